"""uniform_random: uniform rows as torch.nn.Linear draws them, to be trained afterwards."""

from __future__ import annotations

from moemerge.gates.needs import Needs
from moemerge.gates.task import Routers, Task
from moemerge.plan import generator

NEEDS = Needs(seed=True)


def routers(task: Task) -> Routers:
    """(E, D) a layer from U(-D**-0.5, D**-0.5), the default of `torch.nn.Linear`."""
    bound = task.shape[1] ** -0.5
    draws = [generator(task.options.seed, name, 0) for name in task.names]
    return Routers([(one.random(task.shape, dtype="float32") * 2 - 1) * bound for one in draws])
