"""The settings of a training: one frozen record, checked on creation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moemerge.errors import InputError, Problem


@dataclass(frozen=True)
class Tuning:
    """How much is trained on, and how fast.

    `data` are text or jsonl files; `held_out` is the share that is never trained on. A step reads
    `batch` passages of at most `length` tokens (None: 256 or the model's context, whichever is
    less; a length beyond the context is refused). `balance` is the weight of the load-balancing
    loss (None: as in config.json). `distil` is the share of the loss that is the distance to the
    predictions of each text's best expert.
    """

    data: tuple[str | Path, ...] = ()
    steps: int = 100
    batch: int = 8
    length: int | None = None
    learning_rate: float = 0.1
    held_out: float = 0.1
    balance: float | None = None
    distil: float = 0.0
    patience: int = 4

    def __post_init__(self) -> None:
        problems = []
        if not self.data:
            problems.append(Problem("--data", "names no text", "name a text or jsonl file"))
        for name, low, high in (
            ("steps", 1, 10**7), ("batch", 1, 4096), ("length", 8, 1 << 20), ("patience", 1, 10**6),
            ("learning_rate", 1e-9, 10), ("held_out", 1e-6, 0.9), ("distil", 0, 1),
            ("balance", 0, 1000),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                fix = f"write a number from {low:g} to {high:g}"
                problems.append(Problem(flag, f"is {value}", fix))
        if problems:
            raise InputError(problems)
