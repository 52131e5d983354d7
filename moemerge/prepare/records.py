"""The results of a preparation: the inputs of a plan, and a merge that can begin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint import Checkpoint, Donor
from moemerge.config import MergeConfig
from moemerge.dense import Body
from moemerge.errors import Line
from moemerge.fit import Fit
from moemerge.gates import ExpertPrompts, Gate
from moemerge.plan import Plan
from moemerge.prepare.choose import Target
from moemerge.split import Cutting, Split
from moemerge.text import Encoder, Vocabulary


@dataclass(frozen=True)
class Chosen:
    """The inputs of a plan, after every check has passed.

    `donors` are the routed experts, and `shared` the shared experts. With a split and its
    `cutting`, the donors are the routed slices, and each one is the base model. `own_card` is the
    text of the card that a person wrote for the mixture.
    """

    config: MergeConfig
    gate: Gate
    split: Split | None
    base: Donor
    donors: tuple[Donor, ...]
    shared: tuple[Donor, ...]
    target: Target
    vocabulary: Vocabulary
    encoder: Encoder | None
    prompts: tuple[ExpertPrompts, ...]
    cutting: Cutting | None
    own_card: str


@dataclass(frozen=True)
class Prepared(Chosen):
    """A merge that can begin: its plan, its opened models, and notes for a person.

    `donors` are the experts by themselves, and `experts` those of the mixture, which a `fit` may
    have aligned.
    """

    plan: Plan
    body: Body
    fit: Fit | None
    checkpoints: dict[str, Checkpoint]
    carried: tuple[Path, ...]
    notes: tuple[Line, ...]

    @property
    def experts(self) -> tuple[Donor, ...]:
        """The experts as the mixture has them."""
        return self.fit.donors(self.donors) if self.fit else self.donors

    @property
    def folder(self) -> str | None:
        """The config file's folder; None if nothing that the config names is on this machine."""
        local = any(source.directory for source in self.plan.sources)
        local = local or any(expert.calibration for expert in self.config.experts)
        return str(self.config.folder) if self.config.folder and local else None
