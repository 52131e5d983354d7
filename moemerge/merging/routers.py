"""The gate mode run: its routers are saved as a small checkpoint, with a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from moemerge.checkpoint import numpy_dtype
from moemerge.errors import RunError
from moemerge.files import PART_SUFFIX, read_json
from moemerge.gates import Keeper, Routers, Task
from moemerge.gates import load_balance as selection
from moemerge.gates import statistics as routing_stats
from moemerge.options import RunOptions
from moemerge.output import writing
from moemerge.plan import Fill, PlannedTensor, Shard, file_header
from moemerge.prepare import Prepared
from moemerge.report import RoutingSummary
from moemerge.reporting import Reporter
from moemerge.split import Cutter
from moemerge.text import Prompt

if TYPE_CHECKING:
    from moemerge.gates import Matrix
    from moemerge.split import Order
from moemerge.prepare import Tensors


def task_of(ready: Prepared, sources: Tensors, options: RunOptions, reporter: Reporter) -> Task:
    """The input of the gate mode."""
    cutter = None
    if ready.cutting:
        cutter = Cutter(ready.cutting, ready.body, sources, options, reporter)
    return Task(
        names=[t.name for t in ready.plan.shards[0].tensors if t.made == "router"],
        body=ready.body,
        donors=(*ready.experts, *ready.shared[: ready.target.mixture.gated]),
        sources=sources,
        experts=ready.prompts,
        encoder=ready.encoder,
        settings=ready.gate.settings,
        options=options,
        reporter=reporter,
        cutter=cutter,
    )


def run_gate(ready: Prepared, sources: Tensors, options: RunOptions, reporter: Reporter) -> Routers:
    """Run the gate mode and return its routers.

    Raises:
        RunError: the prompts give routers that cannot tell experts apart.
    """
    return ready.gate.routers(task_of(ready, sources, options, reporter))


def make_routers(
    ready: Prepared,
    sources: Tensors,
    options: RunOptions,
    reporter: Reporter,
    path: Path,
    written: Sequence[Sequence[Prompt]] = (),
    kept: Path | None = None,
) -> None:
    """Run the gate mode, and save its routers and their report on held-out prompts at `path`.

    For a split, the orders of neurons are saved there too. `written` is what experts wrote already.
    The router inputs of a ridge fit are written to `kept`, if it is given.

    Raises:
        RunError: a router's rows are all equal, or a router is not finite.
        WriteError: `path` cannot be written.
    """
    given, keeper = task_of(ready, sources, options, reporter), None
    if kept:
        settings = {key: getattr(ready.gate.settings, key, None) for key in ("lambda_", "kappa")}
        hidden = int(ready.body.config["hidden_size"])
        keeper = Keeper(kept, len(given.names), hidden, settings)
    task = replace(given, written=written, keep=keeper)
    made, gates = _apart(ready, ready.gate.routers(task))
    routed = routing_stats.held_out(made, ready.encoder)
    names, per_token = ready.plan.experts, ready.plan.experts_per_token
    report = routing_stats.summary(routed, names, per_token)
    if report:  # for the report's picture
        report["texts"] = [
            {"name": names[expert], "expert": expert, "first": text["first"]}
            for text in routing_stats.texts_of(routed, per_token)
            if (expert := text["expert"]) is not None
        ]
    kinds = {
        "router": made.matrices,
        "shared gate": gates,
        "bias": selection.biases(made, ready.target.mixture),
    }
    shard = ready.plan.shards[0]
    content = {
        tensor.name: next(rows)
        for kind in kinds
        for rows in [iter(kinds[kind])]
        for tensor in shard.tensors
        if tensor.made == kind
    }
    if not ready.gate.mode.NEEDS.untaught:
        _check_apart(shard, content)
    routers = replace(shard, tensors=tuple(one for one in shard.tensors if one.made), head=None)
    save(routers, content, report, path, task.cutter.finish() if task.cutter else {})


def _check_apart(shard: Shard, made: Mapping[str, Matrix]) -> None:
    """Refuse a router if all its rows are equal in the dtype that is written.

    Raises:
        RunError: names the router.
    """
    for tensor in (one for one in shard.tensors if one.made):
        rows = made[tensor.name].astype(numpy_dtype(tensor.dtype))
        if tensor.made == "router" and len(rows) > 1 and (rows == rows[0]).all():
            what = "all rows are equal, so it cannot route"
            raise RunError(f"{tensor.name}: {what}; change the prompts")


def _apart(ready: Prepared, made: Routers) -> tuple[Routers, list[Matrix]]:
    """Split the gate mode's result: the routers, and the shared experts' gates, (1, D) per layer.

    Gated shared experts are the last rows of each matrix; without them the gates are empty.
    """
    count = len(ready.donors)
    if not ready.target.mixture.gated:
        return made, []
    kept = [at for at, text in enumerate(made.texts) if text.expert < count]
    held_out = tuple([layer[at][:, :count] for at in kept] for layer in made.held_out)
    routed = [matrix[:count] for matrix in made.matrices]
    texts = tuple(made.texts[at] for at in kept)
    return Routers(routed, texts, held_out), [matrix[count:] for matrix in made.matrices]


def save(
    shard: Shard,
    made: dict[str, Matrix],
    report: RoutingSummary,
    path: Path,
    orders: Mapping[str, Order] = MappingProxyType({}),
) -> None:
    """Save a gate mode's tensors as a small checkpoint in the shard's dtypes, and its report.

    `orders` are the orders of neurons by name; they come last, as int32.

    Raises:
        RunError: a router is not finite.
        WriteError: `path` cannot be written.
    """
    import numpy as np

    tensors = [replace(tensor, shape=made[tensor.name].shape) for tensor in shard.tensors]
    none = Fill(0.0, ())
    numbers = [PlannedTensor(n, order.shape, "I32", none) for n, order in orders.items()]
    content = [file_header([*tensors, *numbers], {"format": "pt"})]
    for tensor in tensors:
        matrix = made[tensor.name]
        if not np.isfinite(matrix).all():
            raise RunError(
                f"{tensor.name}: the router came out as NaN or Inf; use other prompts, another "
                "dtype of the models, or --device cpu"
            )
        content.append(matrix.astype(numpy_dtype(tensor.dtype)).tobytes())
    content += [order.astype("<i4").tobytes() for order in orders.values()]
    with writing(path):
        _report(path).write_text(json.dumps(report), encoding="utf-8")
        part = path.with_name(f"{path.name}{PART_SUFFIX}")
        part.write_bytes(b"".join(content))
        part.replace(path)


def report_of(path: Path) -> RoutingSummary:
    """The report that was saved with the routers at `path`; empty if there is none."""
    return cast(RoutingSummary, read_json(_report(path)))


def _report(path: Path) -> Path:
    return path.with_suffix(".json")
