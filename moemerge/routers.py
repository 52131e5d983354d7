"""A gate mode run: the sources it needs, and the routers it makes as a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge import checkpoint, recipe, routing_stats
from moemerge.checkpoint import Donor, Location, numpy_dtype
from moemerge.errors import RunError
from moemerge.fitting import Routers, Task
from moemerge.options import Options
from moemerge.output import writing
from moemerge.plan import ROUTERS, Shard, file_header
from moemerge.prepare import Prepared
from moemerge.reporting import Reporter
from moemerge.state import PART_SUFFIX, read_json

if TYPE_CHECKING:
    from moemerge.fitting import Matrix

Tensors = dict[str, dict[str, Location]]


def fetch(ready: Prepared, options: Options, reporter: Reporter) -> Tensors:
    """Every source's tensors, with the files that the plan reads from the Hub downloaded."""
    needed: dict[str, set[str]] = {text: set() for text in ready.checkpoints}
    for tensor in ready.plan.tensors:
        for read in recipe.reads(tensor.recipe):
            if read.source != ROUTERS:
                needed[read.source].add(read.tensor)
    runs = [ready.base] if "model" in ready.gate.USES else []
    runs += ready.donors if "experts" in ready.gate.USES else ()
    for donor in runs:
        for text, names in _of_donor(donor):
            needed[text] |= names
    found = {}
    for text, opened in ready.checkpoints.items():
        files = {opened.tensors[name].file.name for name in needed[text]} & set(opened.absent)
        if options.stream and files and not any(name.endswith(".bin") for name in files):
            opened = checkpoint.streamed(opened)
        else:
            if files:
                reporter.say(f"{text}: downloading what is needed into the Hub's cache")
            opened = checkpoint.fetch(opened, needed[text], options.cache_dir)
        found[text] = opened.tensors
    return found


def run_gate(ready: Prepared, sources: Tensors, options: Options, reporter: Reporter) -> Routers:
    """Let the gate mode make its routers.

    Raises:
        RunError: its prompts give routers that cannot choose.
    """
    task = Task(
        names=[tensor.name for tensor in ready.plan.shards[0].tensors],
        body=ready.body,
        donors=ready.donors,
        sources=sources,
        experts=ready.prompts,
        encoder=ready.encoder,
        settings=ready.settings,
        options=options,
        reporter=reporter,
    )
    return ready.gate.routers(task)


def make_routers(
    ready: Prepared, sources: Tensors, options: Options, reporter: Reporter, path: Path
) -> None:
    """Run the gate mode and save its routers, and how they do held out, at `path`.

    Raises:
        RunError: they cannot choose, or are not finite, which only a broken model can cause.
        WriteError: `path` cannot be written.
    """
    made = run_gate(ready, sources, options, reporter)
    routed = routing_stats.held_out(made, ready.encoder)
    names, per_token = ready.plan.experts, ready.plan.experts_per_token
    report = routing_stats.summary(routed, names, per_token)
    if report:  # what its picture shows
        report["texts"] = [
            {"name": names[text["expert"]], "expert": text["expert"], "first": text["first"]}
            for text in routing_stats.texts_of(routed, per_token)
        ]
    save(ready.plan.shards[0], made.matrices, report, path)


def save(shard: Shard, matrices: Sequence[Matrix], report: dict[str, Any], path: Path) -> None:
    """Save routers, (E, D) a layer, as a tiny checkpoint in the shard's dtype, and a report beside.

    Raises:
        RunError: a router is not finite.
        WriteError: `path` cannot be written.
    """
    import numpy as np

    content = [file_header(shard.tensors, {"format": "pt"})]
    for tensor, matrix in zip(shard.tensors, matrices, strict=True):
        if not np.isfinite(matrix).all():
            raise RunError(
                f"{tensor.name}: the router came out as NaN or Inf; the base model overflows on "
                "these prompts: try another dtype of it, or --device cpu"
            )
        content.append(matrix.astype(numpy_dtype(tensor.dtype)).tobytes())
    with writing(path):
        _report(path).write_text(json.dumps(report), encoding="utf-8")
        part = path.with_name(f"{path.name}{PART_SUFFIX}")
        part.write_bytes(b"".join(content))
        part.replace(path)


def report_of(path: Path) -> dict[str, Any]:
    """The report saved with the routers at `path`."""
    return read_json(_report(path))


def _report(path: Path) -> Path:
    return path.with_suffix(".json")


def _of_donor(donor: Donor) -> list[tuple[str, set[str]]]:
    """The checkpoints that a donor's tensors are read from, and all that they hold."""
    models = [donor.model, *([donor.adapter.checkpoint] if donor.adapter else [])]
    return [(model.reference.text, set(model.tensors)) for model in models]
