"""adapter_config.json as PEFT reads it: scales, targets, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from moemerge.checkpoint.not_a_model import SourceProblem

MERGE_FIRST = "merge it into its base with PEFT's merge_and_unload and name the result"
_REPAIR = "repair adapter_config.json"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

REFUSED = {
    "layer_replication": "stacks the model's layers anew",
    "use_dora": "is a DoRA adapter",
    "use_qalora": "is a QALoRA adapter",
    "alora_invocation_tokens": "is switched on by tokens (aLoRA)",
    "monteclora_config": "is a MonteCLoRA adapter",
    "kasa_config": "is a KaSA adapter, which changes its base's own weights",
    "use_bdlora": "is block-diagonal (BD-LoRA)",
    "arrow_config": "routes among adapters (Arrow)",
    "megatron_config": "was trained with Megatron's layers",
}
"""Fields that make an adapter more than W + scale * B A, if they are set."""

READ = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "lora_bias",
    "trainable_token_indices", "ensure_weight_tying",
))  # fmt: skip
"""Fields that decide what the adapter does, or that its own tensors show."""

NO_EFFECT = frozenset((
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
    "runtime_config",
))  # fmt: skip
"""Fields for training only, or that PEFT ignores for a linear layer."""


def check(config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than plain LoRA.

    Raises:
        SourceProblem: the config says so.
    """
    if str(config.get("peft_type")).upper() != "LORA":
        raise SourceProblem(f"is a {config.get('peft_type')} adapter, not LoRA", MERGE_FIRST)
    for key, what in REFUSED.items():
        if config.get(key) not in (None, False):
            raise SourceProblem(f"{what} ({key})", MERGE_FIRST)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        what = f"changed its base's own weights (init_lora_weights: {start})"
        raise SourceProblem(what, MERGE_FIRST)


def unknown(config: Mapping[str, Any]) -> list[str]:
    """Fields that are set, and that neither PEFT 0.21 nor this program knows."""
    known = {*REFUSED, *READ, *NO_EFFECT}
    return sorted(key for key in config.keys() - known if config[key] not in (None, False, [], {}))


def targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT puts a LoRA on a module of a dense model.

    Raises:
        SourceProblem: the config does not say.
    """
    excluded, wanted = config.get("exclude_modules"), config.get("target_modules")
    if isinstance(excluded, str) and _matches(re.fullmatch, excluded, module):
        return False
    if _ends_as(module, _names(excluded)) or is_saved_whole(config, module):
        return False
    if wanted is None:
        if config.get("target_parameters"):
            return False
        raise SourceProblem("has no target_modules in adapter_config.json", _REPAIR)
    if isinstance(wanted, str):
        if wanted.lower() == "all-linear":
            return not module.endswith(("lm_head", "embed_tokens"))
        return _matches(re.fullmatch, wanted, module)
    if module in _names(wanted):
        return True
    return _ends_as(module, _names(wanted)) and _is_in_layers(config, module)


def is_saved_whole(config: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names the module, or one around it."""
    return any(
        _matches(re.match, rf"(^|.*\.){name}($|\..*)", module)
        for name in _names(config.get("modules_to_save"))
    )


def scale(config: Mapping[str, Any], target: str, key: str, found: int) -> float:
    """The factor of B A, for matrices of LoRA rank `found`.

    `key` is the path of the module, or of the parameter, that PEFT compares with the patterns.

    Raises:
        SourceProblem: the LoRA rank differs, or alpha is not a number.
    """
    rank = _by_pattern(config, "rank_pattern", key, config.get("r", 8))
    alpha = _by_pattern(config, "alpha_pattern", key, config.get("lora_alpha", 8))
    if rank != found or not rank:
        raise SourceProblem(
            f"{target}: adapter_config.json says rank {rank}, the weights are of rank {found} "
            "(r, rank_pattern)",
            "save the adapter again",
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise SourceProblem(f"lora_alpha is {alpha!r}", _REPAIR)
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(config: Mapping[str, Any], field: str, key: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the path."""
    patterns = config.get(field)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if _matches(re.match, rf"(.*\.)?({pattern})$", key):
            return value
    return default


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether `layers_to_transform`, if it is given, names the layer of the module."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        lead = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if found := _match(re.match, rf"{lead}{pattern}\.(?P<at>\d+)\.", module):
            return int(found["at"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _names(value: object) -> Iterator[str]:
    yield from (one for one in (value if isinstance(value, list) else ()) if isinstance(one, str))


def _ends_as(module: str, names: Iterator[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def _matches(how: Any, pattern: str, text: str) -> bool:
    return _match(how, pattern, text) is not None


def _match(how: Any, pattern: str, text: str) -> re.Match[str] | None:
    try:
        found: re.Match[str] | None = how(pattern, text)
    except re.error as error:
        what = f"its pattern {pattern!r} is no regular expression"
        raise SourceProblem(what, _REPAIR) from error
    return found
