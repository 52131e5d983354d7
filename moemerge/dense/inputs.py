"""The routers' inputs at each layer, while a model with the mixture's body reads texts.

A router's input is the output of the layer's post-attention norm. All texts go through one layer
before the next layer, so that each weight is read once and memory for one layer is enough. Neither
the head nor logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor
from moemerge.dense.body import Body
from moemerge.dense.run import compute_dtype, load_tensors, one_layer, pick_device, quantise
from moemerge.errors import ReadError, RunError
from moemerge.families import EMBEDDING, LAYER
from moemerge.options import RunOptions
from moemerge.plan import Recipe, Sources, load_rows, recipe
from moemerge.reporting import Reporter
from moemerge.text import Prompt, batching

if TYPE_CHECKING:
    import numpy as np
    import torch

    Matrix = np.ndarray[Any, np.dtype[np.float32]]
    Weights = dict[str, torch.Tensor]

_MLP = "mlp."


@dataclass(frozen=True)
class Passage:
    """A text's tokens, and the donor of the MLPs that it goes through; None is the body itself."""

    prompt: Prompt
    mlps: Donor | None = None


def router_inputs(
    body: Body,
    sources: Sources,
    passages: Sequence[Passage],
    options: RunOptions,
    reporter: Reporter,
) -> Iterator[list[Matrix]]:
    """Yield for each layer the router's inputs at each passage's own tokens: a list of (T, D)."""
    for seen in layer_inputs(("mlp",), body, sources, passages, options, reporter):
        yield seen["mlp"]


def layer_inputs(
    modules: Sequence[str],
    body: Body,
    sources: Sources,
    passages: Sequence[Passage],
    options: RunOptions,
    reporter: Reporter,
) -> Iterator[dict[str, list[Matrix]]]:
    """Yield for each layer the inputs of each of its `modules`: a list by module name.

    Each list has one matrix per passage, with the rows of the passage's own tokens. The input of
    `mlp` is the router's input (T, D). The input of `mlp.down_proj` is the activations (T, F).

    With `options.lazy` the weights of one layer are in memory at a time. Otherwise there are two
    layers, because the next one is read while one computes. The values are the same, bit for bit.

    Raises:
        RunError: a layer gives NaN or Inf; names the model and the layer.
        ReadError: an embedding row of the texts' tokens holds NaN or Inf.
    """
    import numpy as np
    import torch

    device = pick_device(options.device)
    config = body.base.model.config
    dtype = compute_dtype(body.recipe(EMBEDDING), sources, device)
    donors = list({id(passage.mlps): passage.mlps for passage in passages}.values())
    batches = [(donor, batch) for donor in donors for batch in _batches(passages, donor)]
    states = _embed(body, sources, passages, [batch for _, batch in batches], dtype, device)
    layers = range(config["num_hidden_layers"])
    names = one_layer(config).layers[0].state_dict().keys()
    mlp = [name for name in names if name.startswith(_MLP)]
    rest = [name for name in names if not name.startswith(_MLP)]
    # Memory of finished layers, used again for later layers.
    memory: list[Weights] = [{}] if options.lazy else [{}, {}]
    several = len(donors) > 1  # then each donor's MLPs are read in turn

    def load(layer: int) -> Weights:
        names_now = rest if several else [*rest, *mlp]
        recipe_of = _through(body, donors[0])
        again = memory[layer % len(memory)]
        return load_tensors(names_now, LAYER.format(layer=layer), recipe_of, sources, dtype, again)

    total = len(layers) * sum(len(batch) for _, batch in batches)
    with (
        torch.inference_mode(),
        reporter.progress("texts through the layers", total, "text") as advance,
    ):
        for number, weights in enumerate(_in_turn(load, layers, options.lazy)):
            seen: dict[str, dict[int, Matrix]] = {module: {} for module in modules}
            of_mlp: Weights = {}
            for donor in donors:
                if several:
                    prefix, recipe_of = LAYER.format(layer=number), _through(body, donor)
                    weights |= load_tensors(mlp, prefix, recipe_of, sources, dtype, of_mlp)
                layer = _ready_layer(config, weights, device, options)
                for (whose, batch), state in zip(batches, states, strict=True):
                    if whose is donor:
                        _run(layer, passages, batch, state, seen)
                        if not state.isfinite().all():
                            given = seen.get("mlp", {})
                            own = all(np.isfinite(given[n]).all() for n in batch if n in given)
                            raise _overflow(donor if donor and own else body.base, number)
                        advance(len(batch))
                del layer  # free it before the next one is read
            weights.clear()
            yield {
                module: [found[at] for at in range(len(passages))] for module, found in seen.items()
            }


