"""How texts and pictures enter the first layer: embeddings, masks, and what a model sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor
from moemerge.dense.body import Body
from moemerge.dense.calls import Calls, calls_of
from moemerge.dense.run import family_of, load_tensors
from moemerge.errors import ReadError
from moemerge.families import EMBEDDING
from moemerge.plan import Read, Recipe, Sources, load_rows, recipe
from moemerge.text import Prompt, batching

if TYPE_CHECKING:
    import torch

_LOOKED_UP = "model.embed_tokens"
"""What the names of tensors with a row for each token begin with."""


@dataclass(frozen=True)
class Passage:
    """A text's tokens, and the donor of the MLPs that it goes through; None is the body itself."""

    prompt: Prompt
    mlps: Donor | None = None


def entered(
    outer: Any,
    model: Any,
    body: Body,
    sources: Sources,
    passages: Sequence[Passage],
    batches: list[list[int]],
    dtype: torch.dtype,
    device: str,
) -> list[Calls]:
    """How each batch, padded on the right, enters the layers of `model`.

    Of the embeddings, only the rows of the texts' tokens are read. `outer` is the model that sees,
    of which `model` is the language part; without pictures, it is `model` itself.
    """
    import torch

    config = body.base.model.config
    record = family_of(config)
    ids = sorted({one for passage in passages for one in passage.prompt.ids})
    if outer is not model:  # which may embed this token in place of a picture's
        pad = config.get("pad_token_id") or 0
        ids = sorted({*ids, pad})
        outer.config.get_text_config().pad_token_id = pad
    places = torch.zeros(max(ids) + 1, dtype=torch.long, device=device)
    places[ids] = torch.arange(len(ids), device=device)
    beside = [EMBEDDING, *record.top(config)]
    looked_up = [name for name in beside if name.startswith(_LOOKED_UP)]
    whole = [name for name in beside if name not in looked_up]
    weights = load_tensors(whole, "", body.recipe, sources, dtype, record)
    for name in looked_up:
        rows = embed(body, sources, ids, name)
        weights[name] = torch.stack([torch.from_numpy(rows[one]) for one in ids]).to(dtype)
    for name, weight in weights.items():
        own = record.name_in_class(name).removeprefix("model.")
        module, _, leaf = own.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, leaf, torch.nn.Parameter(weight.to(device), requires_grad=False))
        if name in looked_up:
            owner.forward = partial(_look_up, owner.forward, places)
    if outer is not model:
        _open_eyes(outer, model, body, sources, dtype, device)
    found = []
    with torch.inference_mode():
        for batch in batches:
            prompts = [passages[number].prompt for number in batch]
            mask = batching.mask(len(prompt.ids) for prompt in prompts).to(device)
            tokens = batching.padded((prompt.ids for prompt in prompts), ids[0]).to(device)
            seen = prompts[0].seen.given if prompts[0].seen else {}
            given = {
                name: value.to(device, dtype if value.is_floating_point() else None)
                for name, value in seen.items()
            }
            start = outer if given else model
            found.append(
                calls_of(start, model.layers, input_ids=tokens, attention_mask=mask, **given)
            )
    return found


def embed(body: Body, sources: Sources, ids: list[int], tensor: str = EMBEDDING) -> dict[int, Any]:
    """The row of each token id in the embeddings (D), or in another `tensor` with a row for each
    token; only these rows are read.

    Raises:
        ReadError: a row holds NaN or Inf, or the source changed.
    """
    import numpy as np

    made = body.recipe(tensor)
    rows = load_rows(made, ids, sources)
    for token, row in zip(ids, rows, strict=True):
        if not np.isfinite(row).all():
            read = next(recipe.reads(made))
            what = f"{read.source}: {read.tensor}, row {token}, holds NaN or Inf"
            raise ReadError(f"{what}; use another model, or prompts without that token")
    return dict(zip(ids, rows, strict=True))


def _look_up(forward: Callable[..., Any], places: torch.Tensor, ids: torch.Tensor) -> Any:
    """An embedding's forward, whose weight has only the rows that `places` names."""
    return forward(places[ids])


def _open_eyes(
    outer: Any, model: Any, body: Body, sources: Sources, dtype: torch.dtype, device: str
) -> None:
    """Give the parts of `outer` beside its language part `model` their weights."""
    base = body.base.model.reference.text
    for part, module in list(outer.named_children()):
        if module is model:
            continue
        if hasattr(module, "config"):  # built again: no file holds some of its buffers
            module = type(module)._from_config(module.config)
            setattr(outer, part, module)
        names = list(module.state_dict())

        def recipe_of(name: str, part: str = part) -> Recipe:
            return Read(base, f"model.{part}.{name}")

        made = load_tensors(names, "", recipe_of, sources, dtype, family_of(body.base.model.config))
        module.load_state_dict(made, assign=True)
        module.to(device).eval()
