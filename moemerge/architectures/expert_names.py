"""Where each MoE family keeps its experts and routers: the names that every reader knows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
"""A tensor of a layer: the layer's prefix, its number, and the tensor's name within it."""

MLP = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense MLP: (F, D), (F, D), (D, F)."""

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""The keys by which configs say how many experts there are; some say it twice."""

SEGMENTS, SPLIT_FACTOR = "moemerge_segments", "moemerge_split_factor"
"""The keys by which config.json says for later edits that its experts are parts of MLPs.

An expert is so many segments, with equal rows in the routers; or a slice of the one MLP that was
split, and what the chosen slices add is multiplied by the factor. No reader heeds either.
"""


@dataclass(frozen=True)
class Names:
    """A family's names within a layer.

    `matrices` are an expert's in the order of `MLP`. Some writer has all experts' in two tensors
    instead, gate above up (E, 2F, D) and down (E, D, F), under names of `uppers` and `lowers`;
    where readers know only such, `stacked`, the first of each is theirs and `matrices` are ours.
    """

    expert: str
    matrices: tuple[str, str, str]
    router: str
    routers: tuple[str, ...]
    uppers: tuple[str, ...]
    lowers: tuple[str, ...]
    stacked: bool = False

    def matrix(self, expert: int, which: int) -> str:
        """The name of an expert's matrix, by its place in `MLP`."""
        return f"{self.expert}{expert}.{self.matrices[which]}.weight"


_MIXTRAL = Names(
    expert="block_sparse_moe.experts.",
    matrices=("w1", "w3", "w2"),
    router="block_sparse_moe.gate.weight",
    routers=("mlp.gate.weight",),
    uppers=("mlp.experts.gate_up_proj",),
    lowers=("mlp.experts.down_proj",),
)


_QWEN = dataclasses.replace(
    _MIXTRAL, expert="mlp.experts.", matrices=MLP, router="mlp.gate.weight", routers=()
)
_GRANITE = Names(
    expert="block_sparse_moe.experts.",
    matrices=MLP,
    router="block_sparse_moe.router.layer.weight",
    routers=("block_sparse_moe.router.weight",),
    uppers=("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    lowers=("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    stacked=True,
)

_FAMILIES = {
    "mixtral": _MIXTRAL,
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "dots1", "glm4_moe"), _QWEN),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE),
}
"""By model_type. The names that are not every reader's are those of transformers 5's memory."""


def names_of(family: object, tensors: Iterable[str]) -> Names | None:
    """A family's names; of one that is not known, those by which its `tensors` go, if any."""
    if isinstance(family, str) and family in _FAMILIES:
        return _FAMILIES[family]
    inside = {found[3] for found in map(LAYER.fullmatch, tensors) if found}
    for names in (_MIXTRAL, _QWEN, _GRANITE):
        if (names.uppers[0] if names.stacked else names.matrix(0, 0)) in inside:
            return names
    return None


def count_of(config: Mapping[str, Any]) -> object:
    """What a config says of how many experts there are."""
    return next((config[key] for key in COUNTS if key in config), None)
