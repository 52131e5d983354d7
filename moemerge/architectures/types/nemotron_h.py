"""nemotron_h: Nemotron-H's own mixture layers in place of its MLPs, which have no gate.

The router has sigmoids and a bias for selection alone. The class always has a shared expert:
without shared experts, a narrow one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import router, separate, shared_or_zeros, shared_width
from moemerge.architectures.limits import Holds, as_said, lonely
from moemerge.architectures.reading import Names, Reading
from moemerge.architectures.slots import Made, Mixture, Slot, whole
from moemerge.families import DOWN, LAYER, UP

HOLDS = Holds(layers=("nemotron h",))
READING = Reading(
    Names(
        expert="mixer.experts.",
        router="mixer.gate.weight",
        shared=("mixer.shared_experts.",),
        closed="whose experts have no gate",
    ),
    counts=("n_routed_experts",),
)
SHARED = "always"
SCORES = "sigmoid"
READERS = ("transformers 5", "llama.cpp", "mlx-lm")
ALIASES = ()
TRAINING = {"output_router_logits": False}

_PATTERN = "hybrid_override_pattern"


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Two experts or more, no biases in MLPs."""
    yield from lonely(mixture, "nemotron_h")
    if config["mlp_bias"]:
        yield "has MLP biases, which no mixture has a place for", "use a model without them"


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """No caveat is known."""
    yield from ()


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors, routers, biases (float32), experts and shared ones: up and down alone."""

    def mlp(layer: int) -> Iterator[Slot]:
        block = f"{LAYER.format(layer=layer)}mixer."
        yield router(f"{block}gate.weight", config, mixture)
        bias = f"{block}gate.e_score_correction_bias"
        yield Slot(bias, (mixture.experts,), Made("bias"), dtype="F32")
        yield from separate(f"{block}experts.", config, mixture, layer, (UP, DOWN))
        prefix, width = f"{block}shared_experts.", shared_width(mixture)
        yield from shared_or_zeros(prefix, config, mixture, layer, width, (UP, DOWN))

    return whole(config, mlp)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; every MLP is a mixture, in one group."""
    own = {
        "moe_intermediate_size": mixture.inner,
        "moe_shared_expert_intermediate_size": shared_width(mixture),
        "n_group": 1,
        "n_routed_experts": mixture.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": mixture.per_token,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
    }
    own[_PATTERN] = config[_PATTERN].replace("-", "E")
    names = ("NemotronHForCausalLM", "")
    return as_said(config, mixture, dtype, TRAINING, own, "nemotron_h", names)
