"""How a mixture routes text, and its perplexity beside its sources: numbers for a report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.architectures import COUNTS, PER_TOKEN
from moemerge.errors import Findings, InputError, Problem
from moemerge.evaluation.loss import (
    Passages,
    check_tokens,
    mean_loss,
    mean_losses,
    passages_of,
    set_experts_per_token,
)
from moemerge.evaluation.sources import prepared, sources_of
from moemerge.gates import Routed, check_device_is_here
from moemerge.gates import statistics as routing_stats
from moemerge.merging import read_back, run_gate
from moemerge.mixture import config_of, encoder_of, load_mixture, portions
from moemerge.options import Options
from moemerge.output import MANIFEST_FILE, Manifest, manifest_of
from moemerge.plan import ROUTERS
from moemerge.prepare import fetch
from moemerge.report import RoutingReport, TextRouting, fit_lines
from moemerge.reporting import Reporter, listener
from moemerge.text import Encoder

PAGE_TOKENS = 256
PAGE_PASSAGES = 4


def report(
    out: str | Path,
    texts: Mapping[str, str | Path] | None = None,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> RoutingReport:
    """How the mixture in `out` routes, as plain data, for any mixture that transformers loads.

    With `texts`, each a file by the name of the expert that it is for (or any other name), the
    mixture reads them, and so do its sources if they are available. Without, the prompts of the
    config are used; each prompt is routed by routers that were made without it.

    Raises:
        InputError: `out` is not a mixture, a text cannot be read, or there are neither texts nor
            prompts.
    """
    out, options, reporter = Path(out), options or Options(), listener(reporter, progress)
    manifest = manifest_of(out, "look at")
    config = config_of(out)
    if manifest:
        options = dataclasses.replace(options, seed=manifest.plan.seed)
    count = next(int(config[key]) for key in COUNTS if key in config)
    per_token = next(int(config[key]) for key in PER_TOKEN if key in config)
    findings = Findings()
    segments, factor = portions(config, manifest, count, per_token, str(out), findings)
    findings.refuse()
    per_token //= segments
    experts = tuple(f"expert {n}" for n in range(count // segments))
    experts = manifest.plan.experts if manifest else experts
    if texts:
        check_device_is_here(options, findings)
        findings.refuse()
        encoder = encoder_of(out)
        passages = {name: passages_of(name, path, encoder) for name, path in texts.items()}
        reading = _Reading(passages, encoder, experts, per_token, segments, options, reporter)
        others = () if factor else {1, 2, per_token + 1, len(experts)}
        routed, measured = reading.run(out, manifest, others)
    elif manifest and manifest.config:
        routed, measured = _held_out(out, manifest, options, reporter), {}
    else:
        told = f"has no config in its {MANIFEST_FILE}" if manifest else f"holds no {MANIFEST_FILE}"
        what, fix = f"{told}, so its prompts are not known", "name texts: --text"
        raise InputError([Problem(str(out), what, fix)])
    mode = manifest.plan.gate_mode if manifest else ""
    found = _assemble(out.name, routed, experts, per_token, measured, mode if not texts else "")
    found["verdicts"] += fit_lines(manifest.fitted) if manifest else []
    return found


def _held_out(out: Path, manifest: Manifest, options: Options, reporter: Reporter) -> list[Routed]:
    """The config's prompts, each with routers that are made again without it."""
    ready = prepared(manifest, options, reporter, out)
    sources = fetch(ready, options, reporter)
    ready, sources[ROUTERS] = read_back(ready, manifest.plan, out)
    made = run_gate(ready, sources, options, reporter)
    found = routing_stats.held_out(made, ready.encoder)
    if not found:
        mode = manifest.plan.gate_mode
        what = f"gate_mode: {mode} leaves no prompt to hold out"
        raise InputError([Problem("--text", what, "name texts: --text NAME=FILE")])
    names = manifest.plan.experts
    return [dataclasses.replace(one, name=names[one.expert or 0]) for one in found]


