"""RegMean: one matrix that gives each expert's outputs on its own inputs, as well as can be.

W = (sum G_i + l I)^-1 (sum G_i W_i + l W_mean), with the second moments G_i of the inputs of expert
i, each divided by the mean of its diagonal (Jin et al. 2023, "Dataless knowledge fusion by merging
weights of language models", https://arxiv.org/abs/2212.09849).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LAMBDA = 0.1
"""l, as a share of the mean of the sum's diagonal. The loss hardly changes from .03 to 1."""


def regmean(
    mean: torch.Tensor,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    weights: list[float],
) -> torch.Tensor:
    """The fitted matrix (out, in).

    `mean` is the mean of the experts' matrices (out, in). Of each expert, `inputs` are (T, in), and
    `outputs` (T, out) what its own matrix makes of them; `weights` are its share, which sum to 1.
    Everything is float32. Of the two forms, the one with the smaller system is solved.
    """
    import torch

    count, left, right = len(inputs), [], []
    for given, made, weight in zip(inputs, outputs, weights, strict=True):
        diagonal = float(given.square().sum(dtype=torch.float64)) / given.shape[1]
        if weight and diagonal > 0:
            scale = (weight * count / diagonal) ** 0.5
            left.append(scale * given)
            right.append(scale * (made - given @ mean.T))
    if not left:
        return mean
    x, z = torch.cat(left), torch.cat(right)
    penalty = LAMBDA * sum(weights) * count
    if len(x) <= x.shape[1]:
        return mean + (x.T @ _solve(x @ x.T, z, penalty)).T
    return mean + _solve(x.T @ x, x.T @ z, penalty).T


def _solve(gram: torch.Tensor, wanted: torch.Tensor, penalty: float) -> torch.Tensor:
    """(gram + penalty I)^-1 wanted; the inverse is made in float64."""
    import torch

    gram = gram.double()
    gram.diagonal().add_(penalty)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return inverse.float() @ wanted
