"""granitemoehybrid: a granitemoeshared in Granite 4's class, with attention in all layers.

More programs know this class. It always has a shared MLP: without shared experts, one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moemerge.architectures.limits import long_factors
from moemerge.architectures.slots import Constant, Mixture, Slot
from moemerge.architectures.types import granitemoe, granitemoeshared

HOLDS = granitemoe.HOLDS
SHARED = "always"
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "llama.cpp", "mlx-lm", "vLLM")
ALIASES = ("deepseek",)
TRAINING = granitemoe.TRAINING

_IDLE = 256
"""Neurons of a shared MLP of zeros; the blocks of quantised formats must be full."""

_OLDER = {"full_attention": "attention", "linear_attention": "mamba"}


def _attends(config: Mapping[str, Any]) -> bool:
    """Without `layer_types`, all layers are Mamba."""
    types = config.get("layer_types")
    return isinstance(types, list) and {_OLDER.get(str(k), k) for k in types} == {"attention"}


def _has_positions(config: Mapping[str, Any]) -> bool:
    return config.get("position_embedding_type") == "rope"


READING = replace(
    granitemoe.READING, older_kinds=_OLDER, attends=_attends, has_positions=_has_positions
)

refusals = granitemoe.refusals


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """A granitemoe's in llama.cpp; mlx-lm's granitemoehybrid.py was measured in November 2026."""
    yield from granitemoe.caveats_of_llama_cpp(config)
    yield from long_factors(config, "vLLM")
    if config["rope_scaling"]:
        kind = config["rope_scaling"]["rope_type"]
        yield "mlx-lm", f"mlx-lm ignores its rope scaling ({kind}): expect other text from it"


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """A granitemoeshared's slots; zeros for its shared MLP if there are no shared experts."""
    hidden, width = config["hidden_size"], _width(mixture)
    for slot in granitemoeshared.slots(config, mixture):
        yield slot
        if slot.name.endswith("block_sparse_moe.output_linear.weight") and not mixture.shared:
            block = slot.name.partition("block_sparse_moe")[0] + "shared_mlp."
            zeros = Constant(0.0)
            yield Slot(f"{block}input_linear.weight", (2 * width, hidden), zeros)
            yield Slot(f"{block}output_linear.weight", (hidden, width), zeros)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """A granitemoeshared's config; the keys of Mamba layers only make it valid, because no layer is
    one."""
    return {
        **granitemoeshared.output_config(config, mixture, dtype),
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * config["num_hidden_layers"],
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 2 * config["hidden_size"],
        "mamba_d_state": 256,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 1,
        "position_embedding_type": "rope",
        "shared_intermediate_size": _width(mixture),
    }


def _width(mixture: Mixture) -> int:
    return mixture.shared * mixture.inner or min(mixture.inner, _IDLE)
