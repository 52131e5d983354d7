"""Output architectures, one file each, named after the model_type it writes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast


@dataclass(frozen=True)
class Slot:
    """One tensor that the architecture needs.

    It is the donor's tensor `source` of that `shape`: the base model's, or expert `expert`'s. A
    `residual` one ends its MLP, where `residual_scale` applies. A router has no source.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    expert: int | None = None
    residual: bool = False


class Architecture(Protocol):
    """What a file of this folder defines, in functions of the base's normalised config."""

    FAMILIES: tuple[str, ...]
    """The dense model_types that it reproduces exactly."""

    SHARED_EXPERTS: bool
    """Whether it has experts that are always on."""

    def refusals(self, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """What of this dense model it cannot express: (what, what could or what to do)."""

    def caveats(self, config: dict[str, Any]) -> Iterator[str]:
        """Which programs that read it drop a feature of this model."""

    def slots(self, config: dict[str, Any], experts: int) -> Iterator[Slot]:
        """Every tensor in the order of writing, the routers among them, one a layer."""

    def output_config(
        self, config: dict[str, Any], experts: int, experts_per_token: int, dtype: str
    ) -> dict[str, Any]:
        """The config.json to write; `dtype` by its long name."""


def names() -> list[str]:
    """The architectures there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Architecture:
    """The architecture `name`, one of `names()`."""
    return cast(Architecture, importlib.import_module(f"{__name__}.{name}"))
