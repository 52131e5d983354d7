"""uniform_random: uniform rows as torch.nn.Linear draws them, for training afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.gates import Task
from moemerge.recipe import generator

if TYPE_CHECKING:
    from moemerge.gates import Matrix

USES = frozenset({"seed"})


def routers(task: Task) -> list[Matrix]:
    """(E, D) per layer from U(-D**-0.5, D**-0.5), the default of `torch.nn.Linear`."""
    bound = task.shape[1] ** -0.5
    return [
        (generator(task.options.seed, name, 0).random(task.shape, dtype="float32") * 2 - 1) * bound
        for name in task.names
    ]
