"""A PEFT LoRA adapter as what it does to each tensor: a low-rank delta or a replacement.

The arithmetic is PEFT's (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W + scale * B @ A, with
scale = alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from moemerge.checkpoint.fused import row_name, rows_of
from moemerge.checkpoint.model import Checkpoint, SourceProblem, with_rows

_PREFIX = "base_model.model."
_MERGE_FIRST = "merge it into its base with PEFT's merge_and_unload and name the result"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """scale * up @ down, with `down` (r, in) and `up` (out, r) named in the adapter."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter does, by the names of its model's tensors.

    Of one trained on fused tensors each part has a delta: all of `down`, and its rows of `up`.
    """

    checkpoint: Checkpoint
    deltas: dict[str, Delta]
    replacements: dict[str, str]


def open_adapter(checkpoint: Checkpoint, model: Checkpoint) -> Adapter:
    """Read an opened adapter for the model under it.

    Raises:
        SourceProblem: it is no plain LoRA adapter, or it does not fit the model.
    """
    config = checkpoint.config
    _refuse_what_is_not_plain(config)
    deltas: dict[str, Delta] = {}
    replacements: dict[str, str] = {}
    for name in [name for name in checkpoint.tensors if name not in checkpoint.views]:
        module = name.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.\w+)?\.weight", module)
        if found:
            if found[2] == "A":
                target, up = _add(found[1], name), _partner(name)
                whole = _delta(checkpoint, model, found[1], target, name, up)
                for part, its_up in _parts(model, target, up).items():
                    deltas[part] = dataclasses.replace(whole, up=its_up)
        elif re.search(r"lora_|\.ranknum|token_adapter|magnitude", module):
            raise SourceProblem(f"holds {name!r}, which is more than plain LoRA", _MERGE_FIRST)
        else:
            target = re.sub(r"\.modules_to_save(\.\w+)?(?=\.\w+$)", "", module)
            if target == "lm_head.weight" and _is_tied(config, model):
                continue
            have = _shape(model, target)
            if have != checkpoint.tensors[name].shape:
                raise SourceProblem(
                    f"replaces {target!r} by {list(checkpoint.tensors[name].shape)}, "
                    f"the model has {'no such tensor' if have is None else list(have)}",
                    "name the model that the adapter was trained on",
                )
            replacements |= _parts(model, target, name)
    if not deltas and not replacements:
        raise SourceProblem("holds no LoRA weights", "name another adapter")
    rows = [*(delta.up for delta in deltas.values()), *replacements.values()]
    return Adapter(with_rows(checkpoint, rows), deltas, replacements)


def _is_tied(config: dict[str, Any], model: Checkpoint) -> bool:
    """Whether the head that PEFT saves is the embeddings once more, and no tensor of the model."""
    return bool(config.get("ensure_weight_tying")) and "lm_head.weight" not in model.tensors


def _shape(model: Checkpoint, target: str) -> tuple[int, ...] | None:
    """The shape of the model's tensor as the adapter was trained on it, fused or not."""
    if target in model.tensors:
        return model.tensors[target].shape
    parts = rows_of(model.views, target)
    if not parts:
        return None
    return (sum(map(len, parts.values())), *model.tensors[next(iter(parts))].shape[1:])


def _parts(model: Checkpoint, target: str, tensor: str) -> dict[str, str]:
    """The model's tensors that the adapter's `tensor` is for, and which rows of it each has."""
    parts = rows_of(model.views, target)
    if target in model.tensors or not parts:
        return {target: tensor}
    return {name: row_name(tensor, rows) for name, rows in parts.items()}


def _refuse_what_is_not_plain(config: dict[str, Any]) -> None:
    if str(config.get("peft_type")).upper() != "LORA":
        raise SourceProblem(f"is a {config.get('peft_type')} adapter, not LoRA", _MERGE_FIRST)
    if config.get("use_dora"):
        raise SourceProblem("is a DoRA adapter", _MERGE_FIRST)
    for key in ("fan_in_fan_out", "lora_bias", "use_qalora", "alora_invocation_tokens"):
        if config.get(key):
            raise SourceProblem(f"uses {key}", _MERGE_FIRST)
    if config.get("bias", "none") != "none":
        raise SourceProblem(f"trained biases (bias: {config['bias']})", _MERGE_FIRST)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise SourceProblem(f"changed its base's own weights ({start})", _MERGE_FIRST)


def _add(module: str, name: str) -> str:
    if module.endswith("embed_tokens"):
        raise SourceProblem(f"holds {name!r}, which is more than plain LoRA", _MERGE_FIRST)
    return f"{module}.weight"


def _partner(name: str) -> str:
    head, _, tail = name.rpartition(".lora_A")
    return f"{head}.lora_B{tail}"


def _delta(
    checkpoint: Checkpoint, model: Checkpoint, module: str, target: str, down: str, up: str
) -> Delta:
    if up not in checkpoint.tensors:
        raise SourceProblem(f"holds {down!r} but not {up!r}", "save the adapter again")
    w = _shape(model, target)
    if w is None:
        raise SourceProblem(
            f"changes {target!r}, which the model does not have",
            "name the model that the adapter was trained on",
        )
    a, b = checkpoint.tensors[down].shape, checkpoint.tensors[up].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != w:
        raise SourceProblem(
            f"{target}: its matrices are {list(a)} and {list(b)}, the model's {list(w)}",
            "name the model that the adapter was trained on",
        )
    config = checkpoint.config
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", a[0]))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", a[0]))
    if rank != a[0] or not rank:
        raise SourceProblem(
            f"{target}: adapter_config.json says rank {rank}, the weights are of rank {a[0]}",
            "save the adapter again",
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise SourceProblem(f"lora_alpha is {alpha!r}", "repair adapter_config.json")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Delta(down, up, alpha / divisor)


def _by_pattern(patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's path, as PEFT does."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise SourceProblem(
                    f"its pattern {pattern!r} is no regular expression", "repair it"
                ) from error
    return default
