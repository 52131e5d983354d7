"""dots1: DeepSeek-V3's routing in the body of a Qwen3; see glm4_moe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moemerge.architectures.limits import (
    Holds,
    beyond_window,
    lonely,
    long_factors,
    no_loading,
    one_alone,
    one_kind,
)
from moemerge.architectures.reading import windows_where
from moemerge.architectures.slots import Mixture, Slot, whole
from moemerge.architectures.types import glm4_moe

HOLDS = Holds(qk_norms=("head",), qkv_bias=True, o_bias=True)
SHARED = "always"
SCORES = "sigmoid"
READERS = ("transformers 4.57", "transformers 5", "mlx-lm", "vLLM")
ALIASES = ()
TRAINING = glm4_moe.TRAINING

Settings = glm4_moe.Settings


def _windows(config: Mapping[str, Any]) -> Any:
    """Windows in layers from `max_window_layers` on, unless `layer_types` names each layer's
    kind."""
    types, first = config.get("layer_types"), config.get("max_window_layers")
    first = first if type(first) is int else 0
    return windows_where(config, lambda layer: layer >= first) if types is None else types


READING = replace(glm4_moe.READING, windows=_windows, turned=1.0)


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """One kind of attention in all layers, and two experts or more."""
    yield from lonely(mixture, "dots1")
    yield from one_kind(config)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026; llama.cpp refuses grouped queries."""
    yield from no_loading(config, "dots1", "mlx-lm")
    yield from long_factors(config, "mlx-lm")
    for _ in long_factors(config, "vLLM"):
        what = "takes longrope's long factors for short sequences too in a batch with a long one"
        yield "vLLM", f"vLLM {what}: expect other text from it"
    yield from one_alone(mixture)
    yield from beyond_window(config, "mlx-lm")


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The slots of a glm4_moe."""
    return whole(config, lambda layer: glm4_moe.experts(config, mixture, layer))


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """Every layer is a mixture; windows are in all layers or in none."""
    window, layers = config["sliding_window"], config["num_hidden_layers"]
    return {
        "architectures": ["Dots1ForCausalLM"],
        "model_type": "dots1",
        **glm4_moe.routing(config, mixture, dtype),
        "layer_types": ["sliding_attention" if window else "full_attention"] * layers,
        "max_window_layers": 0 if window else layers,
    }
