"""A safetensors file's header; every claim in it is checked.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length
N, N bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the data, to which the
offsets are relative, without holes.
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from moemerge.checkpoint.location import MAX_DIMENSIONS, PLAIN, Location
from moemerge.files import WEIGHTS_SUFFIX

SUFFIXES = (WEIGHTS_SUFFIX,)
MODEL, ADAPTER = f"model{WEIGHTS_SUFFIX}", f"adapter_model{WEIGHTS_SUFFIX}"
ORDER = 0
STREAMS = True
FIX = "download or save the model again"

MAX_HEADER_BYTES = 100_000_000


def read_header(path: Path, remote: BinaryIO | None = None) -> dict[str, Location]:
    """The tensors of a safetensors file by name.

    With `remote`, the file is read there and `path` is where it will be.

    Raises:
        ValueError: the file is truncated or its header claims what cannot be; says which.
        OSError: the file cannot be read.
    """
    with remote or path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(f"its header's length is {length} bytes, which no real file has")
        text = file.read(length)
        size = file.seek(0, os.SEEK_END)
    if len(text) < length:
        raise ValueError(f"it is truncated: the header is {length} bytes, the file has fewer")
    return check_header(parse_header(text), path, size, 8 + length)


def parse_header(text: bytes) -> dict[str, Any]:
    """The header's JSON as a dict; a name that appears twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("its header names a tensor twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header


def check_header(
    header: dict[str, Any], path: Path, file_bytes: int, data_start: int
) -> dict[str, Location]:
    """Make locations from a parsed header; each claim is checked against the file's size."""
    spans = []
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"tensor {name!r} has a malformed entry") from error
        if not isinstance(dtype, str) or dtype not in PLAIN:
            raise ValueError(f"tensor {name!r} has dtype {dtype!r}, which is not known")
        flat = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
        numbers = [*shape, begin, end] if flat else [None]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"tensor {name!r} has a shape or offset that is not a natural number")
        if end - begin != PLAIN[dtype].nbytes(math.prod(shape)):
            raise ValueError(
                f"tensor {name!r}: shape {shape} of {dtype} is not {end - begin} bytes"
            )
        if data_start + end > file_bytes:
            raise ValueError(
                f"it is truncated: tensor {name!r} ends at byte {data_start + end}, "
                f"the file at {file_bytes}"
            )
        spans.append((begin, end, name))
        tensors[name] = Location(path, data_start + begin, PLAIN[dtype], tuple(shape))
    spans.sort()
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(f"tensors {first!r} and {second!r} overlap")
    return tensors
