"""Batches and losses: every text once, none in more memory than is meant, torch's own numbers."""

from __future__ import annotations

import random

import pytest
import torch

from moemerge import RunError
from moemerge.text.batching import (
    BATCH_TOKENS,
    batches,
    check_loss,
    log_probabilities,
    losses,
    mask,
    padded,
)
from moemerge.training.data import Passage
from moemerge.training.lora import collate
from moemerge.training.router_loop import _batch


def test_every_text_is_in_one_batch_and_none_holds_too_much() -> None:
    draw = random.Random(3)
    lengths = [draw.choice([1, 7, 100, 1000, BATCH_TOKENS, BATCH_TOKENS + 1]) for _ in range(300)]
    made = batches(lengths)
    assert sorted(number for batch in made for number in batch) == list(range(300))
    in_order = [number for batch in made for number in batch]
    assert in_order == sorted(range(300), key=lambda number: (-lengths[number], number))
    for batch, following in zip(made, [*made[1:], None], strict=True):
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= BATCH_TOKENS
        assert following is None or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS
    assert batches([]) == []


def test_losses_are_torchs() -> None:
    rows = [[5, 3, 1], [2, 4, 6, 0, 1], [7]]
    ids, real = padded(rows), mask(map(len, rows))
    assert ids.tolist() == [[5, 3, 1, 0, 0], [2, 4, 6, 0, 1], [7, 0, 0, 0, 0]]
    assert real.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    logits = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    found = losses(log_probabilities(logits), ids)
    meant = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
    )
    assert found.dtype == torch.float32 and torch.allclose(found, meant, rtol=0, atol=1e-6)


def test_the_two_trainings_count_the_same_tokens() -> None:
    passages = [
        Passage((5, 3, 1, 2), (False, True, False, True), (0, 3)),
        Passage((2, 4), (False, True)),
        Passage((1, 2, 3, 4, 5, 6), (False, True) * 3, (0, 2, 3)),
    ]
    ids, real, counted = _batch(passages, "cpu")
    batch = collate(passages)
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["labels"], torch.where(counted, ids, -100))
    assert real.sum().item() == 12 and not counted[~real.bool()].any()
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3], [0, 1, 0, 0, 1, 2]
    ]  # fmt: skip


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 700.0])
def test_a_loss_that_is_none_is_refused(loss: float) -> None:
    assert check_loss(699.0) == 699.0
    with pytest.raises(RunError, match=r"the loss came out as .*; the model is broken"):
        check_loss(loss)
