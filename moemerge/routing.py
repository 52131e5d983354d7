"""How a built mixture routes text, and how good it is beside its sources: numbers for a report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge import recipe, routing_stats
from moemerge.body import Body
from moemerge.calibration import texts_of
from moemerge.checkpoint import Donor
from moemerge.checkpoint.moe_names import COUNTS
from moemerge.compare import other_ids, same_vocabulary
from moemerge.config import parse_config
from moemerge.dense import whole_model
from moemerge.errors import Findings, InputError, Problem
from moemerge.gate_setup import check_device_is_here
from moemerge.options import Options
from moemerge.output import CONFIG_FILE, MANIFEST_FILE, Manifest
from moemerge.prepare import Prepared, prepare
from moemerge.prompts import PIECE_TOKENS, Encoder, Prompt
from moemerge.reading import load_mixture, mean_loss, set_experts_per_token
from moemerge.reporting import Reporter, Silent
from moemerge.routers import Tensors, fetch, run_gate
from moemerge.routing_stats import Routed
from moemerge.verify import check_shards, open_manifest

PAGE_TOKENS = 256
PAGE_PASSAGES = 4
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token")

Passages = dict[str, tuple[Prompt, ...]]


def report(
    out: str | Path,
    texts: dict[str, Path] | None = None,
    options: Options | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """How the mixture in `out` routes, as plain data; any mixture that transformers loads.

    With `texts`, each a file by the name of the expert that it is for (or any other name), the
    mixture reads them, and so do its sources where they are at hand. Without, the config's own
    prompts are used, each seen by routers that were made without it.

    Raises:
        InputError: `out` is no mixture, a text cannot be read, or there is nothing to go by.
    """
    out, options, reporter = Path(out), options or Options(), reporter or Silent()
    manifest = open_manifest(out) if (out / MANIFEST_FILE).exists() else None
    if manifest:
        check_shards(out, manifest.plan, "look at")
    config = _config_of(out)
    if manifest:  # what was merged may be looked at
        seed = manifest.plan.seed
        options = dataclasses.replace(options, seed=seed, allow_crimes=True)
    count = next(int(config[key]) for key in COUNTS if key in config)
    per_token = next(int(config[key]) for key in _PER_TOKEN if key in config)
    experts = manifest.plan.experts if manifest else tuple(f"expert {n}" for n in range(count))
    if texts:
        findings = Findings()
        check_device_is_here(options, findings)
        findings.refuse()
        encoder = _encoder(out)
        passages = {name: _passages(name, path, encoder) for name, path in texts.items()}
        reading = _Reading(passages, encoder, experts, per_token, options, reporter)
        routed, measured = reading.run(out, manifest)
    elif manifest and manifest.config:
        routed, measured = _held_out(manifest, options, reporter), {}
    else:
        told = f"has no config in its {MANIFEST_FILE}" if manifest else f"holds no {MANIFEST_FILE}"
        what, fix = f"{told}, so its prompts are not known", "name texts: --text"
        raise InputError([Problem(str(out), what, fix)])
    return _assemble(out.name, routed, experts, per_token, measured, held_out=not texts)


def _config_of(out: Path) -> dict[str, Any]:
    try:
        config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
        numbers = [[config[key] for key in k if key in config] for k in (COUNTS, _PER_TOKEN)]
        if all(of and isinstance(of[0], int) and of[0] > 0 for of in numbers):
            return dict(config)
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    fix = "name a directory that holds a mixture of experts"
    raise InputError([Problem(str(out), f"has no {CONFIG_FILE} of a mixture", fix)])


def _encoder(out: Path) -> Encoder:
    try:
        return Encoder(out)
    except ValueError as error:
        raise InputError([Problem(str(out), str(error), "copy the base's tokenizer")]) from error


def _passages(name: str, path: Path, encoder: Encoder) -> tuple[Prompt, ...]:
    try:
        pieces = encoder.pieces(texts_of(path), PIECE_TOKENS)
    except ValueError as error:
        raise InputError([Problem(f"--text {name}", str(error), "name a text or jsonl")]) from error
    pieces = tuple(piece for piece in pieces if len(piece.ids) > max(piece.own, 1))
    if not pieces:
        raise InputError([Problem(f"--text {name}", f"{path} holds no text", "name one that does")])
    return pieces


def _held_out(manifest: Manifest, options: Options, reporter: Reporter) -> list[Routed]:
    """The config's prompts by routers that are made anew without each."""
    ready = _prepared(manifest, options)
    made = run_gate(ready, fetch(ready, options, reporter), options, reporter)
    found = routing_stats.held_out(made, ready.encoder)
    if not found:
        mode = manifest.plan.gate_mode
        what = f"gate_mode: {mode} leaves no prompt to hold out"
        raise InputError([Problem("--text", what, "name texts: --text NAME=FILE")])
    names = manifest.plan.experts
    return [dataclasses.replace(one, name=names[one.expert or 0]) for one in found]


