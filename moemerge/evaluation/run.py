"""How good a mixture is beside its sources: perplexity of texts, and lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moemerge.errors import Findings, InputError
from moemerge.evaluation.lm_eval_tasks import Score, Tasks, find_tasks, run_tasks
from moemerge.evaluation.loss import Passages, check_tokens, counted, mean_losses, passages_of
from moemerge.evaluation.sources import Source, sources_of
from moemerge.gates import check_device_is_here
from moemerge.mixture import config_of, encoder_of, load_mixture
from moemerge.options import Options, RunOptions
from moemerge.output import MANIFEST_FILE, manifest_of
from moemerge.report import Evaluation, EvaluationRow
from moemerge.reporting import Reporter, listener
from moemerge.tokenizer import TOKENIZER_FILE
from moemerge.version import __version__

ALL_TOKENS = 1 << 62


@dataclass(frozen=True)
class EvalSpec:
    """What to evaluate a mixture with: text files by their names, and lm-eval's tasks.

    A text is read in pieces of at most `length` tokens. For the other fields see
    `lm_eval_tasks.Tasks`.
    """

    texts: Mapping[str, str | Path] = field(default_factory=dict)
    tasks: tuple[str | Path, ...] = ()
    length: int = 1024
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1


def evaluate(
    out: str | Path,
    wanted: EvalSpec,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate the mixture in `out` and its sources, side by side, as plain data.

    `plan_digest` identifies the mixture. `columns` are the models, the mixture first. Each of
    `rows` is a text's perplexity or a task's metric. Its `values` and `stderr` are in the order of
    the columns, and None where there is no value. One model is in memory at a time; if memory is
    too small, one layer of it. A mixture that moemerge did not make has one column.

    Raises:
        InputError: `out` is not a mixture, or a text or task cannot be read.
        RunError: a model or a task fails.
    """
    out, options, reporter = Path(out), options or Options(), listener(reporter, progress)
    manifest = manifest_of(out, "evaluate")
    if not manifest:
        reporter.say(f"{out}: holds no {MANIFEST_FILE}, so only the mixture is evaluated")
    config = config_of(out)
    context = config.get("max_position_embeddings") or wanted.length
    if wanted.texts and context < wanted.length:
        reporter.say(f"texts are read in pieces of {context} tokens, the most the mixture reads")
        wanted = replace(wanted, length=context)
    texts, tasks = _checked(out, config, wanted, options, reporter)
    sources = sources_of(manifest, options, reporter, out)
    taken = EvaluationRun(out, texts, tasks, options, reporter)
    measured = [taken.through("mixture", load_mixture(out, options, reporter), out)]
    known: dict[tuple[object, ...], _Measured] = {}
    for source in sources:
        found = known.get(source.identity) or taken.through_source(source)
        if source.identity:
            known[source.identity] = found
        measured.append(found)
    return {
        "model": out.name,
        "plan_digest": manifest.plan.digest if manifest else None,
        "columns": ["mixture", *(source.name for source in sources)],
        "rows": [*_text_rows(texts, measured), *_task_rows(measured)],
        "length": wanted.length if texts else None,
        "limit": wanted.limit,
        "versions": _versions(tasks is not None),
    }


def _checked(
    out: Path, config: dict[str, Any], wanted: EvalSpec, options: RunOptions, reporter: Reporter
) -> tuple[Passages, Tasks | None]:
    """The texts as passages, and the tasks; all problems are found before a model is read."""
    findings = Findings()
    if not (wanted.texts or wanted.tasks):
        fix = "name texts (--text NAME=FILE) or tasks (--tasks NAME)"
        findings.problem(str(out), "nothing says by what to evaluate it", fix)
    check_device_is_here(options, findings)
    encoder = encoder_of(out)
    texts: Passages = {}
    for name, path in wanted.texts.items():
        try:
            texts[name] = passages_of(name, path, encoder, wanted.length, ALL_TOKENS)
            check_tokens({name: texts[name]}, config.get("vocab_size") or ALL_TOKENS)
        except InputError as error:
            findings.problems += error.problems
    limit, shots, batch = wanted.limit, wanted.num_fewshot, wanted.batch_size
    tasks = find_tasks([*map(str, wanted.tasks)], limit, shots, batch, findings, reporter)
    findings.refuse()
    return texts, tasks


@dataclass(frozen=True)
class _Measured:
    """The results of one model: perplexities by text, and scores; None for a text it cannot
    read."""

    perplexities: dict[str, float] | None
    scores: dict[tuple[str, str, str], Score]


@dataclass(frozen=True)
class EvaluationRun:
    """Runs texts and tasks through one model after another."""

    out: Path
    texts: Passages
    tasks: Tasks | None
    options: Options
    reporter: Reporter

    def through_source(self, source: Source) -> _Measured:
        """Run a dense model; texts are skipped, with a note, if its token ids differ."""
        ids = {one for text in self.texts.values() for p in text for one in p.ids}
        if why := source.why_not(ids):
            self.reporter.say(f"{source.name} does not read the texts: {why}")
        if why and not self.tasks:
            return _Measured(None, {})
        own = source.directory
        tokenizer = own if own and (own / TOKENIZER_FILE).is_file() else self.out
        model = source.model(self.options, self.reporter)
        return self.through(source.name, model, tokenizer, reads=not why)

    def through(self, name: str, model: Any, directory: Path, reads: bool = True) -> _Measured:
        """Run a model in transformers; `directory` holds its tokenizer and generation config."""
        losses = mean_losses(model, self.texts, self.reporter, name) if reads else {}
        scores: list[Score] = []
        if self.tasks:
            _generate_as(model, directory)
            scores = run_tasks(self.tasks, model, directory, name, self.reporter)
        return _Measured(
            {text: math.exp(loss) for text, loss in losses.items()} if reads else None,
            {(one.task, one.metric, one.filter): one for one in scores},
        )


def _generate_as(model: Any, directory: Path) -> None:
    """Give a model the generation config with which transformers would load it."""
    from transformers import AutoConfig, GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except OSError:
        config = AutoConfig.from_pretrained(directory)
        model.generation_config = GenerationConfig.from_model_config(config)


def _text_rows(texts: Passages, measured: Sequence[_Measured]) -> Iterator[EvaluationRow]:
    for name, passages in texts.items():
        yield {
            "kind": "text",
            "name": name,
            "metric": "perplexity",
            "higher_is_better": False,
            "samples": counted(passages),
            "values": [(one.perplexities or {}).get(name) for one in measured],
            "stderr": [None] * len(measured),
        }


def _task_rows(measured: Sequence[_Measured]) -> Iterator[EvaluationRow]:
    for key, first in measured[0].scores.items():
        scores = [one.scores.get(key) for one in measured]
        yield {
            "kind": "task",
            "name": first.task,
            "metric": first.metric,
            "filter": first.filter,
            "shots": first.shots,
            "higher_is_better": first.higher_is_better,
            "samples": first.samples,
            "values": [score.value if score else None for score in scores],
            "stderr": [score.stderr if score else None for score in scores],
        }


def _versions(harness: bool) -> dict[str, str]:
    from importlib.metadata import version

    used = ["torch", "transformers", *(["lm_eval"] if harness else [])]
    return {"moemerge": __version__, **{name: version(name) for name in used}}
