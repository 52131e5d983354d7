"""Text written by a dense model: seeded random sampling, in batches, with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moemerge.checkpoint import Donor
from moemerge.dense.run import whole_model
from moemerge.errors import RunError
from moemerge.options import RunOptions
from moemerge.plan import Sources, generator, recipe
from moemerge.reporting import Reporter
from moemerge.text import Prompt

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float32]]

BATCH_TOKENS = 8192
"""The most tokens in a batch, new tokens included: limits the memory of the KV cache."""


class Sampling(Protocol):
    """How many texts are written, and how their tokens are drawn."""

    @property
    def samples(self) -> int:
        """The number of texts per model."""

    @property
    def tokens(self) -> int:
        """The number of new tokens per text."""

    @property
    def temperature(self) -> float:
        """The number that logits are divided by."""

    @property
    def top_p(self) -> float:
        """The share of probability, from the most likely token down, that draws come from."""


def write_texts(
    donor: Donor,
    name: str,
    beginnings: Sequence[Prompt],
    sampling: Sampling,
    never: Sequence[int],
    sources: Sources,
    options: RunOptions,
    reporter: Reporter,
) -> list[Prompt]:
    """Let a donor's model continue the `beginnings`, in turn, until there are enough texts.

    Returns `sampling.samples` texts. Draws depend only on the seed, `name`, the batch and the step,
    so equal logits give equal texts. The token ids in `never` (special tokens) are not drawn, so
    every text has its full length.

    Raises:
        RunError: the model gives NaN or Inf.
    """
    import torch

    begun = [beginnings[number % len(beginnings)] for number in range(sampling.samples)]
    longest = max(len(prompt.ids) for prompt in begun) + sampling.tokens
    size = max(1, BATCH_TOKENS // longest)
    batches = [begun[at : at + size] for at in range(0, len(begun), size)]
    config = donor.model.config
    texts: list[Prompt] = []
    steps = sampling.tokens * len(batches)
    with (
        torch.inference_mode(),
        reporter.progress(f"{donor.name} writes", steps, "token") as advance,
    ):
        model = whole_model(config, lambda tensor: recipe.of_donor(donor, tensor), sources, options)
        device = model.get_input_embeddings().weight.device
        banned = torch.tensor([i for i in never if i < config["vocab_size"]], dtype=torch.long)
        for number, batch in enumerate(batches):
            width = max(len(prompt.ids) for prompt in batch)
            pads = [width - len(prompt.ids) for prompt in batch]
            ids = torch.tensor(
                [[0] * pad + list(p.ids) for pad, p in zip(pads, batch, strict=True)]
            )
            mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            written, cache = [ids], None
            for step in range(sampling.tokens):
                done = model(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    position_ids=positions.to(device),
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, logits = done.past_key_values, done.logits[:, -1].float().cpu()
                if not logits.isfinite().all():
                    what = f"{donor.name} ({donor.model.reference.text}): writes NaN or Inf"
                    raise RunError(f"{what}; use another dtype of it, or gate_mode: ridge")
                logits[:, banned] = -torch.inf
                draws = generator(options.seed, f"{name}, batch {number}", step)
                chosen = draw(logits.numpy(), draws.random(len(batch)), sampling)
                ids = torch.from_numpy(chosen)[:, None]
                written.append(ids)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                positions = positions[:, -1:] + 1
                advance(1)
            rows = torch.cat(written, dim=1).tolist()
            for row, pad, prompt in zip(rows, pads, batch, strict=True):
                texts.append(Prompt(tuple(row[pad:]), prompt.own))
    return texts


def draw(logits: Matrix, uniform: Any, sampling: Sampling) -> Any:
    """Draw a token id for each row of logits (B, V) from uniform numbers (B) in [0, 1): (B).

    Only the most likely tokens that together hold `top_p` of the probability can be drawn (nucleus
    sampling: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
    """
    import numpy as np

    scaled = logits.astype(np.float64) / sampling.temperature
    chances = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    if sampling.top_p < 1:
        order = np.argsort(-chances, axis=1, kind="stable")
        falling = np.take_along_axis(chances, order, axis=1)
        before = np.cumsum(falling, axis=1) - falling
        falling[before >= sampling.top_p * falling.sum(axis=1, keepdims=True)] = 0
        np.put_along_axis(chances, order, falling, axis=1)
    sums = np.cumsum(chances, axis=1)
    return (sums <= uniform[:, None] * sums[:, -1:]).sum(axis=1)
