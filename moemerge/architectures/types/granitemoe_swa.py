"""granitemoe_swa: a granitemoe with layers without positions, for the body of a SmolLM3.

Each head has a sink, which takes a part of the attention; a sink of -1e9 takes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moemerge.architectures.experts import router, stacked
from moemerge.architectures.limits import Holds, as_said
from moemerge.architectures.reading import Names, dense_of
from moemerge.architectures.slots import Constant, Mixture, Slot, whole
from moemerge.architectures.types import granitemoe
from moemerge.families import LAYER

_OWN = (
    *granitemoe.MULTIPLIERS, "attention_multiplier", "num_local_experts", "num_experts_per_tok",
    "layer_rope_theta", "shared_intermediate_size", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip

HOLDS = Holds(layers=("smollm3",))
READING = replace(
    granitemoe.READING,
    names=Names(
        expert="block_sparse_moe.experts.",
        router="block_sparse_moe.router.weight",
        uppers=("block_sparse_moe.experts.gate_up_proj",),
        lowers=("block_sparse_moe.experts.down_proj",),
        stacked=True,
    ),
    dense=dense_of("smollm3", _OWN),
)
SHARED = ""
SCORES = "softmax"
READERS = ("transformers 5", "vLLM")
ALIASES = ()
TRAINING = granitemoe.TRAINING

_NO_SINK = -1e9


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """No biases in MLPs."""
    if config["mlp_bias"]:
        yield "has MLP biases, which no mixture has a place for", "use a model without them"


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """Measured in November 2026."""
    if config["attention_bias"]:
        yield "vLLM", "vLLM leaves out attention biases: expect other text from it"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """The dense tensors under their own names, sinks, routers, experts in two tensors a layer."""
    heads = config["num_attention_heads"]

    def mlp(layer: int) -> Iterator[Slot]:
        prefix = LAYER.format(layer=layer)
        block = f"{prefix}block_sparse_moe."
        yield Slot(f"{prefix}self_attn.sinks", (heads,), Constant(_NO_SINK))
        yield router(f"{block}router.weight", config, mixture)
        upper, lower = f"{block}experts.gate_up_proj", f"{block}experts.down_proj"
        yield from stacked(config, mixture, layer, upper, lower)

    return whole(config, mlp)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """The base's keys; multipliers that change nothing; rope's base for each layer, 0 for none."""
    own = {
        **granitemoe.MULTIPLIERS,
        "attention_multiplier": config["head_dim"] ** -0.5,
        "intermediate_size": mixture.inner,
        "layer_rope_theta": [config["rope_theta"] if on else 0 for on in config["no_rope_layers"]],
        "num_experts_per_tok": mixture.per_token,
        "num_local_experts": mixture.experts,
        "shared_intermediate_size": 0,
        "sliding_window": config["sliding_window"] or config["max_position_embeddings"],
    }
    names = ("GraniteMoeSWAForCausalLM", "")
    return as_said(config, mixture, dtype, TRAINING, own, "granitemoe_swa", names)
