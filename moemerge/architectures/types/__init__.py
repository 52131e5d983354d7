"""Output architectures, one file each, named after the model_type it writes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

from moemerge.architectures.slots import Mixture, Slot


class Architecture(Protocol):
    """What a file of this folder defines, in functions of the base's normalised config.

    A frozen dataclass `Settings` too if it has options: a field is a key of the config's
    `architecture_options:`, and its method `problems(mixture)` yields (key, what, fix) for values
    that cannot be.
    """

    FAMILIES: tuple[str, ...]
    """The dense model_types that it reproduces exactly."""

    SHARED: str
    """Its experts that are always on: none (empty), `always` at full weight, `gated` by a sigmoid
    gate."""

    SCORES: str
    """How its router scores experts: `softmax`, or `sigmoid` with a bias for selection alone."""

    READERS: tuple[str, ...]
    """The programs that load it, and compute what transformers does but for `caveats`."""

    ALIASES: tuple[str, ...]
    """What else a config may call it."""

    TRAINING: Mapping[str, Any]
    """The keys of a config's `training:`, with what they are when nothing is said."""

    def refusals(self, config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
        """What of this dense model it cannot express: (what, what could or what to do)."""

    def caveats(self, config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
        """Which reader drops a feature of this model: (reader, line); one is no reader's."""

    def slots(self, config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
        """Every tensor in the order of writing, the routers among them, one a layer."""

    def output_config(self, config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
        """The config.json to write; `dtype` by its long name."""


def names() -> list[str]:
    """The architectures there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Architecture:
    """The architecture `name`, one of `names()`."""
    return cast(Architecture, importlib.import_module(f"{__name__}.{name}"))
