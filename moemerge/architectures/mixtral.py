"""mixtral: softmax top-k experts in the body of a Llama or a Mistral.

Routing renormalises the chosen experts' weights (Jiang et al. 2024, https://arxiv.org/abs/2401.04088),
so equal experts give exactly the dense model. Names are the Hub's per-expert ones, which every
reader knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures import Slot

FAMILIES = ("llama", "mistral")
SHARED_EXPERTS = False

_LAYER = "model.layers.{layer}."
_ROUTER = _LAYER + "block_sparse_moe.gate.weight"
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}.{mlp}.weight"
_MLP = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_KEPT = (
    "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


def refusals(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A Mixtral has no bias anywhere, and one kind of attention in all layers."""
    if config.get("attention_bias"):
        yield "has attention biases, which a Mixtral has no place for", "a qwen2_moe could hold it"
    if config.get("mlp_bias"):
        yield "has MLP biases, which a Mixtral has no place for", "use a model without them"
    if len(set(config.get("layer_types") or ["one"])) > 1:
        yield "mixes kinds of attention by layer (layer_types)", "use a model with one kind"


def caveats(config: dict[str, Any]) -> Iterator[str]:
    """Read in mlx-lm's mixtral.py and llama.cpp's llama graph, November 2026."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield f"mlx-lm cannot load it: its Mixtral has no head_dim ({config['head_dim']} here)"
    if config["rope_scaling"]:
        kind = config["rope_scaling"]["rope_type"]
        yield f"mlx-lm ignores its rope scaling ({kind}): expect other text from it"
    if config["sliding_window"]:
        window = config["sliding_window"]
        yield f"mlx-lm and llama.cpp attend beyond its sliding window ({window} tokens)"


def slots(config: dict[str, Any], experts: int) -> Iterator[Slot]:
    """Embeddings, layers (norms, attention, router, experts), final norm, head unless tied."""
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    body = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
    }
    yield _same("model.embed_tokens.weight", (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, shape in body.items():
            yield _same(f"{_LAYER.format(layer=layer)}{name}.weight", shape)
        yield Slot(_ROUTER.format(layer=layer), (experts, hidden), None)
        for expert in range(experts):
            for dense, mlp in _MLP.items():
                yield Slot(
                    name=_EXPERT.format(layer=layer, expert=expert, mlp=mlp),
                    shape=(hidden, inner) if dense == "down_proj" else (inner, hidden),
                    source=f"{_LAYER.format(layer=layer)}mlp.{dense}.weight",
                    expert=expert,
                    residual=dense == "down_proj",
                )
    yield _same("model.norm.weight", (hidden,))
    if not config["tie_word_embeddings"]:
        yield _same("lm_head.weight", (vocab, hidden))


def output_config(
    config: dict[str, Any], experts: int, experts_per_token: int, dtype: str
) -> dict[str, Any]:
    """The base's own values under Mixtral's names; defaults that differ by family are written."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **{key: config.get(key) for key in _KEPT},
        "num_local_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _same(name: str, shape: tuple[int, ...]) -> Slot:
    return Slot(name, shape, name)
