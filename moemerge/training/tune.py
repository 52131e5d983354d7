"""The routers of a finished mixture, trained: its first shard is rewritten, and nothing else moves.

What was there before stands in `before-tuning/` until the next time, for `undo`.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge import card, card_files, output
from moemerge.checkpoint import numpy_dtype, read_bytes
from moemerge.checkpoint.safetensors_file import read_header
from moemerge.errors import Findings, InputError, Problem, RunError
from moemerge.evaluation_text import untold
from moemerge.experts_apart import dtype_of, load, routers_of
from moemerge.moe import Moe
from moemerge.options import Options
from moemerge.output import CARD_FILE, CONFIG_FILE, MANIFEST_FILE, Manifest
from moemerge.plan import ROUTERS, Plan, PlannedTensor, Shard, digest_of
from moemerge.recipe import Read
from moemerge.reporting import Reporter, Silent
from moemerge.routers import save
from moemerge.shard_file import file_checksum
from moemerge.state import State, write_json
from moemerge.training.beginning import begin
from moemerge.training.routers import Trained, train
from moemerge.training.text import divide
from moemerge.training.tuning import Tuning
from moemerge.verify import check_shards, open_manifest
from moemerge.write import How, write_shard

BEFORE = "before-tuning"
"""Holds the first shard as it was, under a name that no reader takes for weights."""

_SHARD = f"{BEFORE}/routers"
_CARD = f"{BEFORE}/{CARD_FILE}"
_MANIFEST = f"{BEFORE}/{MANIFEST_FILE}"
_TITLE = "## Trained routers"


@dataclass(frozen=True)
class Tuned:
    """What came of it: held-out losses by step, how much was read, and how long it took."""

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
) -> Tuned:
    """Train the routers of the mixture in `out`; everything else is frozen.

    The first shard is replaced in one step, then manifest and card; killed in between, the same
    call begins again from the routers as they were. If no step is better on held-out text than
    the beginning, nothing changes.

    Raises:
        InputError: `out` is no finished mixture, or the data cannot be read; nothing was written.
        RunError: a failure on the way; `out` has its old routers or its new ones.
    """
    begun, out, options = time.monotonic(), Path(out), options or Options()
    reporter, findings = reporter or Silent(), Findings()
    manifest = _tunable(out, findings)
    moe, passages = begin(str(out), tuning, options, findings, None)
    findings.refuse()
    assert moe is not None
    texts, held = divide(passages, tuning.held_out, options.seed)
    with _alone(out):
        _roll_back(out, manifest.plan)
        model = load(moe, options, reporter, dtype_of(moe))
        routers = routers_of(model, moe)
        balance = balance_of(moe, tuning)
        trained, made = train(
            model, routers, texts, held, tuning, options.seed, balance, moe.per_token, reporter
        )
        tuned = Tuned(out, trained, len(texts), len(held), time.monotonic() - begun)
        if trained.best:
            _replace(out, manifest, made, tuned, tuning, options, reporter)
        else:
            reporter.say("no step was better on held-out text than the beginning: nothing changes")
            with output.writing(out):
                State(out).remove()
    return dataclasses.replace(tuned, seconds=time.monotonic() - begun)


def undo(out: str | Path, reporter: Reporter | None = None) -> None:
    """Give the mixture in `out` back the routers from before its last `tune`.

    Raises:
        InputError: it was not tuned, or has had other routers since.
    """
    out, reporter, findings = Path(out), reporter or Silent(), Findings()
    manifest = _tunable(out, findings)
    try:
        before = output.read_manifest(out / BEFORE)
    except (OSError, ValueError):
        before = None
    if not before or not manifest.tuned or not (out / _SHARD).is_file():
        what = "holds no routers from before a tuning that its own came of"
        findings.problem(str(out), what, "there is nothing to undo")
    findings.refuse()
    assert before is not None
    with _alone(out), output.writing(out):
        state = State(out)
        _copy(out / _SHARD, out / before.plan.shards[0].file, state)
        write_json(out / MANIFEST_FILE, before.to_json(), scratch=state.directory)
        if (out / _CARD).is_file():
            if card.is_untouched((out / CARD_FILE).read_bytes()):
                _copy(out / _CARD, out / CARD_FILE, state)
            else:
                reporter.say(f"{out / CARD_FILE}: was edited since it was written, so it stays")
        for name in (_MANIFEST, _CARD, _SHARD):
            (out / name).unlink(missing_ok=True)
        (out / BEFORE).rmdir()
        state.remove()


def balance_of(moe: Moe, tuning: Tuning) -> float:
    """The weight of the load-balancing loss: what is asked for, else what config.json asks for."""
    if tuning.balance is not None:
        return tuning.balance
    wanted = moe.config.get("output_router_logits") is True
    return float(moe.config.get("router_aux_loss_coef") or 0) if wanted else 0.0


def _tunable(out: Path, findings: Findings) -> Manifest:
    """The manifest of a mixture whose first shard has its routers."""
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


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with output.writing(out):
        state = State(out)
        held = state.mine(shared=False)
        mine = held.__enter__()
    try:
        if not mine:
            raise RunError(f"{out}: another moemerge is at work there; wait for it")
        yield
    finally:
        held.__exit__(None, None, None)


def _roll_back(out: Path, plan: Plan) -> None:
    """Put back the old first shard where an earlier run was killed after it had replaced it."""
    shard = plan.shards[0]
    header, path, kept = shard.header(), out / shard.file, out / _SHARD
    with output.writing(out):
        if path.read_bytes()[: len(header)] == header or not kept.is_file():
            return
        if kept.read_bytes()[: len(header)] == header:
            _copy(kept, path, State(out))


def _replace(
    out: Path,
    manifest: Manifest,
    made: dict[str, Any],
    tuned: Tuned,
    tuning: Tuning,
    options: Options,
    reporter: Reporter,
) -> None:
    """Keep what is there, then replace the first shard, the manifest and the card."""
    state, plan = State(out), manifest.plan
    first = plan.shards[0]
    source = state.directory / "tuned.safetensors"
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
        (out / BEFORE).mkdir(exist_ok=True)
        _copy(out / first.file, out / _SHARD, state)
        write_json(out / _MANIFEST, _bare(manifest).to_json(), scratch=state.directory)
        (out / _CARD).unlink(missing_ok=True)
        if (out / CARD_FILE).is_file():
            _copy(out / CARD_FILE, out / _CARD, state)
    reading = dataclasses.replace(whole, digest=digest)
    how = How(options.threads, options.direct, True)
    entry = write_shard(reading, {ROUTERS: read_header(source)}, out, how, lambda nbytes: None)
    kept = {
        name: {"bytes": (out / name).stat().st_size, "xxh3": file_checksum(out / name)}
        for name in (_SHARD, _MANIFEST, _CARD)
        if (out / name).is_file()
    }
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
        files={**manifest.files, first.file: entry, **kept},
        routing={},
        tuned=said,
    )
    with output.writing(out):
        write_json(out / MANIFEST_FILE, new.to_json(), scratch=state.directory)
        _retell(out, tuned, tuning, reporter)
        state.remove()


def _bare(manifest: Manifest) -> Manifest:
    """The manifest without what an earlier tuning kept, which this one's takes the place of."""
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(BEFORE)}
    return dataclasses.replace(manifest, files=files)


