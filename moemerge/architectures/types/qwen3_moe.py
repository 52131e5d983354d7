"""qwen3_moe: softmax top-k experts in the body of a Qwen3, with its norms on queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moemerge.architectures.experts import routed
from moemerge.architectures.limits import (
    LLAMA_CPP_ROPE,
    Holds,
    beyond_window,
    common,
    drops_biases,
    long_factors,
    no_loading,
    one_kind,
    other_rope,
)
from moemerge.architectures.reading import Reading, windows_where
from moemerge.architectures.slots import Mixture, Slot, whole

HOLDS = Holds(qk_norms=("head",), qkv_bias=True, o_bias=True)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "llama.cpp", "mlx-lm", "vLLM", "mistral.rs")
ALIASES = ("qwen3",)
TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def _windows(config: Mapping[str, Any]) -> list[str] | None:
    """Windows in all layers or in none; `layer_types` does not matter."""
    every = windows_where(config, lambda _: True)
    return every if config.get("use_sliding_window") else None


READING = Reading(counts=("num_experts", "num_local_experts"), windows=_windows)


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """One kind of attention in all layers."""
    yield from one_kind(config)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    yield from no_loading(config, "qwen3_moe", "mlx-lm", "llama.cpp")
    yield from drops_biases(config, "qwen3_moe", "vLLM", "mistral.rs")
    yield from other_rope(config, "mlx-lm")
    yield from other_rope(config, "mistral.rs")
    yield from long_factors(config, "vLLM")
    yield from other_rope(config, "llama.cpp", LLAMA_CPP_ROPE)
    yield from beyond_window(config, "mlx-lm", "llama.cpp")


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers and experts."""
    return whole(config, lambda layer: routed(config, mixture, layer))


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """Routing weights are renormalised, which is not the class's default."""
    window = config["sliding_window"]
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **common(config, mixture, dtype, TRAINING),
        "attention_bias": config["qkv_bias"],
        "decoder_sparse_step": 1,
        "intermediate_size": mixture.inner,
        "max_window_layers": 0 if window else config["num_hidden_layers"],
        "mlp_only_layers": [],
        "moe_intermediate_size": mixture.inner,
        "norm_topk_prob": True,
        "num_experts": mixture.experts,
        "num_local_experts": mixture.experts,
        "use_sliding_window": window is not None,
    }
