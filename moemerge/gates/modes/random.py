"""random: Gaussian rows of standard deviation initializer_range, to be trained afterwards."""

from __future__ import annotations

from moemerge.gates.needs import Needs
from moemerge.gates.task import Routers, Task
from moemerge.plan import generator

NEEDS = Needs(seed=True)


def routers(task: Task) -> Routers:
    """(E, D) a layer from N(0, initializer_range), as transformers initialises a new model."""
    std = float(task.body.base.model.config.get("initializer_range") or 0.02)
    draws = [generator(task.options.seed, name, 0) for name in task.names]
    return Routers([one.standard_normal(task.shape, dtype="float32") * std for one in draws])
