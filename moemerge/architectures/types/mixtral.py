"""mixtral: softmax top-k experts in the body of a Llama or a Mistral.

Routing renormalises the chosen experts' weights (Jiang et al. 2024, https://arxiv.org/abs/2401.04088),
so equal experts give exactly the dense model. Names are the Hub's per-expert ones, which every
reader knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import projection, router
from moemerge.architectures.limits import (
    LLAMA_CPP_ROPE,
    Holds,
    beyond_window,
    common,
    long_factors,
    one_kind,
    other_rope,
)
from moemerge.architectures.reading import Names, Reading, windows_where
from moemerge.architectures.slots import Mixture, Slot, whole
from moemerge.families import DOWN, GATE, LAYER, UP

HOLDS = Holds()
READING = Reading(
    Names(
        expert="block_sparse_moe.experts.",
        matrices=("w1", "w3", "w2"),
        router="block_sparse_moe.gate.weight",
        routers=("mlp.gate.weight",),
    ),
    counts=("num_local_experts",),
    windows=lambda config: windows_where(config, lambda _: True),
)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "llama.cpp", "mlx-lm", "vLLM", "mistral.rs")
ALIASES = ()
TRAINING = {
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0
}  # fmt: skip

_BLOCK = LAYER + "block_sparse_moe."
_MLP = {GATE: "w1", DOWN: "w2", UP: "w3"}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """One kind of attention in all layers."""
    yield from one_kind(config)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        for reader in ("mlx-lm", "mistral.rs"):
            what = f"cannot load it: its Mixtral has no head_dim ({config['head_dim']} here)"
            yield reader, f"{reader} {what}"
    yield from other_rope(config, "mlx-lm")
    yield from other_rope(config, "mistral.rs")
    yield from long_factors(config, "vLLM")
    yield from other_rope(config, "llama.cpp", LLAMA_CPP_ROPE | {"llama3"})
    yield from beyond_window(config, "mlx-lm", "llama.cpp")


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers and experts."""

    def mlp(layer: int) -> Iterator[Slot]:
        block = _BLOCK.format(layer=layer)
        yield router(f"{block}gate.weight", config, mixture)
        for expert in range(mixture.experts):
            for which, name in _MLP.items():
                full = f"{block}experts.{expert}.{name}.weight"
                yield projection(full, config, mixture, layer, expert, which)

    return whole(config, mlp)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's own values under Mixtral's names."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **common(config, mixture, dtype, TRAINING),
        "intermediate_size": mixture.inner,
        "num_local_experts": mixture.experts,
    }
