"""Gate modes, one file each, named as a config's `gate_mode` names it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from moemerge.checkpoint import Donor
from moemerge.options import Options
from moemerge.prompts import ExpertPrompts
from moemerge.recipe import Sources
from moemerge.reporting import Reporter

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Task:
    """What a gate mode works from. `names` are the routers', one a layer, in order."""

    names: Sequence[str]
    base: Donor
    sources: Sources
    experts: tuple[ExpertPrompts, ...]
    options: Options
    reporter: Reporter

    @property
    def shape(self) -> tuple[int, int]:
        """A router's: (E, D)."""
        return len(self.experts), int(self.base.model.config["hidden_size"])


class GateMode(Protocol):
    """What a file of this folder defines."""

    USES: frozenset[str]
    """Of `prompts`, `model` (it runs the base model) and `seed`: what its result depends on."""

    def routers(self, task: Task) -> list[Matrix]:
        """One float32 (E, D) matrix per layer: row e is the direction that calls expert e."""


def names() -> list[str]:
    """The gate modes there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> GateMode:
    """The gate mode `name`, one of `names()`."""
    return cast(GateMode, importlib.import_module(f"{__name__}.{name}"))
