"""How a merge is run, as opposed to what it makes: one frozen record, checked on creation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from moemerge.errors import InputError, Problem

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
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMBT])|([KMGT])(i?)B)", text.strip(), re.I)
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

    `given` names the options a person set, so that one without effect can be said.
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
    cache_dir: str | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        try:
            ShardSize.parse(self.shard_size)
        except InputError as error:
            problems += error.problems
        if self.device not in ("auto", "cpu", "cuda", "mps"):
            fix = "write auto, cpu, cuda or mps"
            problems.append(Problem("--device", f"{self.device!r} is not a device", fix))
        if self.load_in_4bit and self.load_in_8bit:
            what = "and --load-in-8bit cannot both be"
            problems.append(Problem("--load-in-4bit", what, "keep one of them"))
        if not 0 <= self.seed < 2**63:
            fix = "write a whole number from 0 to 2^63 - 1"
            problems.append(Problem("--seed", f"is {self.seed}", fix))
        if problems:
            raise InputError(problems)
