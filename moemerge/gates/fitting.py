"""Routers fitted to router inputs: averages, ridge regression, scale, and held-out logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moemerge.dense import Passage, router_inputs
from moemerge.errors import RunError
from moemerge.gates.prompts import ExpertPrompts
from moemerge.gates.task import Example, Routers, Task

if TYPE_CHECKING:
    from moemerge.gates.task import Matrix, Vector

KAPPA = 5.0
"""The spread of a router's logits over the experts. The loss hardly changes from 5 to 20."""

_ALIKE = 1e-6
"""A smaller difference of unit rows, or of the two sides of a contrast, is only rounding."""


def examples_of(experts: Sequence[ExpertPrompts]) -> list[Example]:
    """Every prompt and calibration text; the negative prompts come last."""
    found = [Example(prompt, e) for e, expert in enumerate(experts) for prompt in expert.own]
    return found + [
        Example(prompt, e, False) for e, expert in enumerate(experts) for prompt in expert.negative
    ]


def inputs_of(
    task: Task, examples: Sequence[Example], on_policy: bool = False
) -> Iterator[list[Matrix]]:
    """The router inputs (T, D) of each example, layer by layer.

    With `on_policy`, a positive example passes its own expert's MLPs, because a router that works
    sends it there. So the next layers see the inputs that they will see in the mixture (Ross et al.
    2011, https://arxiv.org/abs/1011.0686).
    """
    passages = [
        Passage(x.prompt, task.donors[x.expert] if on_policy and x.positive else None)
        for x in examples
    ]
    unique = list(dict.fromkeys((p.prompt, id(p.mlps)) for p in passages))
    place = {key: at for at, key in enumerate(unique)}
    wanted = [place[p.prompt, id(p.mlps)] for p in passages]
    firsts = [passages[wanted.index(at)] for at in range(len(unique))]
    read = router_inputs(task.body, task.sources, firsts, task.options, task.reporter)
    for layer in read:
        yield [layer[at] for at in wanted]


def averaged(task: Task, reduce: Callable[[Matrix], Vector], kappa: float | None = None) -> Routers:
    """Routers (E, D): an expert's row is the mean of its texts' vectors.

    `reduce` makes a text's vector (D,) from its router inputs (T, D). With `kappa`, the rows are
    centred over the experts, and scaled so that the logits have this spread. For the held-out
    logits of a text, the text is left out of its expert's mean.

    Raises:
        RunError: an expert's row is zero, or two experts' rows are equal.
    """
    examples = examples_of(task.experts)
    left = [n for n, example in enumerate(examples) if _may_leave(example, examples)]
    matrices, held_out = [], []
    for number, layer in enumerate(inputs_of(task, examples)):
        vectors, where = [reduce(inputs) for inputs in layer], f"in layer {number}"
        rows = contrast(examples, vectors, where)
        without = [contrast(_but(n, examples), _but(n, vectors), where) for n in left]
        scale = 1.0
        if kappa is not None:
            rows, without = _centred(rows), [_centred(rows) for rows in without]
            scale = sharpness(rows, examples, layer, kappa)
        matrices.append((scale * rows).astype("float32"))
        logits = (scale * layer[n] @ rows.T for n, rows in zip(left, without, strict=True))
        held_out.append([of_one.astype("float32") for of_one in logits])
    return Routers(matrices, tuple(examples[n] for n in left), tuple(held_out))


def _but(number: int, items: Sequence[Any]) -> list[Any]:
    return [*items[:number], *items[number + 1 :]]


def _centred(rows: Matrix) -> Matrix:
    """The rows minus their mean, which is the same for all experts; a single row is unchanged."""
    centred: Matrix = rows if len(rows) == 1 else rows - rows.mean(axis=0)
    return centred


def contrast(examples: Sequence[Example], vectors: Sequence[Vector], where: str) -> Matrix:
    """(E, D): the mean vector of each expert's positive examples minus that of its negative ones.

    Every text has the same weight, whatever its length. Rows have unit length, as in mergekit.
    `where` names the layer in errors.

    Raises:
        RunError: an expert's row is zero, or two experts' rows are equal, so that the router
            cannot choose.
    """
    import numpy as np

    rows: list[Any] = []
    for index in range(max(example.expert for example in examples) + 1):
        sides: dict[bool, list[Vector]] = {True: [], False: []}
        for example, vector in zip(examples, vectors, strict=True):
            if example.expert == index:
                sides[example.positive].append(vector)
        row = np.mean(sides[True], axis=0, dtype=np.float32)
        least = _ALIKE * float(np.linalg.norm(row))
        if sides[False]:
            row = row - np.mean(sides[False], axis=0, dtype=np.float32)
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


def ridge(
    task: Task, examples: Sequence[Example], lambda_: float | None, kappa: float, on_policy: bool
) -> Routers:
    """Routers (E, D) by ridge regression of the expert on each token's router input.

    A router is linear and has no intercept, and so is this least-squares classifier (Hoerl and
    Kennard 1970, "Ridge regression"; as a classifier, Hastie et al., "The Elements of Statistical
    Learning", 4.2). A token's target is 1 for its expert and 0 for the others. In a negative text
    the target is 0 for the expert and 1/(E-1) for the others. 1/E is subtracted from every target.
    Each expert's positive tokens have weight 1 in total, and so have its negative tokens.

    `lambda_` is relative to the mean of the Gram matrix's diagonal; None is `default_lambda`. The
    held-out logits of a text come from a fit without this text, in closed form.
    `scripts/bench_routing.py` compares ridge regression with averages.

    Raises:
        RunError: `lambda_` is too small to solve the equations in float64.
    """

    def layers() -> Iterator[list[Matrix]]:
        for layer in inputs_of(task, examples, on_policy):
            if task.keep:
                task.keep(examples, layer)
            yield layer

    return solved(layers(), examples, task.shape[0], lambda_, kappa)


