"""The `split:` part of a config, checked against the model that it cuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moemerge.config import Expert, MergeConfig, read_settings
from moemerge.errors import Findings, nearest
from moemerge.families import LAYER
from moemerge.split import neurons

ORDER = LAYER + "mlp.order"
"""The name under which a layer's order of neurons is saved with the routers."""

MOST_SLICES = 4096


@dataclass(frozen=True)
class Split:
    """A config's `split:`. Each MLP is cut into `slices` of equal size; the first `shared` of them
    are always on.

    `assign` is how neurons are grouped into slices, one of `neurons.ASSIGNMENTS`. None means
    coactivation where there is a `text` (a file, a directory or a dataset), otherwise kmeans.
    """

    slices: int = 8
    shared: int = 0
    assign: str | None = None
    text: str | None = None

    @property
    def routed(self) -> int:
        """How many slices a router chooses from."""
        return self.slices - self.shared

    @property
    def assignment(self) -> str:
        """The assignment in use: `assign`, or the default where it is None."""
        return self.assign or ("coactivation" if self.text else "kmeans")

    @property
    def order(self) -> str:
        """The name of a layer's order of neurons; empty where neurons keep their order."""
        return "" if self.assignment == "order" else ORDER

    @property
    def reads_text(self) -> bool:
        """Whether the orders of neurons depend on the text; the base model then reads it."""
        return self.assignment == "coactivation"

    @property
    def draws(self) -> bool:
        """Whether the orders of neurons depend on random draws."""
        return self.assignment != "order"

    def per_token(self, config: MergeConfig) -> int:
        """The routed slices chosen for each token; by default half of all slices are on, the
        shared ones included."""
        return config.experts_per_token or max(1, self.slices // 2 - self.shared)

    def problems(self, inner: Any) -> Iterator[tuple[str, str, str]]:
        """Each problem of the settings for MLPs of `inner` neurons: key, what, fix."""
        if not 2 <= self.slices <= MOST_SLICES:
            yield "slices", f"is {self.slices}", f"write a number from 2 to {MOST_SLICES}"
        elif isinstance(inner, int) and inner % self.slices:
            fits = ", ".join(str(n) for n in range(2, 65) if inner % n == 0)
            what = f"is {self.slices}, which does not divide the MLPs' {inner} neurons"
            yield "slices", what, f"write one of {fits}"
        if not 0 <= self.shared < self.slices:
            what = f"is {self.shared} of {self.slices} slices"
            yield "shared", what, "leave at least one for the router to choose"
        if self.assignment not in neurons.ASSIGNMENTS:
            fix = nearest(self.assignment, neurons.ASSIGNMENTS)
            yield "assign", f"{self.assign!r} is not an assignment", fix
        if self.assignment == "coactivation" and not self.text:
            what = "is missing: assign: coactivation needs a text for the model to read"
            yield "text", what, "name a text or jsonl file, or use assign: kmeans"


def split_of(config: MergeConfig, findings: Findings) -> Split | None:
    """The config's split, checked without the model; problems are recorded.

    Returns None where the config has no split, or where the split has problems.
    """
    if not config.split:
        return None
    before = len(findings.problems)
    split = read_settings(
        Split,
        config.split,
        lambda key: config.where(f"split.{key}"),
        "is not a setting of split",
        findings,
    )
    for key, why in _at_odds(config):
        findings.problem(config.where(key), f"cannot be used with split: {why}", "remove one")
    return split if len(findings.problems) == before else None


def _at_odds(config: MergeConfig) -> Iterator[tuple[str, str]]:
    """Each key of the config that a split does not allow: key, why."""
    one = "the experts are the slices of the base model, and no others"
    if config.experts:
        yield "experts", one
    if config.shared_experts:
        yield "shared_experts", "set split.shared, the number of slices that are always on"
    if config.segments != 1:
        yield "segments", "write more slices"
    if config.body != "base":
        yield "body", one
    if config.aligns:
        yield "align", one


def with_slices(config: MergeConfig, split: Split) -> MergeConfig:
    """The config with one expert for each routed slice; all come from the base model."""
    count = max(1, min(split.routed, MOST_SLICES))
    names = [f"slice-{number}" for number in range(split.shared, split.shared + count)]
    experts = tuple(Expert(config.base_model, name=name) for name in names)
    return replace(config, experts=experts)


def check_split(config: MergeConfig, split: Split, inner: Any, findings: Findings) -> None:
    """Record each problem of a split for MLPs of `inner` neurons."""
    for key, what, fix in split.problems(inner):
        findings.problem(config.where(f"split.{key}"), what, fix)
    per_token = config.experts_per_token
    if per_token is not None and split.routed > 0 and not 1 <= per_token <= split.routed:
        what = f"is {per_token}, but routers choose from {split.routed} slices"
        fix = f"write a number from 1 to {split.routed}"
        findings.problem(config.where("experts_per_token"), what, fix)
