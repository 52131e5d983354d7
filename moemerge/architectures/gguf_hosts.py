"""The GGUF architecture of each class whose mixtures llama.cpp computes right, as one record each.

Names are llama.cpp's (gguf-py/gguf/constants.py). A dense model of the same arithmetic has the same
names of body tensors, so its bytes can be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moemerge.architectures.slots import Mixture, dense_shapes
from moemerge.families import EMBEDDING, HEAD, NORM

BODY = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""The names of a layer's tensors beside its MLP."""

_LFM2 = {
    "operator_norm": "attn_norm", "ffn_norm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv", "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
}  # fmt: skip
TOP = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
_SOFTMAX, _SIGMOID = 1, 2
"""llama.cpp's numbers of how experts are scored."""

TURNED = ("self_attn.q_proj", "self_attn.k_proj")


def _nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _scales(config: Mapping[str, Any]) -> dict[str, Any]:
    """A granite's factors; those of a model without them change nothing."""
    return {
        "attention.scale": float(config.get("attention_multiplier", config["head_dim"] ** -0.5)),
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": float(config.get("logits_scaling", 1.0)),
    }


def _lfm2(config: Mapping[str, Any]) -> dict[str, Any]:
    _plain(config, "conv_bias")
    return {
        "shortconv.l_cache": config["conv_L_cache"],
        "leading_dense_block_count": 0,
        "expert_gating_func": _SIGMOID,
    }


def _cohere2(config: Mapping[str, Any]) -> dict[str, Any]:
    _plain(config, "attention_bias")
    return {
        "logit_scale": float(config["logit_scale"]),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": [
            kind == "sliding_attention" for kind in config["layer_types"]
        ],
        "rope.scaling.type": "none",
        "leading_dense_block_count": 0,
        "expert_gating_func": _SOFTMAX,
        "expert_weights_norm": True,
    }


def _plain(config: Mapping[str, Any], bias: str) -> None:
    """Refuse rope scaling, and the biases that this key of config.json says."""
    kind, family = rope_of(config).get("rope_type", "default"), config["model_type"]
    if kind != "default":
        raise ValueError(f"rope scaling {kind!r} of a {family} is not written as GGUF")
    if config[bias]:
        raise ValueError(f"has biases ({bias}), which a {family} in llama.cpp does not have")


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope scaling of a dense model, in either form."""
    found: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return found


def key_heads(config: Mapping[str, Any]) -> list[int]:
    """How many heads of keys each layer of a dense model has; 0 if it does not attend."""
    there, heads = dense_shapes(dict(config)), int(config["num_key_value_heads"])
    names = (
        f"model.layers.{at}.self_attn.v_proj.weight" for at in range(config["num_hidden_layers"])
    )
    return [heads if name in there else 0 for name in names]


@dataclass(frozen=True)
class GgufHost:
    """How llama.cpp names a class: its architecture, whether its rope turns neighbouring rows, and
    further fields of the base's config. A `shared` one has one always active expert beside.
    `needs` are keys of a mixture's config.json with the values that they may have; `epsilon` is
    the field of the norms' epsilon."""

    name: str
    turns_neighbours: bool = False
    more: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    shared: bool = False
    body: Mapping[str, str] = field(default_factory=lambda: BODY)
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    epsilon: str = "layer_norm_rms_epsilon"


GGUF_HOSTS = {
    "mixtral": GgufHost("llama", turns_neighbours=True),
    "qwen3_moe": GgufHost("qwen3moe", needs={"norm_topk_prob": (True,)}),
    "granitemoe": GgufHost("granitemoe", turns_neighbours=True, more=_scales),
    "granitemoeshared": GgufHost("granitemoe", turns_neighbours=True, more=_scales, shared=True),
    "lfm2_moe": GgufHost(
        "lfm2moe",
        more=_lfm2,
        body=_LFM2,
        top={
            EMBEDDING: "token_embd",
            "model.embedding_norm.weight": "token_embd_norm",
            HEAD: "output",
        },
        needs={
            "num_dense_layers": (0,),
            "norm_topk_prob": (True,),
            "use_expert_bias": (True,),
            "routed_scaling_factor": (1.0,),
        },
    ),
    "cohere2_moe": GgufHost(
        "cohere2moe",
        more=_cohere2,
        epsilon="layer_norm_epsilon",
        needs={
            "expert_selection_fn": ("softmax",),
            "num_shared_experts": (0,),
            "rms_norm_eps": (None,),
            "first_k_dense_replace": (0,),
        },
    ),
}
"""By the name of the class in transformers."""


def counts(mixture: Mixture) -> dict[str, int]:
    """The fields of a mixture's numbers."""
    return {
        "expert_count": mixture.experts,
        "expert_used_count": mixture.per_token,
        "expert_feed_forward_length": mixture.inner,
    }
