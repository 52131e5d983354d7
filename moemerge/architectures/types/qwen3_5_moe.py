"""qwen3_5_moe: softmax top-k experts in the body of a Qwen 3.5, mostly with linear attention.

The class always has a gated shared expert: without shared experts, one of zeros. The dense model's
block for multi-token prediction (`mtp.`) is left out. Experts are stacked, which every program
reads; mlx-lm reads nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import gated_shared, router, shared_width, stacked
from moemerge.architectures.limits import Holds, as_said
from moemerge.architectures.reading import Names, Reading, dense_of
from moemerge.architectures.slots import Mixture, Slot, whole
from moemerge.families import LAYER

_OWN = (
    "moe_intermediate_size", "num_experts", "num_experts_per_tok",
    "shared_expert_intermediate_size", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip

HOLDS = Holds(layers=("qwen 3.5",))
READING = Reading(
    Names(stacked=True),
    counts=("num_experts",),
    model_types=("qwen3_5_moe_text",),
    dense=dense_of("qwen3_5_text", _OWN),
)
SHARED = "gated"
SCORES = "softmax"
READERS = ("transformers 5", "mlx-lm")
ALIASES = ("qwen3.5",)
TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """None: the class has the same body."""
    yield from ()


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    if "wrapper" not in config:
        yield "mlx-lm", "mlx-lm cannot load it: it knows the class with a vision tower only"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers, experts, the shared one and its gate."""

    def mlp(layer: int) -> Iterator[Slot]:
        block = f"{LAYER.format(layer=layer)}mlp."
        yield router(f"{block}gate.weight", config, mixture)
        upper, lower = f"{block}experts.gate_up_proj", f"{block}experts.down_proj"
        yield from stacked(config, mixture, layer, upper, lower)
        yield from gated_shared(block, config, mixture, layer)

    return whole(config, mlp)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; routing weights are always renormalised."""
    own = {
        "moe_intermediate_size": mixture.inner,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "shared_expert_intermediate_size": shared_width(mixture),
    }
    names = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")
    without = ("intermediate_size",)
    return as_said(config, mixture, dtype, TRAINING, own, "qwen3_5_moe_text", names, without)
