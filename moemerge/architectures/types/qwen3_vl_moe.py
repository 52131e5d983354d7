"""qwen3_vl_moe: softmax top-k experts in the language part of a Qwen 3 VL.

Every program but the newest transformers wants experts stacked and transposed, (E, D, 2F) and
(E, F, D). The newest compares shapes to find which way they lie, so a model in which both ways have
the same shape is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import router, stacked
from moemerge.architectures.limits import Holds, as_said
from moemerge.architectures.reading import Names, Reading
from moemerge.architectures.slots import Mixture, Slot, whole
from moemerge.families import LAYER

HOLDS = Holds(layers=("qwen 3 vl",))
READING = Reading(
    Names(stacked=True, closed="whose experts' matrices are stored transposed"),
    counts=("num_experts",),
    model_types=("qwen3_vl_moe_text",),
)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "llama.cpp", "mlx-lm")
ALIASES = ()
TRAINING = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """A whole model, and experts whose shapes say which way they lie."""
    if "wrapper" not in config:
        what = "is the language part of a Qwen 3 VL alone, for which there is no class"
        yield what, "name the whole model, with its vision tower"
    if config["hidden_size"] in (mixture.inner, 2 * mixture.inner):
        what = f"would have experts of {mixture.inner} neurons at hidden_size "
        what += f"{config['hidden_size']}, which readers take for their transpose"
        yield what, "use another number of segments"


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """No caveat is known."""
    yield from ()


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names; routers; all experts in two tensors a layer."""

    def mlp(layer: int) -> Iterator[Slot]:
        block = f"{LAYER.format(layer=layer)}mlp."
        yield router(f"{block}gate.weight", config, mixture)
        upper, lower = f"{block}experts.gate_up_proj", f"{block}experts.down_proj"
        yield from stacked(config, mixture, layer, upper, lower, transposed=True)

    return whole(config, mlp)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; routing weights are always renormalised."""
    own = {
        "decoder_sparse_step": 1,
        "intermediate_size": mixture.inner,
        "mlp_only_layers": [],
        "moe_intermediate_size": mixture.inner,
        "norm_topk_prob": True,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
    }
    names = ("", "Qwen3VLMoeForConditionalGeneration")
    return as_said(config, mixture, dtype, TRAINING, own, "qwen3_vl_moe_text", names)
