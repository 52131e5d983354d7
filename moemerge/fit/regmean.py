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


class RegMean:
    """The matrices that read the same inputs, fitted one after the other.

    Of each expert, `inputs` are (T, in), float32; `weights` are its share, which sum to 1. Of the
    two forms, the one with the smaller system is solved, and its inverse is made once. What a fit
    changes is multiplied in `dtype`, the models' own: it is small beside the mean.
    """

    def __init__(
        self, inputs: list[torch.Tensor], weights: list[float], dtype: torch.dtype | None = None
    ):
        import torch

        self.dtype = dtype or torch.float32

        count = len(inputs)
        sizes = [float(x.square().sum(dtype=torch.float64)) / x.shape[1] for x in inputs]
        pairs = zip(weights, sizes, strict=True)
        self.scales = [(w * count / size) ** 0.5 if w and size > 0 else 0.0 for w, size in pairs]
        self.x = torch.cat([s * x for s, x in zip(self.scales, inputs, strict=True)])
        self.penalty = LAMBDA * sum(weights) * count
        self.dual = len(self.x) <= self.x.shape[1]
        gram = (self.x @ self.x.T if self.dual else self.x.T @ self.x).double()
        gram.diagonal().add_(self.penalty)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).float()

    def fit(
        self, mean: torch.Tensor, lacking: list[torch.Tensor]
    ) -> tuple[torch.Tensor, float, float]:
        """The fitted matrix (out, in), and the squared errors of the mean's and its own outputs.

        `mean` is the mean of the experts' matrices, and `lacking` (T, out) what its outputs lack of
        each expert's own. Errors are scaled as the inputs are.
        """
        import torch

        z = torch.cat([s * one for s, one in zip(self.scales, lacking, strict=True)])
        if self.dual:
            solved = self.inverse @ z
            left = self.penalty * solved  # because (gram + penalty) solved = z
            change = (self.x.T.to(self.dtype) @ solved.to(self.dtype)).float()
        else:
            change = self.inverse @ (self.x.T @ z)
            left = z - self.x @ change
        return mean + change.T, float(z.square().sum()), float(left.square().sum())
