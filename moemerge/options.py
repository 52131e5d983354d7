"""How a merge is run, as opposed to what it makes: one frozen record, checked on creation."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from moemerge.errors import InputError, Problem

_POWERS = {"": 0, "K": 1, "M": 2, "B": 3, "G": 3, "T": 4}
_SPELLED = {
    "checksums": "checksum",
    "card_config": "config-in-card",
    "untrained_ok": "i-understand-this-is-not-useful-without-training",
}


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
class Options:
    """Every way to run a merge; none changes what the config says is made, save `seed`.

    `jobs` None is two a processor; `shards` is this run's share, as `0/8`; `ray` is a cluster's
    address, `local` for one of its own; `push` is a repository on the Hub. `given` names options
    that a person spelled out; `flags` adds those that differ from their defaults, so that one
    without effect can be said.
    """

    lazy: bool = False
    shard_size: str = "5GB"
    seed: int = 0
    device: str = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    overwrite: bool = False
    verify: bool = True
    copy_tokenizer: bool = True
    allow_crimes: bool = False
    untrained_ok: bool = False
    cache_dir: str | Path | None = None
    jobs: int | None = None
    direct: bool = True
    checksums: bool = True
    shards: str = ""
    ray: str = ""
    stream: bool = False
    push: str = ""
    private: bool = False
    push_as_you_go: bool = False
    card: str | Path = ""
    card_config: bool = True
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        try:
            ShardSize.parse(self.shard_size)
        except InputError as error:
            problems += error.problems
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            fix = "write auto, cpu, cuda, cuda:1 or mps"
            problems.append(Problem("--device", f"{self.device!r} is not a device", fix))
        if self.load_in_4bit and self.load_in_8bit:
            what = "and --load-in-8bit cannot both be"
            problems.append(Problem("--load-in-4bit", what, "keep one of them"))
        if not 0 <= self.seed < 2**63:
            fix = "write a whole number from 0 to 2^63 - 1"
            problems.append(Problem("--seed", f"is {self.seed}", fix))
        if self.jobs is not None and not 1 <= self.jobs <= 256:
            problems.append(Problem("--jobs", f"is {self.jobs}", "write a number from 1 to 256"))
        if self.shards and self.share is None:
            fix = "write PART/PARTS, as 0/8 to 7/8 for eight runs"
            problems.append(Problem("--shards", f"{self.shards!r} is no share", fix))
        for other, why in (("ray", "Ray shares the work by itself"),
                           ("overwrite", "each run would remove the others' work")):  # fmt: skip
            if self.shards and getattr(self, other):
                problems.append(Problem("--shards", f"and --{other} cannot both be", why))
        for name in ("private", "push_as_you_go"):
            if getattr(self, name) and not self.push:
                fix = "add --push USER/NAME"
                problems.append(Problem(self._flag(name), "says nothing without --push", fix))
        if self.push and self.shards:
            fix = f"run `moemerge push OUT {self.push}` when all shares are done"
            problems.append(Problem("--push", "and --shards cannot both be", fix))
        if self.push_as_you_go and self.ray:
            why = "shards leave one after another: use --push alone"
            problems.append(Problem("--push-as-you-go", "and --ray cannot both be", why))
        if problems:
            raise InputError(problems)

    @property
    def flags(self) -> dict[str, str]:
        """Each option that a person set, and the flag to name it by."""
        names = [f.name for f in fields(self) if f.name != "given"]
        differ = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: self._flag(name) for name in names if name in self.given | differ}

    def _flag(self, name: str) -> str:
        if name == "device" and "cuda" in self.given:
            return "--no-cuda" if self.device == "cpu" else "--cuda"
        no = "no-" if getattr(self, name) is False else ""
        return f"--{no}{_SPELLED.get(name, name).replace('_', '-')}"

    @property
    def threads(self) -> int:
        """How many threads write: `jobs`, else two a processor, for half of them wait for disks; at
        least eight where they wait for the network."""
        return self.jobs or max(min(2 * (os.cpu_count() or 2), 16), 8 * self.stream)

    @property
    def share(self) -> tuple[int, int] | None:
        """`shards` as (part, parts); None where it is not one."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shards)
        if not found:
            return None
        part, parts = map(int, found.groups())
        return (part, parts) if part < parts else None
