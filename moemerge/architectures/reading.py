"""How a mixture of a class is read, whoever wrote it: tensor names and config keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

LAYER = re.compile(r"(model\.(?:language_model\.)?layers\.(\d+)\.)(.+)")
"""A tensor of a layer: the layer's prefix, its number, and the tensor's name within it."""

MLP = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense MLP: (F, D), (F, D), (D, F)."""

SEGMENTS, SPLIT_FACTOR = "moemerge_segments", "moemerge_split_factor"
"""Keys of config.json for later edits: its experts are parts of MLPs.

Each MLP was cut into that many segments, with equal rows in the routers; or the experts are slices
of one split MLP, and the output of the chosen slices is multiplied by the factor. No reader uses
these keys.
"""


@dataclass(frozen=True)
class Names:
    """A class's names within a layer; the defaults are those of most classes.

    `matrices` are an expert's, in the order of `MLP`. Some writers store all experts in two
    tensors, gate above up (E, 2F, D) and down (E, D, F), with names of `uppers` and `lowers`. If
    readers know only these, the class is `stacked`, the first name of each is theirs, and
    `matrices` are names that only moemerge uses. `closed` says why moemerge cannot take a mixture
    of the class apart, if it cannot. `routers` are other names of the `router`. Names that only
    some readers know are those of transformers 5 in memory. The name of a tensor with one number
    for each expert ends in `bias`. Names of shared experts and their gate begin with one of
    `shared`.
    """

    expert: str = "mlp.experts."
    matrices: tuple[str, str, str] = MLP
    router: str = "mlp.gate.weight"
    routers: tuple[str, ...] = ()
    uppers: tuple[str, ...] = ("mlp.experts.gate_up_proj",)
    lowers: tuple[str, ...] = ("mlp.experts.down_proj",)
    stacked: bool = False
    closed: str = ""
    bias: str = "e_score_correction_bias"
    shared: tuple[str, ...] = ("mlp.shared_expert", "shared_mlp.")
    shared_gate: str = "mlp.shared_expert_gate.weight"

    def matrix(self, expert: int, which: int) -> str:
        """The name of an expert's matrix, by its place in `MLP`."""
        return f"{self.expert}{expert}.{self.matrices[which]}.weight"

    @property
    def signature(self) -> str:
        """A name by which files with these names are recognised."""
        return self.uppers[0] if self.stacked else self.matrix(0, 0)

    @property
    def routing(self) -> set[str]:
        """The last parts of the names of routing modules: `gate` of `mlp.gate.weight`."""
        weights = (self.router, *self.routers, self.shared_gate)
        return {name.removesuffix(".weight").rpartition(".")[2] for name in weights}


def windows_by_type(config: Mapping[str, Any]) -> Any:
    """Each layer's attention by `layer_types`; if config.json has none, all have a window."""
    types = config.get("layer_types")
    return windows_where(config, lambda _: True) if types is None else types


def windows_where(config: Mapping[str, Any], windowed: Callable[[int], bool]) -> list[str]:
    """Each layer's attention; `windowed` says whether the layer of that number has a window."""
    layers = config.get("num_hidden_layers")
    numbers = range(layers if type(layers) is int else 0)
    return ["sliding_attention" if windowed(n) else "full_attention" for n in numbers]


def no_windows(_: Mapping[str, Any]) -> None:
    """For a class whose layers attend to everything."""


def dense_of(
    family: str, without: Collection[str], own: Mapping[str, Any] | None = None
) -> Callable[[Mapping[str, Any], int], dict[str, Any]]:
    """A function for `Reading.dense`: the mixture's config of that family, without some keys."""

    def made(config: Mapping[str, Any], inner: int) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in without}
        return {**kept, "intermediate_size": inner, **(own or {}), "model_type": family}

    return made


@dataclass(frozen=True)
class RouterInput:
    """What a class's router sees: the input of a `module` of the dense model's layer, by its usual
    name. If `unit`, each token's input is divided by its root mean square."""

    module: str = "mlp"
    unit: bool = False


@dataclass(frozen=True)
class Reading:
    """How transformers 5 reads a class's files; the defaults are for a class that is not known."""

    names: Names = field(default_factory=Names)

    counts: tuple[str, ...] = ()
    """The keys of config.json for the number of experts; each is needed by some reader."""

    per_token: str = "num_experts_per_tok"
    """The key of config.json for the number of experts a token."""

    model_types: tuple[str, ...] = ()
    """Further model_types of the class, beside the file's name."""

    dense: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None
    """The config.json of a dense model with the same body, by the mixture's config and the
    intermediate size of its experts; None if the body has attention as usual in all layers."""

    sees: RouterInput = field(default_factory=RouterInput)
    """What its router sees."""

    windows: Callable[[Mapping[str, Any]], Any] = windows_by_type
    """The `layer_types` of a dense model with the same windows, for a config.json with a
    `sliding_window`; None if there are no windows."""

    turned: float = 1.0
    """The partial rotary factor if config.json does not say one."""

    older_kinds: Mapping[str, str] = field(default_factory=dict)
    """Names in `layer_types` that transformers 4 writes differently, with its name for each."""

    factor: str = ""
    """The key of config.json, and of the class's `Settings`, for a factor of the chosen experts'
    output; empty if there is none."""

    stacks_adapters: bool = False
    """Whether PEFT 0.21 takes an adapter on its experts only in stacked form, although files hold
    separate experts."""
