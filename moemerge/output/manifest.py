"""The manifest, `moemerge.json`: what an output was made of, and what its files hold."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from moemerge.files import CONFIG_FILE, is_inside
from moemerge.plan import INDEX_FILE, Plan, digest_of
from moemerge.report import RoutingSummary
from moemerge.version import __version__

MANIFEST_FILE = "moemerge.json"
CARD_FILE = "README.md"
PICTURE_FILE = "routing.png"
OWN_FILES = (INDEX_FILE, CONFIG_FILE, MANIFEST_FILE, CARD_FILE)
BEFORE_TUNING = "before-tuning"
"""Holds the first shard as it was, under a name that no reader takes for weights."""


class FileEntry(TypedDict, total=False):
    """What is known of a written file; empty for `OWN_FILES`.

    Its size, its xxh3 (64 bits, hex; absent with `--no-checksum`) and, once it was pushed as it was
    written, its sha256.
    """

    bytes: int
    xxh3: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a finished directory says of itself: the config, the plan, and its files' checksums.

    The entries of `OWN_FILES`, which the plan decides or a person may edit, are empty. `routing` is
    how the routers do on the prompts; `folder` is where the config file stood, for its relative
    paths; `card` is what a person wanted of the card; `tuned` is how the routers were trained, if
    they were.
    """

    config: str
    plan: Plan
    files: dict[str, FileEntry]
    routing: RoutingSummary = field(default_factory=lambda: RoutingSummary())
    folder: str | None = None
    version: str = __version__
    card: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain data."""
        plan = self.plan.to_json()
        return {
            "moemerge": self.version,
            "plan_digest": self.plan.digest,
            "seed": self.plan.seed,
            "config": self.config,
            "folder": self.folder,
            "sources": plan.pop("sources"),
            "files": self.files,
            "routing": self.routing,
            "card": self.card,
            **({"tuned": self.tuned} if self.tuned else {}),
            "plan": plan,
        }


def read_manifest(out: Path) -> Manifest:
    """Read a finished directory's manifest.

    Raises:
        ValueError: it is not one, or was changed; says how.
        OSError: it cannot be read.
    """
    try:
        data = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        said = {**data["plan"], "sources": data["sources"]}
        if digest_of(Plan.without_places(said)) != data["plan_digest"]:
            raise ValueError("its plan is not the one its digest was made from")
        plan = Plan.from_json(said)
        _check_types(data, plan)
        return Manifest(
            data["config"],
            plan,
            data["files"],
            data.get("routing", {}),
            data.get("folder"),
            data["moemerge"],
            data.get("card", {}),
            data.get("tuned", {}),
        )
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    except (TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"it is damaged ({error})") from error


def _check_types(data: dict[str, Any], plan: Plan) -> None:
    """Refuse, by their names, entries beside the plan that are not what they must be."""
    files = data["files"]
    kinds: dict[str, tuple[object, object]] = {
        "moemerge": (data["moemerge"], str),
        "config": (data["config"], str),
        "folder": (data.get("folder"), str | None),
        "files": (files, dict),
        **{key: (data.get(key, {}), dict) for key in ("routing", "card", "tuned")},
    }
    for source in plan.sources:
        for name in ("directory", "repo", "commit", "tokens"):
            kinds[f"{name} of {source.reference}"] = (getattr(source, name), str | None)
        kinds[f"modified of {source.reference}"] = (source.modified, int | None)
    for name, entry in files.items() if isinstance(files, dict) else ():
        kinds[f"entry of {name}"] = (entry, dict)
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):  # type: ignore[arg-type]
            raise ValueError(f"its {name} is {value!r}")
    shards = {shard.file: shard.nbytes for shard in plan.shards}
    if not all(map(is_inside, [*files, *shards])):
        raise ValueError("it names a file outside its directory")
    if lost := sorted(shards.keys() - files.keys()):
        raise ValueError(f"it has no entry of {lost[0]}")
    for name, entry in files.items():
        size, digest = entry.get("bytes"), entry.get("xxh3")
        whole = name in shards or digest is not None or not entry
        if entry and not (type(size) is int and size >= 0 and isinstance(digest, str | None)):
            raise ValueError(f"its entry of {name} is {entry!r}")
        if not whole or (name in shards and size != shards[name]):
            raise ValueError(f"its entry of {name} is not what was written")
