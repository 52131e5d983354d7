"""Which type llama.cpp's quantiser gives each tensor of a file of a certain kind, such as Q4_K_M.

The rules are those of `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's
src/llama-quant.cpp (November 2026), without its special cases for other architectures.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS: dict[str, tuple[int, str]] = {
    "f32": (0, "F32"), "f16": (1, "F16"), "bf16": (32, "BF16"), "q4_0": (2, "Q4_0"),
    "q4_1": (3, "Q4_1"), "q5_0": (8, "Q5_0"), "q5_1": (9, "Q5_1"), "q8_0": (7, "Q8_0"),
    "q2_k": (10, "Q2_K"), "q3_k_s": (11, "Q3_K"), "q3_k_m": (12, "Q3_K"), "q3_k_l": (13, "Q3_K"),
    "q4_k_s": (14, "Q4_K"), "q4_k_m": (15, "Q4_K"), "q5_k_s": (16, "Q5_K"),
    "q5_k_m": (17, "Q5_K"), "q6_k": (18, "Q6_K"), "iq4_nl": (25, "IQ4_NL"), "iq3_s": (26, "IQ3_S"),
    "iq3_m": (27, "IQ3_S"), "iq4_xs": (30, "IQ4_XS"), "q2_k_s": (21, "Q2_K"),
    "iq1_s": (24, "IQ1_S"), "iq1_m": (31, "IQ1_M"), "iq2_xxs": (19, "IQ2_XXS"),
    "iq2_xs": (20, "IQ2_XS"), "iq2_s": (28, "IQ2_XS"), "iq2_m": (29, "IQ2_S"),
    "iq3_xxs": (23, "IQ3_XXS"), "iq3_xs": (22, "IQ3_S"),
}  # fmt: skip
"""Each kind of file: llama.cpp's number of it (`general.file_type`), and its usual type."""

ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_FLOATS = ("F32", "F16", "BF16")
_OF_256 = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
"""What takes the place of a type with blocks of 256 where a row is no multiple of that."""

