"""hunyuan_v1_moe: softmax top-k experts beside an MLP that is always on, for a dense Hunyuan.

That MLP is as wide as an expert; without shared experts, it is one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import router, separate, shared_or_zeros
from moemerge.architectures.limits import Holds, as_said
from moemerge.architectures.reading import Names, Reading, dense_of
from moemerge.architectures.slots import Mixture, Slot, whole
from moemerge.families import LAYER

_OWN = ("num_experts", "moe_topk", "output_router_logits")

HOLDS = Holds(layers=("hunyuan",))
READING = Reading(
    Names(router="mlp.gate.wg.weight", shared=("mlp.shared_mlp.",)),
    counts=("num_experts",),
    per_token="moe_topk",
    dense=dense_of("hunyuan_v1_dense", _OWN),
)
SHARED = "always"
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "vLLM", "mistral.rs")
ALIASES = ()
TRAINING = {"output_router_logits": False}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """One shared expert at most."""
    if mixture.shared > 1:
        what = f"would have {mixture.shared} shared experts, and a hunyuan_v1_moe has one"
        yield what, "keep one of them, without segments"


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    yield "mistral.rs", "mistral.rs gives other text than transformers"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers, experts, the shared MLP."""

    def mlp(layer: int) -> Iterator[Slot]:
        block = f"{LAYER.format(layer=layer)}mlp."
        yield router(f"{block}gate.wg.weight", config, mixture)
        yield from separate(f"{block}experts.", config, mixture, layer)
        yield from shared_or_zeros(f"{block}shared_mlp.", config, mixture, layer, mixture.inner)

    return whole(config, mlp)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; routing weights are always renormalised."""
    own = {
        "intermediate_size": mixture.inner,
        "moe_topk": mixture.per_token,
        "num_experts": mixture.experts,
    }
    names = ("HunYuanMoEV1ForCausalLM", "")
    return as_said(config, mixture, dtype, TRAINING, own, "hunyuan_v1_moe", names)
