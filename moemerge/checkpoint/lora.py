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
from moemerge.checkpoint.model import Checkpoint, with_rows
from moemerge.checkpoint.moe_names import LAYER, count_of, names_of
from moemerge.checkpoint.not_a_model import SourceProblem

_PREFIX = "base_model.model."
_MERGE_FIRST = "merge it into its base with PEFT's merge_and_unload and name the result"
_CHANGES = "changes {!r}, which the model does not have"
_TRAINED_ON = "name the model that the adapter was trained on"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """scale * up @ down, with `down` (r, in) and `up` (out, r) named in the adapter.

    Of an `up` (out, r * every) that experts share, the columns `first`, `first + every` ...
    """

    down: str
    up: str
    scale: float
    every: int = 1
    first: int = 0


@dataclass(frozen=True)
class Adapter:
    """What an adapter does, by the names of its model's tensors.

    Of one trained on fused tensors each part has a delta: all of `down`, and its rows of `up`; of
    one trained on stacked experts (PEFT's `target_parameters`), its rows of `down` too.
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
                up, wrapped = _partner(name), _wrapped(config, found[1])
                if wrapped and not wrapped.endswith(".weight"):
                    deltas |= _stacked(checkpoint, model, wrapped, name, up)
                    continue
                target = _add(found[1], name)
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
                    _TRAINED_ON,
                )
            replacements |= _parts(model, target, name)
    if not deltas and not replacements:
        raise SourceProblem("holds no LoRA weights", "name another adapter")
    rows = [one for delta in deltas.values() for one in (delta.down, delta.up)]
    rows += replacements.values()
    return Adapter(with_rows(checkpoint, rows), deltas, replacements)


def _wrapped(config: dict[str, Any], module: str) -> str | None:
    """The parameter that PEFT's wrapper at `module` is for; of several the first is innermost."""
    path = module
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    depth = (len(module) - len(path)) // len(".base_layer")
    targets = [one for one in config.get("target_parameters") or () if isinstance(one, str)]
    names = [f"{path}.{leaf}" for leaf in ("gate_up_proj", "down_proj", "weight")]
    own = [name for name in names if any(f".{name}".endswith(f".{one}") for one in targets)]
    return own[-1 - depth] if depth < len(own) else None


def _stacked(
    checkpoint: Checkpoint, model: Checkpoint, parameter: str, down: str, up: str
) -> dict[str, Delta]:
    """What an adapter of stacked experts does to each of them.

    PEFT reshapes A (E * r, in) to (E, r, in), but B (out, r * E) to (out, r, E).
    """
    found = LAYER.fullmatch(parameter)
    names = names_of(model.config.get("model_type"), model.tensors)
    own: dict[tuple[int, int], str] = {}
    if found and names and found[3] in (*names.uppers, *names.lowers):
        count = count_of(model.config)
        each = (0, 1) if found[3] in names.uppers else (2,)
        for expert in range(count if isinstance(count, int) else 0):
            own |= {(expert, n): found[1] + names.matrix(expert, w) for n, w in enumerate(each)}
    if not own or not {*own.values()} <= model.tensors.keys():
        raise SourceProblem(_CHANGES.format(parameter), _TRAINED_ON)
    experts, parts = len({expert for expert, _ in own}), len({part for _, part in own})
    high, wide = model.tensors[own[0, 0]].shape
    rank = _rank(checkpoint, down) // experts
    shapes = (experts * rank, wide), (high * parts, experts * rank)
    _check_shapes(checkpoint, parameter, down, up, shapes, (experts, high * parts, wide))
    scale = _scale(checkpoint.config, parameter, parameter, rank)
    return {
        name: Delta(
            row_name(down, range(expert * rank, (expert + 1) * rank)),
            row_name(up, range(part * high, (part + 1) * high)),
            scale,
            experts,
            expert,
        )
        for (expert, part), name in own.items()
    }


def _is_tied(config: dict[str, Any], model: Checkpoint) -> bool:
    """Whether the head that PEFT saves is the embeddings once more."""
    return bool(config.get("ensure_weight_tying") and model.config.get("tie_word_embeddings"))


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
    w = _shape(model, target)
    if w is None:
        raise SourceProblem(_CHANGES.format(target), _TRAINED_ON)
    rank = _rank(checkpoint, down)
    _check_shapes(checkpoint, target, down, up, ((rank, *w[1:]), (w[0], rank)), w)
    return Delta(down, up, _scale(checkpoint.config, target, module, rank))


def _rank(checkpoint: Checkpoint, down: str) -> int:
    return (*checkpoint.tensors[down].shape, 0)[0]


def _check_shapes(
    checkpoint: Checkpoint,
    target: str,
    down: str,
    up: str,
    wanted: tuple[tuple[int, ...], tuple[int, ...]],
    whole: tuple[int, ...],
) -> None:
    if up not in checkpoint.tensors:
        raise SourceProblem(f"holds {down!r} but not {up!r}", "save the adapter again")
    have = checkpoint.tensors[down].shape, checkpoint.tensors[up].shape
    if have != wanted or any(len(shape) != 2 for shape in have):
        a, b = map(list, have)
        what = f"{target}: its matrices are {a} and {b}, the model's {list(whole)}"
        raise SourceProblem(what, _TRAINED_ON)


def _scale(config: dict[str, Any], target: str, module: str, found: int) -> float:
    """What B A is multiplied by, for matrices of rank `found`."""
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", found))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", found))
    if rank != found or not rank:
        raise SourceProblem(
            f"{target}: adapter_config.json says rank {rank}, the weights are of rank {found}",
            "save the adapter again",
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise SourceProblem(f"lora_alpha is {alpha!r}", "repair adapter_config.json")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


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
