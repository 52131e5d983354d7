"""The body of the mixture, everything but its MLPs and routers: the base model's or an average."""

from __future__ import annotations

from dataclasses import dataclass

from moemerge.checkpoint import Donor
from moemerge.recipe import Mean, Recipe, of_donor

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Body:
    """A dense model that the mixture's body is taken from.

    With `experts`, the mean of theirs by `weights`, which sum to 1 (Wortsman et al. 2022, "Model
    soups", https://arxiv.org/abs/2203.05482); what that wins is measured by
    `scripts/bench_routing.py`. A tensor that an expert lacks, or has in another shape, is the base
    model's; so are embeddings and head unless `vocabulary` says that all agree on it.
    """

    base: Donor
    experts: tuple[Donor, ...] = ()
    weights: tuple[float, ...] = ()
    vocabulary: bool = True

    def recipe(self, tensor: str) -> Recipe:
        """How the dense model's tensor of that name is made; MLPs among them."""
        own = of_donor(self.base, tensor)
        shape = _shape(self.base, tensor)
        parts = [
            (of_donor(expert, tensor), weight)
            for expert, weight in zip(self.experts, self.weights, strict=True)
            if weight
        ]
        same = all(_shape(expert, tensor) == shape for expert in self.experts)
        if not parts or not same or (tensor in VOCABULARY and not self.vocabulary):
            return own
        if all(part == parts[0][0] for part, _ in parts):
            return parts[0][0]
        return Mean(tuple(part for part, _ in parts), tuple(weight for _, weight in parts))


def _shape(donor: Donor, tensor: str) -> tuple[int, ...] | None:
    found = donor.model.tensors.get(tensor)
    return found.shape if found else None
