"""lfm2_moe: sigmoid router with a bias for selection alone, in the body of an LFM2.

The chosen experts' weights are divided by their sum and 1e-6: equal experts give the dense model
only while the router's logits are not strongly negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.experts import projection, router
from moemerge.architectures.limits import Holds, as_said
from moemerge.architectures.reading import Names, Reading, dense_of
from moemerge.architectures.slots import Made, Mixture, Slot, whole
from moemerge.families import DOWN, GATE, LAYER, UP

_OWN = (
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "num_dense_layers",
    "use_expert_bias", "norm_topk_prob", "routed_scaling_factor", "output_router_logits",
)  # fmt: skip
_COMPUTED = ("block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim")

HOLDS = Holds(layers=("lfm2",))
READING = Reading(
    Names(
        expert="feed_forward.experts.",
        matrices=("w1", "w3", "w2"),
        router="feed_forward.gate.weight",
        uppers=("feed_forward.experts.gate_up_proj",),
        lowers=("feed_forward.experts.down_proj",),
        bias="expert_bias",
    ),
    counts=("num_experts",),
    dense=dense_of("lfm2", _OWN, {"block_auto_adjust_ff_dim": False}),
)
SHARED = ""
SCORES = "sigmoid"
READERS = ("transformers 5", "llama.cpp", "mlx-lm", "vLLM")
ALIASES = ()
TRAINING = {"output_router_logits": False}

_MLP = {GATE: "w1", DOWN: "w2", UP: "w3"}


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """None: the class has the same body."""
    yield from ()


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026, vLLM on a CPU."""
    yield "vLLM", "vLLM gives other text than transformers"
    if config["conv_bias"]:
        yield "llama.cpp", "llama.cpp cannot convert it: its LFM2 has no biases on convolutions"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, routers, biases (float32) and experts."""

    def mlp(layer: int) -> Iterator[Slot]:
        block = f"{LAYER.format(layer=layer)}feed_forward."
        yield router(f"{block}gate.weight", config, mixture)
        yield Slot(f"{block}expert_bias", (mixture.experts,), Made("bias"), dtype="F32")
        for expert in range(mixture.experts):
            for which, name in _MLP.items():
                full = f"{block}experts.{expert}.{name}.weight"
                yield projection(full, config, mixture, layer, expert, which)

    return whole(config, mlp, copies_head=False)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; every layer is a mixture."""
    own = {
        "intermediate_size": mixture.inner,
        "moe_intermediate_size": mixture.inner,
        "norm_topk_prob": True,
        "num_dense_layers": 0,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
    }
    names = ("Lfm2MoeForCausalLM", "")
    return as_said(config, mixture, dtype, TRAINING, own, "lfm2_moe", names, _COMPUTED)
