"""hidden_last: what each layer's router sees at the last token of each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moemerge.gates import Task
from moemerge.gates.hidden_avg import USES, from_router_inputs

if TYPE_CHECKING:
    from moemerge.gates import Matrix

__all__ = ["USES", "routers"]


def routers(task: Task) -> list[Matrix]:
    """(E, D) per layer, unit rows, from the router input of each prompt's last token."""
    return from_router_inputs(task, lambda inputs: inputs[-1])
