"""The body of the mixture, everything but its MLPs and routers: the base model's or an average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.families import EMBEDDING, HEAD
from moemerge.plan import Cut, Join, Mean, Recipe, of_donor
from moemerge.text import Vocabulary

VOCABULARY = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Body:
    """A dense model that the mixture's body is taken from.

    With `experts`, the mean of theirs by `weights`, which sum to 1 (Wortsman et al. 2022, "Model
    soups", https://arxiv.org/abs/2203.05482); what that wins is measured by
    `scripts/bench_routing.py`. A tensor that an expert lacks, or has in another shape, is the base
    model's. Of embeddings and head, each row is the mean of those experts that have it for the same
    token, whose `rows` say so; where none has, it is the base model's. With a `vocabulary` of the
    mixture's own, its rows are theirs.
    """

    base: Donor
    experts: tuple[Donor, ...] = ()
    weights: tuple[float, ...] = ()
    rows: tuple[tuple[range, ...], ...] = ()
    vocabulary: Vocabulary | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The normalised config.json of the dense model that the body is."""
        own = self.base.model.config
        return {**own, **self.vocabulary.config} if self.vocabulary else own

    def recipe(self, tensor: str) -> Recipe:
        """How the dense model's tensor of that name is made; MLPs among them."""
        if tensor in VOCABULARY:
            made = self._by_rows(tensor)
            return self.vocabulary.recipe(tensor, made) if self.vocabulary else made
        shape = _shape(self.base, tensor)
        same = all(_shape(expert, tensor) == shape for expert in self.experts)
        return self._mean(tensor, range(len(self.experts)) if same else ())

    def shared(self) -> list[tuple[Donor, dict[str, tuple[int, ...]]]]:
        """What may be read of experts' embeddings and heads: names with their shapes."""
        return [
            (one, {name: shape for name in VOCABULARY if (shape := _shape(one, name))})
            for one, rows in zip(self.experts, self.rows, strict=True)
            if rows
        ]

    def _by_rows(self, tensor: str) -> Recipe:
        """Each stretch of rows as the mean of those experts that share it."""
        size, *width = _shape(self.base, tensor) or (0,)
        turns: dict[int, set[int]] = {0: set(), size: set()}  # where an expert begins or ends
        whole = set()
        for number, rows in enumerate(self.rows):
            its, *wide = _shape(self.experts[number], tensor) or (0,)
            whole |= {number} if its == size else set()
            for one in rows if wide == width else ():
                ends = one.start, min(one.stop, its, size)
                for end in ends if ends[0] < ends[1] else ():
                    turns.setdefault(end, set()).add(number)
        members = set[int]()
        stretches = list[tuple[int, Recipe]]()
        for start, _ in pairwise(sorted(turns)):
            members ^= turns[start]
            made = self._mean(tensor, members)
            if not stretches or stretches[-1][1] != made:
                stretches.append((start, made))
        if not stretches or (len(stretches) == 1 and members <= whole):
            return stretches[0][1] if stretches else of_donor(self.base, tensor)
        stops = [*(start for start, _ in stretches[1:]), size]
        parts = (Cut(made, 0, at, end) for (at, made), end in zip(stretches, stops, strict=True))
        return Join(tuple(parts)) if len(stretches) > 1 else next(parts)

    def _mean(self, tensor: str, members: Iterable[int]) -> Recipe:
        """The mean of some experts' tensors; the base model's where there are none."""
        counted = [number for number in sorted(members) if self.weights[number]]
        parts = [of_donor(self.experts[number], tensor) for number in counted]
        if not parts:
            return of_donor(self.base, tensor)
        if all(part == parts[0] for part in parts):
            return parts[0]
        weights = [self.weights[number] for number in counted]
        if len(counted) < sum(map(bool, self.weights)):
            weights = [weight / sum(weights) for weight in weights]
        return Mean(tuple(parts), tuple(weights))


def _shape(donor: Donor, tensor: str) -> tuple[int, ...] | None:
    model, adapter = donor.model, donor.adapter
    own = adapter.replacements.get(tensor) if adapter else None
    found = adapter.checkpoint.tensors.get(own) if adapter and own else model.tensors.get(tensor)
    return found.shape if found else None
