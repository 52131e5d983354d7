"""How a merge is run, apart from what it makes: frozen records, checked when they are created."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from moemerge.errors import InputError, Problem, flag

_POWERS = {"": 0, "K": 1, "M": 2, "B": 3, "G": 3, "T": 4}


@dataclass(frozen=True)
class ShardSize:
    """The most one shard may hold: `limit` parameters or bytes."""

    limit: int
    unit: Literal["parameters", "bytes"]

    @classmethod
    def parse(cls, text: str) -> ShardSize:
        """`1B` is parameters; `5GB`, `500MB` and `2GiB` are bytes.

        Raises:
            InputError: a bare number, an unknown unit, or nothing at all.
        """
        found = re.fullmatch(
            r"(\d{1,15}(?:\.\d{1,15})?)\s*(?:([KMBT])|([KMGT])(i?)B)", text.strip(), re.I
        )
        if found:
            number, count, size, binary = found.groups()
            base = 1024 if binary else 1000
            limit = int(float(number) * base ** _POWERS[(count or size).upper()])
            if limit > 0:
                return cls(limit, "parameters" if count else "bytes")
        example = "write 1B or 500M for parameters, 5GB or 2GiB for bytes"
        raise InputError([Problem("--shard-size", f"{text!r} is not a size", example)])

    def max_bytes(self, itemsize: int) -> int:
        """The limit in bytes, for tensors of `itemsize` bytes a parameter."""
        return self.limit * itemsize if self.unit == "parameters" else self.limit


@dataclass(frozen=True)
class RunOptions:
    """How sources are read, and how models run for gate modes that need it.

    With `lazy`, the weights of fewer decoder layers are in memory at a time. With `stream`, models
    on the Hub are read over the network and no copy is kept. `cache_dir` None is the Hub's usual
    cache.
    """

    lazy: bool = False
    seed: int = 0
    device: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    cache_dir: str | Path | None = None
    stream: bool = False

    def problems(self) -> Iterator[Problem]:
        """Values that no run can have: (option, what is wrong, the fix)."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            fix = "write auto, cpu, cuda, cuda:1 or mps"
            yield Problem("--device", f"{self.device!r} is not a device", fix)
        if self.load_in_4bit and self.load_in_8bit:
            yield Problem("--load-in-4bit", "and --load-in-8bit cannot both be", "keep one of them")
        if not 0 <= self.seed < 2**63:
            yield Problem("--seed", f"is {self.seed}", "write a whole number from 0 to 2^63 - 1")


@dataclass(frozen=True)
class WriteOptions:
    """How files are written.

    `jobs` None is two threads for each processor. `direct` None writes past the page cache where
    the file system can; True also tells where it cannot. `shards` is this run's share, such as
    `0/8`. `ray` is the address of a cluster; `local` starts one on this machine. `type` is the kind
    of a GGUF file, such as q4_k_m; without it, tensors stay as they are in the sources. With
    `exact`, a GGUF file is made only if all its bytes beside the routers can be copied. `imatrix`
    is a file of llama-imatrix, by which values are weighed when they are quantised. `statistics`
    keeps the routers' inputs, so that an expert can be added without the others' texts.
    """

    shard_size: str = "5GB"
    overwrite: bool = False
    verify: bool = True
    copy_tokenizer: bool = True
    jobs: int | None = None
    direct: bool | None = None
    checksums: bool = True
    shards: str = ""
    ray: str = ""
    type: str = ""
    exact: bool = False
    imatrix: str | Path = ""
    statistics: bool = False

    def problems(self) -> Iterator[Problem]:
        """Values that no files can be written with: (option, what is wrong, the fix)."""
        try:
            ShardSize.parse(self.shard_size)
        except InputError as error:
            yield from error.problems
        if self.jobs is not None and not 1 <= self.jobs <= 256:
            yield Problem("--jobs", f"is {self.jobs}", "write a number from 1 to 256")
        if self.shards and self.share is None:
            fix = "write PART/PARTS, as 0/8 to 7/8 for eight runs"
            yield Problem("--shards", f"{self.shards!r} is no share", fix)
        if self.shards and self.ray:
            yield Problem("--shards", "and --ray cannot both be", "Ray shares the work by itself")
        if self.shards and self.overwrite:
            why = "each run would remove the others' work"
            yield Problem("--shards", "and --overwrite cannot both be", why)

    @property
    def past_the_cache(self) -> bool:
        """Whether to write past the page cache where the file system can."""
        return self.direct is not False

    @property
    def share(self) -> tuple[int, int] | None:
        """`shards` as (part, parts); None if it is not a share."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shards)
        if not found:
            return None
        part, parts = map(int, found.groups())
        return (part, parts) if part < parts else None


@dataclass(frozen=True)
class PublishOptions:
    """What the model card shows, and where the result is pushed.

    `push` is a repository on the Hub. With `card_config` None the card shows the config; a card for
    new routers shows it if the card before did.
    """

    push: str = ""
    private: bool = False
    push_as_you_go: bool = False
    card: str | Path = ""
    card_config: bool | None = None

    def problems(self) -> Iterator[Problem]:
        """Values that no push can have: (option, what is wrong, the fix)."""
        for name in ("private", "push_as_you_go"):
            if getattr(self, name) and not self.push:
                yield Problem(flag(name), "says nothing without --push", "add --push USER/NAME")


@dataclass(frozen=True)
class Options(PublishOptions, WriteOptions, RunOptions):
    """Every option of a merge. None changes what the config says is made, except `seed`.

    `allow_crimes` lets models of different families mix. `untrained_ok` leaves out the note that
    equal experts need training.

    Raises:
        InputError: values that cannot be, or cannot be together; all of them are told.
    """

    allow_crimes: bool = False
    untrained_ok: bool = False

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise InputError(problems)

    def problems(self) -> Iterator[Problem]:
        """All problems of these values."""
        for part in (WriteOptions, RunOptions, PublishOptions):
            yield from part.problems(self)
        if self.push and self.shards:
            fix = f"run `moemerge push OUT {self.push}` when all shares are done"
            yield Problem("--push", "and --shards cannot both be", fix)
        if self.push_as_you_go and self.ray:
            why = "shards leave one after another: use --push alone"
            yield Problem("--push-as-you-go", "and --ray cannot both be", why)

    @property
    def chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults: their values by their names."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}

    @property
    def threads(self) -> int:
        """The number of threads that write: `jobs`, or two for each processor, because half of them
        wait for disks; at least eight if they wait for the network."""
        return self.jobs or max(min(2 * (os.cpu_count() or 2), 16), 8 * self.stream)
