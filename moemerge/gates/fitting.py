"""Router inputs to routers: averages, ridge regression, their scale, and how they do held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moemerge.dense import Passage, router_inputs
from moemerge.errors import RunError
from moemerge.gates.prompts import ExpertPrompts
from moemerge.gates.task import Example, Routers, Task

if TYPE_CHECKING:
    from moemerge.gates.task import Matrix, Vector

KAPPA = 5.0
"""The spread of a router's logits over the experts; the measured loss is flat from 5 to 20."""

_ALIKE = 1e-6
"""Unit rows, or the two sides of a contrast, that differ by less differ by rounding alone."""


def examples_of(experts: Sequence[ExpertPrompts]) -> list[Example]:
    """Every prompt and document, the positive ones first."""
    found = [Example(prompt, e) for e, expert in enumerate(experts) for prompt in expert.own]
    return found + [
        Example(prompt, e, False) for e, expert in enumerate(experts) for prompt in expert.negative
    ]


def inputs_of(
    task: Task, examples: Sequence[Example], on_policy: bool = False
) -> Iterator[list[Matrix]]:
    """What each layer's router sees of each example: (T, D), layer by layer.

    With `on_policy` a positive one passes its own expert's MLPs, as it will once routers work; so
    the layers above see what they will see (Ross et al. 2011, https://arxiv.org/abs/1011.0686).
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
    """Routers whose rows are the mean of `reduce`'s vector (D) of each of an expert's texts.

    With `kappa`, the rows are centred over the experts and their logits get that spread. Held out,
    a text is left out of its expert's mean.
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
    """The rows less their mean, which tells no expert from another; a single one stays."""
    centred: Matrix = rows if len(rows) == 1 else rows - rows.mean(axis=0)
    return centred


def contrast(examples: Sequence[Example], vectors: Sequence[Vector], where: str) -> Matrix:
    """(E, D): the mean of each expert's positive examples' vectors minus that of its negative ones.

    Every text counts the same, however long; rows are scaled to unit length, as mergekit does.

    Raises:
        RunError: an expert's row is zero, or two are equal: a router that cannot choose. `where`
            is the layer, in words.
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
    """Routers by ridge regression of the expert on each token's router input, without intercept.

    A least-squares classifier of hidden states (Hoerl and Kennard 1970, "Ridge regression"; as a
    classifier, Hastie et al., "The Elements of Statistical Learning", 4.2), for a router is linear
    and has no intercept. A token's target is 1 for its expert and 0 for the others, of a negative
    text 0 for that expert and 1/(E-1) for the others, less 1/E; each expert's positive tokens weigh
    1 in all, and so do its negative ones. `lambda_` is relative to the mean of the Gram matrix's
    diagonal; its default is `default_lambda`. That it beats averages, and by how much, is measured
    by `scripts/bench_routing.py`. Held out, a text is left out of the fit, in closed form.

    Raises:
        RunError: `lambda_` is so small that the numbers do not suffice.
    """
    import numpy as np

    left = [n for n, example in enumerate(examples) if _may_leave(example, examples)]
    matrices: list[Matrix] = []
    held_out = []
    for layer in inputs_of(task, examples, on_policy):
        try:
            rows, without = _ridge(layer, examples, task.shape[0], lambda_, left)
        except np.linalg.LinAlgError as error:
            raise RunError(
                f"gate.lambda: no router comes of it in layer {len(matrices)} ({error}); write a "
                "larger number"
            ) from error
        scale = sharpness(rows, examples, layer, kappa)
        matrices.append((scale * rows).astype("float32"))
        held_out.append([(scale * logits).astype("float32") for logits in without])
    return Routers(matrices, tuple(examples[n] for n in left), tuple(held_out))


def default_lambda(tokens: float) -> float:
    """Ridge's lambda for `tokens` an expert: 1 for a handful of keywords, down to .1 for much text.

    On held-out text the right expert came first most often with 1 for 30 tokens, with .3 to 1 for
    100; for 1000 of the experts' own, the loss was lower with .1 to .2 than with .3
    (`scripts/bench_routing.py --modes self self:lambda=.3`).
    """
    return min(1.0, max(0.1, math.sqrt(30 / max(tokens, 1))))


def _ridge(
    layer: Sequence[Matrix],
    examples: Sequence[Example],
    experts: int,
    lambda_: float | None,
    left: Sequence[int],
) -> tuple[Any, list[Any]]:
    """The rows (E, D), and for each example in `left` its logits (T, E) by rows without it.

    The smaller of the two forms is solved: of tokens by tokens or of features by features. With H
    the matrix that turns targets into fitted values, leaving out rows p changes their residual r to
    (1 - H_pp)^-1 r (the block form of PRESS: Allen 1974, https://doi.org/10.2307/1267500).
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
    """The factor that gives the rows' logits on the positive texts a spread of `kappa`.

    The spread is the root of their variance over the experts, averaged over tokens, where every
    expert's tokens weigh the same. Without it, the scale of a router follows its layer's norm.
    """
    import numpy as np

    variances: dict[int, list[Any]] = {}
    for inputs, example in zip(layer, examples, strict=True):
        if example.positive:
            variances.setdefault(example.expert, []).append((inputs @ rows.T).var(axis=1))
    mean = np.mean([np.concatenate(of_one).mean() for of_one in variances.values()])
    return kappa / float(np.sqrt(mean)) if mean > 0 else 1.0


def not_positive(**values: float | None) -> Iterator[tuple[str, str, str]]:
    """What of a gate mode's settings is there and not above 0: key, what, fix."""
    for key, value in values.items():
        if value is not None and not 0 < value < 1e30:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            fix = "write a smaller number" if value > 0 else "write a number above 0"
            yield key, f"is {shown}", fix


def _may_leave(example: Example, examples: Sequence[Example]) -> bool:
    """Whether it is positive, and its expert has another positive text."""
    return (
        example.positive
        and sum(other.positive and other.expert == example.expert for other in examples) > 1
    )
