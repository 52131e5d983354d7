"""hidden_avg: the mean router input of each layer while the base model reads the prompts."""

from __future__ import annotations

from moemerge.gates.fitting import averaged
from moemerge.gates.needs import Needs, Prompts
from moemerge.gates.task import Routers, Task

NEEDS = Needs(prompts=Prompts.REQUIRED, body_pass=True)


def routers(task: Task) -> Routers:
    """(E, D) for each layer, unit rows: positive minus negative prompts' mean router inputs."""
    return averaged(task, lambda inputs: inputs.mean(axis=0))
