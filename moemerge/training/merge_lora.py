"""A LoRA adapter merged into a mixture, streamed into a full checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moemerge.checkpoint import (
    TIED,
    Donor,
    NoSource,
    SourceProblem,
    open_adapter,
    open_checkpoint,
    parse_source,
)
from moemerge.errors import Findings
from moemerge.families import EMBEDDING, HEAD
from moemerge.mixture import Edit, EditResult, build, open_moe
from moemerge.options import Options
from moemerge.plan import adapted
from moemerge.reporting import Reporter, listener


def merge_adapter(
    old: str | Path,
    adapter: str | Path,
    out: str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> EditResult:
    """Write the mixture `old` with a LoRA adapter's deltas into `out`.

    The adapter has the names of the mixture's files, as `moemerge tune lora` writes it, or it was
    trained with PEFT on experts that transformers 5 had stacked (`target_parameters`). An adapter
    that changes only the embeddings or only the head of a tied mixture unties them, as PEFT does.

    Raises:
        InputError: either cannot be read, or they do not fit; nothing was written.
        RunError: a failure on the way; the same call again goes on.
    """
    options, reporter, findings = options or Options(), listener(reporter, progress), Findings()
    adapter = str(adapter)
    moe = open_moe(old, options.cache_dir, findings)
    try:
        opened = open_checkpoint(parse_source(adapter)[0], options.cache_dir)
        lora = open_adapter(opened, moe.checkpoint)
        for note in opened.notes:
            findings.note(f"{adapter}: {note}")
    except NoSource as error:
        findings.problem(adapter, str(error), error.fix)
    except SourceProblem as error:
        findings.problem(adapter, error.what, error.fix)
    findings.refuse()
    for note in findings.notes:
        reporter.say(note)
    old_parts, config = list(moe.parts), moe.config
    if lora.untied:
        config = {**config, TIED: False}
        if HEAD not in moe.checkpoint.tensors:
            old_parts += [replace(one, name=HEAD) for one in moe.parts if one.name == EMBEDDING]
    names = {part.name for part in old_parts}
    for lost in sorted(lora.changes - names)[:1]:
        what = f"changes {lost}, which is no tensor of its own in {moe.text}"
        findings.problem(adapter, what, "merge it with PEFT")
    for tensor, (what, fix) in lora.obstacles.items():
        findings.problem(adapter, f"{tensor}: {what}", fix)
    findings.refuse()
    if lora.untied:
        reporter.say("its embeddings and its head are two from now on, as the adapter has them")
    for note in lora.notes:
        reporter.say(f"{adapter}: {note}")
    text = opened.reference.text
    parts = [replace(part, recipe=adapted(lora, part.name, part.recipe)) for part in old_parts]
    name = Path(text).name
    donor = Donor(adapter, name, moe.checkpoint, lora)
    story = f"{Path(moe.text).name} with the adapter {name} merged into it."
    edit = Edit(moe, parts, config, moe.names, moe.per_token, story, (donor,))
    return build(edit, Path(out), options, reporter, findings)
