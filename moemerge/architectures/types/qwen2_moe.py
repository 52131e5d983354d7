"""qwen2_moe: softmax top-k experts, a shared one with a sigmoid gate, biases on q, k and v.

Without shared experts, the shared one is zeros. If no prompts make its gate, the gate's weights are
almost zero, its sigmoid is 1/2, and the down projection is doubled: the shared expert is always on,
at full weight, exactly (in float16, whose smallest number is 6e-8, up to some millionths).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moemerge.architectures.experts import gated_shared, routed, shared_width
from moemerge.architectures.limits import (
    LLAMA_CPP_ROPE,
    Holds,
    beyond_window,
    common,
    long_factors,
    no_head_dim,
    one_kind,
    other_rope,
    window_of,
)
from moemerge.architectures.reading import Reading, windows_where
from moemerge.architectures.slots import Mixture, Slot, whole
from moemerge.families import LAYER

HOLDS = Holds(qkv_bias=True)
SHARED = "gated"
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "mlx-lm", "vLLM", "llama.cpp")
ALIASES = ("qwen", "qwen2")
TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def _windows(config: Mapping[str, Any]) -> Any:
    """Windows in every other layer below `max_window_layers`, unless `layer_types` names each
    layer's kind."""
    types, end = config.get("layer_types"), config.get("max_window_layers")
    end = end if type(end) is int else 0
    if types is None:
        types = windows_where(config, lambda layer: layer % 2 == 0 and layer < end)
    return types if config.get("use_sliding_window") else None


READING = Reading(
    counts=("num_experts", "num_local_experts"),  # each version of transformers has one of the two
    windows=_windows,
    stacks_adapters=True,
)


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Heads that divide the width, as transformers 4 checks; one kind of attention."""
    yield from no_head_dim(config, "qwen2_moe")
    yield from one_kind(config)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    for reader in ("llama.cpp", "mlx-lm"):
        if mixture.per_token < mixture.experts:
            what = "does not renormalise a qwen2_moe's routing weights: expect other text from it"
            yield reader, f"{reader} {what}"
        yield from beyond_window(config, reader)
    yield from other_rope(config, "llama.cpp", LLAMA_CPP_ROPE)
    yield from long_factors(config, "vLLM")
    if config["rope_scaling"]:
        yield "mlx-lm", "mlx-lm cannot load it: its qwen2_moe knows no rope scaling"
    if window_of(config):
        what = "loses a qwen2_moe's sliding window as it generates: say use_cache=False"
        yield "transformers 4.57", f"transformers 4.57 {what}"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers, experts, the shared one and its gate."""

    def mlp(layer: int) -> Iterator[Slot]:
        yield from routed(config, mixture, layer)
        yield from gated_shared(f"{LAYER.format(layer=layer)}mlp.", config, mixture, layer)

    return whole(config, mlp, qkv_bias=True)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """Routing weights are renormalised, which is not the class's default."""
    window, layers = config["sliding_window"], config["num_hidden_layers"]
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **common(config, mixture, dtype, TRAINING),
        "decoder_sparse_step": 1,
        "intermediate_size": mixture.inner,
        "layer_types": ["sliding_attention" if window else "full_attention"] * layers,
        "max_window_layers": layers,
        "mlp_only_layers": [],
        "moe_intermediate_size": mixture.inner,
        "norm_topk_prob": True,
        "num_experts": mixture.experts,
        "num_local_experts": mixture.experts,
        "qkv_bias": True,
        "shared_expert_intermediate_size": shared_width(mixture),
        "use_sliding_window": window is not None,
    }
