"""A finished mixture as a GGUF file: the same tensors under llama.cpp's names, in another type."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moemerge import output
from moemerge.architectures import MLP, GgufHost, Mixture, name_of
from moemerge.checkpoint import Opener, fetch
from moemerge.errors import Findings, InputError, Problem
from moemerge.files import GGUF_SUFFIX, folder_of
from moemerge.merging import ShardLoop
from moemerge.mixture import Moe, Part, opened_mixture
from moemerge.options import Options
from moemerge.output import FileEntry, Manifest, held, settle, verify_shards
from moemerge.plan import Plan, recipe
from moemerge.prepare import (
    Content,
    Tensors,
    Wanted,
    body_tensors,
    expert_tensors,
    host_of,
    made_name,
    planned,
    source_of,
)
from moemerge.reporting import Reporter, listener


@dataclass(frozen=True)
class Exported:
    """The GGUF file `out` that was written, by its plan, in `seconds`."""

    out: Path
    plan: Plan
    seconds: float


def export(
    moe: str | Path,
    out: str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> Exported:
    """Write the mixture `moe` as the GGUF file `out`; a run that was cut off goes on.

    `options.type` is the kind of file, such as q4_k_m; without it, tensors keep their types.

    Raises:
        InputError: `moe` is no mixture that llama.cpp computes right, or `out` cannot be written.
        RunError: the run failed; the same call goes on.
    """
    begun, options, findings = time.monotonic(), options or Options(), Findings()
    reporter = listener(reporter, progress)
    if Path(out).suffix != GGUF_SUFFIX:
        raise InputError([Problem(str(out), "is no name of a GGUF file", "write NAME.gguf")])
    opened = opened_mixture(moe, options, findings, reporter)
    plan, sources = _plan(opened, Path(out).name, options, findings)
    folder = folder_of(Path(out))
    settle(folder)
    output.check(folder, plan, (), [opened.checkpoint.place], options, findings)
    findings.refuse()
    for note in findings.notes:
        reporter.say(note)
    _write(opened, plan, sources, folder, options, reporter)
    return Exported(Path(out), plan, time.monotonic() - begun)


def _plan(moe: Moe, file: str, options: Options, findings: Findings) -> tuple[Plan, Tensors]:
    name = name_of(moe.family) or moe.family
    host = host_of(name, moe.text, findings)
    if any(part.shared for part in moe.parts) or moe.factor:
        what = "has shared experts" if not moe.factor else "is a split"
        fix = "merge its config into NAME.gguf instead"
        findings.problem(moe.text, f"{what}, which export does not take", fix)
    layers = moe.dense.get("num_hidden_layers")
    if (count := sum(part.made == "router" for part in moe.parts)) != layers:
        what = f"{count} of its {layers} layers are mixtures; export takes it if all are"
        findings.problem(moe.text, what, "convert it with llama.cpp's convert_hf_to_gguf.py")
    findings.refuse()
    assert host
    mixture = Mixture(moe.experts, moe.per_token, moe.inner)
    own = moe.checkpoint
    opener = Opener(findings, None, options.cache_dir)
    imatrix = opener.imatrix(str(options.imatrix)) if options.imatrix else None
    findings.refuse()
    opened = {one.reference.text: one for one in (own, imatrix) if one}
    content = Content(host, moe.dense, mixture, [*_tensors(moe, host)], own, moe.names, 0, imatrix)
    plan = Plan(
        architecture=name,
        gate_mode=moe.manifest.plan.gate_mode if moe.manifest else "given",
        gate_inputs="",
        seed=0,
        dtype="",
        experts=moe.names,
        experts_per_token=moe.per_token // moe.segments,
        config=moe.config,
        sources=tuple(map(source_of, opened.values())),
        shards=(),
    )
    sources = {text: one.tensors for text, one in opened.items()}
    made = planned(content, plan, file, sources, options, findings)
    findings.refuse()
    return made, sources


def _tensors(moe: Moe, host: GgufHost) -> Iterator[Wanted]:
    by_name = {part.name: part for part in moe.parts}
    yield from body_tensors(moe.dense, lambda name: by_name[name].recipe, host)
    layers: dict[int, list[Part]] = {}
    for part in moe.parts:
        if part.expert is not None or part.made:
            layers.setdefault(int(part.layer.split(".")[-2]), []).append(part)
    for layer, parts in sorted(layers.items()):
        for one in (part for kind in ("router", "bias") for part in parts if part.made == kind):
            yield made_name(layer, one.made), one.shape, one.recipe, one.made, None
        for which, dense in enumerate(MLP):
            own = sorted((p for p in parts if p.expert is not None and p.which == which),
                         key=lambda part: part.expert or 0)  # fmt: skip
            yield expert_tensors(layer, dense, [part.recipe for part in own], own[0].shape)


def _write(
    moe: Moe, plan: Plan, sources: Tensors, folder: Path, options: Options, reporter: Reporter
) -> None:
    own = moe.checkpoint.reference.text
    names = {
        read.tensor
        for tensor in plan.tensors
        for read in recipe.reads(tensor.recipe)
        if read.source == own
    }
    opened = fetch(moe.checkpoint, names, options.cache_dir, reporter, options.stream)
    sources = {**sources, own: opened.tensors}
    with held(folder) as change:
        output.begin(folder, plan, output.file_names(plan, ()), options)
        loop = ShardLoop(plan, folder, options, reporter, change.state, None, threading.Event())
        loop.write(list(plan.shards), sources)
        if options.verify:
            verify_shards(plan, folder, sources)
        files: dict[str, FileEntry] = {one.file: change.state.entry(one) for one in plan.shards}
        files |= {name: {} for name in output.OWN_FILES}
        change.finish(Manifest("", plan, files))
