"""granitemoehybrid: Granite 4's class, for its dense models with Mamba layers or without; and a
granitemoeshared, with attention in all layers, because more programs know this class.

It always has a shared MLP: without shared experts, one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from moemerge.architectures.experts import shared_width
from moemerge.architectures.limits import as_said, long_factors
from moemerge.architectures.reading import dense_of
from moemerge.architectures.slots import Constant, Mixture, Slot
from moemerge.architectures.types import granitemoe, granitemoeshared
from moemerge.families import ATTENTION

HOLDS = replace(granitemoe.HOLDS, layers=(ATTENTION, "granite 4"))
SHARED = "always"
SCORES = "softmax"
READERS = ("transformers 4.57", "transformers 5", "llama.cpp", "mlx-lm", "vLLM")
ALIASES = ("deepseek",)
TRAINING = granitemoe.TRAINING

_NO_MAMBA = 1
"""The number of Mamba heads of a mixture whose body is no Granite 4's; a Granite 4 has more."""

_OLDER = {"full_attention": "attention", "linear_attention": "mamba"}


def _attends(config: Mapping[str, Any]) -> bool:
    """Without `layer_types`, all layers are Mamba."""
    types = config.get("layer_types")
    return isinstance(types, list) and {_OLDER.get(str(k), k) for k in types} == {"attention"}


def _dense(config: Mapping[str, Any], inner: int) -> dict[str, Any]:
    """A Granite 4, unless the body came from another family (`output_config`)."""
    if _attends(config) and config.get("mamba_n_heads") == _NO_MAMBA:
        return {}
    own = {"num_local_experts": 0, "shared_intermediate_size": inner}
    return dense_of("granitemoehybrid", ("num_experts_per_tok",), own)(config, inner)


READING = replace(granitemoe.READING, older_kinds=_OLDER, dense=_dense)


def refusals(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """A granitemoe's; none for a Granite 4, whose class this is."""
    return iter(()) if _is_own(config) else granitemoe.refusals(config, mixture)


def caveats(config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
    """A granitemoe's in llama.cpp; mlx-lm's granitemoehybrid.py was measured in November 2026."""
    if _is_own(config):
        return
    yield from granitemoe.caveats_of_llama_cpp(config)
    yield from long_factors(config, "vLLM")
    if config["rope_scaling"]:
        kind = config["rope_scaling"]["rope_type"]
        yield "mlx-lm", f"mlx-lm ignores its rope scaling ({kind}): expect other text from it"


def _is_own(config: dict[str, Any]) -> bool:
    """Whether the dense model is a Granite 4, whose class this is."""
    return bool(config["model_type"] == "granitemoehybrid")


def slots(config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
    """A granitemoeshared's slots; zeros for its shared MLP if there are no shared experts."""
    hidden, width = config["hidden_size"], shared_width(mixture)
    for slot in granitemoeshared.slots(config, mixture):
        yield slot
        if slot.name.endswith("block_sparse_moe.output_linear.weight") and not mixture.shared:
            block = slot.name.partition("block_sparse_moe")[0] + "shared_mlp."
            zeros = Constant(0.0)
            yield Slot(f"{block}input_linear.weight", (2 * width, hidden), zeros)
            yield Slot(f"{block}output_linear.weight", (hidden, width), zeros)


def output_config(config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
    """A Granite 4's own config, or a granitemoeshared's; there, the keys of Mamba layers only make
    it valid, because no layer is one."""
    if _is_own(config):
        own = {
            "intermediate_size": mixture.inner,
            "num_experts_per_tok": mixture.per_token,
            "num_local_experts": mixture.experts,
            "shared_intermediate_size": shared_width(mixture),
        }
        names = ("GraniteMoeHybridForCausalLM", "")
        return as_said(config, mixture, dtype, TRAINING, own, "granitemoehybrid", names)
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
        "mamba_n_heads": _NO_MAMBA,
        "position_embedding_type": "rope",
        "shared_intermediate_size": shared_width(mixture),
    }
