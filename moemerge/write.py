"""A plan to files: shards streamed by their recipes, checksummed in passing, renamed when whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge import recipe
from moemerge.checkpoint import Location, numpy_dtype
from moemerge.checkpoint.safetensors_file import read_header
from moemerge.errors import RunError
from moemerge.output import STATE_DIRECTORY, writing
from moemerge.plan import Shard, file_header
from moemerge.recipe import Sources

if TYPE_CHECKING:
    from moemerge.gates import Matrix


def write_shard(shard: Shard, sources: Sources, out: Path, advance: Callable[[int], object]) -> str:
    """Write one shard into `out` and return its checksum (xxh3, 64 bits, hex).

    The file has its name only when it is whole and flushed to disk. `advance` is called with the
    bytes of each step. A shard knows of no other, so they may be written in any order.

    Raises:
        ReadError: a source is truncated or holds NaN or Inf.
        WriteError: the disk is full or cannot be written.
    """
    import xxhash

    digest = xxhash.xxh3_64()
    temporary = out / STATE_DIRECTORY / shard.file
    with writing(temporary), temporary.open("wb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            advance(len(data))

        put(shard.header())
        for tensor in shard.tensors:
            for block in recipe.stream(
                tensor.name, tensor.shape, tensor.dtype, tensor.recipe, sources
            ):
                put(block)
        os.fsync(file.fileno())
        temporary.replace(out / shard.file)
    return digest.hexdigest()


def save_routers(shard: Shard, matrices: Sequence[Matrix], path: Path) -> dict[str, Location]:
    """Save what a gate mode made, (E, D) a layer, as a tiny checkpoint in the shard's dtype.

    Raises:
        RunError: a router is not finite, which only a broken model can cause.
    """
    import numpy as np

    for tensor, matrix in zip(shard.tensors, matrices, strict=True):
        if not np.isfinite(matrix).all():
            raise RunError(
                f"{tensor.name}: the router came out as NaN or Inf; the base model overflows on "
                "these prompts: try another dtype of it, or --device cpu"
            )
    with writing(path), path.open("wb") as file:
        file.write(file_header(shard.tensors, {"format": "pt"}))
        for tensor, matrix in zip(shard.tensors, matrices, strict=True):
            file.write(matrix.astype(numpy_dtype(tensor.dtype)).tobytes())
    return read_header(path)