@dataclass(frozen=True)
class _Reading:
    """All passages, read by the mixture and then by its sources.

    Each expert has `segments` equal rows in the routers.
    """

    passages: Passages
    encoder: Encoder
    experts: Sequence[str]
    per_token: int
    segments: int
    options: Options
    reporter: Reporter

    def run(
        self, out: Path, manifest: Manifest | None, others: Iterable[int]
    ) -> tuple[list[Routed], dict[str, Any]]:
        """The router logits of the passages, and mean losses (nats) by experts_per_token and by
        source.

        `others` are values of experts_per_token that the mixture can take without new weights.
        """
        model = load_mixture(out, self.options, self.reporter)
        check_tokens(self.passages, model.get_input_embeddings().num_embeddings)
        count = len(self.experts)
        by_count: dict[str, dict[str, float]] = {str(self.per_token): {}}
        routed = list(self._routed(model, by_count[str(self.per_token)]))
        for k in sorted({*others} - {self.per_token}):
            if k <= count and set_experts_per_token(model, k * self.segments):
                by_count[str(k)] = self._losses(model, f"{k} experts a token")
        del model
        measured: dict[str, Any] = {"by_experts_per_token": by_count, "sources": {}, "experts": {}}
        ids = {one for of_one in self.passages.values() for p in of_one for one in p.ids}
        for source in sources_of(manifest, self.options, self.reporter, out):
            if why := source.why_not(ids):
                self.reporter.say(f"{source.name} is not compared: {why}")
                continue
            kind = "experts" if source.kind == "expert" else "sources"
            model = source.model(self.options, self.reporter)
            measured[kind][source.name] = self._losses(model, source.name)
            del model  # before the next is read
        return routed, measured

    def _routed(self, model: Any, losses: dict[str, float]) -> Iterator[Routed]:
        owner = {str(n): n for n in range(len(self.experts))}
        owner |= {name: n for n, name in enumerate(self.experts)}
        for name, of_one in self.passages.items():
            logits: list[Any] = []
            losses[name] = mean_loss(model, of_one, self.reporter, f"{name}: routing", logits)
            for prompt, layers in zip(of_one, logits, strict=True):
                tokens = tuple(self.encoder.spelled(prompt.ids[prompt.own :]))
                yield Routed(name, owner.get(name), layers[..., :: self.segments], tokens)

    def _losses(self, model: Any, what: str) -> dict[str, float]:
        return mean_losses(model, self.passages, self.reporter, what)


def _assemble(
    name: str,
    routed: list[Routed],
    experts: Sequence[str],
    per_token: int,
    measured: dict[str, Any],
    mode: str,
) -> RoutingReport:
    """The report as plain data, from which the page and the card are made.

    If prompts were held out, `mode` is the gate mode that made the routers.
    """
    summary = routing_stats.summary(routed, experts, per_token)
    texts = routing_stats.texts_of(routed, per_token)
    by_count = measured.get("by_experts_per_token", {})
    for text in texts:
        text["perplexity"] = _perplexities(text["name"], per_token, measured)
    numbers = {text["name"]: n for n, text in enumerate(texts)}
    shown = dict.fromkeys(numbers, 0)
    passages = []
    for one in routed:
        if one.tokens and shown[one.name] < PAGE_PASSAGES:
            shown[one.name] += 1
            passages.append(routing_stats.passage_of(one, numbers[one.name], PAGE_TOKENS))
    overall = {
        k: math.exp(sum(by_count[k].values()) / len(by_count[k])) for k in sorted(by_count, key=int)
    }
    verdicts = [*_expert_verdicts(texts, experts), *_whole_verdicts(overall, per_token, measured)]
    if mode:
        verdicts = list(routing_stats.verdict(summary, experts, mode))
    else:
        verdicts += routing_stats.troubles(summary, experts)
    return {
        "model": name,
        "experts": list(experts),
        "experts_per_token": per_token,
        "layers": int(routed[0].logits.shape[0]),
        "held_out": bool(mode),
        "verdicts": verdicts,
        "texts": texts,
        "summary": summary,
        "by_experts_per_token": overall or None,
        "passages": passages,
    }


def _perplexities(name: str, per_token: int, measured: dict[str, Any]) -> dict[str, Any] | None:
    if not measured:
        return None
    found: dict[str, Any] = {
        "moe": math.exp(measured["by_experts_per_token"][str(per_token)][name])
    }
    found |= {source: math.exp(losses[name]) for source, losses in measured["sources"].items()}
    experts = {expert: math.exp(losses[name]) for expert, losses in measured["experts"].items()}
    return found | ({"experts": experts} if experts else {})


def _expert_verdicts(texts: list[TextRouting], experts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        found = text["perplexity"] or {}
        if text["expert"] is None or "base" not in found:
            continue
        change = found["moe"] / found["base"] - 1
        name = experts[text["expert"]]
        earns = "earns its place" if change < -0.01 else "does not earn its place"
        yield f"{name} {earns}: {change:+.0%} perplexity on its domain against the base"


def _whole_verdicts(
    overall: dict[str, float], per_token: int, measured: dict[str, Any]
) -> Iterator[str]:
    sources = measured.get("sources", {})
    ours = overall.get(str(per_token))
    if ours and "average" in sources:
        average = math.exp(sum(sources["average"].values()) / len(sources["average"]))
        word = "better" if ours < average else "worse"
        yield (
            f"on the whole: perplexity {ours:.2f}, {abs(ours / average - 1):.0%} {word} than the "
            f"plain average of the experts' weights ({average:.2f})"
        )
    for k, theirs in overall.items():
        if ours and int(k) < per_token:
            yield (
                f"{k} expert{'s' * (k != '1')} a token instead of {per_token}: "
                f"{theirs / ours - 1:+.1%} perplexity, {1 - int(k) / per_token:.0%} less work in "
                "the MLPs"
            )
