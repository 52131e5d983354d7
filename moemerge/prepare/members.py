"""Whose neurons each expert is: the shape of a mixture, the host that holds it, and its members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moemerge.architectures import SEGMENTS, SPLIT_FACTOR, Mixture
from moemerge.checkpoint import Donor
from moemerge.config import Expert, MergeConfig
from moemerge.dense import Body
from moemerge.errors import Findings
from moemerge.families import DOWN
from moemerge.plan import ROUTERS, Recipe, recipe
from moemerge.prepare.choose import Host, find_host
from moemerge.split import Split


@dataclass(frozen=True)
class Member:
    """Whose MLPs an expert has, and what the config says of it.

    Its neurons are those from `start` to `stop`, if `stop` is given, in the layer's `order` if that
    is given by its name; what it adds to the residual stream is multiplied by `factor`.
    """

    donor: Donor | Body
    said: Expert | None = None
    start: int = 0
    stop: int = 0
    factor: float = 1.0
    order: str = ""

    def recipe(self, tensor: str, seed: int, which: str) -> Recipe:
        """How the dense tensor of that name becomes this expert's; `which` tells it from others."""
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
class Parts:
    """What fills an architecture's slots: the body, the routed experts and the shared ones."""

    body: Body
    routed: tuple[Member, ...]
    shared: tuple[Member, ...] = ()


def host_of(
    config: MergeConfig, split: Split | None, base: Donor, findings: Findings
) -> Host | None:
    """The architecture for these models and this mixture; None, with a problem, if none fits.

    Where it multiplies what is chosen by a factor itself, that does what `factor_of` else does.
    """
    mixture = _mixture(config, split, base.model.config.get("intermediate_size"), findings)
    host = find_host(config, base, mixture, findings) if mixture else None
    if host is None or not _factor(host) or host.mixture.settings is None:
        return host
    own, key = host.mixture.settings, _factor(host)
    own = replace(own, **{key: getattr(own, key) * _sharing(config, split)})
    return replace(host, mixture=replace(host.mixture, settings=own))


def factor_of(config: MergeConfig, split: Split | None, host: Host) -> int:
    """What the routed experts' down projections are multiplied by."""
    return 1 if _factor(host) else _sharing(config, split)


def parts_of(
    config: MergeConfig,
    split: Split | None,
    host: Host,
    body: Body,
    donors: Sequence[Donor],
    shared: Sequence[Donor],
) -> Parts:
    """Each expert, or each of its segments, or of the base model's slices, in turn.

    Shared experts are doubled where a gate that nothing decides halves them.
    """
    inner, factor = host.mixture.inner, factor_of(config, split, host)
    halved = host.architecture.SHARED == "gated" and not host.mixture.gated
    always = 2.0 if halved else 1.0
    if split:
        slices = [
            Member(body.base, None, at * inner, (at + 1) * inner, order=split.order)
            for at in range(split.slices)
        ]
        routed = tuple(replace(one, factor=factor) for one in slices[split.shared :])
        return Parts(
            body, routed, tuple(replace(one, factor=always) for one in slices[: split.shared])
        )

    def segments(
        of: Sequence[Donor], experts: Sequence[Expert], times: float
    ) -> tuple[Member, ...]:
        pieces = config.segments
        return tuple(
            Member(donor, said, at * inner, (at + 1) * inner if pieces > 1 else 0, times)
            for donor, said in zip(of, experts, strict=True)
            for at in range(pieces)
        )

    return Parts(
        body,
        segments(donors, config.experts, factor),
        segments(shared, config.shared_experts, always),
    )


def _mixture(
    config: MergeConfig, split: Split | None, inner: object, findings: Findings
) -> Mixture | None:
    count, pieces = max(len(config.experts), 1), config.segments
    if split:
        if any(split.problems(inner)):  # which are told where the config is read
            return None
        return Mixture(
            experts=count,
            per_token=split.per_token(config),
            inner=inner // split.slices if isinstance(inner, int) else 0,
            shared=split.shared,
            told=((SPLIT_FACTOR, split.per_token(config)),),
        )
    if pieces < 1 or not isinstance(inner, int) or inner % pieces:
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
    """Among how many slices or segments a router divides what one MLP would weigh."""
    return split.per_token(config) if split else config.segments


def _factor(host: Host) -> str:
    """The architecture's own factor for what is chosen, if it has one."""
    return host.architecture.READING.factor
