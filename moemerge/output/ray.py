"""Shards written by a Ray cluster, as tasks on a shared file system; needs `moemerge[ray]`."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from moemerge.errors import MoemergeError, RunError
from moemerge.output.manifest import FileEntry
from moemerge.output.write import How, write_shard
from moemerge.plan import Shard, Sources

RETRIES = 10
"""How often a shard is tried again after its worker died."""


def write_shards(
    shards: Sequence[Shard], sources: Sources, out: Path, how: How, address: str
) -> Iterator[tuple[Shard, FileEntry]]:
    """Write the shards on the cluster; yield each finished shard with its manifest entry.

    The cluster runs `write_shard` too, so the bytes are the same as without it. `address` is an
    address for `ray.init`, or `local` for a cluster on this machine.

    Raises:
        RunError: the cluster cannot be reached, or a shard failed `RETRIES` times.
        ReadError, WriteError: as `write_shard`.
    """
    import ray

    ours = not ray.is_initialized()
    try:
        if ours:
            _knock(address)
            ray.init(address=None if address == "local" else address, log_to_driver=False)
        task = ray.remote(max_retries=RETRIES)(_write)
        located = ray.put(sources)
        waiting = {task.remote(shard, located, out, how): shard for shard in shards}
        while waiting:
            (ended,), _ = ray.wait(list(waiting), num_returns=1)
            entry = ray.get(ended)
            yield waiting.pop(ended), entry
    except MoemergeError:
        raise
    except (ray.exceptions.RayError, OSError) as error:
        line = str(error).strip().splitlines()[-1]
        raise RunError(f"Ray: {line}; run the same command again to go on") from error
    finally:
        if ours:
            ray.shutdown()


def _write(shard: Shard, sources: Sources, out: Path, how: How) -> FileEntry:
    return write_shard(shard, sources, out, how, lambda nbytes: None)


def _knock(address: str) -> None:
    """Check that something listens at `host:port`, because Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address)
    if found:
        with socket.create_connection((found[1], int(found[2])), timeout=10):
            pass
