"""Token ids in batches, padded on the right, and the loss of a causal model that reads them.

Shapes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moemerge.errors import RunError

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 2048
"""The most tokens in a batch, with padding: this bounds the memory for activations."""

_MOST_LOSS = 700.0
"""The largest mean loss (nats) whose perplexity a float can hold."""


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the texts with these lengths, in batches of similar length, the longest first.

    A text longer than `BATCH_TOKENS` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    made = []
    while order:
        count = max(1, BATCH_TOKENS // lengths[order[0]])
        made.append(order[:count])
        order = order[count:]
    return made


def padded(rows: Iterable[Sequence[int]], fill: int = 0) -> torch.Tensor:
    """Rows of numbers as one matrix (B, T), int64, with `fill` after those that are shorter."""
    import torch

    made = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=fill)


def mask(lengths: Iterable[int]) -> torch.Tensor:
    """The attention mask (B, T), int64, of texts with these lengths: 0 where there is padding."""
    return padded([1] * length for length in lengths)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of logits (B, T, V), float32 log-probabilities (B, T - 1, V) of what comes next."""
    return logits[:, :-1].float().log_softmax(-1)


def losses(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The loss (nats) of each of the `ids` (B, T) except the first: (B, T - 1).

    `scores` are `log_probabilities`.
    """
    return -scores.gather(2, ids[:, 1:, None])[..., 0]


def check_loss(mean: float, what: str = "the loss", fix: str = "the model is broken") -> float:
    """Return a mean loss after a check.

    Raises:
        RunError: it is NaN, or too large for the loss of a language model.
    """
    if not mean < _MOST_LOSS:
        raise RunError(f"{what} came out as {mean:g}; {fix}")
    return mean
