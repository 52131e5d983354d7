"""Alignment: an expert's down projection moved so that the mixture's state becomes its own model's.

In the mixture, an expert's MLP reads what another attention made. The down projection gets what
brings the residual stream back, as well as it can be told from its inputs: ridge regression in its
dual form, tokens by tokens. Errors count as shares of the state, because norms divide by its size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LAMBDA = 0.3
"""The penalty, as a share of the mean of the kernel's diagonal. The loss is flat up to 10."""

MOST_TOKENS = 4096
"""The most tokens of an expert's texts that its alignment is fitted to."""


def correction(
    inputs: torch.Tensor, wanted: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The change of a down projection as `up @ down`: up (D, T) and down (T, F), in float32.

    `inputs` (T, F) are the down projection's, `wanted` (T, D) is what is missing in the residual
    stream, and `state` (T, D) what it should be.
    """
    import torch

    size = state.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    x, y = inputs / size, wanted / size
    kernel = (x @ x.T).double()
    kernel.diagonal().add_(LAMBDA * kernel.diagonal().mean().clamp_min(1e-30))
    dual = torch.cholesky_solve(y.double(), torch.linalg.cholesky(kernel)).float()
    return dual.T.contiguous(), x


def is_factored(tokens: int, hidden: int, inner: int) -> bool:
    """Whether the two factors have fewer values than the whole matrix."""
    return tokens * (hidden + inner) < hidden * inner
