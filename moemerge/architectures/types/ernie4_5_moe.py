"""ernie4_5_moe: softmax top-k experts in the body of an ERNIE 4.5, whose rope turns neighbours.

The class has a bias for selection, which is zeros here. A mixtral holds such a body too, and more
programs read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import routed
from moemerge.architectures.limits import (
    Holds,
    common,
    long_factors,
    no_head_dim,
    no_window,
    one_kind,
    other_rope,
)
from moemerge.architectures.reading import Names, Reading, no_windows
from moemerge.architectures.slots import Constant, Mixture, Slot, whole
from moemerge.families import LAYER

HOLDS = Holds(qkv_bias=True, o_bias=True, interleaved=True)
READING = Reading(
    Names(closed="whose bias for selection has a shape of its own"),
    counts=("moe_num_experts",),
    per_token="moe_k",
    windows=no_windows,
)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "mlx-lm")
ALIASES = ()
TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Heads that divide the width, all biases or none, no window."""
    yield from no_head_dim(config, "ernie4_5_moe")
    yield from no_window(config, "ernie4_5_moe")
    yield from one_kind(config)
    if bool(config["qkv_bias"]) != bool(config["o_bias"]):
        what = "has biases on some projections, and an ernie4_5_moe has all or none"
        yield what, "a granitemoehybrid could hold it"


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026; llama.cpp's converter wants a tokenizer.model."""
    yield from other_rope(config, "mlx-lm")
    yield from long_factors(config, "vLLM")


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers, biases (float32) and experts."""

    def mlp(layer: int) -> Iterator[Slot]:
        yield from routed(config, mixture, layer)
        bias = f"{LAYER.format(layer=layer)}mlp.moe_statics.e_score_correction_bias"
        yield Slot(bias, (1, mixture.experts), Constant(0.0), dtype="F32")

    return whole(config, mlp, halves=False)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """Every layer is a mixture; routing weights are always renormalised."""
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        **common(config, mixture, dtype, TRAINING),
        "intermediate_size": mixture.inner,
        "moe_intermediate_size": mixture.inner,
        "moe_k": mixture.per_token,
        "moe_layer_end_index": config["num_hidden_layers"] - 1,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 0,
        "moe_norm_min": 1e-12,
        "moe_num_experts": mixture.experts,
        "moe_num_shared_experts": 0,
        "use_bias": bool(config["qkv_bias"]),
    }
