"""The bias of DeepSeek-V3's routing: added to the scores that choose experts, it spreads load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moemerge.architectures import Mixture
from moemerge.gates.task import Routers

if TYPE_CHECKING:
    import numpy as np

    Vector = np.ndarray[Any, np.dtype[np.float32]]

ROUNDS, STEP, SHRINK = 400, 0.05, 0.99
"""Updates of the bias: their number, the first step, and the factor from each step to the next."""


def biases(made: Routers, mixture: Mixture) -> list[Vector]:
    """Each layer's bias (E,), float32, with which every expert serves equally many prompt tokens.

    The bias is zero if the gate mode reads no texts. It is found by the updates of training (Wang
    et al. 2024, "Auxiliary-loss-free load balancing", https://arxiv.org/abs/2408.15664): it goes
    up for an expert with less than its share, and down for one with more. The texts of each expert
    have the same weight in total.
    """
    import numpy as np

    count = len(made.matrices[0])
    if not made.texts:
        return [np.zeros(count, np.float32) for _ in made.matrices]
    owners = [text.expert for text in made.texts]
    per_token = max(1, mixture.per_token * count // mixture.experts)
    found = []
    for layer in made.held_out:
        lengths = [len(logits) for logits in layer]
        of_expert = np.bincount(owners, lengths, count)
        weight = np.repeat(1 / of_expert[owners], lengths)
        scores = 1 / (1 + np.exp(-np.concatenate(layer).astype(np.float64)))
        found.append(_balanced(scores, weight / weight.sum(), per_token).astype(np.float32))
    return found


def _balanced(scores: Any, weight: Any, per_token: int) -> Any:
    """The bias (E,) of the step whose loads were nearest to equal. `scores` is (T, E)."""
    import numpy as np

    count = scores.shape[1]
    bias = best = np.zeros(count)
    step, least = STEP, np.inf
    for _ in range(ROUNDS):
        chosen = np.argpartition(-(scores + bias), per_token - 1, axis=1)[:, :per_token]
        load = np.bincount(chosen.ravel(), np.repeat(weight, per_token), count)
        uneven = np.abs(load - per_token / count).max()
        if uneven < least:
            best, least = bias, uneven
        bias = bias + step * np.sign(per_token / count - load)
        step *= SHRINK
    return best - best.mean()
