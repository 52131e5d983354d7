"""random: Gaussian rows of the model's initializer_range, for training afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.gates import Task
from moemerge.recipe import generator

if TYPE_CHECKING:
    from moemerge.gates import Matrix

USES = frozenset({"seed"})


def routers(task: Task) -> list[Matrix]:
    """(E, D) per layer from N(0, initializer_range), as transformers initialises a new model."""
    std = float(task.base.model.config.get("initializer_range") or 0.02)
    return [
        generator(task.options.seed, name, 0).standard_normal(task.shape, dtype="float32") * std
        for name in task.names
    ]
