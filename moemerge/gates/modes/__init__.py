"""Gate modes: one file for each, with the name that a config's `gate_mode` gives."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from moemerge.gates.needs import GateSettings, Needs
from moemerge.gates.prompts import ExpertPrompts
from moemerge.gates.task import Routers, Task
from moemerge.text import Prompt

if TYPE_CHECKING:
    from moemerge.gates.task import Matrix


__all__ = ["GateMode", "Matrix", "Routers", "Task", "Writer", "find", "names", "writer"]


class GateMode(Protocol):
    """The names that each file of this folder defines.

    A mode with options also defines `Settings`, a frozen dataclass derived from `GateSettings`.
    """

    NEEDS: Needs
    """What its routers are made from."""

    def routers(self, task: Task) -> Routers:
        """One float32 (E, D) matrix for each layer; row e gives the logit of expert e."""


class Writer(GateMode, Protocol):
    """A gate mode whose routers are made from what each expert writes."""

    def planned(
        self, own: GateSettings, experts: Sequence[ExpertPrompts], start: Prompt
    ) -> list[list[Prompt]]:
        """What each expert will write, with zeros for the tokens that are not known yet."""

    def write(self, task: Task) -> list[list[Prompt]]:
        """What each expert writes."""


def writer(mode: GateMode) -> Writer | None:
    """The gate mode, if its experts write."""
    return cast(Writer, mode) if hasattr(mode, "write") else None


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
