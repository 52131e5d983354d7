"""A causal model reads passages: what each token cost it, and what its routers saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moemerge.dense import available_memory, pick_device
from moemerge.errors import InputError, Problem, RunError
from moemerge.options import Options
from moemerge.prompts import Prompt
from moemerge.reporting import Reporter, size

BATCH_TOKENS = 2048
"""The most tokens that are read at once, padding included."""

_MOST = 700.0
"""A mean loss from which on no float holds the perplexity."""

_ROUTERS = (".gate", ".router", ".router.layer")


def load_mixture(out: Path, options: Options, reporter: Reporter) -> Any:
    """The mixture in transformers.

    Raises:
        InputError: memory is too small, or transformers cannot load it.
    """
    needed = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    free = available_memory()
    if free is not None and needed > free:
        what = f"needs {size(needed)} of memory to read text, {size(free)} are free"
        fix = "leave --text out to judge the routers by the config's prompts, layer by layer"
        raise InputError([Problem(str(out), what, fix)])
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with reporter.progress("loading the mixture", 1, "model"):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        except Exception as error:  # it lets through what any of many libraries raises
            what = f"transformers cannot load it ({_first_line(error)})"
            fix = "name one that it loads; `moemerge verify` checks one that moemerge made"
            raise InputError([Problem(str(out), what, fix)]) from error
    if model.dtype == torch.float16:
        model = model.float()
    return model.eval().to(pick_device(options.device))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def set_experts_per_token(model: Any, count: int) -> bool:
    """Make every router choose `count` experts; whether the model has such routers."""
    found = [
        module for module in model.modules() if isinstance(getattr(module, "top_k", None), int)
    ]
    for module in found:
        module.top_k = count
    return bool(found)


def mean_loss(
    model: Any,
    passages: Sequence[Prompt],
    reporter: Reporter,
    what: str,
    routed: list[Any] | None = None,
) -> float:
    """The mean loss (nats) of the passages' own tokens; their router logits into `routed`.

    Each passage gets (L, T, E), in the order of the passages.

    Raises:
        RunError: the model gives no number, or has no router where one is known.
    """
    import numpy as np
    import torch

    order = sorted(range(len(passages)), key=lambda n: -len(passages[n].ids))
    logits: dict[int, Any] = {}
    total, tokens, at = 0.0, 0, 0
    with reporter.progress(what, len(passages), "text") as advance, torch.inference_mode():
        while at < len(order):
            width = len(passages[order[at]].ids)
            batch = order[at : at + max(1, BATCH_TOKENS // width)]
            at += len(batch)
            rows = [list(passages[n].ids) for n in batch]
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            seen: list[Any] = []
            with _router_logits(model, seen if routed is not None else None):
                device = model.device if model.device.type != "meta" else "cpu"
                done = model(input_ids=ids.to(device), attention_mask=mask.to(device))
            if routed is not None and not seen:
                raise RunError(f"{what}: the model has no router that moemerge knows")
            scores = done.logits[:, :-1].float().log_softmax(-1).cpu()
            losses = -scores.gather(2, ids[:, 1:, None])[..., 0]
            for row, n in enumerate(batch):
                prompt = passages[n]
                own = slice(max(prompt.own, 1) - 1, len(prompt.ids) - 1)
                total += float(losses[row, own].sum())
                tokens += own.stop - own.start
                if routed is not None:
                    layers = [one.reshape(len(batch), width, -1)[row] for one in seen]
                    layers = [one[prompt.own : len(prompt.ids)].numpy() for one in layers]
                    logits[n] = np.stack(layers)
            advance(len(batch))
    if not total / tokens < _MOST:
        raise RunError(f"{what}: the loss came out as {total / tokens:g}; the model is broken")
    if routed is not None:
        routed += [logits[n] for n in range(len(passages))]
    return total / tokens


@contextmanager
def _router_logits(model: Any, seen: list[Any] | None) -> Iterator[None]:
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
