"""The manifest, `moemerge.json`: the config, plan, sources and file checksums of an output."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from moemerge.files import CONFIG_FILE, is_inside
from moemerge.plan import INDEX_FILE, Plan, digest_of
from moemerge.report import FitSummary, RoutingSummary
from moemerge.version import __version__

MANIFEST_FILE = "moemerge.json"
CARD_FILE = "README.md"
PICTURE_FILE = "routing.png"
OWN_FILES = (INDEX_FILE, CONFIG_FILE, MANIFEST_FILE, CARD_FILE)
BEFORE_TUNING = "before-tuning"
"""The folder with the first shard from before tuning; readers do not load weights from it."""


class FileEntry(TypedDict, total=False):
    """A file's entry in the manifest; empty for `OWN_FILES`.

    `bytes` is the file's size. `xxh3` is its checksum (64 bits, hex), absent with `--no-checksum`.
    `sha256` is there only during a merge that pushes each shard.
    """

    bytes: int
    xxh3: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `moemerge.json`.

    `config` is the config's YAML text, and `folder` the directory of the config file, for relative
    paths. `files` has an entry for each file; entries of `OWN_FILES` are empty, because the plan
    decides these files or a person may edit them. `routing` is the report of the routers on the
    prompts, `card` holds the user's settings of the model card, `tuned` the settings and losses of
    the router training, and `fitted` the report of the fit of body and experts, if there was one.
    """

    config: str
    plan: Plan
    files: dict[str, FileEntry]
    routing: RoutingSummary = field(default_factory=lambda: RoutingSummary())
    folder: str | None = None
    version: str = __version__
    card: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    fitted: FitSummary = field(default_factory=lambda: FitSummary())

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
            **({"fitted": self.fitted} if self.fitted else {}),
            "plan": plan,
        }


def read_manifest(out: Path) -> Manifest:
    """Read a finished directory's manifest.

    Raises:
        ValueError: the file is no manifest, or was changed; the message says what is wrong.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
        said = {**data["plan"], "sources": data["sources"]}
        if digest_of(Plan.without_places(said)) != data["plan_digest"]:
            raise ValueError("its plan does not match its plan_digest")
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
            data.get("fitted", {}),
        )
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from error
    except (TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"it is damaged ({error})") from error


def _check_types(data: dict[str, Any], plan: Plan) -> None:
    """Refuse entries outside the plan that have a wrong type or value, by their names."""
    files = data["files"]
    kinds: dict[str, tuple[object, object]] = {
        "moemerge": (data["moemerge"], str),
        "config": (data["config"], str),
        "folder": (data.get("folder"), str | None),
        "files": (files, dict),
        **{key: (data.get(key, {}), dict) for key in ("routing", "card", "tuned", "fitted")},
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
            raise ValueError(f"its entry of {name} does not match the plan")
