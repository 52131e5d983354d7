"""A finished mixture as a GGUF file: the same tensors under llama.cpp's names, in another type."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moemerge import output
from moemerge.architectures import MLP, GgufHost, Mixture, name_of
from moemerge.card import card_of_file
from moemerge.checkpoint import Opener, fetch
from moemerge.errors import Findings, InputError, Problem
from moemerge.families import DOWN, GATE, UP
from moemerge.files import GGUF_SUFFIX, folder_of, shown
from moemerge.merging import ShardLoop
from moemerge.mixture import Moe, Part, opened_mixture
from moemerge.options import Options
from moemerge.output import (
    CARD_FILE,
    PICTURE_FILE,
    Change,
    FileEntry,
    Manifest,
    held,
    settle,
    verify_shards,
)
from moemerge.plan import Cut, Plan, Recipe, recipe
from moemerge.prepare import (
    Content,
    Tensors,
    Wanted,
    body_tensors,
    expert_tensors,
    host_of,
    made_name,
    planned,
    shared_tensor,
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
    always = _shared(moe)
    other = next((p.name for p in moe.parts if p.shared and p.name not in always), "")
    if host and (other or (always and not host.shared)):
        what = f"holds {other or min(always)}, which export does not take"
        findings.problem(moe.text, what, "merge its config into NAME.gguf instead")
    wide = _shared_width(moe, always, findings)
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
    tensors = [*_tensors(moe, host)]
    content = Content(host, moe.dense, mixture, tensors, own, moe.names, wide, imatrix)
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


_Matrix = tuple[str, tuple[int, ...], Recipe]
"""Which matrix of an MLP it is, its shape, and its recipe."""


def _shared(moe: Moe) -> dict[str, list[_Matrix]]:
    """The matrices of the always active experts, by the name of the tensor that holds them."""
    found: dict[str, list[_Matrix]] = {}
    for part in (part for part in moe.parts if part.shared):
        module = part.name.removesuffix(".weight").rpartition(".")[2]
        if len(part.shape) != 2:
            continue
        if module == "input_linear":  # (2S, D), gate above up
            wide, hidden = part.shape[0] // 2, part.shape[1]
            cuts = ((GATE, 0, wide), (UP, wide, 2 * wide))
            found[part.name] = [
                (which, (wide, hidden), Cut(part.recipe, 0, start, stop))
                for which, start, stop in cuts
            ]
        elif module == "output_linear" or module in MLP:
            which = DOWN if module == "output_linear" else module
            found[part.name] = [(which, part.shape, part.recipe)]
    return found


def _shared_width(moe: Moe, always: dict[str, list[_Matrix]], findings: Findings) -> int:
    """S, how wide the always active experts of a layer are together; 0 if there are none."""
    matrices = [matrix for found in always.values() for matrix in found]
    wide = next((shape[1] for which, shape, _ in matrices if which == DOWN), 0)
    hidden, layers = moe.dense["hidden_size"], moe.dense["num_hidden_layers"]
    wanted = {(GATE, (wide, hidden)), (UP, (wide, hidden)), (DOWN, (hidden, wide))}
    found = {(which, shape) for which, shape, _ in matrices}
    if matrices and (found != wanted or len(matrices) != len(MLP) * layers):
        fix = "use the weights and the config.json of one and the same model"
        findings.problem(moe.text, "its shared experts are not the same in all layers", fix)
    return wide


def _tensors(moe: Moe, host: GgufHost) -> Iterator[Wanted]:
    by_name = {part.name: part for part in moe.parts}
    yield from body_tensors(moe.dense, lambda name: by_name[name].recipe, host)
    layers: dict[int, list[Part]] = {}
    for part in moe.parts:
        if part.layer:
            layers.setdefault(int(part.layer.split(".")[-2]), []).append(part)
    always = _shared(moe)
    for layer, parts in sorted(layers.items()):
        for one in (part for kind in ("router", "bias") for part in parts if part.made == kind):
            yield made_name(layer, one.made), one.shape, one.recipe, one.made, None
        shared = [matrix for part in parts for matrix in always.get(part.name, ())]
        for number, dense in enumerate(MLP):
            own = sorted((p for p in parts if p.expert is not None and p.which == number),
                         key=lambda part: part.expert or 0)  # fmt: skip
            yield expert_tensors(layer, dense, [part.recipe for part in own], own[0].shape)
            for which, shape, of in shared:
                if which == dense:
                    yield shared_tensor(layer, which, of, shape)


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
        files |= _card(moe, plan, change, reporter)
        change.finish(Manifest("", plan, files))


def _card(moe: Moe, plan: Plan, change: Change, reporter: Reporter) -> dict[str, FileEntry]:
    """Write the directory's card as the file's, and its picture; returns the picture's entry."""
    from_card, picture = (moe.checkpoint.directory / name for name in (CARD_FILE, PICTURE_FILE))
    if moe.manifest is None or not from_card.is_file():
        return {}
    content = card_of_file(from_card.read_bytes(), plan, picture.is_file())
    if content is None:
        to = shown(change.out)
        reporter.say(f"{from_card}: was edited since it was written, so {to} gets no card of it")
        return {}
    change.write(CARD_FILE, content)
    if not picture.is_file():
        return {}
    change.write(PICTURE_FILE, picture.read_bytes())
    return {PICTURE_FILE: change.entry(PICTURE_FILE)}
