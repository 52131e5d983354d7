"""The tensors of a Llama's layer and its like, with shapes by the normalised config.

Shapes: D hidden size, H heads of size d, K heads of keys and values.
"""

from __future__ import annotations

from typing import Any

from moemerge.families.names import LAYER, NORM

Shapes = dict[str, tuple[int, ...]]


def attention(config: dict[str, Any], number: int) -> Shapes:
    """Two norms; attention with queries (H d, D), keys and values (K d, D), output (D, H d)."""
    layer, hidden = LAYER.format(layer=number), config["hidden_size"]
    before = ("post_attention_layernorm", "post_feedforward_layernorm")
    norms = before if config["post_norm"] else ("input_layernorm", "post_attention_layernorm")
    return {
        f"{layer}{norms[0]}.weight": (hidden,),
        **projections(config, f"{layer}self_attn."),
        f"{layer}{norms[1]}.weight": (hidden,),
    }


def projections(config: dict[str, Any], prefix: str, out: str = "o_proj") -> Shapes:
    """The four projections with their biases, and the norms of queries and keys."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    found: Shapes = {}
    for name, rows, width, bias in (
        ("q_proj", queries, hidden, config["qkv_bias"]),
        ("k_proj", keys, hidden, config["qkv_bias"]),
        ("v_proj", keys, hidden, config["qkv_bias"]),
        (out, hidden, queries, config["o_bias"]),
    ):
        found[f"{prefix}{name}.weight"] = (rows, width)
        if bias:
            found[f"{prefix}{name}.bias"] = (rows,)
    if config["qk_norm"]:
        full = config["qk_norm"] == "full"
        for name, size in (("q_norm", queries), ("k_norm", keys)):
            found[f"{prefix}{name}.weight"] = (size if full else head,)
    return found


def mamba(
    prefix: str, hidden: int, heads: int, inner: int, state: int, kernel: int,
    conv_bias: bool, bias: bool,
) -> Shapes:  # fmt: skip
    """Mamba 2 with `heads`, `inner` channels, and `state` values of all groups together.

    Its convolution over time has a `kernel` of that many steps.
    """
    mixed = inner + 2 * state
    found: Shapes = {
        f"{prefix}dt_bias": (heads,),
        f"{prefix}A_log": (heads,),
        f"{prefix}D": (heads,),
        f"{prefix}conv1d.weight": (mixed, 1, kernel),
        f"{prefix}in_proj.weight": (inner + mixed + heads, hidden),
        f"{prefix}norm.weight": (inner,),
        f"{prefix}out_proj.weight": (hidden, inner),
    }
    if conv_bias:
        found[f"{prefix}conv1d.bias"] = (mixed,)
    if bias:
        found[f"{prefix}in_proj.bias"] = (inner + mixed + heads,)
        found[f"{prefix}out_proj.bias"] = (hidden,)
    return found


def final_norm(config: dict[str, Any]) -> Shapes:
    """The norm (D) after the last layer."""
    return {NORM: (config["hidden_size"],)}


def one_width(config: dict[str, Any], _: int) -> int:
    """The same intermediate size in all layers."""
    width: int = config["intermediate_size"]
    return width