def solved(
    layers: Iterable[Sequence[Matrix]],
    examples: Sequence[Example],
    experts: int,
    lambda_: float | None,
    kappa: float,
) -> Routers:
    """The routers of `ridge` from the router inputs (T, D) of each example, layer by layer."""
    import numpy as np

    left = [n for n, example in enumerate(examples) if _may_leave(example, examples)]
    matrices: list[Matrix] = []
    held_out = []
    for layer in layers:
        try:
            rows, without = _ridge(layer, examples, experts, lambda_, left)
        except np.linalg.LinAlgError as error:
            raise RunError(
                f"gate.lambda: is too small in layer {len(matrices)} ({error}); write a larger "
                "number"
            ) from error
        scale = sharpness(rows, examples, layer, kappa)
        matrices.append((scale * rows).astype("float32"))
        held_out.append([(scale * logits).astype("float32") for logits in without])
    return Routers(matrices, tuple(examples[n] for n in left), tuple(held_out))


def default_lambda(tokens: float) -> float:
    """The default lambda for `tokens` tokens per expert: 1 for a few keywords, 0.1 for much text.

    On held-out text the right expert came first most often with lambda 1 for 30 tokens, and with
    0.3 to 1 for 100 tokens. With 1000 tokens of the experts' own text, the loss was lower with 0.1
    to 0.2 than with 0.3 (`scripts/bench_routing.py --modes self self:lambda=.3`).
    """
    return min(1.0, max(0.1, math.sqrt(30 / max(tokens, 1))))


def _ridge(
    layer: Sequence[Matrix],
    examples: Sequence[Example],
    experts: int,
    lambda_: float | None,
    left: Sequence[int],
) -> tuple[Any, list[Any]]:
    """The rows (E, D), and the logits (T, E) of each example in `left` by rows fitted without it.

    Of the two forms, the one with the smaller matrix is solved: tokens by tokens, or features by
    features. H is the matrix that turns targets into fitted values. If the tokens p are left out,
    their residual r becomes (1 - H_pp)^-1 r (the block form of PRESS: Allen 1974,
    https://doi.org/10.2307/1267500).
    """
    import numpy as np

    counts: dict[tuple[int, bool], int] = {}
    for inputs, x in zip(layer, examples, strict=True):
        counts[x.expert, x.positive] = counts.get((x.expert, x.positive), 0) + len(inputs)
    weights, targets, starts = [], [], [0]
    for inputs, x in zip(layer, examples, strict=True):
        target = np.zeros(experts)
        target[x.expert] = 1
        if not x.positive:
            target = (1 - target) / max(experts - 1, 1)
        weights += [counts[x.expert, x.positive] ** -0.5] * len(inputs)
        targets += [target - 1 / experts] * len(inputs)
        starts.append(starts[-1] + len(inputs))
    root = np.array(weights)[:, None]
    inputs_all = np.concatenate(layer).astype(np.float64) * root
    wanted = np.stack(targets) * root
    if lambda_ is None:
        positive = sum(n for (_, is_positive), n in counts.items() if is_positive)
        lambda_ = default_lambda(positive / experts)
    penalty = lambda_ * float((inputs_all**2).sum()) / inputs_all.shape[1]
    blocks = [slice(starts[n], starts[n + 1]) for n in left]
    if len(inputs_all) <= inputs_all.shape[1]:
        gram = inputs_all @ inputs_all.T
        gram[np.diag_indices_from(gram)] += penalty
        inverse = np.linalg.inv(gram)
        dual = inverse @ wanted
        rows = dual.T @ inputs_all
        residuals = [np.linalg.solve(inverse[at, at], dual[at]) for at in blocks]
    else:
        gram = inputs_all.T @ inputs_all
        gram[np.diag_indices_from(gram)] += penalty
        inverse = np.linalg.inv(gram)
        rows = (inverse @ (inputs_all.T @ wanted)).T
        residuals = []
        for at in blocks:
            part = inputs_all[at]
            hat = np.eye(len(part)) - part @ inverse @ part.T
            residuals.append(np.linalg.solve(hat, wanted[at] - part @ rows.T))
    logits = [
        (wanted[at] - residual) / root[at] for at, residual in zip(blocks, residuals, strict=True)
    ]
    return rows, logits


def sharpness(
    rows: Any, examples: Sequence[Example], layer: Sequence[Matrix], kappa: float
) -> float:
    """The factor for the rows (E, D) with which the positive texts' logits have spread `kappa`.

    The spread is the square root of the logits' variance over the experts, averaged over tokens;
    each expert's tokens have the same weight in total. Without this factor, the scale of a router
    depends on the scale of its layer's norm.
    """
    import numpy as np

    variances: dict[int, list[Any]] = {}
    for inputs, example in zip(layer, examples, strict=True):
        if example.positive:
            variances.setdefault(example.expert, []).append((inputs @ rows.T).var(axis=1))
    mean = np.mean([np.concatenate(of_one).mean() for of_one in variances.values()])
    return kappa / float(np.sqrt(mean)) if mean > 0 else 1.0


def not_positive(**values: float | None) -> Iterator[tuple[str, str, str]]:
    """Problems of options that are given and not above 0: key, what is wrong, fix."""
    for key, value in values.items():
        if value is not None and not 0 < value < 1e30:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            fix = "write a smaller number" if value > 0 else "write a number above 0"
            yield key, f"is {shown}", fix


def _may_leave(example: Example, examples: Sequence[Example]) -> bool:
    """Whether the example is positive, and its expert has another positive text."""
    return (
        example.positive
        and sum(other.positive and other.expert == example.expert for other in examples) > 1
    )
