"""The body of the mixture, everything but its MLPs and routers: the base model's or an average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.recipe import Mean, Recipe, of_donor
from moemerge.vocabulary import EMBEDDING, HEAD, Vocabulary

VOCABULARY = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Body:
    """A dense model that the mixture's body is taken from.

    With `experts`, the mean of theirs by `weights`, which sum to 1 (Wortsman et al. 2022, "Model
    soups", https://arxiv.org/abs/2203.05482); what that wins is measured by
    `scripts/bench_routing.py`. A tensor that an expert lacks, or has in another shape, is the base
    model's; so are embeddings and head unless they are `alike`: all agree on the vocabulary. With a
    `vocabulary` of the mixture's own, its rows are theirs.
    """

    base: Donor
    experts: tuple[Donor, ...] = ()
    weights: tuple[float, ...] = ()
    alike: bool = True
    vocabulary: Vocabulary | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The normalised config.json of the dense model that the body is."""
        own = self.base.model.config
        return {**own, **self.vocabulary.config} if self.vocabulary else own

    def recipe(self, tensor: str) -> Recipe:
        """How the dense model's tensor of that name is made; MLPs among them."""
        made = self._average(tensor)
        if tensor in VOCABULARY and self.vocabulary:
            return self.vocabulary.recipe(tensor, made)
        return made

    def _average(self, tensor: str) -> Recipe:
        own = of_donor(self.base, tensor)
        shape = _shape(self.base, tensor)
        parts = [
            (of_donor(expert, tensor), weight)
            for expert, weight in zip(self.experts, self.weights, strict=True)
            if weight
        ]
        same = all(_shape(expert, tensor) == shape for expert in self.experts)
        if not parts or not same or (tensor in VOCABULARY and not self.alike):
            return own
        if all(part == parts[0][0] for part, _ in parts):
            return parts[0][0]
        return Mean(tuple(part for part, _ in parts), tuple(weight for _, weight in parts))


def _shape(donor: Donor, tensor: str) -> tuple[int, ...] | None:
    found = donor.model.tensors.get(tensor)
    return found.shape if found else None
