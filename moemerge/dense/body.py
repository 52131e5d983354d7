"""The mixture's body, which is all but MLPs and routers: the base model's, or an average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from moemerge.architectures import RouterInput
from moemerge.checkpoint import Donor
from moemerge.families import EMBEDDING, HEAD
from moemerge.plan import ROUTERS, Cut, Join, Mean, Read, Recipe, of_donor
from moemerge.text import Vocabulary

VOCABULARY = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Body:
    """The dense model that gives the mixture's body.

    Without `experts` it is the base model. With `experts`, each tensor is the mean of the experts'
    tensors by `weights`, which sum to 1 (Wortsman et al. 2022, "Model soups",
    https://arxiv.org/abs/2203.05482; `scripts/bench_routing.py` measures the gain). Where an expert
    lacks a tensor or has it in another shape, the base model's tensor is used. Each row of the
    embeddings and the head is the mean of the experts that have this row for the same token; an
    expert's `rows` list these rows. A row that no expert shares is the base model's. If the mixture
    has its own `vocabulary`, the vocabulary decides the rows. The mixture's routers see `sees`.
    Matrices of `fitted` are read from the computed checkpoint, under the names that it gives.
    """

    base: Donor
    experts: tuple[Donor, ...] = ()
    weights: tuple[float, ...] = ()
    rows: tuple[tuple[range, ...], ...] = ()
    vocabulary: Vocabulary | None = None
    sees: RouterInput = field(default_factory=RouterInput)
    fitted: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The dense model's normalised config.json, with the vocabulary's settings."""
        own = self.base.model.config
        return {**own, **self.vocabulary.config} if self.vocabulary else own

    def recipe(self, tensor: str) -> Recipe:
        """The recipe of the dense model's tensor `tensor`, which may be of an MLP too."""
        if tensor in VOCABULARY:
            made = self._by_rows(tensor)
            return self.vocabulary.recipe(tensor, made) if self.vocabulary else made
        if tensor in self.fitted:
            return Read(ROUTERS, self.fitted[tensor])
        return self._mean(tensor, range(len(self.experts)) if self.is_mean(tensor) else ())

    def is_mean(self, tensor: str) -> bool:
        """Whether all experts have a tensor, in the base model's shape."""
        shape = _shape(self.base, tensor)
        return all(_shape(expert, tensor) == shape for expert in self.experts)

    def shared(self) -> list[tuple[Donor, dict[str, tuple[int, ...]]]]:
        """Each expert that shares rows, with the names and shapes of its embeddings and head."""
        return [
            (one, {name: shape for name in VOCABULARY if (shape := _shape(one, name))})
            for one, rows in zip(self.experts, self.rows, strict=True)
            if rows
        ]

    def _by_rows(self, tensor: str) -> Recipe:
        """The recipe of a tensor by ranges of rows: each the mean of the experts that share it."""
        size, *width = _shape(self.base, tensor) or (0,)
        # Row: the experts whose ranges begin or end there.
        turns: dict[int, set[int]] = {0: set(), size: set()}
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
        """The mean of the members' tensors; the base model's tensor if there are no members."""
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