_OUTPUT_OF_8 = (
    "q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_xs",
    "iq3_xs", "iq3_xxs",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What the rules ask of a model: heads per key head of the first layer (0 if it does not
    attend), experts, layers, tied embeddings; whether it is a Llama of 70B, whether there is an
    importance matrix, and the numbers of the layers that attend, if not all do."""

    groups: int
    experts: int
    layers: int
    tied: bool
    of_70b: bool = False
    weighed: bool = False
    attends: tuple[int, ...] = ()


_TINY = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
_WHOLE = (".shortconv.conv.weight", ".ssm_conv1d.weight")
_NEED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


def needs_importance(kind: str, name: str, chosen: str) -> bool:
    """Whether llama.cpp's quantiser refuses this type of a tensor without an importance matrix."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    return chosen in _NEED or (kind == "q2_k_s" and chosen == "Q2_K")


def stays_whole(name: str) -> bool:
    """Whether llama.cpp has a matrix in float32 in files of every kind."""
    return name.endswith(_WHOLE)


def type_of(kind: str, name: str, width: int, shape: Shape) -> str:
    """The type of the matrix `name` with rows of `width` values in a file of that kind."""
    usual = KINDS[kind][1]
    if usual in _FLOATS:
        return usual
    return _fallback(_chosen(kind, usual, name, width, shape), width)


def _fallback(chosen: str, width: int) -> str:
    if chosen in _OF_256 and width % 256:
        chosen = _OF_256[chosen]
    return chosen if not width % 32 else "F16"


def _chosen(kind: str, usual: str, name: str, width: int, shape: Shape) -> str:
    leaf = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    tiny = kind in _TINY
    if leaf == "output" or (leaf == "token_embd" and shape.tied):
        block = 256 if usual in _OF_256 else 32
        if width % block or usual == "Q8_0":
            return "Q8_0"
        return "Q5_K" if tiny or kind == "iq3_xxs" else "Q6_K"
    if leaf == "token_embd":
        if kind in ("iq2_s", "iq2_m", "iq3_xxs"):
            return "IQ3_S"
        return "Q2_K" if tiny else usual
    if tiny:
        return _tiny(kind, usual, leaf, layer, shape)
    if leaf == "attn_v":
        attends = shape.attends or tuple(range(shape.layers))
        return _values(kind, usual, attends.index(layer), len(attends), shape)
    if leaf in ("attn_q", "attn_k"):
        if leaf == "attn_k" and shape.experts == 8:
            return "Q8_0"
        return {"iq3_xs": "IQ3_XXS", "iq3_xxs": "IQ2_S"}.get(kind, usual)
    if leaf.startswith("ffn_down"):
        return _down(kind, usual, layer, shape)
    if leaf == "attn_output":
        if shape.experts == 8:
            return "Q5_K" if kind in _OUTPUT_OF_8 else usual
        known = {
            "q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K", "iq3_m": "Q4_K", "iq3_xxs": "IQ3_S"
        }  # fmt: skip
        return known.get(kind, usual)
    middle = leaf.startswith(("ffn_gate", "ffn_up"))
    if kind == "iq3_xs" and middle and shape.layers // 8 <= layer < 7 * shape.layers // 8:
        return "IQ3_XXS"
    return usual


def _tiny(kind: str, usual: str, leaf: str, layer: int, shape: Shape) -> str:
    """The kinds of fewer than three bits a value."""
    more = "IQ3_S" if kind in ("iq2_s", "iq2_m") else "Q2_K"
    if leaf == "attn_v":
        return "Q4_K" if shape.groups >= 4 or shape.experts >= 4 else more
    if leaf == "attn_k" and shape.experts == 8:
        return "Q4_K"
    if leaf.startswith("ffn_down"):
        return more if layer < shape.layers // 8 else usual
    if leaf == "attn_output":
        if shape.experts == 8:
            return "Q5_K"
        if kind in ("iq1_s", "iq1_m"):
            return "IQ2_XXS"
        return more if more == "IQ3_S" else usual
    return usual


def _values(kind: str, usual: str, layer: int, layers: int, shape: Shape) -> str:
    """Values of attention; `layer` counts, of `layers`, those that attend."""
    many, found = shape.groups >= 4, usual
    if kind == "q2_k":
        found = "Q4_K" if many else "Q3_K"
    elif kind == "iq3_xxs":
        found = "Q4_K" if many else "IQ3_XXS" if shape.weighed else "IQ3_S"
    elif (kind in ("iq3_s", "iq3_xs", "q2_k_s") and many) or kind == "iq3_m":
        found = "Q4_K"
    elif kind == "q3_k_m":
        found = "Q5_K" if layer < 2 else "Q4_K"
    elif kind == "q3_k_l" or (kind in ("iq4_nl", "iq4_xs") and many):
        found = "Q5_K"
    elif kind in ("q4_k_m", "q5_k_m") and _more_bits(layer, layers):
        found = "Q6_K"
    elif kind == "q4_k_s" and layer < 4:
        found = "Q5_K"
    if shape.of_70b and found in ("Q3_K", "Q4_K"):
        found = "Q5_K"
    return "Q8_0" if shape.experts == 8 else found


def _down(kind: str, usual: str, layer: int, shape: Shape) -> str:
    first = layer < shape.layers // 8
    if kind == "q2_k":
        return "Q3_K"
    if kind == "q3_k_m":
        return "Q5_K" if layer < shape.layers // 16 else "Q4_K"
    if kind == "iq3_m" and (first or (shape.experts == 8 and _more_bits(layer, shape.layers))):
        return "Q4_K"
    if kind == "q3_k_l":
        return "Q5_K"
    if kind in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if _more_bits(layer, shape.layers) else usual
    if kind == "iq3_xxs" and not shape.weighed:
        return "Q4_K" if first else "Q3_K"
    if not first:
        return usual
    if kind in ("iq4_nl", "iq4_xs"):
        return usual if shape.weighed else "Q5_K"
    if kind in ("q4_0", "q5_0"):
        return {"q4_0": "Q4_1", "q5_0": "Q5_1"}[kind] if shape.weighed else usual
    return {"q4_k_s": "Q5_K", "q2_k_s": "Q4_K"}.get(kind, usual)


def _more_bits(layer: int, layers: int) -> bool:
    """The layers whose values and down projections get more bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
