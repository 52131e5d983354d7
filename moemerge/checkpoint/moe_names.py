"""Where each MoE family keeps its experts and routers: the names that every reader knows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
"""A tensor of a layer: the layer's prefix, its number, and the tensor's name within it."""

MLP = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a dense MLP: (F, D), (F, D), (D, F)."""

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""The keys by which configs say how many experts there are; some say it twice."""


@dataclass(frozen=True)
class Names:
    """A family's names within a layer, and its config's keys.

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
    count: tuple[str, ...]
    inner: str
    stacked: bool = False

    def matrix(self, expert: int, which: int) -> str:
        """The name of an expert's matrix, by its place in `MLP`."""
        return f"{self.expert}{expert}.{self.matrices[which]}.weight"

    def count_of(self, config: Mapping[str, Any]) -> object:
        """What the config says of how many experts there are."""
        return next((config[key] for key in self.count if key in config), None)


_MIXTRAL = Names(
    expert="block_sparse_moe.experts.",
    matrices=("w1", "w3", "w2"),
    router="block_sparse_moe.gate.weight",
    routers=("mlp.gate.weight",),
    uppers=("mlp.experts.gate_up_proj",),
    lowers=("mlp.experts.down_proj",),
    count=("num_local_experts",),
    inner="intermediate_size",
)


def _like_qwen(inner: str, *count: str) -> Names:
    return dataclasses.replace(
        _MIXTRAL,
        expert="mlp.experts.",
        matrices=MLP,
        router="mlp.gate.weight",
        routers=(),
        count=count,
        inner=inner,
    )


_GRANITE = Names(
    expert="block_sparse_moe.experts.",
    matrices=MLP,
    router="block_sparse_moe.router.layer.weight",
    routers=("block_sparse_moe.router.weight",),
    uppers=("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    lowers=("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
    count=("num_local_experts",),
    inner="intermediate_size",
    stacked=True,
)

FAMILIES = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": _like_qwen("moe_intermediate_size", "num_experts"),
    "qwen3_moe": _like_qwen("moe_intermediate_size", "num_experts", "num_local_experts"),
    "olmoe": _like_qwen("intermediate_size", "num_experts"),
    "flex_olmo": _like_qwen("intermediate_size", "num_experts"),
    "dots1": _like_qwen("moe_intermediate_size", "n_routed_experts"),
    "glm4_moe": _like_qwen("moe_intermediate_size", "n_routed_experts"),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
}
"""By model_type. The names that are not every reader's are those of transformers 5's memory."""
