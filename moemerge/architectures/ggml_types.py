"""Which type llama.cpp's quantiser gives each tensor of a file of a certain kind, such as Q4_K_M.

The rules are those of `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's
src/llama-quant.cpp (November 2026), without its special cases for other architectures, and without
the kinds that need an importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS: dict[str, tuple[int, str]] = {
    "f32": (0, "F32"), "f16": (1, "F16"), "bf16": (32, "BF16"), "q4_0": (2, "Q4_0"),
    "q4_1": (3, "Q4_1"), "q5_0": (8, "Q5_0"), "q5_1": (9, "Q5_1"), "q8_0": (7, "Q8_0"),
    "q2_k": (10, "Q2_K"), "q3_k_s": (11, "Q3_K"), "q3_k_m": (12, "Q3_K"), "q3_k_l": (13, "Q3_K"),
    "q4_k_s": (14, "Q4_K"), "q4_k_m": (15, "Q4_K"), "q5_k_s": (16, "Q5_K"),
    "q5_k_m": (17, "Q5_K"), "q6_k": (18, "Q6_K"), "iq4_nl": (25, "IQ4_NL"), "iq3_s": (26, "IQ3_S"),
    "iq3_m": (27, "IQ3_S"), "iq4_xs": (30, "IQ4_XS"),
}  # fmt: skip
"""Each kind of file: llama.cpp's number of it (`general.file_type`), and its usual type."""

ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_FLOATS = ("F32", "F16", "BF16")
_OF_256 = {
    "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0",
    "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
"""What takes the place of a type with blocks of 256 where a row is no multiple of that."""

_OUTPUT_OF_8 = (
    "q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_xs"
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What the rules ask of a model: heads per key head, experts, layers, tied embeddings; and
    whether it is a Llama of 70B."""

    groups: int
    experts: int
    layers: int
    tied: bool
    of_70b: bool = False


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
    if leaf == "output" or (leaf == "token_embd" and shape.tied):
        block = 256 if usual in _OF_256 else 32
        return "Q8_0" if width % block or usual == "Q8_0" else "Q6_K"
    if leaf == "attn_v":
        return _values(kind, usual, layer, shape)
    if leaf == "attn_k" and shape.experts == 8:
        return "Q8_0"
    if leaf.startswith("ffn_down"):
        return _down(kind, usual, layer, shape)
    if leaf == "attn_output":
        if shape.experts == 8:
            return "Q5_K" if kind in _OUTPUT_OF_8 else usual
        known = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K", "iq3_m": "Q4_K"}
        return known.get(kind, usual)
    return usual


def _values(kind: str, usual: str, layer: int, shape: Shape) -> str:
    many, found = shape.groups >= 4, usual
    if kind == "q2_k":
        found = "Q4_K" if many else "Q3_K"
    elif (kind == "iq3_s" and many) or kind == "iq3_m":
        found = "Q4_K"
    elif kind == "q3_k_m":
        found = "Q5_K" if layer < 2 else "Q4_K"
    elif kind == "q3_k_l" or (kind in ("iq4_nl", "iq4_xs") and many):
        found = "Q5_K"
    elif kind in ("q4_k_m", "q5_k_m") and _more_bits(layer, shape.layers):
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
    if kind in ("iq4_nl", "iq4_xs", "q4_k_s") and first:
        return "Q5_K"
    return usual


def _more_bits(layer: int, layers: int) -> bool:
    """The layers whose values and down projections get more bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
