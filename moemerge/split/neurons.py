"""Which neurons of a dense MLP make up which slice of it: an order of them, cut into equal parts.

Legend: F intermediate neurons, D hidden size, N slices, T tokens. An order is (F): slice i holds
the neurons that its i-th stretch of F/N names. The first slices are those that are always on.
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
"""Of a clustering, which mostly comes to rest in fewer."""


def in_order(neurons: int) -> Order:
    """As they stand."""
    import numpy as np

    return np.arange(neurons)


def at_random(neurons: int, random: Random) -> Order:
    """Shuffled, which LLaMA-MoE found best to go on training from (Zhu et al. 2024,
    https://arxiv.org/abs/2406.16554)."""
    return random.permutation(neurons)


def by_weights(gate: Matrix, sizes: Matrix, slices: int, shared: int, random: Random) -> Order:
    """Neurons whose rows of gate_proj, `gate` (F, D), point the same way: balanced k-means.

    What opens one opens the others (MoEfication's parameter clustering: Zhang et al. 2022,
    https://arxiv.org/abs/2110.01786). The shared slices are the neurons of the largest `sizes` (F).
    """
    import numpy as np

    slice_of = _by_size(sizes, slices)
    routed = slice_of >= shared
    slice_of[routed] = shared + _k_means(_unit(gate[routed]), slices - shared, random)
    return np.argsort(slice_of, kind="stable")


def by_activation(
    strengths: Matrix, slices: int, shared: int, active: int, random: Random
) -> Order:
    """Neurons that are strong on the same tokens; `strengths` (T, F) is what each adds, >= 0.

    The shared slices are the neurons of the most energy, their strengths' squares, a token's 1 in
    all. For the others, first balanced k-means of their patterns over the tokens, a partition of
    the graph of co-activations (MoEfication: Zhang et al. 2022, https://arxiv.org/abs/2110.01786).
    Then, by turns, each token chooses its `active` strongest routed slices, and each neuron goes
    where most of its energy is chosen: what the chosen slices hold of the whole grows with every
    turn, and so does what half of the slices are worth (`scripts/bench_split.py`).
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
    """1 at each token's `active` highest of its scores (T, N), 0 elsewhere."""
    import numpy as np

    highest = np.argsort(-scores, axis=1, kind="stable")[:, :active]
    chosen = np.zeros(scores.shape, np.float32)
    np.put_along_axis(chosen, highest, 1.0, axis=1)
    return chosen


def _by_size(sizes: Matrix, slices: int) -> Order:
    """Each neuron's slice, were the largest to come first."""
    import numpy as np

    slice_of = np.empty(len(sizes), np.int64)
    slice_of[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes)) * slices // len(sizes)
    return slice_of


def _unit(rows: Matrix) -> Matrix:
    """The rows at length 1; those of zeros stay."""
    import numpy as np

    lengths: Matrix = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return rows / lengths


def _k_means(unit: Matrix, clusters: int, random: Random) -> Order:
    """Each unit row's cluster, all clusters of one size; centres by k-means++, then by turns.

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
    """(F, N): 1 where the neuron is of the slice."""
    import numpy as np

    return np.eye(slices, dtype=np.float32)[slice_of]


def _balanced(worth: Matrix) -> Order:
    """A column for each row of `worth` (F, N), F/N rows a column, of high worth in all.

    Rows bid for their best column; those that would lose least by their next best give way.
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
