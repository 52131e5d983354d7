"""hidden_avg: the mean of what each layer's router sees while the base model reads the prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moemerge.errors import RunError
from moemerge.gates import Task
from moemerge.prompts import ExpertPrompts, Prompt
from moemerge.router_inputs import router_inputs

if TYPE_CHECKING:
    import numpy as np

    from moemerge.gates import Matrix

    Vector = np.ndarray[Any, np.dtype[np.float32]]

USES = frozenset({"prompts", "model"})

_ALIKE = 1e-6
"""Unit rows, or the two sides of a contrast, that differ by less differ by rounding alone."""


def routers(task: Task) -> list[Matrix]:
    """(E, D) per layer, unit rows: positive minus negative prompts' mean router inputs."""
    return from_router_inputs(task, lambda inputs: inputs.mean(axis=0))


def from_router_inputs(task: Task, reduce: Callable[[Matrix], Vector]) -> list[Matrix]:
    """One matrix per layer, with `reduce` making one vector (D) of a prompt's inputs (T, D)."""
    prompts = list(dict.fromkeys(p for e in task.experts for p in e.positive + e.negative))
    layers = router_inputs(task.base, task.sources, prompts, task.options, task.reporter)
    routers = []
    for number, layer in enumerate(layers):
        vectors = dict(zip(prompts, map(reduce, layer), strict=True))
        routers.append(contrast(task.experts, vectors.__getitem__, f"in layer {number}"))
    return routers


def contrast(
    experts: tuple[ExpertPrompts, ...], vector: Callable[[Prompt], Vector], where: str
) -> Matrix:
    """(E, D): each expert's mean over its positive prompts minus that over its negative ones.

    Every prompt counts the same, however long; rows are scaled to unit length, as mergekit does.

    Raises:
        RunError: an expert's row is zero, or two are equal: a router that cannot choose. `where`
            is the layer, in words.
    """
    import numpy as np

    rows: list[Any] = []
    for index, expert in enumerate(experts):
        row = np.mean([vector(prompt) for prompt in expert.positive], axis=0, dtype=np.float32)
        least = _ALIKE * float(np.linalg.norm(row))
        if expert.negative:
            row = row - np.mean([vector(p) for p in expert.negative], axis=0, dtype=np.float32)
        norm = float(np.linalg.norm(row))
        if norm <= least:
            raise RunError(
                f"experts[{index}]: its prompts give a router of zeros {where}; change the prompts"
            )
        row = row / norm
        for other, before in enumerate(rows):
            if np.abs(row - before).max() <= _ALIKE:
                raise RunError(
                    f"experts[{other}] and experts[{index}]: their prompts give the same router "
                    f"{where}; change the prompts"
                )
        rows.append(row)
    return np.stack(rows).astype(np.float32)
