"""Training of a mixture's routers by the model's loss; all other weights are frozen.

Shapes: B passages, T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from moemerge.mixture import experts_of
from moemerge.reporting import Reporter, listener
from moemerge.text import batching
from moemerge.training.data import Passage, endless
from moemerge.training.settings import Tuning

if TYPE_CHECKING:
    import torch


EVALUATIONS = 10
"""How often the held-out text is read on the way."""

_WARM_UP = 0.1
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Trained:
    """Held-out losses (nats per token) by step, from step 0, and the step with the kept routers."""

    curve: tuple[tuple[int, float], ...]
    best: int

    @property
    def before(self) -> float:
        """The held-out loss of the old routers."""
        return self.curve[0][1]

    @property
    def after(self) -> float:
        """The held-out loss of the kept routers."""
        return dict(self.curve)[self.best]


def train(
    model: Any,
    routers: dict[str, torch.nn.Parameter],
    texts: Sequence[Passage],
    held: Sequence[Passage],
    tuning: Tuning,
    seed: int,
    balance: float,
    per_token: int,
    reporter: Reporter,
) -> tuple[Trained, dict[str, Any]]:
    """Train the routers; return those of the step with the lowest held-out loss, (E, D) in float32.

    AdamW with a cosine schedule trains float32 copies; the model reads them in its own dtype. The
    seed decides the order of passages. Training ends early if the held-out loss has not fallen for
    `tuning.patience` measurements. Step 0 counts, so the result is never worse than the start.

    Raises:
        RunError: the loss is not finite.
    """
    import torch

    masters = {name: router.detach().float().clone() for name, router in routers.items()}
    for router in routers.values():
        router.requires_grad_(True)
    fallen = torch.optim.AdamW(masters.values(), lr=tuning.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(fallen, lambda at: _pace(at, tuning.steps))
    teachers = _best_experts(model, texts, tuning, reporter) if tuning.distil else {}
    order = endless(len(texts), seed)
    curve = [(0, mean_loss(model, held, tuning.batch, reporter))]
    best, kept = 0, {name: master.clone() for name, master in masters.items()}
    every = -(-tuning.steps // EVALUATIONS)
    for begun in range(0, tuning.steps, every):
        steps = min(every, tuning.steps - begun)
        with reporter.progress(f"held out {shape(curve)}", steps, "step") as advance:
            for _ in range(steps):
                chosen = list(islice(order, tuning.batch))
                loss = _loss(
                    model, [texts[at] for at in chosen], [teachers.get(at) for at in chosen],
                    tuning, balance, per_token, list(routers.values()),
                )  # fmt: skip
                loss.backward()
                for name, router in routers.items():
                    masters[name].grad = router.grad.float() if router.grad is not None else None
                    router.grad = None
                torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
                fallen.step()
                schedule.step()
                with torch.no_grad():
                    for name, router in routers.items():
                        router.copy_(masters[name])
                advance(1)
        step = begun + steps
        curve.append((step, mean_loss(model, held, tuning.batch, reporter)))
        reporter.detail(f"step {step}: held-out loss {curve[-1][1]:.4f}")
        if curve[-1][1] < dict(curve)[best]:
            best, kept = step, {name: master.clone() for name, master in masters.items()}
        elif step - best >= tuning.patience * every:
            reporter.detail(f"stopped: no better than at step {best}")
            break
    return Trained(tuple(curve), best), {name: one.cpu().numpy() for name, one in kept.items()}


def shape(curve: Sequence[tuple[int, float]]) -> str:
    """A curve as a row of bar characters, and its last value."""
    losses = [loss for _, loss in curve]
    low, high = min(losses), max(losses)
    bars = [_BARS[round((loss - low) / (high - low or 1) * (len(_BARS) - 1))] for loss in losses]
    return f"{''.join(bars)} {losses[-1]:.4f}"


def mean_loss(
    model: Any, passages: Sequence[Passage], batch: int, reporter: Reporter | None = None
) -> float:
    """The mean loss (nats) of the tokens that count.

    Raises:
        RunError: it is no number.
    """
    import torch

    order = sorted(passages, key=lambda one: len(one.ids))
    total, tokens = 0.0, 0
    reading = listener(reporter, False).progress("reading held-out text", len(order), "passage")
    with reading as advance, torch.inference_mode():
        for at in range(0, len(order), batch):
            scores, ids, counted = _scores(model, order[at : at + batch])
            counted = counted[:, 1:]
            total += float(batching.losses(scores, ids)[counted].double().sum())
            tokens += int(counted.sum())
            advance(len(scores))
    return batching.check_loss(total / tokens)


def _pace(at: int, steps: int) -> float:
    """The factor of the learning rate: a warm-up of a tenth of the steps, then a cosine to 0."""
    import math

    warm = max(1, round(_WARM_UP * steps))
    if at < warm:
        return (at + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (at - warm) / max(1, steps - warm)))


def _batch(passages: Sequence[Passage], device: Any) -> tuple[Any, Any, Any]:
    """Ids (B, T), the attention mask, and which the loss counts."""
    ids = batching.padded(one.ids for one in passages)
    mask = batching.mask(len(one.ids) for one in passages)
    counted = batching.padded(one.counted for one in passages).bool()
    return ids.to(device), mask.to(device), counted.to(device)


def _scores(model: Any, passages: Sequence[Passage]) -> tuple[Any, Any, Any]:
    """Log-probabilities (B, T - 1, V) of what comes next, the ids, and which of these count."""
    ids, mask, counted = _batch(passages, model.lm_head.weight.device)
    done = model(input_ids=ids, attention_mask=mask, use_cache=False)
    return batching.log_probabilities(done.logits), ids, counted


def _loss(
    model: Any,
    passages: Sequence[Passage],
    teachers: Sequence[int | None],
    tuning: Tuning,
    balance: float,
    per_token: int,
    routers: Sequence[Any],
) -> Any:
    seen: list[Any] = []
    with _router_logits(model, routers, seen if balance else None):
        scores, ids, counted = _scores(model, passages)
    counted = counted[:, 1:]
    loss = batching.losses(scores, ids)[counted].mean()
    if tuning.distil:
        far = scores.new_zeros(())
        for expert in sorted({one for one in teachers if one is not None}):
            rows = [row for row, own in enumerate(teachers) if own == expert]
            meant = _of_one_expert(model, [passages[row] for row in rows], expert)
            ours = scores[rows, : meant.shape[1]]
            apart = (meant.exp() * (meant - ours)).sum(-1)
            far = far + apart[counted[rows, : meant.shape[1]]].sum()
        loss = (1 - tuning.distil) * loss + tuning.distil * far / counted.sum()
    if balance:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        mask = _batch(passages, ids.device)[1]
        count = routers[0].shape[0]
        loss = loss + balance * load_balancing_loss_func(tuple(seen), count, per_token, mask)
    return loss


@contextmanager
def _router_logits(model: Any, routers: Sequence[Any], seen: list[Any] | None) -> Iterator[None]:
    """Collect every router's logits (B * T, E) for the load-balancing loss."""
    if seen is None:
        yield
        return
    own = {id(router) for router in routers}

    def note(module: Any, args: tuple[Any, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])
        seen.append((inputs @ module.weight.T).float())

    modules = [m for m in model.modules() if id(getattr(m, "weight", None)) in own]
    hooks = [m.register_forward_pre_hook(note) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_one_expert(model: Any, passages: Sequence[Passage], expert: int) -> Any:
    """Log-probabilities (B, T - 1, V) where every token goes through one expert alone."""
    import torch

    layers = experts_of(model)
    try:
        for layer in layers:
            layer.only = expert
        with torch.no_grad():
            return _scores(model, passages)[0]
    finally:
        for layer in layers:
            layer.only = None


def _best_experts(
    model: Any, texts: Sequence[Passage], tuning: Tuning, reporter: Reporter
) -> dict[int, int]:
    """For each passage, the expert that alone predicts it best."""
    import torch

    count = len(experts_of(model)[0])
    losses: dict[int, list[float]] = {}
    with reporter.progress("which expert is best", len(texts), "text") as advance:
        for at in range(0, len(texts), tuning.batch):
            batch = texts[at : at + tuning.batch]
            for expert in range(count):
                scores = _of_one_expert(model, batch, expert)
                ids, _, counted = _batch(batch, scores.device)
                own = batching.losses(scores, ids)
                sums = torch.where(counted[:, 1:], own, torch.zeros_like(own)).sum(1).tolist()
                for row, loss in enumerate(sums):
                    losses.setdefault(at + row, []).append(loss)
            advance(len(batch))
    return {at: own.index(min(own)) for at, own in losses.items()}
