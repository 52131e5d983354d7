"""How a mixture of a class is read, whoever wrote it: its tensors' names and its config's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
"""A tensor of a layer: the layer's prefix, its number, and the tensor's name within it."""

MLP = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense MLP: (F, D), (F, D), (D, F)."""

SEGMENTS, SPLIT_FACTOR = "moemerge_segments", "moemerge_split_factor"
"""The keys by which config.json says for later edits that its experts are parts of MLPs.

An expert is so many segments, with equal rows in the routers; or a slice of the one MLP that was
split, and what the chosen slices add is multiplied by the factor. No reader heeds either.
"""


@dataclass(frozen=True)
class Names:
    """A class's names within a layer; by default, those that most classes have.

    `matrices` are an expert's in the order of `MLP`. Some writer has all experts' in two tensors
    instead, gate above up (E, 2F, D) and down (E, D, F), under names of `uppers` and `lowers`;
    where readers know only such, `stacked`, the first of each is theirs and `matrices` are ours.
    `routers` are other names of the `router`. Those that are not every reader's are the names in
    transformers 5's memory. A selection bias's name ends in `bias`; those of experts that are
    always on, and of their gate, begin with one of `shared`.
    """

    expert: str = "mlp.experts."
    matrices: tuple[str, str, str] = MLP
    router: str = "mlp.gate.weight"
    routers: tuple[str, ...] = ()
    uppers: tuple[str, ...] = ("mlp.experts.gate_up_proj",)
    lowers: tuple[str, ...] = ("mlp.experts.down_proj",)
    stacked: bool = False
    bias: str = "e_score_correction_bias"
    shared: tuple[str, ...] = ("mlp.shared_expert", "shared_mlp.")
    shared_gate: str = "mlp.shared_expert_gate.weight"

    def matrix(self, expert: int, which: int) -> str:
        """The name of an expert's matrix, by its place in `MLP`."""
        return f"{self.expert}{expert}.{self.matrices[which]}.weight"

    @property
    def signature(self) -> str:
        """A name by which files that use these names are known."""
        return self.uppers[0] if self.stacked else self.matrix(0, 0)

    @property
    def routing(self) -> set[str]:
        """The last parts of the names of modules that route: `gate` of `mlp.gate.weight`."""
        weights = (self.router, *self.routers, self.shared_gate)
        return {name.removesuffix(".weight").rpartition(".")[2] for name in weights}


def windows_by_type(config: Mapping[str, Any]) -> Any:
    """What config.json says of each layer's attention; a window in all if it says nothing."""
    types = config.get("layer_types")
    return windows_where(config, lambda _: True) if types is None else types


def windows_where(config: Mapping[str, Any], windowed: Callable[[int], bool]) -> list[str]:
    """Each layer's attention, by whether the layer of that number has a window."""
    layers = config.get("num_hidden_layers")
    numbers = range(layers if type(layers) is int else 0)
    return ["sliding_attention" if windowed(n) else "full_attention" for n in numbers]


def no_windows(_: Mapping[str, Any]) -> None:
    """For a class whose layers attend to everything."""


def _always(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Reading:
    """How transformers 5 reads a class's files; the defaults are for a class of which nothing is
    known but its names."""

    names: Names = field(default_factory=Names)

    counts: tuple[str, ...] = ()
    """The keys of config.json that say how many experts there are, all that some reader needs."""

    windows: Callable[[Mapping[str, Any]], Any] = windows_by_type
    """Of a config.json with a `sliding_window`: the `layer_types` of a dense model with the same
    windows; None if there are none."""

    turned: float = 1.0
    """The part of each head that is turned where config.json does not say."""

    older_kinds: Mapping[str, str] = field(default_factory=dict)
    """Kinds of layers that transformers 4 calls otherwise in `layer_types`: its word for each."""

    attends: Callable[[Mapping[str, Any]], bool] = _always
    """Whether all layers are attention, by config.json."""

    has_positions: Callable[[Mapping[str, Any]], bool] = _always
    """Whether attention has positions (rope), by config.json."""

    factor: str = ""
    """The key of config.json, and of the class's `Settings`, for a number that multiplies what the
    chosen experts add; empty if there is none."""

    stacks_adapters: bool = False
    """Whether PEFT 0.21 takes an adapter on its experts in stacked form alone, though files hold
    them apart."""