def _as_made(tensor: PlannedTensor) -> PlannedTensor:
    return dataclasses.replace(tensor, recipe=Read(ROUTERS, tensor.name))


def _array(out: Path, shard: Shard, tensor: PlannedTensor) -> Any:
    """A tensor of the first shard that is no router, as it stands there."""
    import numpy as np

    location = read_header(out / shard.file)[tensor.name]
    raw = np.frombuffer(read_bytes(location), numpy_dtype(location.dtype))
    return raw.astype(np.float32).reshape(location.shape)


def _copy(old: Path, new: Path, state: State) -> None:
    """Copy a small file in one step."""
    part = state.directory / f"{new.name}.part"
    part.write_bytes(old.read_bytes())
    part.replace(new)


def _retell(out: Path, tuned: Tuned, tuning: Tuning, reporter: Reporter) -> None:
    """Say in the card what was done; what it says of the old routers goes."""
    trained = tuned.trained
    paragraph = (
        f"Its routers were trained after the merge, all else frozen: {trained.best} steps of "
        f"{tuning.batch} passages of at most {tuning.length} tokens, chosen by held-out loss "
        f"({trained.before:.4f} before, {trained.after:.4f} after, nats a token on "
        f"{tuned.held_out} passages of the same data)."
    )
    section = f"{_TITLE}\n\n{paragraph}\n\n"

    def change(text: str) -> str:
        text = untold(text)
        for title in ("## Routing", _TITLE):
            text = re.sub(rf"^{title}\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"^- Its routers are [^\n]*: train it before use\.\n?", "", text, flags=re.M)
        routers = r"^(\| Routers \| .*?)(, then trained)? \|$"
        text = re.sub(routers, r"\1, then trained |", text, flags=re.M)
        text = text.replace(
            "without training it further:", "without training it further but for its routers:"
        )
        head, limits, rest = text.partition("## Limits\n")
        return head + section + limits + rest

    card_files.rewrite(out, change, reporter)
