"""Neurons of a dense MLP assigned to slices: an order of the neurons, cut into equal parts.

Legend: F intermediate neurons, D hidden size, N slices, T tokens. An order is a vector of F neuron
numbers: the first F/N of them are slice 0, the next F/N are slice 1, and so on. The first slices
are the shared ones, which are always on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Order = np.ndarray[Any, np.dtype[np.int64]]
    Matrix = np.ndarray[Any, np.dtype[np.float32]]
    Random = np.random.Generator

ASSIGNMENTS = ("coactivation", "kmeans", "order", "random")

_ROUNDS = 30
"""The most rounds of a clustering; most clusterings stop changing earlier."""


def in_order(neurons: int) -> Order:
    """The neurons in the order that they have in the model: (F)."""
    import numpy as np

    return np.arange(neurons)


def at_random(neurons: int, random: Random) -> Order:
    """The neurons shuffled: (F).

    LLaMA-MoE found this best where training follows (Zhu et al. 2024,
    https://arxiv.org/abs/2406.16554).
    """
    return random.permutation(neurons)


def by_weights(gate: Matrix, sizes: Matrix, slices: int, shared: int, random: Random) -> Order:
    """Group neurons by balanced k-means of their rows of gate_proj, `gate` (F, D): an order (F).

    Neurons of like direction are active on the same tokens (MoEfication's parameter clustering:
    Zhang et al. 2022, https://arxiv.org/abs/2110.01786). The shared slices hold the neurons of the
    largest `sizes` (F).
    """
    import numpy as np

    slice_of = _by_size(sizes, slices)
    routed = slice_of >= shared
    slice_of[routed] = shared + _k_means(_unit(gate[routed]), slices - shared, random)
    return np.argsort(slice_of, kind="stable")


def by_activation(
    strengths: Matrix, slices: int, shared: int, active: int, random: Random
) -> Order:
    """Group neurons that are strong on the same tokens: an order (F).

    `strengths` (T, F), >= 0, is the size of each neuron's contribution to the MLP's output. A
    neuron's energy on a token is its strength squared; the energies of a token are scaled to sum to
    1. The shared slices hold the neurons of the highest mean energy. The other neurons are first
    grouped by balanced k-means of their strengths over the tokens, which partitions the graph of
    co-activations (MoEfication: Zhang et al. 2022, https://arxiv.org/abs/2110.01786). Then two
    steps alternate: each token chooses its `active` routed slices of most energy, and each neuron
    moves to the slice with which most of its energy is chosen. So the chosen slices hold more and
    more of the energy, and the model with half of its slices on gets better
    (`scripts/bench_split.py`).
    """
    import numpy as np

    energies = np.square(strengths.T)
    energies /= np.maximum(energies.sum(axis=0), np.finfo(np.float32).tiny)
    slice_of = _by_size(energies.mean(axis=1), slices)
    routed = slice_of >= shared
    energies = energies[routed]
    found = _k_means(_unit(np.sqrt(energies)), slices - shared, random)
    for _ in range(_ROUNDS):
        held = _membership(found, slices - shared).T @ energies  # (N - shared, T)
        again = _balanced(energies @ chosen_slices(held.T, active))
        if (again == found).all():
            break
        found = again
    slice_of[routed] = shared + found
    return np.argsort(slice_of, kind="stable")


def chosen_slices(scores: Matrix, active: int) -> Matrix:
    """A matrix (T, N): 1 at each token's `active` highest scores, 0 elsewhere."""
    import numpy as np

    highest = np.argsort(-scores, axis=1, kind="stable")[:, :active]
    chosen = np.zeros(scores.shape, np.float32)
    np.put_along_axis(chosen, highest, 1.0, axis=1)
    return chosen


def _by_size(sizes: Matrix, slices: int) -> Order:
    """Each neuron's slice (F), where neurons are assigned in order of size, the largest first."""
    import numpy as np

    slice_of = np.empty(len(sizes), np.int64)
    slice_of[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes)) * slices // len(sizes)
    return slice_of


def _unit(rows: Matrix) -> Matrix:
    """The rows scaled to length 1; rows of zeros stay zeros."""
    import numpy as np

    lengths: Matrix = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return rows / lengths


def _k_means(unit: Matrix, clusters: int, random: Random) -> Order:
    """Each unit row's cluster; all clusters have the same size.

    The first centres come from k-means++; then assignments and centres are renewed in turn.
    Balanced k-means: Malinen and Fränti 2014, https://doi.org/10.1007/978-3-662-44415-3_4;
    k-means++: Arthur and Vassilvitskii 2007.
    """
    import numpy as np

    centres = [unit[random.integers(len(unit))]]
    near = np.full(len(unit), -1.0)
    while len(centres) < clusters:
        near = np.maximum(near, (unit @ centres[-1]).astype(np.float64))
        far = np.maximum(1 - near, 1e-9)
        centres.append(unit[random.choice(len(unit), p=far / far.sum())])
    found = _balanced(unit @ np.stack(centres).T)
    for _ in range(_ROUNDS):
        middle = _unit(_membership(found, clusters).T @ unit)
        again = _balanced(unit @ middle.T)
        if (again == found).all():
            break
        found = again
    return found


def _membership(slice_of: Order, slices: int) -> Matrix:
    """A matrix (F, N): 1 where the neuron is in the slice, 0 elsewhere."""
    import numpy as np

    return np.eye(slices, dtype=np.float32)[slice_of]


def _balanced(worth: Matrix) -> Order:
    """Assign each row of `worth` (F, N) to a column, F/N rows to each, with high worth in total.

    Each row asks for its best free column. Where too many rows ask for one column, it takes the
    rows that would lose most with their second best; the other rows ask again.
    """
    import numpy as np

    rows, columns = worth.shape
    found = np.full(rows, -1)
    room = np.full(columns, rows // columns)
    while (left := np.flatnonzero(found < 0)).size:
        open_to = np.where(room > 0, worth[left], -np.inf)
        each = np.arange(len(left))
        best = open_to.argmax(axis=1)
        lost = open_to[each, best]
        open_to[each, best] = -np.inf
        lost = lost - open_to.max(axis=1)
        for column in np.flatnonzero(room):
            bidders = np.flatnonzero(best == column)
            bidders = bidders[np.argsort(-lost[bidders], kind="stable")][: room[column]]
            found[left[bidders]] = column
            room[column] -= len(bidders)
    return found
