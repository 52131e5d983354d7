"""granitemoeshared: a granitemoe with shared experts that are always on, as in DeepSeek-MoE.

Dai et al. 2024, https://arxiv.org/abs/2401.06066. Several shared experts are one wide MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import shared
from moemerge.architectures.limits import drops_biases, long_factors
from moemerge.architectures.slots import Mixture, Slot, joined, whole
from moemerge.architectures.types import granitemoe
from moemerge.families import DOWN, GATE, LAYER, UP

HOLDS = granitemoe.HOLDS
READING = granitemoe.READING
SHARED = "always"
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "llama.cpp", "vLLM")
ALIASES = ()
TRAINING = granitemoe.TRAINING

refusals = granitemoe.refusals


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """A granitemoe's caveats, of its own readers."""
    yield from granitemoe.caveats_of_llama_cpp(config)
    yield from drops_biases(config, "granitemoeshared", "vLLM")
    yield from long_factors(config, "vLLM")


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """A granitemoe's slots, and a shared MLP: input (2S, D) of gate and up, output (D, S)."""

    def mlp(layer: int) -> Iterator[Slot]:
        yield from granitemoe.experts(config, mixture, layer)
        if mixture.shared:
            block = f"{LAYER.format(layer=layer)}shared_mlp."
            parts = [shared("", config, mixture, layer, which) for which in (GATE, UP)]
            yield joined(f"{block}input_linear.weight", parts)
            yield shared(f"{block}output_linear.weight", config, mixture, layer, DOWN)

    return whole(config, mlp, *granitemoe.biases(config))


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """A granitemoe's config, and the width of all shared experts together."""
    return {
        **granitemoe.output_config(config, mixture, dtype),
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        "shared_intermediate_size": mixture.shared * mixture.inner,
    }
