"""A merge's fit run: what experts write, and the computed checkpoint of body and alignment."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

from moemerge.checkpoint import Location, read_header
from moemerge.errors import InputError, Problem
from moemerge.files import place_of, read_json, write_json
from moemerge.fit import as_written, run_fit, with_written
from moemerge.gates import modes
from moemerge.merging.routers import task_of
from moemerge.options import RunOptions
from moemerge.output import State, writing
from moemerge.plan import Join, Plan, Recipe
from moemerge.prepare import Prepared, Tensors
from moemerge.report import FitSummary, FittedExpert
from moemerge.reporting import Reporter
from moemerge.text import Prompt


def written_texts(
    ready: Prepared, sources: Tensors, options: RunOptions, reporter: Reporter, state: State
) -> list[list[Prompt]]:
    """What each expert writes, for the fit and the routers alike: once, also after a kill."""
    writes = modes.writer(ready.gate.mode)
    if ready.fit is None or writes is None:
        return []
    if not state.texts.exists():
        written = writes.write(task_of(ready, sources, options, reporter))
        told = [[[list(one.ids), one.own] for one in of_one] for of_one in written]
        with writing(state.texts):
            write_json(state.texts, {"texts": told})
    found = read_json(state.texts)["texts"]
    return [[Prompt(tuple(ids), own) for ids, own in of_one] for of_one in found]


def make_fit(
    ready: Prepared, sources: Tensors, options: RunOptions, reporter: Reporter, state: State
) -> None:
    """Fit the body and the experts, and save what was computed, with a report.

    Raises:
        RunError: a model gives NaN or Inf.
        WriteError: the state cannot be written.
    """
    fit = ready.fit
    assert fit
    written = written_texts(ready, sources, options, reporter, state)
    fit = with_written(fit, written) if written else fit
    mean = fit.unfitted(ready.body)
    with writing(state.fitted):
        made = run_fit(
            fit, mean, ready.donors, sources, options, reporter, fit.dtype(ready.plan), state.fitted
        )
        _report(state.fitted).write_text(json.dumps(asdict(made)), encoding="utf-8")


def fit_report(ready: Prepared, path: Path) -> FitSummary:
    """The fit's report that was saved with the checkpoint at `path`; empty if there is none."""
    found = read_json(_report(path))
    if not found:
        return {}
    experts: list[FittedExpert] = [
        {"name": name, "aligned": kept, "losses": losses}
        for name, kept, losses in zip(
            ready.plan.experts, found["kept"], found["losses"], strict=True
        )
    ]
    told = {key: found[key] for key in ("drift", "attention")}
    return {"body": ready.config.body, "experts": experts, **told}  # type: ignore[typeddict-item]


def read_back(ready: Prepared, plan: Plan, out: Path) -> tuple[Prepared, dict[str, Location]]:
    """The merge of a finished mixture `out`, and where what was fitted lies in it.

    Raises:
        InputError: the mixture does not have it as it was fitted.
    """
    if ready.fit is None:
        return ready, {}
    places = dict[Recipe, Location]()
    for shard in plan.shards[1:]:
        header = read_header(place_of(out, shard.file))
        for tensor in shard.tensors:
            at, of = header[tensor.name], tensor.recipe
            if isinstance(of, Join) and len(tensor.shape) == 3:
                one = math.prod(tensor.shape[1:])
                for number, part in enumerate(of.of):
                    its = at.part(number * one, tensor.shape[1:])
                    places |= {part: its} if its else {}
            else:
                places[of] = at
    try:
        fit, found = as_written(ready.fit, ready.donors, places)
    except KeyError as error:
        what = "its body was fitted, and is not in it as it was fitted"
        raise InputError([Problem(str(out), what, "merge again")]) from error
    return replace(ready, fit=fit), found


def _report(path: Path) -> Path:
    return path.with_suffix(".json")
