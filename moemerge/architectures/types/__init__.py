"""Output architectures, one file each, named after the model_type it writes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, cast

from moemerge.architectures.limits import Holds
from moemerge.architectures.reading import LAYER, Reading
from moemerge.architectures.slots import Mixture, Slot


class Architecture(Protocol):
    """What a file of this folder defines, in functions of the base's normalised config.

    A frozen dataclass `Settings` too if it has options: a field is a key of the config's
    `architecture_options:`, and its method `problems(mixture)` yields (key, what, fix) for values
    that cannot be.
    """

    HOLDS: Holds
    """What of a dense model's body it has a place for; which families it reproduces follows."""

    READING: Reading
    """How a mixture of this class is read, also one that another program wrote."""

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


ONLY_READ = {"olmoe": Reading(counts=("num_experts",))}
"""Classes that moemerge reads, but does not write."""


def reading_of(family: object, tensors: Iterable[str]) -> Reading | None:
    """How a mixture of that model_type is read; of a class that is not known, by the names that its
    `tensors` go by. None if these are not known either."""
    if isinstance(family, str) and family in ONLY_READ:
        return ONLY_READ[family]
    if family in names():
        return find(str(family)).READING
    inside = {found[3] for found in map(LAYER.fullmatch, tensors) if found}
    known = (find(name).READING.names for name in names())
    return next((Reading(one) for one in known if one.signature in inside), None)


_READINGS = (*(find(name).READING for name in names()), *ONLY_READ.values())

COUNTS = tuple(dict.fromkeys(key for one in _READINGS for key in one.counts))
"""The keys by which configs say how many experts there are; some say it twice."""

ROUTING = frozenset(name for one in _READINGS for name in one.names.routing)
"""The last parts of the names of modules that route."""


def count_of(config: Mapping[str, Any]) -> object:
    """What a config says of how many experts there are."""
    return next((config[key] for key in COUNTS if key in config), None)
