"""flex_olmo: softmax top-k experts in the body of an OLMo 2, with norms after attention and MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import routed
from moemerge.architectures.limits import Holds, common, no_head_dim, one_kind
from moemerge.architectures.reading import Reading, no_windows
from moemerge.architectures.slots import Mixture, Slot, whole

HOLDS = Holds(qk_norms=("full",), post_norm=True, qkv_bias=True, o_bias=True)
READING = Reading(counts=("num_experts", "num_local_experts"), windows=no_windows)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "vLLM")
ALIASES = ()
TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.01}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Heads that divide the width, one kind of attention."""
    yield from no_head_dim(config, "flex_olmo")
    yield from one_kind(config)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """No caveat is known."""
    yield from ()


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers and experts."""
    return whole(config, lambda layer: routed(config, mixture, layer))


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """Routing weights are renormalised, which is not the class's default."""
    return {
        "architectures": ["FlexOlmoForCausalLM"],
        "model_type": "flex_olmo",
        **common(config, mixture, dtype, TRAINING),
        "attention_bias": config["qkv_bias"],
        "intermediate_size": mixture.inner,
        "norm_topk_prob": True,
        "num_experts": mixture.experts,
        "num_local_experts": mixture.experts,
    }
