"""The types of ggml's tensors, in which a GGUF file stores them: blocks of values along a row.

Sizes are those of ggml.h (`ggml_type`, https://github.com/ggml-org/llama.cpp). The `gguf` package
decodes blocks with numpy, and encodes some types; `quantise` encodes the others.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint.gguf.quantise import INSTALL
from moemerge.checkpoint.location import PLAIN, Encoding
from moemerge.errors import ReadError

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[Any]]

_BLOCKS = {
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17),
}  # fmt: skip
"""Each type's number, the values of a block, and its bytes."""

_NUMBERS = {"F32": 0, "F16": 1, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30}


def _decode(number: int, raw: memoryview) -> Numbers:
    """The float32 values of whole blocks."""
    import numpy as np

    try:
        import gguf
    except ImportError as error:
        what = "values in blocks cannot be decoded without the gguf package"
        raise ReadError(f"{what}: {INSTALL}") from error

    data = np.frombuffer(raw, np.uint8)
    kind = gguf.GGMLQuantizationType(number)
    found: Numbers = gguf.dequantize(data, kind).astype(np.float32, copy=False)
    return found.reshape(-1)


QUANTISED = {
    name: Encoding(name, values, nbytes, partial(_decode, number))
    for name, (number, values, nbytes) in _BLOCKS.items()
}
"""The encodings in blocks, by ggml's names."""

ENCODINGS = PLAIN | QUANTISED
"""Everything that a tensor may be written in, by name."""

NUMBERS = _NUMBERS | {name: number for name, (number, _, _) in _BLOCKS.items()}
"""ggml's number of each type that a tensor of a GGUF file may have."""

BY_NUMBER = {number: ENCODINGS[name] for name, number in NUMBERS.items()}


def encode(values: Numbers, name: str, weights: Numbers | None = None) -> memoryview:
    """The blocks of some rows of float32 values, (rows, width), as ggml writes them.

    `weights` are the importance of each column, (width,), as float32.

    Raises:
        QuantiserError: the type needs llama.cpp's own code, which is not installed.
    """
    from moemerge.checkpoint.gguf import quantise

    return quantise.encode(values, name, NUMBERS[name], weights)
