"""Values to ggml's blocks, by llama.cpp's own code if it is installed, otherwise by numpy.

The `xllamacpp` package has ggml's `ggml_quantize_chunk` in its library, and a llama.cpp that is on
the PATH has it in a library beside `llama-quantize`. The `gguf` package encodes the simple types in
numpy, to the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.errors import RunError

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[Any]]

IN_NUMPY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
"""What the `gguf` package encodes by itself."""

INSTALL = "pip install 'moemerge[gguf]'"
IMPORTANT = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""The types that ggml writes only with an importance matrix."""

_LIBRARIES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


def lacks(name: str) -> str:
    """What must be installed to write this type; empty if nothing must."""
    if library() is not None:
        return ""
    there = importlib.util.find_spec("gguf") is not None
    return "" if there and name in IN_NUMPY else INSTALL


def encode(values: Numbers, name: str, number: int, weights: Numbers | None = None) -> memoryview:
    """The blocks of rows of float32 values, (rows, width).

    `weights` are the importance of each column, (width,), as float32.

    Raises:
        RunError: the type needs what is not installed.
    """
    import numpy as np

    if not np.isfinite(values).all():
        raise RunError(f"a tensor that becomes {name} holds NaN or Inf; use another model")
    code = library()
    if weights is None and name in IMPORTANT:
        raise RunError(f"{name} cannot be written without an importance matrix")
    if code is None:
        missing = lacks(name) or (INSTALL if weights is not None else "")
        if missing:
            raise RunError(f"{name} cannot be written: {missing}")
        import gguf

        made = gguf.quantize(values, gguf.GGMLQuantizationType(number))
        return np.ascontiguousarray(made).data.cast("B")
    rows, width = values.shape
    values = np.ascontiguousarray(values, np.float32)
    room = rows * code.ggml_row_size(number, width)
    out = bytearray(room)
    into = (ctypes.c_char * room).from_buffer(out)
    pointer = ctypes.POINTER(ctypes.c_float)
    important = None
    if weights is not None:
        weights = np.ascontiguousarray(weights, np.float32)
        important = weights.ctypes.data_as(pointer)
    source = values.ctypes.data_as(pointer)
    done = code.ggml_quantize_chunk(number, source, into, 0, rows, width, important)
    if done != room:
        raise RunError(f"{name}: ggml wrote {done} bytes of {room}")
    return memoryview(out)


@lru_cache(maxsize=1)
def library() -> Any:
    """ggml's functions, of the `xllamacpp` package or a llama.cpp on the PATH; None if neither is
    installed."""
    for path in _libraries():
        try:
            code = ctypes.CDLL(str(path))
            code.ggml_quantize_chunk.restype = ctypes.c_size_t
        except (OSError, AttributeError):
            continue
        code.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_int64,
            ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_float),
        ]  # fmt: skip
        code.ggml_row_size.restype = ctypes.c_size_t
        code.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        return code
    return None


def _libraries() -> Iterator[Path]:
    """Files that may have ggml's functions."""
    found = importlib.util.find_spec("xllamacpp")
    for place in (found.submodule_search_locations or ()) if found else ():
        yield from sorted(Path(place).glob("xllamacpp*.so"))
    if program := shutil.which("llama-quantize"):
        here = Path(program).resolve().parent
        for folder in (here, here.parent / "lib"):
            yield from (folder / name for name in _LIBRARIES if (folder / name).is_file())
