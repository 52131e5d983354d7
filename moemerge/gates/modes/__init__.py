"""Gate modes, one file each, named as a config's `gate_mode` names it."""

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
    """What a file of this folder defines; if it has options, `Settings` too, a frozen dataclass
    derived from `GateSettings`."""

    NEEDS: Needs
    """What its routers depend on."""

    def routers(self, task: Task) -> Routers:
        """One float32 (E, D) matrix per layer: row e is the direction that calls expert e."""


def names() -> list[str]:
    """The gate modes there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def for_merges() -> list[str]:
    """Those that need no split."""
    return [name for name in names() if not find(name).NEEDS.text]


def find(name: str) -> GateMode:
    """The gate mode `name`, one of `names()`."""
    return cast(GateMode, importlib.import_module(f"{__name__}.{name}"))


def settings_class(mode: GateMode) -> type[GateSettings]:
    """The options that a gate mode declares."""
    declared: type[GateSettings] = getattr(mode, "Settings", GateSettings)
    return declared
