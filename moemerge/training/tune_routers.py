"""Trains the routers of a finished mixture, in place: only its first shard is rewritten.

The old shard, manifest and card stay in `before-tuning/` for `undo`, until the next training.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge import output
from moemerge.card import card
from moemerge.card import files as card_files
from moemerge.checkpoint import numpy_dtype, read_bytes, read_header
from moemerge.errors import Findings, InputError, Problem
from moemerge.files import CONFIG_FILE, WEIGHTS_SUFFIX, place_of
from moemerge.merging import save
from moemerge.mixture import Moe, dtype_of, load, routers_of
from moemerge.options import Options
from moemerge.output import (
    BEFORE_TUNING,
    CARD_FILE,
    MANIFEST_FILE,
    Change,
    How,
    Manifest,
    check_shards,
    file_checksum,
    held,
    open_manifest,
    write_shard,
)
from moemerge.plan import ROUTERS, PlannedTensor, Read, Shard, digest_of
from moemerge.reporting import Reporter, listener
from moemerge.training.data import divide
from moemerge.training.router_loop import Trained, train
from moemerge.training.settings import Tuning
from moemerge.training.setup import begin

_SHARD = f"{BEFORE_TUNING}/routers"
_CARD = f"{BEFORE_TUNING}/{CARD_FILE}"
_MANIFEST = f"{BEFORE_TUNING}/{MANIFEST_FILE}"


@dataclass(frozen=True)
class Tuned:
    """The result: held-out losses by step, the numbers of passages, and the seconds it took."""

    out: Path
    trained: Trained
    passages: int
    held_out: int
    seconds: float


def tune(
    out: str | Path,
    tuning: Tuning,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> Tuned:
    """Train the routers of the mixture in `out`; everything else is frozen.

    First shard, manifest, card and the copies for `undo` are replaced together. If no step has a
    lower held-out loss than the start, nothing changes.

    Raises:
        InputError: `out` is no finished mixture, or the data cannot be read; nothing was written.
        RunError: a failure on the way; `out` has its old routers or its new ones.
    """
    begun, out, options = time.monotonic(), Path(out), options or Options()
    reporter, findings = listener(reporter, progress), Findings()
    _tunable(out, Findings())
    with held(out) as change:
        manifest = _tunable(out, findings)
        moe, passages, length = begin(str(out), tuning, options, findings, None)
        findings.refuse()
        assert moe is not None
        tuning = dataclasses.replace(tuning, length=length)
        texts, apart = divide(passages, tuning.held_out, options.seed)
        model = load(moe, options, reporter, dtype_of(moe))
        routers = routers_of(model, moe)
        balance = balance_of(moe, tuning)
        trained, made = train(
            model, routers, texts, apart, tuning, options.seed, balance, moe.per_token, reporter
        )
        tuned = Tuned(out, trained, len(texts), len(apart), time.monotonic() - begun)
        if trained.best:
            _replace(change, manifest, made, tuned, tuning, options, reporter)
        else:
            reporter.say("no step was better on held-out text than the beginning: nothing changes")
    return dataclasses.replace(tuned, seconds=time.monotonic() - begun)


def undo(out: str | Path, reporter: Reporter | None = None, progress: bool = False) -> None:
    """Put back the routers of `out` from before its last training.

    Later changes of other things, such as the experts per token, stay.

    Raises:
        InputError: the mixture was not trained, or has had other routers since.
    """
    out, reporter, findings = Path(out), listener(reporter, progress), Findings()
    _tunable(out, Findings())
    with held(out) as change, output.writing(out):
        manifest = _tunable(out, findings)
        try:
            before = output.read_manifest(out / BEFORE_TUNING)
        except (OSError, ValueError):
            before = None
        if not before or not manifest.tuned or not (out / _SHARD).is_file():
            what = "holds no routers from before a tuning that its own came of"
            findings.problem(str(out), what, "there is nothing to undo")
            raise InputError(findings.problems)
        findings.refuse()
        first = before.plan.shards[0]
        plan = dataclasses.replace(manifest.plan, shards=(first, *manifest.plan.shards[1:]))
        as_was = dataclasses.replace(before, plan=plan, config=manifest.config)
        change.write(first.file, (out / _SHARD).read_bytes())
        change.write_json(MANIFEST_FILE, as_was.to_json())
        if (out / _CARD).is_file():
            if card.is_untouched((out / CARD_FILE).read_bytes()):
                change.write(CARD_FILE, (out / _CARD).read_bytes())
            else:
                reporter.say(f"{out / CARD_FILE}: was edited since it was written, so it stays")
        for name in (_MANIFEST, _CARD, _SHARD):
            change.remove(name)
        change.commit()


def balance_of(moe: Moe, tuning: Tuning) -> float:
    """The weight of the load-balancing loss: the setting's, or config.json's."""
    if tuning.balance is not None:
        return tuning.balance
    wanted = moe.config.get("output_router_logits") is True
    return float(moe.config.get("router_aux_loss_coef") or 0) if wanted else 0.0


def _tunable(out: Path, findings: Findings) -> Manifest:
    """The manifest of a mixture; problems are recorded if its first shard has no routers."""
    if not (out / MANIFEST_FILE).is_file() and (out / CONFIG_FILE).is_file():
        what = f"holds no {MANIFEST_FILE}, so its routers are not in a file of their own"
        fix = "`moemerge top-k` writes the like of it, K as it is, with routers apart"
        raise InputError([Problem(str(out), what, fix)])
    manifest = open_manifest(out)
    check_shards(out, manifest.plan, "tune")
    elsewhere = [t for s in manifest.plan.shards[1:] for t in s.tensors if t.made == "router"]
    first = [t for t in manifest.plan.shards[0].tensors if t.made == "router"]
    if elsewhere or not first:
        findings.problem(str(out), "its routers are not in its first shard", "merge it anew")
    return manifest


def _replace(
    change: Change,
    manifest: Manifest,
    made: dict[str, Any],
    tuned: Tuned,
    tuning: Tuning,
    options: Options,
    reporter: Reporter,
) -> None:
    """Replace the first shard, the manifest and the card, and keep the old ones for `undo`."""
    out, state, plan = change.out, change.state, manifest.plan
    first = plan.shards[0]
    source = state.directory / f"tuned{WEIGHTS_SUFFIX}"
    whole = Shard(first.file, tuple(_as_made(tensor) for tensor in first.tensors), "")
    content = {
        t.name: made[t.name] if t.name in made else _array(out, first, t) for t in first.tensors
    }
    save(whole, content, {}, source)
    changed = tuple(
        dataclasses.replace(t, recipe=Read(ROUTERS, t.name)) if t.name in made else t
        for t in first.tensors
    )
    digest = digest_of([first.digest, file_checksum(source)])
    shard = Shard(first.file, changed, digest)
    with output.writing(out):
        change.write(_SHARD, (out / first.file).read_bytes())
        change.write_json(_MANIFEST, _bare(manifest).to_json())
        if (out / CARD_FILE).is_file():
            change.write(_CARD, (out / CARD_FILE).read_bytes())
        else:
            change.remove(_CARD)
    reading = dataclasses.replace(whole, digest=digest)
    how, to = How(options.threads, options.past_the_cache, True), change.path(first.file)
    made_of = {ROUTERS: read_header(source)}
    entry = write_shard(reading, made_of, out, how, lambda nbytes: None, to)
    kept = {name: change.entry(name) for name in (_SHARD, _MANIFEST)}
    if (out / CARD_FILE).is_file():
        kept[_CARD] = change.entry(_CARD)
    trained = tuned.trained
    said = {
        "steps": trained.best, "batch": tuning.batch, "length": tuning.length,
        "learning_rate": tuning.learning_rate, "balance": tuning.balance, "distil": tuning.distil,
        "seed": options.seed, "passages": tuned.passages, "held_out": tuned.held_out,
        "data": [Path(name).name for name in tuning.data],
        "curve": [list(point) for point in trained.curve],
    }  # fmt: skip
    new = dataclasses.replace(
        manifest,
        plan=dataclasses.replace(plan, shards=(shard, *plan.shards[1:])),
        files={**_bare(manifest).files, first.file: entry, **kept},
        routing={},
        tuned=said,
    )
    change.write_json(MANIFEST_FILE, new.to_json())
    card_files.tell_training(change, said, reporter)
    change.commit()


def _bare(manifest: Manifest) -> Manifest:
    """The manifest without the files that an earlier training kept for `undo`."""
    own = (_SHARD, _MANIFEST, _CARD)
    files = {name: entry for name, entry in manifest.files.items() if name not in own}
    return dataclasses.replace(manifest, files=files)


def _as_made(tensor: PlannedTensor) -> PlannedTensor:
    return dataclasses.replace(tensor, recipe=Read(ROUTERS, tensor.name))


def _array(out: Path, shard: Shard, tensor: PlannedTensor) -> Any:
    """A tensor of the first shard that is no router, as an array."""
    import numpy as np

    location = read_header(place_of(out, shard.file))[tensor.name]
    raw = np.frombuffer(read_bytes(location), numpy_dtype(location.dtype))
    return raw.astype(np.float32).reshape(location.shape)
