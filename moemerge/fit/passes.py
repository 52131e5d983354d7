"""The pass of a fit: every expert's own model and the mixture's, side by side, layer by layer.

One layer of one model is in memory at a time. In each layer the experts' own models go first; then
the body's matrices are fitted, and the mixture reads each expert's texts with that expert forced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor
from moemerge.dense import Body, Lane, Passage
from moemerge.families import DOWN, LAYER
from moemerge.fit.align import correction
from moemerge.fit.computed import Computed
from moemerge.fit.regmean import RegMean
from moemerge.fit.targets import Fit
from moemerge.options import RunOptions
from moemerge.plan import ROUTERS, Recipe, Sources, arithmetic, recipe
from moemerge.reporting import Reporter
from moemerge.text import Prompt

if TYPE_CHECKING:
    import torch

_DOWN = f"mlp.{DOWN}"
_ALIKE = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj"}
"""Modules that read the same input as another."""

_SOME = 32
"""So many tokens of an expert tell the size of its outputs."""


@dataclass(frozen=True)
class FitReport:
    """What a fit did; see `report.FitSummary`. `losses` are, by expert, the losses on held-out
    texts without and with alignment, and whether it was kept."""

    attention: list[tuple[float, float]] = field(default_factory=list)
    drift: list[tuple[float, float]] = field(default_factory=list)
    losses: list[tuple[float, float] | None] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)


def run_fit(
    fit: Fit,
    body: Body,
    donors: Sequence[Donor],
    sources: dict[str, Any],
    options: RunOptions,
    reporter: Reporter,
    dtype: str,
    path: Path,
) -> FitReport:
    """Compute everything that `fit` names into the checkpoint `path`, in `dtype`.

    `body` is the mean of the experts, or the base; `donors` are the experts by themselves.

    Raises:
        RunError: a model gives NaN or Inf, or a matrix comes out so.
    """
    import torch

    computed = Computed(path, list(fit.tensors(body, dtype)))
    everything = {**sources, ROUTERS: computed.places}
    run = _Run(fit, body, donors, everything, options, computed)
    total = len(run.layers) * run.texts
    with torch.inference_mode(), reporter.progress("fitting the body", total, "text") as advance:
        for layer in run.layers:
            run.layer(layer, advance)
        report = run.finish()
    computed.finish()
    return report


class _Run:
    def __init__(
        self,
        fit: Fit,
        body: Body,
        donors: Sequence[Donor],
        sources: Sources,
        options: RunOptions,
        computed: Computed,
    ):
        self.fit, self.mean, self.donors, self.sources = fit, body, donors, sources
        self.computed = computed
        self.own: list[Lane | None] = []
        mixed: list[Passage] = []
        self.groups: list[_Group] = []
        for expert, (donor, texts) in enumerate(zip(donors, fit.texts, strict=True)):
            aligns = bool(fit.downs[expert])
            every = list(dict.fromkeys([*texts.body, *texts.aligned, *texts.held]))
            if not aligns:
                every = list(dict.fromkeys(texts.body))
            passages = [Passage(prompt) for prompt in every]
            own_model = Lane(Body(donor), sources, passages, options) if every else None
            self.own.append(own_model)
            if aligns:
                place = {prompt: at for at, prompt in enumerate(every)}
                for kind, prompts in (
                    ("fit", texts.aligned), ("held", texts.held), ("plain", texts.held)
                ):  # fmt: skip
                    own = [place[prompt] for prompt in prompts]
                    here = range(len(mixed), len(mixed) + len(prompts))
                    mixed += [Passage(prompt, donor) for prompt in prompts]
                    self.groups.append(_Group(expert, kind, here, own, prompts))
        self.mixed = Lane(fit.body(body), sources, mixed, options) if mixed else None
        lanes = [lane for lane in (*self.own, self.mixed) if lane]
        self.layers = lanes[0].layers if lanes else range(0)
        self.texts = sum(len(lane.passages) for lane in lanes)
        self.drift: list[tuple[float, float]] = []
        self.attention: list[tuple[float, float]] = []
        self.memory: dict[str, torch.Tensor] = {}

    def layer(self, number: int, advance: Callable[[int], object]) -> None:
        """Run all models through a layer, and compute what is fitted in it."""
        prefix = LAYER.format(layer=number)
        groups: dict[str, list[str]] = {}
        for name in self.fit.matrices:
            if name.startswith(prefix):
                module = name.removeprefix(prefix).removesuffix(".weight")
                groups.setdefault(_ALIKE.get(module, module), []).append(name)
        inputs: list[dict[str, dict[int, Any]]] = []
        for lane in self.own:
            seen: dict[str, dict[int, Any]] = {module: {} for module in groups}
            if lane:
                weights = lane.load(number, None, self.memory)
                for count in lane.step(number, weights, None, seen):
                    advance(count)
            inputs.append(seen)
        errors = [0.0, 0.0, 0.0]
        for module, names in groups.items():
            for at, error in enumerate(self._fit(names, [seen[module] for seen in inputs])):
                errors[at] += error
        if errors[2]:
            before, after, size = errors
            self.attention.append(((before / size) ** 0.5, (after / size) ** 0.5))
        if self.mixed:
            self._mix(number, advance)

    def _fit(self, names: list[str], inputs: list[dict[int, Any]]) -> tuple[float, float, float]:
        """Fit the body's matrices that read these inputs; returns the squared errors of the mean's
        and the fitted matrices' outputs, and about the squares of the own matrices' outputs."""
        import numpy as np
        import torch

        given: dict[int, torch.Tensor] = {}
        for expert, (seen, texts) in enumerate(zip(inputs, self.fit.texts, strict=True)):
            rows = [seen[at] for at in range(len(set(texts.body))) if at in seen]
            if rows and self.mean.weights[expert]:
                given[expert] = torch.from_numpy(np.concatenate(rows))
        if not given:
            return self._mean_of(names)
        dtype = next(lane.dtype for lane in self.own if lane)
        shares = [self.mean.weights[expert] for expert in given]
        solver = RegMean(list(given.values()), shares, dtype)
        before = after = size = 0.0
        for name in names:
            own = self._own(name)
            mean = self._mean(own)
            lacking = [
                (x.to(dtype) @ (own[expert] - mean).to(dtype).T).float()
                for expert, x in given.items()
            ]
            fitted, was, left = solver.fit(mean, lacking)
            self.computed.write(self.fit.matrices[name], fitted)
            before, after = before + was, after + left
            for (expert, x), scale in zip(given.items(), solver.scales, strict=True):
                some = scale * x[:: max(1, len(x) // _SOME)]
                some = (some.to(dtype) @ own[expert].to(dtype).T).float()
                size += float(some.square().mean()) * len(x) * some.shape[1]
        return before, after, size

    def _mean_of(self, names: list[str]) -> tuple[float, float, float]:
        """Keep the mean of matrices that no text reaches."""
        for name in names:
            self.computed.write(self.fit.matrices[name], self._mean(self._own(name)))
        return 0.0, 0.0, 0.0

    def _own(self, name: str) -> dict[int, torch.Tensor]:
        """A tensor of each expert that counts."""
        return {
            expert: self._load(name, recipe.of_donor(donor, name))
            for expert, donor in enumerate(self.donors)
            if self.mean.weights[expert]
        }

    def _mean(self, own: dict[int, torch.Tensor]) -> torch.Tensor:
        import torch

        mean = torch.zeros(next(iter(own.values())).shape)
        for expert, one in own.items():
            mean.add_(one, alpha=self.mean.weights[expert])
        return mean

    def _load(self, name: str, of: Recipe) -> torch.Tensor:
        return arithmetic.load(name, recipe.shape_of(of, self.sources), of, self.sources)

    def _mix(self, number: int, advance: Callable[[int], object]) -> None:
        """Run the mixture with each expert forced, and align its down projection."""
        lane, far = self.mixed, list[tuple[float, float]]()
        assert lane
        rest = lane.load(number, None, {}, mlp=False)
        memory: dict[str, torch.Tensor] = {}
        for expert in dict.fromkeys(group.expert for group in self.groups):
            donor = self.donors[expert]
            weights = rest | lane.load(number, donor, memory, rest=False)
            seen: dict[str, dict[int, Any]] = {_DOWN: {}}
            for count in lane.step(number, weights, donor, seen, whole=True):
                advance(count)
            groups = [group for group in self.groups if group.expert == expert]
            self._align(number, groups, seen[_DOWN])
            far += self._distances(groups)
        if far:
            before, after = zip(*far, strict=True)
            self.drift.append((sum(before) / len(before), sum(after) / len(after)))

    def _align(self, number: int, groups: list[_Group], inputs: dict[int, Any]) -> None:
        """Fit an expert's correction in a layer, write it, and apply it to the states."""
        import torch

        lane, own = self.mixed, self.own[groups[0].expert]
        assert lane and own
        factor = float(lane.config.get("residual_multiplier", 1.0))
        [fitted] = [group for group in groups if group.kind == "fit"]
        xs, wanted, states = list[Any](), list[Any](), list[Any]()
        for here, there, prompt in fitted.rows():
            target, now = own.state_of(there)[prompt.own :], lane.state_of(here)[prompt.own :]
            xs.append(torch.from_numpy(inputs[here][prompt.own :]))
            wanted.append((target - now) / factor)
            states.append(target)
        up, down = correction(torch.cat(xs), torch.cat(wanted), torch.cat(states))
        name = LAYER.format(layer=number) + f"{_DOWN}.weight"
        names = self.fit.downs[fitted.expert][name]
        if len(names) > 1:
            self.computed.write(names[0], down)
            self.computed.write(names[1], up)
        else:
            self.computed.write(names[0], self._plain(fitted.expert, name) + up @ down)
        for group in groups:
            for here, _, _ in group.rows() if group.kind != "plain" else ():
                moved = factor * (torch.from_numpy(inputs[here]) @ down.T @ up.T)
                lane.add_to_state(here, moved)

    def _plain(self, expert: int, name: str) -> torch.Tensor:
        return self._load(name, recipe.of_donor(self.donors[expert], name)).float()

    def _distances(self, groups: list[_Group]) -> Iterator[tuple[float, float]]:
        """How far held-out texts' states are from the own model's: without and with alignment."""
        lane, own = self.mixed, self.own[groups[0].expert]
        assert lane and own
        by_kind = {group.kind: group for group in groups}
        pairs = zip(by_kind["plain"].rows(), by_kind["held"].rows(), strict=True)
        for (plain, there, prompt), (moved, _, _) in pairs:
            target = own.state_of(there)[prompt.own :]
            before, after = (
                (lane.state_of(at)[prompt.own :] - target).norm(dim=1) for at in (plain, moved)
            )
            size = target.norm(dim=1).clamp_min(1e-12)
            yield float((before / size).mean()), float((after / size).mean())

    def finish(self) -> FitReport:
        """Decide for each expert whether its alignment stays; take back what does not."""
        losses: list[tuple[float, float] | None] = [None] * len(self.donors)
        kept = [bool(downs) and self.fit.always for downs in self.fit.downs]
        told = {} if self.fit.always else self._losses()
        for expert in range(len(self.donors)):
            if (expert, "plain") in told:
                pair = told[expert, "plain"], told[expert, "held"]
                losses[expert], kept[expert] = pair, pair[1] < pair[0]
        for expert, downs in enumerate(self.fit.downs):
            for name, names in downs.items() if not kept[expert] else ():
                if len(names) == 1:
                    self.computed.write(names[0], self._plain(expert, name))
                for one in names if len(names) > 1 else ():
                    self.computed.clear(one)
        return FitReport(self.attention, self.drift, losses, kept)

    def _losses(self) -> dict[tuple[int, str], float]:
        """The mean loss of each group's held-out texts, in nats a token; the head is read once."""
        import torch

        lane, states, ids, owners = self.mixed, list[Any](), list[int](), list[tuple[int, str]]()
        for group in self.groups if lane else ():
            for here, _, prompt in group.rows() if group.kind != "fit" else ():
                assert lane
                first = max(prompt.own, 1)
                own = prompt.ids[first:]
                states.append(lane.state_of(here)[first - 1 : -1])
                ids += own
                owners += [(group.expert, group.kind)] * len(own)
        if not lane or not ids:
            return {}
        found: dict[tuple[int, str], list[float]] = {}
        for owner, loss in zip(
            owners, lane.losses(torch.cat(states), torch.tensor(ids)), strict=True
        ):
            found.setdefault(owner, []).append(float(loss))
        return {owner: sum(every) / len(every) for owner, every in found.items()}


@dataclass(frozen=True)
class _Group:
    """An expert's texts in the mixture: those of the `fit`, and those that are `held` out, with
    alignment and, as `plain` ones, without. `here` are the passages' numbers in the mixture's lane,
    `there` in the own model's."""

    expert: int
    kind: str
    here: range
    there: list[int]
    prompts: tuple[Prompt, ...]

    def rows(self) -> Iterator[tuple[int, int, Prompt]]:
        """Each text: its number in the mixture's lane and in the own model's, and its prompt."""
        yield from zip(self.here, self.there, self.prompts, strict=True)
