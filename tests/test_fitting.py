"""Fits of routers: what their formulas promise, in numbers that another way gives too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moemerge.dense.generate import draw
from moemerge.errors import RunError
from moemerge.gates import fitting
from moemerge.gates.fitting import contrast, default_lambda, sharpness
from moemerge.gates.task import Example
from moemerge.text.encoder import Prompt


def texts(lengths: list[int], experts: list[int], negative: int | None = None) -> list[Example]:
    return [
        Example(Prompt(tuple(range(number, number + length)), 0), expert, number != negative)
        for number, (length, expert) in enumerate(zip(lengths, experts, strict=True))
    ]


def inputs(lengths: list[int], width: int, seed: int = 0) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((n, width)).astype(np.float32) + 0.5 for n in lengths]


LENGTHS, EXPERTS = [3, 5, 2, 7, 4, 6], [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("width", [8, 64], ids=["more tokens", "more features"])
@pytest.mark.parametrize("negative", [None, 3])
def test_ridge_held_out_is_ridge_without_the_text(width: int, negative: int | None) -> None:
    examples, layer = texts(LENGTHS, EXPERTS, negative), inputs(LENGTHS, width)
    left = [0, 4]
    rows, held_out = fitting._ridge(layer, examples, 3, 0.3, left)
    for number, logits in zip(left, held_out, strict=True):
        # Leaving a text out by giving it no weight keeps the others' weights and the penalty.
        again = refit(layer, examples, 3, 0.3, without=number)
        assert np.allclose(logits, layer[number] @ again.T, atol=1e-8)
    assert np.allclose(rows, refit(layer, examples, 3, 0.3, None), atol=1e-8)


def refit(layer: list[Any], examples: list[Example], experts: int, lam: float, without: int | None
          ) -> Any:  # fmt: skip
    """Ridge by its normal equations, written out."""
    width = layer[0].shape[1]
    gram, right, trace = np.zeros((width, width)), np.zeros((width, experts)), 0.0
    for number, (x, example) in enumerate(zip(layer, examples, strict=True)):
        same = [
            len(other)
            for other, e in zip(layer, examples, strict=True)
            if (e.expert, e.positive) == (example.expert, example.positive)
        ]
        x, weight = x.astype(np.float64), 1 / sum(same)
        trace += weight * float((x**2).sum())
        if number == without:
            continue
        target = np.eye(experts)[example.expert]
        if not example.positive:
            target = (1 - target) / (experts - 1)
        gram += weight * x.T @ x
        right += weight * np.outer(x.sum(axis=0), target - 1 / experts)
    return np.linalg.solve(gram + lam * trace / width * np.eye(width), right).T


def test_a_negative_text_is_kept_from_its_expert() -> None:
    layer = inputs([6, 6, 6], 32)
    with_it = texts([6, 6, 6], [0, 1, 0], negative=2)
    rows, _ = fitting._ridge(layer, with_it, 2, 0.1, [])
    without, _ = fitting._ridge(layer[:2], with_it[:2], 2, 0.1, [])
    assert (layer[2] @ rows[0]).mean() < (layer[2] @ without[0]).mean()


def test_sharpness_gives_the_logits_their_spread() -> None:
    examples, layer = texts(LENGTHS, EXPERTS), inputs(LENGTHS, 16)
    rows = np.random.default_rng(1).standard_normal((3, 16))
    scale = sharpness(rows, examples, layer, 5.0)
    spreads = [
        np.concatenate([(scale * x @ rows.T).var(axis=1)
                        for x, e in zip(layer, examples, strict=True) if e.expert == expert]).mean()
        for expert in range(3)
    ]  # fmt: skip
    assert np.sqrt(np.mean(spreads)) == pytest.approx(5.0)


def test_lambda_falls_with_tokens() -> None:
    values = [default_lambda(tokens) for tokens in (0, 5, 15, 100, 1000, 10**6)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] > 0


def test_a_contrast_that_cannot_choose_is_refused() -> None:
    same = [np.ones(4, np.float32)] * 2
    with pytest.raises(RunError, match="the same router in layer 7"):
        contrast(texts([1, 1], [0, 1]), same, "in layer 7")
    with pytest.raises(RunError, match=r"experts\[0\].*zeros"):
        contrast(texts([1, 1], [0, 0], negative=1), same, "in layer 7")


class Drawing:
    samples = tokens = 1

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0):
        self.temperature, self.top_p = temperature, top_p


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)).repeat(10000, axis=0)
    uniform = (np.arange(10000) + 0.5) / 10000
    counts = np.bincount(draw(logits, uniform, Drawing()), minlength=4) / 10000
    assert counts == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    nucleus = np.bincount(draw(logits, uniform, Drawing(top_p=0.7)), minlength=4) / 10000
    assert nucleus == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=1e-3)
    cold = draw(logits, uniform, Drawing(temperature=1e-3))
    assert set(cold) == {0}


def test_what_is_forbidden_is_never_drawn() -> None:
    logits = np.array([[0.0, -np.inf, 0.0]], np.float32).repeat(1000, axis=0)
    drawn = draw(logits, np.linspace(0, 1, 1000, endpoint=False), Drawing())
    assert set(drawn) == {0, 2}
