"""The experts of a mixture: the shape of the mixture, and the neurons that each expert gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moemerge.architectures import SEGMENTS, SPLIT_FACTOR, Mixture, width_of
from moemerge.checkpoint import Donor
from moemerge.config import Expert, MergeConfig
from moemerge.dense import Body
from moemerge.errors import Findings
from moemerge.families import DOWN
from moemerge.plan import ROUTERS, Recipe, recipe
from moemerge.prepare.choose import Target, find_target
from moemerge.split import Split


@dataclass(frozen=True)
class ExpertSource:
    """The model whose MLPs an expert gets, and the config's entry for the expert.

    If `stop` is not 0, the expert has only the neurons from `start` to `stop`. They are counted in
    the layer's `order`, if its tensor name is given. The down projection is multiplied by `factor`.
    """

    donor: Donor | Body
    said: Expert | None = None
    start: int = 0
    stop: int = 0
    factor: float = 1.0
    order: str = ""

    def recipe(self, tensor: str, seed: int, which: str) -> Recipe:
        """The recipe of this expert's part of a dense tensor; `which` is the expert, for seeds."""
        donor, down = self.donor, f".{DOWN}." in tensor
        made = donor.recipe(tensor) if isinstance(donor, Body) else recipe.of_donor(donor, tensor)
        if self.stop:
            layer = tensor.split(".")[2]
            order = recipe.Read(ROUTERS, self.order.format(layer=layer)) if self.order else None
            made = recipe.Cut(made, 1 if down else 0, self.start, self.stop, order)
        if self.said and self.said.renew:
            key = f"{tensor.partition('.mlp.')[0]}, {which}"
            made = recipe.Renew(made, 1 if down else 0, self.said.renew, seed, key)
        if self.said and self.said.noise_scale:
            made = recipe.Noise(made, self.said.noise_scale, seed)
        factor = self.factor * (self.said.residual_scale if self.said else 1.0)
        return recipe.Scale(made, factor) if down and factor != 1 else made


@dataclass(frozen=True)
class MixtureParts:
    """The parts that fill an architecture's slots: body, routed experts and shared experts."""

    body: Body
    routed: tuple[ExpertSource, ...]
    shared: tuple[ExpertSource, ...] = ()


def target_of(
    config: MergeConfig, split: Split | None, base: Donor, findings: Findings
) -> Target | None:
    """The architecture for these models and this mixture; None, with a problem, if none fits.

    Some architectures multiply the routed experts' output by a factor in config.json. This factor
    then takes the place of `factor_of`.
    """
    mixture = _mixture(config, split, width_of(base.model.config), findings)
    target = find_target(config, base, mixture, findings) if mixture else None
    if target is None or not _factor(target) or target.mixture.settings is None:
        return target
    own, key = target.mixture.settings, _factor(target)
    own = replace(own, **{key: getattr(own, key) * _sharing(config, split)})
    return replace(target, mixture=replace(target.mixture, settings=own))


def factor_of(config: MergeConfig, split: Split | None, target: Target) -> int:
    """The factor of the routed experts' down projections."""
    return 1 if _factor(target) else _sharing(config, split)


def parts_of(
    config: MergeConfig,
    split: Split | None,
    target: Target,
    body: Body,
    donors: Sequence[Donor],
    shared: Sequence[Donor],
) -> MixtureParts:
    """The experts in order: each expert, each segment of an expert, or each slice of a split.

    Shared experts are multiplied by 2 if the architecture has a gate for them that no prompts set,
    because a gate of zeros multiplies them by 1/2.
    """
    inner, factor = target.mixture.inner, factor_of(config, split, target)
    halved = target.architecture.SHARED == "gated" and not target.mixture.gated
    always = 2.0 if halved else 1.0
    if split:
        slices = [
            ExpertSource(body.base, None, at * inner, (at + 1) * inner, order=split.order)
            for at in range(split.slices)
        ]
        routed = tuple(replace(one, factor=factor) for one in slices[split.shared :])
        return MixtureParts(
            body, routed, tuple(replace(one, factor=always) for one in slices[: split.shared])
        )

    def segments(
        of: Sequence[Donor], experts: Sequence[Expert], times: float
    ) -> tuple[ExpertSource, ...]:
        pieces = config.segments
        return tuple(
            ExpertSource(donor, said, at * inner, (at + 1) * inner if pieces > 1 else 0, times)
            for donor, said in zip(of, experts, strict=True)
            for at in range(pieces)
        )

    return MixtureParts(
        body,
        segments(donors, config.experts, factor),
        segments(shared, config.shared_experts, always),
    )


def _mixture(
    config: MergeConfig, split: Split | None, inner: int, findings: Findings
) -> Mixture | None:
    count, pieces = max(len(config.experts), 1), config.segments
    if split:
        if any(split.problems(inner)):  # `check_split` records them
            return None
        return Mixture(
            experts=count,
            per_token=split.per_token(config),
            inner=inner // split.slices,
            shared=split.shared,
            told=((SPLIT_FACTOR, split.per_token(config)),),
        )
    if pieces < 1 or inner % pieces:
        what, fix = f"is {pieces}", f"write a divisor of {inner}, their neurons"
        findings.problem(config.where("segments"), what, fix)
        return None
    return Mixture(
        experts=count * pieces,
        per_token=(config.experts_per_token or min(2, count)) * pieces,
        inner=inner // pieces,
        shared=len(config.shared_experts) * pieces,
        gated=any(expert.positive_prompts for expert in config.shared_experts),
        told=((SEGMENTS, pieces),) if pieces > 1 else (),
    )


def _sharing(config: MergeConfig, split: Split | None) -> int:
    """The number of chosen slices or segments that together stand for one MLP."""
    return split.per_token(config) if split else config.segments


def _factor(target: Target) -> str:
    """The config.json key of the architecture's factor for routed experts; empty if it has none."""
    return target.architecture.READING.factor
