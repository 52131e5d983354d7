"""activation: for a split; ridge regression of the slices that each token of a text activates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moemerge.gates.fitting import not_positive
from moemerge.gates.needs import GateSettings, Needs
from moemerge.gates.task import Routers, Task
from moemerge.split import chosen_slices

NEEDS = Needs(text=True, body_pass=True)


@dataclass(frozen=True)
class Settings(GateSettings):
    """`lambda`: the penalty, relative to the mean of the Gram matrix's diagonal.

    `kappa`: the spread of the logits over the slices. It is small, so that all chosen slices have
    nearly the same weight.
    """

    lambda_: float = 0.1
    kappa: float = 0.03

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Numbers that are not above 0."""
        yield from not_positive(**{"lambda": self.lambda_}, kappa=self.kappa)


def routers(task: Task) -> Routers:
    """(E, D) for each layer, by ridge regression without intercept of the slices to choose.

    A token's target is 1 for the slices of most energy, as many as the mixture chooses, and 0 for
    the others, minus the mean of these. A layer's loss hardly changes with lambda from .01 to .3.
    """
    import numpy as np

    assert task.cutter is not None
    active = task.cutter.cutting.active
    matrices = []
    for layer in task.cutter.layers():
        wanted = chosen_slices(layer.energies, active).astype(np.float64)
        wanted -= wanted.mean(axis=1, keepdims=True)
        inputs = layer.inputs.astype(np.float64)
        gram = inputs.T @ inputs
        gram[np.diag_indices_from(gram)] += task.settings.lambda_ * np.trace(gram) / len(gram)
        rows = np.linalg.solve(gram, inputs.T @ wanted).T
        spread = np.sqrt((inputs @ rows.T).var(axis=1).mean())
        scale = task.settings.kappa / spread if spread > 0 else 1.0
        matrices.append((scale * rows).astype(np.float32))
    return Routers(matrices)
