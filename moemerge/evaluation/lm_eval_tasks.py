"""lm-eval's tasks: found by name or file, checked before they run, and a model's scores."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moemerge.errors import Findings, RunError, first_line, nearest
from moemerge.reporting import Reporter


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval can load: registered names, and local files with their content.

    `limit` is the most documents of each task. Without `num_fewshot`, each task has its own number
    of shots.
    """

    specs: tuple[str | dict[str, Any], ...]
    manager: Any
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class Score:
    """A score of a model: a metric of a task over `samples` documents, after a filter."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    shots: int
    higher_is_better: bool | None


def find_tasks(
    named: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    findings: Findings,
    reporter: Reporter,
) -> Tasks | None:
    """The tasks of these names, files and directories; problems are recorded.

    A task file is a program: its `!function` runs Python, and its templates are not sandboxed. In a
    directory, files with `!function` are refused: name such a file itself. Tasks that run code
    written by the model are refused. If all are files, the network is used only if a task asks for
    it.
    """
    if not named:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        findings.problem("--tasks", "lm-eval is not installed", "pip install 'moemerge[eval]'")
        return None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise reading a local file is reported
    files, names = _apart(named)
    before = len(findings.problems)
    specs: list[str | dict[str, Any]] = list(_read(files, findings, reporter))
    with reporter.progress("lm-eval's own tasks", 1, "index"):
        manager = TaskManager(include_defaults=bool(names))
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            close = nearest(name, manager.all_tasks)
            fix = close if close.startswith("did") else "`lm_eval ls tasks` lists them"
            findings.problem(f"--tasks {name}", "is no file and no task of lm-eval", fix)
        specs += matches
    if len(findings.problems) > before:
        return None
    _check(specs, manager, findings)
    return Tasks(tuple(specs), manager, limit, num_fewshot, batch_size)


def run_tasks(
    tasks: Tasks, model: Any, tokenizer: Path, what: str, reporter: Reporter
) -> list[Score]:
    """Run a model in transformers on the tasks, with lm-eval's own `simple_evaluate`.

    Raises:
        RunError: lm-eval fails.
    """
    import lm_eval

    try:
        harness = _harness(model, tokenizer, tasks.batch_size, what, reporter)
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=copy.deepcopy(list(tasks.specs)),
            limit=tasks.limit,
            num_fewshot=tasks.num_fewshot,
            task_manager=tasks.manager,
            log_samples=False,
        )
    except Exception as error:  # it lets through what any task raises
        raise RunError(f"{what}: lm-eval failed ({first_line(error)})") from error
    return list(_scores(found))


def _apart(named: Sequence[str]) -> tuple[list[tuple[Path, bool]], list[str]]:
    """The files, each with whether it was named itself, and the names."""
    files, names = [], []
    for one in named:
        parts = [one] if Path(one).exists() else one.split(",")
        for part in parts:
            path = Path(part)
            if path.is_dir():
                files += [(file, False) for file in sorted(path.glob("*.yaml"))]
            elif path.is_file() or path.suffix in (".yaml", ".yml"):
                files.append((path, True))
            else:
                names.append(part)
    return files, names


def _read(
    files: Sequence[tuple[Path, bool]], findings: Findings, reporter: Reporter
) -> Iterator[dict[str, Any]]:
    """Each file as lm-eval reads it; in a directory, files that are not tasks are skipped."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path, alone in files:
        where = f"--tasks {path}"
        try:
            told = load_yaml(path, resolve_func=False)
            runs = _runs_python(path)
            if not isinstance(told.get("task"), str):
                if alone:
                    fix = "name its tasks' files, or their directory"
                    findings.problem(where, "is no task of lm-eval", fix)
                continue
            if runs and not alone:
                fix = "name the file itself, if you trust it"
                findings.problem(where, "runs Python of its own (!function)", fix)
                continue
            if runs:
                reporter.say(f"{path}: runs Python of its own (!function)")
            yield _with_data_beside(load_yaml(path, resolve_func=True), path.absolute().parent)
        except Exception as error:  # YAML, Python, and what the file's Python raises
            findings.problem(where, f"cannot be read ({first_line(error)})", "repair it")


