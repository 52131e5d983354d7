"""Output architectures, one file each, named after the model_type it writes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Protocol, cast

from moemerge.architectures.limits import Holds
from moemerge.architectures.reading import LAYER, Reading
from moemerge.architectures.slots import Mixture, Slot


class Architecture(Protocol):
    """What a file of this folder defines, with functions of the base's normalised config.

    An architecture with options also defines a frozen dataclass `Settings`: each field is a key of
    the config's `architecture_options:`, and its method `problems(mixture)` yields (key, what, fix)
    for values that cannot be.
    """

    HOLDS: Holds
    """The parts of a dense model's body for which it has a place; this decides its families."""

    READING: Reading
    """How a mixture of this class is read, even if another program wrote it."""

    SHARED: str
    """Its shared experts: none (empty), `always` on at full weight, or `gated` by a sigmoid gate.
    """

    SCORES: str
    """How its router scores experts: `softmax`, or `sigmoid` with a bias for selection alone."""

    READERS: tuple[str, ...]
    """The programs that load it and compute what transformers does, except for `caveats`."""

    ALIASES: tuple[str, ...]
    """Other names for it in a config."""

    TRAINING: Mapping[str, Any]
    """The keys of a config's `training:`, with their defaults."""

    def refusals(self, config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
        """Why it cannot hold this dense model: (what, the fix or a class that could)."""

    def caveats(self, config: dict[str, Any], mixture: Mixture) -> Iterator[tuple[str, str]]:
        """Features of this model that a reader drops: (reader, line). The reader may be empty."""

    def slots(self, config: dict[str, Any], mixture: Mixture) -> Iterator[Slot]:
        """Every tensor in the order of writing, one router for each layer among them."""

    def output_config(self, config: dict[str, Any], mixture: Mixture, dtype: str) -> dict[str, Any]:
        """The config.json to write; `dtype` has its long name."""


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of all architectures."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> Architecture:
    """The architecture `name`, one of `names()`."""
    return cast(Architecture, importlib.import_module(f"{__name__}.{name}"))


def name_of(model_type: object) -> str | None:
    """The name of the architecture that writes this model_type; None if there is none."""
    if model_type in names():
        return str(model_type)
    return next((name for name in names() if model_type in find(name).READING.model_types), None)


ONLY_READ = {"olmoe": Reading(counts=("num_experts",))}
"""Classes that moemerge reads, but does not write."""


def reading_of(family: object, tensors: Iterable[str]) -> Reading | None:
    """How a mixture of that model_type is read.

    A class that is not known is recognised by the names of its `tensors`; None if these are not
    known either.
    """
    if isinstance(family, str) and family in ONLY_READ:
        return ONLY_READ[family]
    if (name := name_of(family)) is not None:
        return find(name).READING
    inside = {found[3] for found in map(LAYER.fullmatch, tensors) if found}
    known = (find(name).READING.names for name in names())
    return next((Reading(one) for one in known if one.signature in inside), None)


def language_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a mixture's language part, if it also sees or hears; empty if it does not.

    The rest of the config is its `wrapper`.
    """
    text = config.get("text_config")
    if not isinstance(text, dict) or reading_of(text.get("model_type"), ()) is None:
        return {}
    return {**text, "wrapper": {key: v for key, v in config.items() if key != "text_config"}}


_READINGS = (*(find(name).READING for name in names()), *ONLY_READ.values())

COUNTS = tuple(dict.fromkeys(key for one in _READINGS for key in one.counts))
"""The keys for the number of experts in configs; some configs have two."""

PER_TOKEN = (*dict.fromkeys(one.per_token for one in _READINGS), "num_experts_per_token")
"""The keys for the number of experts a token in configs."""

ROUTERS = tuple({f".{one.names.router.removesuffix('.weight')}" for one in _READINGS})
"""The last parts of the routers' names, as modules of a layer."""

ROUTING = frozenset(name for one in _READINGS for name in one.names.routing)
"""The last parts of the names of routing modules."""


def count_of(config: Mapping[str, Any]) -> object:
    """The number of experts in a config, unchecked; None if it has none."""
    return next((config[key] for key in COUNTS if key in config), None)