def _prepared(manifest: Manifest, options: Options) -> Prepared:
    """The merge that the manifest tells of, made ready again from its sources."""
    config = parse_config(manifest.config)
    folder = Path(manifest.folder) if manifest.folder else None
    return prepare(dataclasses.replace(config, folder=folder), options)


@dataclass(frozen=True)
class _Reading:
    """All passages read by the mixture, at every experts_per_token, and then by its sources."""

    passages: Passages
    encoder: Encoder
    experts: Sequence[str]
    per_token: int
    options: Options
    reporter: Reporter

    def run(self, out: Path, manifest: Manifest | None) -> tuple[list[Routed], dict[str, Any]]:
        """The passages as routers saw them, and mean losses (nats): by k, and by source."""
        model = load_mixture(out, self.options, self.reporter)
        self._check_tokens(model.get_input_embeddings().num_embeddings)
        count = len(self.experts)
        others = sorted({1, 2, self.per_token + 1, count} - {self.per_token})
        by_count: dict[str, dict[str, float]] = {str(self.per_token): {}}
        routed = list(self._routed(model, by_count[str(self.per_token)]))
        for k in others:
            if k <= count and set_experts_per_token(model, k):
                by_count[str(k)] = self._losses(model, f"{k} experts a token")
        del model
        measured: dict[str, Any] = {"by_experts_per_token": by_count, "sources": {}, "experts": {}}
        last = max(token for of_one in self.passages.values() for p in of_one for token in p.ids)
        for kind, name, dense in _sources(manifest, self.options, self.reporter):
            if last < dense.config.vocab_size:
                measured[kind][name] = self._losses(dense, name)
            else:
                self.reporter.say(f"{name} is not compared: it does not know token {last}")
        return routed, measured

    def _check_tokens(self, known: int) -> None:
        """Refuse texts with tokens that the mixture does not embed."""
        fix = "use the tokenizer that the model came with"
        last = {name: max(max(p.ids) for p in of_one) for name, of_one in self.passages.items()}
        if problems := [
            Problem(f"--text {name}", f"has token {token}, the model embeds {known}", fix)
            for name, token in last.items()
            if token >= known
        ]:
            raise InputError(problems)

    def _routed(self, model: Any, losses: dict[str, float]) -> Iterator[Routed]:
        owner = {str(n): n for n in range(len(self.experts))}
        owner |= {name: n for n, name in enumerate(self.experts)}
        for name, of_one in self.passages.items():
            logits: list[Any] = []
            losses[name] = mean_loss(model, of_one, self.reporter, f"{name}: routing", logits)
            for prompt, layers in zip(of_one, logits, strict=True):
                tokens = tuple(self.encoder.spelled(prompt.ids[prompt.own :]))
                yield Routed(name, owner.get(name), layers, tokens)

    def _losses(self, model: Any, what: str) -> dict[str, float]:
        return {
            name: mean_loss(model, of_one, self.reporter, f"{name}: {what}")
            for name, of_one in self.passages.items()
        }


def _sources(
    manifest: Manifest | None, options: Options, reporter: Reporter
) -> Iterator[tuple[str, str, Any]]:
    """Each dense model that the mixture was made of, and their average, one in memory at a time.

    Before it stand its kind, `sources` or `experts`, and its name.
    """
    if manifest is None or not manifest.config:
        return
    try:
        ready = _prepared(manifest, options)
    except InputError as error:
        reporter.say(f"the sources are not compared: {error.problems[0]}")
        return
    tensors = fetch(ready, options, reporter)
    agree = all(same_vocabulary(ready.base, donor) for donor in ready.donors)
    vocabulary, weights = ready.vocabulary, (1 / len(ready.donors),) * len(ready.donors)
    base = Body(ready.base, vocabulary=vocabulary)
    yield "sources", "base", whole_model(base.config, base.recipe, tensors, options)
    for donor in ready.donors:
        if moved := other_ids(vocabulary, donor):
            why = f"{len(moved)} of its tokens have other ids in the mixture"
            reporter.say(f"{donor.name} is not compared: {why}")
        else:
            yield "experts", donor.name, _dense(donor, tensors, options)
    average = Body(ready.base, ready.donors, weights, agree, vocabulary)
    yield "sources", "average", whole_model(average.config, average.recipe, tensors, options)


def _dense(donor: Donor, tensors: Tensors, options: Options) -> Any:
    def recipe_of(name: str) -> recipe.Recipe:
        return recipe.of_donor(donor, name)

    return whole_model(donor.model.config, recipe_of, tensors, options)


def _assemble(
    name: str,
    routed: list[Routed],
    experts: Sequence[str],
    per_token: int,
    measured: dict[str, Any],
    held_out: bool,
) -> dict[str, Any]:
    """The report as plain data; the page's and the card's source."""
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
    if held_out:
        verdicts = list(routing_stats.verdict(summary, experts))
    else:
        verdicts += routing_stats.troubles(summary, experts)
    return {
        "model": name,
        "experts": list(experts),
        "experts_per_token": per_token,
        "layers": int(routed[0].logits.shape[0]),
        "held_out": held_out,
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


def _expert_verdicts(texts: list[dict[str, Any]], experts: Sequence[str]) -> Iterator[str]:
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
