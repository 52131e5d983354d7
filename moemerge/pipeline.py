"""The whole way: a config to a finished directory, in the order that keeps every promise."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge import card, checkpoint, output, recipe
from moemerge.checkpoint import Location
from moemerge.config import MergeConfig, load_config
from moemerge.gates import Task
from moemerge.options import Options
from moemerge.output import Manifest
from moemerge.plan import ROUTERS, Plan
from moemerge.prepare import Prepared, prepare
from moemerge.reporting import Reporter, Silent
from moemerge.verify import checksum, verify_shards
from moemerge.write import save_routers, write_shard


@dataclass(frozen=True)
class Merged:
    """A finished merge: its plan, the notes a person should read, and what it took."""

    plan: Plan
    out: Path
    notes: tuple[str, ...]
    seconds: float


def make_plan(config: MergeConfig | str | Path, options: Options | None = None) -> Prepared:
    """What a merge would build, from headers alone; nothing is written.

    Args:
        config: a `MergeConfig`, or the path of a YAML file.
        options: how it would be run.

    Raises:
        InputError: with every problem of the config and its models.
    """
    return prepare(_config(config), options or Options())


def merge(
    config: MergeConfig | str | Path,
    out: str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
) -> Merged:
    """Merge the models of a config into the directory `out`.

    Args:
        config: a `MergeConfig`, or the path of a YAML file.
        out: a directory that does not exist, is empty, or holds a merge to go on with or replace.
        options: how to run it.
        reporter: who hears notes and progress; nobody by default.

    Raises:
        InputError: with every problem of the config, its models and `out`; nothing was written.
        RunError: a failure on the way; `out` does not pass for a model.
    """
    begun, out = time.monotonic(), Path(out)
    config = _config(config)
    options, reporter = options or Options(), reporter or Silent()
    ready = prepare(config, options, out)
    for note in ready.notes:
        reporter.say(note)
    plan = ready.plan
    sources = _fetch(ready, options, reporter)
    state = output.begin(out, output.file_names(plan, ready.carried))
    routers = plan.shards[0]
    task = Task(
        names=[tensor.name for tensor in routers.tensors],
        base=ready.base,
        sources=sources,
        experts=ready.prompts,
        options=options,
        reporter=reporter,
    )
    matrices = ready.gate.routers(task)
    sources[ROUTERS] = save_routers(routers, matrices, state / "routers.safetensors")
    files: dict[str, dict[str, Any]] = {}
    with reporter.progress("writing", plan.nbytes, "B") as advance:
        for shard in plan.shards:
            digest = write_shard(shard, sources, out, advance)
            files[shard.file] = {"bytes": shard.nbytes, "xxh3": digest}
            reporter.detail(f"{shard.file}: {shard.nbytes / 1e9:.2f} GB, xxh3 {digest}")
    output.carry(ready.base.model.directory, out, ready.carried)
    files |= {name.as_posix(): checksum(out / name) for name in ready.carried}
    with output.writing(out):
        (out / output.CARD_FILE).write_text(
            card.render(config, plan, ready.checkpoints), encoding="utf-8"
        )
    files |= {name: {} for name in output.OWN_FILES}
    if options.verify:
        verify_shards(plan, out, sources)
    output.finish(out, Manifest(config.text, plan, files))
    return Merged(plan, out, ready.notes, time.monotonic() - begun)


def _config(config: MergeConfig | str | Path) -> MergeConfig:
    return config if isinstance(config, MergeConfig) else load_config(config)


def _fetch(ready: Prepared, options: Options, reporter: Reporter) -> dict[str, dict[str, Location]]:
    """Every source's tensors, with the files that the plan reads from the Hub downloaded."""
    needed: dict[str, set[str]] = {text: set() for text in ready.checkpoints}
    for tensor in ready.plan.tensors:
        for read in recipe.reads(tensor.recipe):
            if read.source != ROUTERS:
                needed[read.source].add(read.tensor)
    if "model" in ready.gate.USES:
        needed[ready.base.model.reference.text] |= ready.base.model.tensors.keys()
    found = {}
    for text, opened in ready.checkpoints.items():
        if {opened.tensors[name].file.name for name in needed[text]} & set(opened.absent):
            reporter.say(f"{text}: downloading what is needed into the Hub's cache")
        found[text] = checkpoint.fetch(opened, needed[text], options.cache_dir).tensors
    return found
