"""Gate modes, one file each, named as a config's `gate_mode` names it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

from moemerge.gates.task import Routers, Task

if TYPE_CHECKING:
    from moemerge.gates.task import Matrix


__all__ = ["GateMode", "Matrix", "Routers", "Task", "find", "names"]


class GateMode(Protocol):
    """What a file of this folder defines; a frozen dataclass `Settings` too if it has options.

    A field of `Settings` is a key of the config's `gate:` (`lambda_` is `lambda`), and its method
    `problems()` yields (key, what, fix) for values that cannot be.
    """

    USES: frozenset[str]
    """What its result depends on: `prompts` (needed), `any prompts` (used if there are some),
    `split text` (needed), `model` (it runs the body), `experts` (it runs the experts' own
    models), `seed`."""

    def routers(self, task: Task) -> Routers:
        """One float32 (E, D) matrix per layer: row e is the direction that calls expert e."""


def names() -> list[str]:
    """The gate modes there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def for_merges() -> list[str]:
    """Those that need no split."""
    return [name for name in names() if "split text" not in find(name).USES]


def find(name: str) -> GateMode:
    """The gate mode `name`, one of `names()`."""
    return cast(GateMode, importlib.import_module(f"{__name__}.{name}"))
