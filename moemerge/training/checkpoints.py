"""Checkpoints of a training: its settings, and its last complete checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moemerge.errors import Findings
from moemerge.files import read_json, write_json
from moemerge.mixture import Moe
from moemerge.plan import digest_of
from moemerge.training.data import Passage

_BEGUN = "begun.json"
_WRITTEN_LAST = "trainer_state.json"


def digest_of_text(passages: Sequence[Passage]) -> str:
    """A digest of the passages: their tokens, their order, and which tokens are learnt."""
    digest = hashlib.blake2b(digest_size=16)
    for one in passages:
        digest.update(repr((one.ids, one.counted, one.starts)).encode())
    return digest.hexdigest()


def digest_of_weights(moe: Moe) -> str:
    """A digest of the mixture's weights: from its manifest, or its fingerprint and time."""
    if moe.manifest:
        return digest_of(moe.manifest.files)
    return digest_of([moe.checkpoint.fingerprint, moe.checkpoint.modified])


def begin(folder: Path, run: dict[str, Any], before: float) -> None:
    """Write the settings of a training, by their flags, and its first held-out loss."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _BEGUN, {"run": run, "before": before})


def last(folder: Path) -> tuple[Path, float] | None:
    """The last complete checkpoint, and the held-out loss before the training."""
    before = read_json(folder / _BEGUN).get("before")
    whole = [one for one in folder.glob("checkpoint-*") if read_json(one / _WRITTEN_LAST)]
    if not isinstance(before, float) or not whole:
        return None
    return max(whole, key=step_of), before


def step_of(checkpoint: Path) -> int:
    """The number of steps of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def check_same(folder: Path, run: dict[str, Any], findings: Findings) -> None:
    """Record every setting that differs from the training in `folder`."""
    begun = read_json(folder / _BEGUN).get("run", {})
    for flag in begun.keys() & run.keys():
        if begun[flag] != run[flag]:
            digests = isinstance(run[flag], str)
            what = "is not" if digests else f"is {run[flag]}, not {begun[flag]},"
            fix = "pass what it began with, or name a new directory to begin anew"
            findings.problem(flag, f"{what} what {folder.parent} began with", fix)
