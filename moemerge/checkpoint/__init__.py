"""The read side: sources opened by their headers, tensors read when they are asked for."""

from moemerge.checkpoint.donor import Donor, Opener
from moemerge.checkpoint.lora import Adapter
from moemerge.checkpoint.model import Checkpoint, fetch, streamed
from moemerge.checkpoint.model_config import normalise
from moemerge.checkpoint.tensors import (
    FLOATS,
    ITEMSIZE,
    Location,
    check_unchanged,
    numpy_dtype,
    read_bytes,
    read_into,
    read_numbers,
    read_rows,
)

__all__ = [
    "FLOATS",
    "ITEMSIZE",
    "Adapter",
    "Checkpoint",
    "Donor",
    "Location",
    "Opener",
    "check_unchanged",
    "fetch",
    "normalise",
    "numpy_dtype",
    "read_bytes",
    "read_into",
    "read_numbers",
    "read_rows",
    "streamed",
]
