"""glm4_moe: DeepSeek-V3's routing in the body of a Llama, Qwen2 or Qwen3.

Scores are sigmoids. A bias that counts only for the selection balances the load (DeepSeek-AI 2024,
https://arxiv.org/abs/2412.19437). Shared experts are always on. The class cannot be without one, so
a mixture without them has one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moemerge.architectures.experts import routed, shared_or_zeros
from moemerge.architectures.limits import (
    Holds,
    common,
    lonely,
    long_factors,
    no_window,
    one_alone,
    one_kind,
    other_rope,
)
from moemerge.architectures.reading import Reading, no_windows
from moemerge.architectures.slots import Made, Mixture, Slot, whole
from moemerge.families import LAYER, PARTIAL

HOLDS = Holds(qk_norms=(None, "head"), qkv_bias=True, turns_in_part=True)
READING = Reading(
    counts=("n_routed_experts",), windows=no_windows, turned=0.5, factor="routed_scaling_factor"
)
SHARED = "always"
SCORES = "sigmoid"
READERS = ("transformers 4.57", "transformers 5", "mlx-lm", "vLLM", "mistral.rs")
ALIASES = ()
TRAINING: dict[str, Any] = {}


@dataclass(frozen=True)
class Settings:
    """`groups` of experts, of which `groups_per_token` may serve a token; a group's score is the
    sum of its best two. `routed_scaling_factor` multiplies the output of the chosen experts."""

    groups: int = 1
    groups_per_token: int = 1
    routed_scaling_factor: float = 1.0

    def problems(self, mixture: Mixture) -> Iterator[tuple[str, str, str]]:
        """Settings that cannot be."""
        experts, groups, chosen = mixture.experts, self.groups, self.groups_per_token
        if groups < 1 or experts % groups or (groups > 1 and experts // groups < 2):
            fix = "groups must divide the experts into equal parts of two or more"
            yield "groups", f"is {groups} with {experts} experts", fix
        elif not 1 <= chosen <= groups or mixture.per_token > experts // groups * chosen:
            what = f"is {chosen} with {groups} groups and {mixture.per_token} experts a token"
            yield "groups_per_token", what, "allow groups enough for the experts a token"
        if not 0 < self.routed_scaling_factor <= 1e30:
            what = f"is {self.routed_scaling_factor:g}"
            yield "routed_scaling_factor", what, "write a number above 0"


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """No sliding window, two experts or more; partial rotary embeddings are allowed."""
    yield from no_window(config, "glm4_moe")
    yield from lonely(mixture, "glm4_moe")
    yield from one_kind(config, in_part=True)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026; llama.cpp's converter wants GLM's own vocabulary."""
    yield from other_rope(config, "mlx-lm")
    yield from other_rope(config, "mistral.rs")
    yield from long_factors(config, "vLLM")
    yield from one_alone(mixture)


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers, biases, experts and shared ones."""
    return whole(config, lambda layer: experts(config, mixture, layer))


def experts(config: dict[str, Any], mixture: Mixture, layer: int) -> Iterator[Slot]:
    """Router, selection bias (in float32, as the class holds it), experts, shared experts."""
    block = f"{LAYER.format(layer=layer)}mlp."
    yield from routed(config, mixture, layer)
    bias = f"{block}gate.e_score_correction_bias"
    yield Slot(bias, (mixture.experts,), Made("bias"), dtype="F32")
    prefix = f"{block}shared_experts."
    yield from shared_or_zeros(prefix, config, mixture, layer, mixture.inner)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """Every layer is a mixture, and there is no layer for multi-token prediction. The partial
    rotary factor is written under every key where a program looks for it."""
    part = {PARTIAL: config[PARTIAL]}
    scaling = config["rope_scaling"]
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **routing(config, mixture, dtype),
        "num_nextn_predict_layers": 0,
        **part,
        "rope_parameters": {**config["rope_parameters"], **part},
        "rope_scaling": scaling and {**scaling, **part},
        "use_qk_norm": config["qk_norm"] is not None,
    }


def routing(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The keys that are common to classes with this routing."""
    own = mixture.settings or Settings()
    return {
        **common(config, mixture, dtype, TRAINING),
        "attention_bias": config["qkv_bias"],
        "first_k_dense_replace": 0,
        "intermediate_size": mixture.inner,
        "moe_intermediate_size": mixture.inner,
        "n_group": own.groups,
        "n_routed_experts": mixture.experts,
        "n_shared_experts": max(mixture.shared, 1),
        "norm_topk_prob": True,
        "routed_scaling_factor": own.routed_scaling_factor,
        "topk_group": own.groups_per_token,
    }
