"""Gate modes: one file for each, with the name that a config's `gate_mode` gives."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

from moemerge.gates.needs import GateSettings, Needs
from moemerge.gates.task import Routers, Task

if TYPE_CHECKING:
    from moemerge.gates.task import Matrix


__all__ = ["GateMode", "Matrix", "Routers", "Task", "find", "names"]


class GateMode(Protocol):
    """The names that each file of this folder defines.

    A mode with options also defines `Settings`, a frozen dataclass derived from `GateSettings`.
    """

    NEEDS: Needs
    """What its routers are made from."""

    def routers(self, task: Task) -> Routers:
        """One float32 (E, D) matrix for each layer; row e gives the logit of expert e."""


def names() -> list[str]:
    """The names of all gate modes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def for_merges() -> list[str]:
    """The names of the gate modes that need no split."""
    return [name for name in names() if not find(name).NEEDS.text]


def find(name: str) -> GateMode:
    """The gate mode of that name, one of `names()`."""
    return cast(GateMode, importlib.import_module(f"{__name__}.{name}"))


def settings_class(mode: GateMode) -> type[GateSettings]:
    """The options that a gate mode declares."""
    declared: type[GateSettings] = getattr(mode, "Settings", GateSettings)
    return declared
