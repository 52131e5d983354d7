"""An importance matrix: how much each input of a matrix matters, as llama.cpp's `llama-imatrix`
writes it to a GGUF file.

Of each matrix it has the sums of its inputs' squares, `NAME.in_sum2` (experts or 1, width), and how
many tokens were summed, `NAME.counts` (experts or 1, 1).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint.gguf.header import Header
from moemerge.checkpoint.location import Location, read_values
from moemerge.errors import ReadError

if TYPE_CHECKING:
    import numpy as np

SUMS, COUNTS = ".in_sum2", ".counts"
FAMILY = "imatrix"
"""What stands for a model's family where such a file is named as a model."""


def is_imatrix(header: Header) -> bool:
    """Whether a file's fields say that it is one."""
    found = header.fields.get("general.type")
    return found is not None and found.value == FAMILY


def importances(header: Header) -> dict[str, Location]:
    """The file's tensors.

    Raises:
        ValueError: one is of another type or shape than it must be, or alone.
    """
    for name, at in header.tensors.items():
        stem = name.removesuffix(SUMS).removesuffix(COUNTS)
        sums, counts = (header.tensors.get(stem + end) for end in (SUMS, COUNTS))
        if stem == name or sums is None or counts is None:
            raise ValueError(f"{name} has no pair, {SUMS} and {COUNTS}")
        rows = 1 if len(sums.shape) == 1 else sums.shape[0]
        if at.encoding.name != "F32" or len(sums.shape) > 2 or math.prod(counts.shape) != rows:
            raise ValueError(f"{name} is {at.encoding.name} {list(at.shape)}, which cannot be")
    return header.tensors


def weights_of(sums: Location, counts: Location, row: int) -> np.ndarray[Any, Any]:
    """The importance of each input of a matrix, (width,), as float32; all 1 if it saw no token.

    Raises:
        ReadError: one is negative, NaN or Inf.
    """
    import numpy as np

    width = sums.shape[-1]
    (count,) = read_values(counts, row, 1)
    if not count > 0:
        return np.ones(width, np.float32)
    made = read_values(sums, row * width, width).astype(np.float32) / np.float32(count)
    if not (np.isfinite(made).all() and (made >= 0).all()):
        raise ReadError(f"{Path(sums.file).name} holds NaN, Inf or a negative importance")
    return made