def _runs_python(path: Path) -> bool:
    """Whether a task file, or one that it includes, has a `!function`."""
    waiting = [path.absolute()]
    seen = set(waiting)
    for file in waiting:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        nodes, known = [root] if root else [], {id(root)}
        for node in nodes:
            if node.tag == "!function":
                return True
            below: list[Any] = []
            if isinstance(node, yaml.SequenceNode):
                below = node.value
            elif isinstance(node, yaml.MappingNode):
                below = [one for pair in node.value for one in pair]
            nodes += [one for one in below if id(one) not in known]
            known |= {id(one) for one in below}
        for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if key.value == "include":
                named = value.value if isinstance(value, yaml.SequenceNode) else [value]
                found = [file.parent / one.value for one in named]
                waiting += [one for one in found if one not in seen]
                seen.update(found)
    return False


def _with_data_beside(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The task, with data files looked for beside it and not in the working directory."""

    def found(said: Any) -> Any:
        if isinstance(said, list):
            return [found(one) for one in said]
        if isinstance(said, dict):
            return {key: found(one) for key, one in said.items()}
        beside = isinstance(said, str) and not Path(said).exists() and (folder / said).exists()
        return str(folder / said) if beside else said

    said = config.get("dataset_kwargs")
    if isinstance(said, dict) and "data_files" in said:
        config["dataset_kwargs"] = {**said, "data_files": found(said["data_files"])}
    return config


def _check(specs: Sequence[str | dict[str, Any]], manager: Any, findings: Findings) -> None:
    """Load each task once; record those that cannot be loaded, or must not run."""
    seen: set[str] = set()
    for spec in specs:
        called = spec if isinstance(spec, str) else str(spec["task"])
        try:
            loaded = manager.load([copy.deepcopy(spec)])["tasks"]
        except Exception as error:  # it lets through what any dataset's or task's code raises
            fix = "check its dataset; a name's is downloaded from the Hub"
            what = f"lm-eval cannot load it ({first_line(error)})"
            findings.problem(f"--tasks {called}", what, fix)
            continue
        for name, task in loaded.items():
            if name in seen:
                findings.problem(f"--tasks {name}", "stands there twice", "keep one of them")
            if getattr(task, "UNSAFE_CODE", False):
                what = "runs what the model writes"
                findings.problem(f"--tasks {name}", what, "run it with lm-eval, in a sandbox")
        seen.update(loaded)


def _harness(model: Any, tokenizer: Path, batch_size: int, what: str, reporter: Reporter) -> Any:
    """lm-eval's wrapper of the model, with its progress sent to the reporter."""
    from lm_eval.models.huggingface import HFLM

    class Told(HFLM):  # type: ignore[misc]
        advance: Any = None

        def _told(self, kind: str, requests: list[Any]) -> Any:
            with reporter.progress(f"{what}: {kind}", len(requests), "request") as advance:
                self.advance = advance
                return getattr(HFLM, kind)(self, requests, disable_tqdm=True)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return self._told("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return self._told("loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return self._told("generate_until", requests)

        def _model_call(self, inps: Any, *args: Any, **named: Any) -> Any:
            made = super()._model_call(inps, *args, **named)
            self.advance(len(inps))
            return made

        def _model_generate(self, context: Any, *args: Any, **named: Any) -> Any:
            made = super()._model_generate(context, *args, **named)
            self.advance(len(context))
            return made

    return Told(pretrained=model, tokenizer=str(tokenizer), batch_size=batch_size)


def _scores(found: Any) -> Iterator[Score]:
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            yield Score(
                task=task,
                metric=metric,
                filter=filtered,
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                samples=int(found["n-samples"].get(task, {}).get("effective", 0)),
                shots=int(found["n-shot"].get(task) or 0),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            )
