"""hidden_avg: the mean of what each layer's router sees while the base model reads the prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moemerge.gates import Task
from moemerge.prompts import ExpertPrompts, Prompt
from moemerge.router_inputs import router_inputs

if TYPE_CHECKING:
    import numpy as np

    from moemerge.gates import Matrix

    Vector = np.ndarray[Any, np.dtype[np.float32]]

USES = frozenset({"prompts", "model"})


def routers(task: Task) -> list[Matrix]:
    """(E, D) per layer, unit rows: positive minus negative prompts' mean router inputs."""
    return from_router_inputs(task, lambda inputs: inputs.mean(axis=0))


def from_router_inputs(task: Task, reduce: Callable[[Matrix], Vector]) -> list[Matrix]:
    """One matrix per layer, with `reduce` making one vector (D) of a prompt's inputs (T, D)."""
    prompts = list(dict.fromkeys(p for e in task.experts for p in e.positive + e.negative))
    return [
        contrast(task.experts, dict(zip(prompts, map(reduce, layer), strict=True)).__getitem__)
        for layer in router_inputs(task.base, task.sources, prompts, task.options, task.reporter)
    ]


def contrast(experts: tuple[ExpertPrompts, ...], vector: Callable[[Prompt], Vector]) -> Matrix:
    """(E, D): each expert's mean over its positive prompts minus that over its negative ones.

    Every prompt counts the same, however long; rows are scaled to unit length, as mergekit does.
    """
    import numpy as np

    rows = []
    for expert in experts:
        row = np.mean([vector(prompt) for prompt in expert.positive], axis=0, dtype=np.float32)
        if expert.negative:
            row = row - np.mean([vector(p) for p in expert.negative], axis=0, dtype=np.float32)
        rows.append(row / max(float(np.linalg.norm(row)), 1e-8))
    return np.stack(rows).astype(np.float32)
