"""granitemoe: softmax over the chosen top k, in the body of a Granite with its multipliers.

Experts are in three-dimensional tensors, which is this class's format in every reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import router, stacked
from moemerge.architectures.limits import (
    LLAMA_CPP_ROPE,
    Holds,
    common,
    drops_biases,
    long_factors,
    no_head_dim,
    no_window,
    one_kind,
    other_rope,
)
from moemerge.architectures.reading import Names, Reading, no_windows
from moemerge.architectures.slots import Mixture, Slot, whole
from moemerge.families import LAYER, RECORDS

HOLDS = Holds(qkv_bias=True, o_bias=True, multipliers=True)
READING = Reading(
    Names(
        expert="block_sparse_moe.experts.",
        router="block_sparse_moe.router.layer.weight",
        routers=("block_sparse_moe.router.weight",),
        uppers=("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        lowers=("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
        stacked=True,
    ),
    counts=("num_local_experts",),
    windows=no_windows,
)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "llama.cpp", "mlx-lm", "vLLM")
ALIASES = ("granite",)
TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001}

MULTIPLIERS = {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0
}  # fmt: skip


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Heads that divide the width, no sliding window."""
    yield from no_head_dim(config, "granitemoe")
    yield from no_window(config, "granitemoe")
    yield from one_kind(config)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    yield from caveats_of_llama_cpp(config)
    yield from drops_biases(config, "granitemoe", "vLLM")
    yield from long_factors(config, "mlx-lm", "vLLM")


def caveats_of_llama_cpp(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Kinds of rope that its granite graph lacks."""
    if (config["rope_scaling"] or {}).get("rope_type") == "llama3":
        yield "llama.cpp", "llama.cpp cannot convert it: its granite has no rope of type llama3"
    yield from other_rope(config, "llama.cpp", LLAMA_CPP_ROPE | {"llama3"})


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names; routers; all experts in two tensors a layer."""
    return whole(config, lambda layer: experts(config, mixture, layer), *biases(config))


def biases(config: dict[str, Any]) -> tuple[bool, bool]:
    """One flag puts biases on all four projections."""
    either = bool(config["qkv_bias"] or config["o_bias"])
    return either, either


def experts(config: dict[str, Any], mixture: Mixture, layer: int) -> Iterator[Slot]:
    """Router, `input_linear` (E, 2F, D) of gates and ups in turn, `output_linear` (E, D, F)."""
    block = f"{LAYER.format(layer=layer)}block_sparse_moe."
    yield router(f"{block}router.layer.weight", config, mixture)
    upper, lower = f"{block}input_linear.weight", f"{block}output_linear.weight"
    yield from stacked(config, mixture, layer, upper, lower)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """A Granite's own multipliers; in other families, values that change nothing."""
    own = config if RECORDS[config["model_type"]].multipliers else {}
    plain = {**MULTIPLIERS, "attention_multiplier": config["head_dim"] ** -0.5}
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        **common(config, mixture, dtype, TRAINING),
        **{key: own.get(key, value) for key, value in plain.items()},
        "attention_bias": biases(config)[0],
        "intermediate_size": mixture.inner,
        "num_local_experts": mixture.experts,
    }
