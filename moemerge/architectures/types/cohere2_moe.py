"""cohere2_moe: softmax top-k experts beside attention, in the body of a Cohere 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import routed
from moemerge.architectures.limits import Holds, as_said
from moemerge.architectures.reading import Reading, dense_of
from moemerge.architectures.slots import Mixture, Slot, whole

_OWN = (
    "num_experts", "num_experts_per_tok", "num_shared_experts", "norm_topk_prob",
    "shared_expert_combination_strategy", "expert_selection_fn", "first_k_dense_replace",
    "mlp_layer_types", "prefix_dense_sliding_window_pattern", "prefix_dense_intermediate_size",
    "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip

HOLDS = Holds(layers=("cohere 2",))
READING = Reading(counts=("num_experts",), dense=dense_of("cohere2", _OWN))
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 5", "llama.cpp", "vLLM")
ALIASES = ()
TRAINING = {"output_router_logits": False}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """None: the class has the same body."""
    yield from ()


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    yield "vLLM", "vLLM gives other text than transformers"
    if config["attention_bias"]:
        yield "llama.cpp", "llama.cpp cannot convert it: its cohere2moe has no attention biases"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers and experts."""
    return whole(config, lambda layer: routed(config, mixture, layer))


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; softmax over the chosen experts, no shared expert (it would count half)."""
    own = {
        "expert_selection_fn": "softmax",
        "first_k_dense_replace": 0,
        "intermediate_size": mixture.inner,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "num_shared_experts": 0,
        "rms_norm_eps": None,  # a number would make its norms other ones
    }
    names = ("Cohere2MoeForCausalLM", "")
    return as_said(config, mixture, dtype, TRAINING, own, "cohere2_moe", names)
