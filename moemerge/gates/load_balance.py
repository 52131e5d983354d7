"""The bias of DeepSeek-V3's routing: it counts for the choice of experts, and spreads load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moemerge.architectures import Mixture
from moemerge.gates.task import Routers

if TYPE_CHECKING:
    import numpy as np

    Vector = np.ndarray[Any, np.dtype[np.float32]]

ROUNDS, STEP, SHRINK = 400, 0.05, 0.99
"""Updates of the bias: how many, how large at first, and each to the one before."""


def biases(made: Routers, mixture: Mixture) -> list[Vector]:
    """A layer's bias (E), with which each expert serves as many of the prompts' tokens.

    Zeros where a gate mode reads no texts. It is found as it is trained (Wang et al. 2024,
    "Auxiliary-loss-free load balancing", https://arxiv.org/abs/2408.15664): up for an expert below
    its share, down for one above. The texts of each expert count the same together.
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
    """The bias that gives each expert an equal share of the places, as near as steps come."""
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
