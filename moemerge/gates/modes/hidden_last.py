"""hidden_last: the router input of each layer at the last token of each prompt."""

from __future__ import annotations

from moemerge.gates.fitting import averaged
from moemerge.gates.needs import Needs, Prompts
from moemerge.gates.task import Routers, Task

NEEDS = Needs(prompts=Prompts.REQUIRED, body_pass=True)


def routers(task: Task) -> Routers:
    """(E, D) for each layer, unit rows, from the router input of each prompt's last token."""
    return averaged(task, lambda inputs: inputs[-1])