def embed(body: Body, sources: Sources, ids: list[int]) -> dict[int, Any]:
    """The embedding (D) of each token id; only these rows are read.

    Raises:
        ReadError: a row holds NaN or Inf, or the source changed.
    """
    import numpy as np

    made = body.recipe(EMBEDDING)
    rows = load_rows(made, ids, sources)
    for token, row in zip(ids, rows, strict=True):
        if not np.isfinite(row).all():
            read = next(recipe.reads(made))
            what = f"{read.source}: {read.tensor}, row {token}, holds NaN or Inf"
            raise ReadError(f"{what}; use another model, or prompts without that token")
    return dict(zip(ids, rows, strict=True))


def _overflow(donor: Donor, layer: int) -> RunError:
    return RunError(
        f"{donor.name} ({donor.model.reference.text}): layer {layer} gives NaN or Inf on "
        "these texts; use another dtype of it, other prompts, or --device cpu"
    )


def _through(body: Body, donor: Donor | None) -> Callable[[str], Recipe]:
    """The recipes of the body's dense model with a donor's MLPs."""

    def recipe_of(tensor: str) -> Recipe:
        of_mlp = f".{_MLP}" in tensor
        return recipe.of_donor(donor, tensor) if donor and of_mlp else body.recipe(tensor)

    return recipe_of


def _batches(passages: Sequence[Passage], donor: Donor | None) -> list[list[int]]:
    """The numbers of the passages that pass the donor's MLPs, in batches."""
    own = [number for number, passage in enumerate(passages) if passage.mlps is donor]
    lengths = [len(passages[number].prompt.ids) for number in own]
    return [[own[at] for at in batch] for batch in batching.batches(lengths)]


def _embed(
    body: Body,
    sources: Sources,
    passages: Sequence[Passage],
    batches: list[list[int]],
    dtype: torch.dtype,
    device: str,
) -> list[torch.Tensor]:
    """The embeddings before the first layer: (B, T, D) per batch, padded on the right."""
    import torch

    width = body.base.model.config["hidden_size"]
    rows = embed(body, sources, sorted({i for passage in passages for i in passage.prompt.ids}))
    states = []
    for batch in batches:
        length = len(passages[batch[0]].prompt.ids)
        state = torch.zeros(len(batch), length, width, dtype=dtype)
        for row, number in enumerate(batch):
            for at, token in enumerate(passages[number].prompt.ids):
                state[row, at] = torch.from_numpy(rows[token])
        states.append(state.to(device))
    return states


def _in_turn(load: Callable[[int], Weights], layers: range, lazy: bool) -> Iterator[Weights]:
    """Yield each layer's weights in order; unless `lazy`, the next layer is read meanwhile."""
    if lazy:
        yield from map(load, layers)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, layers[0])
        for layer in layers:
            weights = ahead.result()
            if layer + 1 in layers:
                ahead = pool.submit(load, layer + 1)
            yield weights


def _ready_layer(config: dict[str, Any], weights: Weights, device: str, options: RunOptions) -> Any:
    """A one-layer body with these weights, quantised if asked, on the device."""
    body = one_layer(config)
    body.layers[0].load_state_dict(weights, assign=True)
    if options.load_in_4bit or options.load_in_8bit:
        quantise(body.layers[0], options.load_in_4bit)
    return body.to(device)


def _run(
    body: Any,
    passages: Sequence[Passage],
    batch: list[int],
    state: torch.Tensor,
    seen: dict[str, dict[int, Matrix]],
) -> None:
    """Run a batch through the layer, in place; add the inputs of `seen`'s modules to `seen`."""
    mask = batching.mask(len(passages[number].prompt.ids) for number in batch).to(state.device)

    def note(found: dict[int, Matrix], module: object, args: tuple[torch.Tensor, ...]) -> None:
        inputs = args[0].float().cpu().numpy()
        for row, number in enumerate(batch):
            prompt = passages[number].prompt
            found[number] = inputs[row, prompt.own : len(prompt.ids)].copy()

    hooks = [
        body.layers[0].get_submodule(module).register_forward_pre_hook(partial(note, found))
        for module, found in seen.items()
    ]
    try:
        state.copy_(
            body(inputs_embeds=state, attention_mask=mask, use_cache=False).last_hidden_state
        )
    finally:
        for hook in hooks:
            hook.remove()
