"""The GGUF architecture of each class whose mixtures llama.cpp computes right, as one record each.

Names are llama.cpp's (gguf-py/gguf/constants.py). A dense model of the same arithmetic has the same
names of body tensors, so its bytes can be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moemerge.architectures.slots import Mixture

BODY = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""The names of a layer's tensors beside its MLP."""

TURNED = ("self_attn.q_proj", "self_attn.k_proj")


def _nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _scales(config: Mapping[str, Any]) -> dict[str, Any]:
    """A granite's factors; those of a model without them change nothing."""
    return {
        "attention.scale": config.get("attention_multiplier", config["head_dim"] ** -0.5),
        "embedding_scale": config.get("embedding_multiplier", 1.0),
        "residual_scale": config.get("residual_multiplier", 1.0),
        "logit_scale": config.get("logits_scaling", 1.0),
    }


@dataclass(frozen=True)
class GgufHost:
    """How llama.cpp names a class: its architecture, whether its rope turns neighbouring rows, and
    further fields of the base's config. A `shared` one has one always active expert beside."""

    name: str
    turns_neighbours: bool = False
    more: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    shared: bool = False
    body: Mapping[str, str] = field(default_factory=lambda: BODY)


GGUF_HOSTS = {
    "mixtral": GgufHost("llama", turns_neighbours=True),
    "qwen3_moe": GgufHost("qwen3moe"),
    "granitemoe": GgufHost("granitemoe", turns_neighbours=True, more=_scales),
    "granitemoeshared": GgufHost("granitemoe", turns_neighbours=True, more=_scales, shared=True),
}
"""By the name of the class in transformers."""


def counts(mixture: Mixture) -> dict[str, int]:
    """The fields of a mixture's numbers."""
    return {
        "expert_count": mixture.experts,
        "expert_used_count": mixture.per_token,
        "expert_feed_forward_length": mixture.inner,
    }
