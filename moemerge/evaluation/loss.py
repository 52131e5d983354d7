"""A causal model reads passages: the loss of each token, and the router logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.architectures import ROUTERS
from moemerge.dense import Streamed
from moemerge.errors import InputError, Problem, RunError
from moemerge.reporting import Reporter
from moemerge.text import PIECE_TOKENS, Encoder, Prompt, batching, texts_of

_ROUTERS = (".gate", ".router", *ROUTERS)


Passages = dict[str, tuple[Prompt, ...]]
"""Texts by their names."""


def passages_of(
    name: str,
    path: str | Path,
    encoder: Encoder,
    longest: int = PIECE_TOKENS,
    most: int | None = None,
) -> tuple[Prompt, ...]:
    """The first `most` tokens of a text file, in pieces of at most `longest` tokens; see
    `Encoder.pieces`.

    Raises:
        InputError: it cannot be read, or holds no text.
    """
    try:
        pieces = encoder.pieces(texts_of(Path(path)), longest, most)
    except ValueError as error:
        raise InputError([Problem(f"--text {name}", str(error), "name a text or jsonl")]) from error
    pieces = tuple(piece for piece in pieces if len(piece.ids) > max(piece.own, 1))
    if not pieces:
        raise InputError([Problem(f"--text {name}", f"{path} holds no text", "name one that does")])
    return pieces


def check_tokens(texts: Passages, known: int) -> None:
    """Refuse texts with tokens for which the mixture has no embedding."""
    fix = "use the tokenizer that the model came with"
    last = {name: max(max(p.ids) for p in passages) for name, passages in texts.items()}
    if problems := [
        Problem(f"--text {name}", f"has token {token}, the model embeds {known}", fix)
        for name, token in last.items()
        if token >= known
    ]:
        raise InputError(problems)


def set_experts_per_token(model: Any, count: int) -> bool:
    """Make every router choose `count` experts; returns whether the model has such routers."""
    found = [
        module for module in model.modules() if isinstance(getattr(module, "top_k", None), int)
    ]
    for module in found:
        module.top_k = count
    return bool(found)


def mean_losses(
    model: Any, texts: Mapping[str, Sequence[Prompt]], reporter: Reporter, what: str
) -> dict[str, float]:
    """The mean loss (nats) of each text's own tokens, by the names of the texts.

    If a model's layers are streamed, all texts go through one layer before the next, so that each
    weight is read once.

    Raises:
        RunError: the model gives NaN or Inf.
    """
    layers = [one.streamed for one in model.modules() if hasattr(one, "streamed")]
    if not layers:
        return {
            name: mean_loss(model, passages, reporter, f"{name}: {what}")
            for name, passages in texts.items()
        }
    batches = [(name, batch) for name, passages in texts.items() for batch in _batches(passages)]
    totals = dict.fromkeys(texts, 0.0)
    all_logits = _by_layer(model, layers, [batch for _, batch in batches], reporter, what)
    for (name, batch), logits in zip(batches, all_logits, strict=True):
        totals[name] += sum(loss for _, loss in batch.losses(logits))
    return {name: _mean(totals[name], texts[name], f"{name}: {what}") for name in texts}


def mean_loss(
    model: Any,
    passages: Sequence[Prompt],
    reporter: Reporter,
    what: str,
    routed: list[Any] | None = None,
) -> float:
    """The mean loss (nats) of the passages' own tokens; router logits are added to `routed`.

    Each passage gets (L, T, E), in the order of the passages.

    Raises:
        RunError: the model gives NaN or Inf, or has no router that moemerge knows.
    """
    import numpy as np
    import torch

    logits: dict[int, Any] = {}
    total = 0.0
    with reporter.progress(what, len(passages), "text") as advance, torch.inference_mode():
        for batch in _batches(passages):
            seen: list[Any] = []
            with router_logits(model, seen if routed is not None else None):
                done = model(**batch.inputs(model))
            if routed is not None and not seen:
                raise RunError(f"{what}: the model has no router that moemerge knows")
            for row, (n, loss) in enumerate(batch.losses(done.logits)):
                total += loss
                if routed is not None:
                    own = slice(passages[n].own, len(passages[n].ids))
                    layers = [one.reshape(*batch.ids.shape, -1)[row, own] for one in seen]
                    logits[n] = np.stack([one.numpy() for one in layers])
            advance(len(batch.passages))
    mean = _mean(total, passages, what)
    if routed is not None:
        routed += [logits[n] for n in range(len(passages))]
    return mean


def counted(passages: Sequence[Prompt]) -> int:
    """The number of tokens in the mean loss of the passages."""
    return sum(len(prompt.ids) - max(prompt.own, 1) for prompt in passages)


def _mean(total: float, passages: Sequence[Prompt], what: str) -> float:
    return batching.check_loss(total / counted(passages), f"{what}: the loss")


@dataclass(frozen=True)
class _Batch:
    """Passages of similar length: their numbers, and their ids (B, T), padded on the right."""

    passages: dict[int, Prompt]
    ids: Any

    def inputs(self, model: Any) -> dict[str, Any]:
        """What the model is called with."""
        mask = batching.mask(len(prompt.ids) for prompt in self.passages.values())
        device = model.device if model.device.type != "meta" else "cpu"
        return {"input_ids": self.ids.to(device), "attention_mask": mask.to(device)}

    def losses(self, logits: Any) -> Iterator[tuple[int, float]]:
        """Each passage's number and the sum of its own tokens' losses, by logits (B, T, V)."""
        losses = batching.losses(batching.log_probabilities(logits).cpu(), self.ids)
        for row, (n, prompt) in enumerate(self.passages.items()):
            yield n, float(losses[row, max(prompt.own, 1) - 1 : len(prompt.ids) - 1].sum())


def _batches(passages: Sequence[Prompt]) -> Iterator[_Batch]:
    """The longest first."""
    for chosen in batching.batches([len(prompt.ids) for prompt in passages]):
        batch = {n: passages[n] for n in chosen}
        yield _Batch(batch, batching.padded(prompt.ids for prompt in batch.values()))


def _by_layer(
    model: Any,
    layers: Sequence[Streamed],
    batches: Sequence[_Batch],
    reporter: Reporter,
    what: str,
) -> Iterator[Any]:
    """Each batch's logits (B, T, V); every layer runs on all batches while it has its weights.

    What a layer is called with (masks, positions) is what transformers' own model calls it with:
    it runs twice for each batch, with nothing in the layers' place before, and their result after.
    """
    import torch

    states: list[Any] = []  # the residual stream, (B, T, D)
    calls: list[list[tuple[Any, Any]]] = []
    in_tuple: list[bool] = []  # as some layers of transformers 4 answer

    def answer(state: Any) -> Any:
        return (state,) if in_tuple[0] else state

    def note(state: Any, *args: Any, **named: Any) -> Any:
        if not in_tuple:
            with layers[0].filled() as forward:
                in_tuple.append(isinstance(forward(state, *args, **named), tuple))
        calls[-1].append((args, named))
        states[len(calls) - 1 :] = [state]
        return answer(state)

    total = len(layers) * len(batches)
    with reporter.progress(what, total, "layer") as advance, torch.inference_mode():
        for batch in batches:
            calls.append([])
            with ExitStack() as held:
                for layer in layers:
                    held.enter_context(layer.replaced(note))
                model.model(**batch.inputs(model), use_cache=False)
        for number, layer in enumerate(layers):
            with layer.filled() as forward:
                for at, (args, named) in enumerate(call[number] for call in calls):
                    made = forward(states[at], *args, **named)
                    states[at] = made[0] if in_tuple[0] else made
                    advance(1)
        for at, batch in enumerate(batches):
            with ExitStack() as held:
                for layer in layers:
                    held.enter_context(layer.replaced(lambda *_, at=at, **__: answer(states[at])))
                yield model(**batch.inputs(model)).logits


@contextmanager
def router_logits(model: Any, seen: list[Any] | None) -> Iterator[None]:
    """Note every router's logits, (B * T, E), layer by layer: what it is given, times its rows."""
    if seen is None:
        yield
        return

    def note(module: Any, args: tuple[Any, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1]).float()
        seen.append((inputs @ module.weight.float().T).cpu())

    routers = [
        module
        for name, module in model.named_modules()
        if ".layers." in name
        and name.endswith(_ROUTERS)
        and getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
    ]
    hooks = [module.register_forward_pre_hook(note) for module in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
