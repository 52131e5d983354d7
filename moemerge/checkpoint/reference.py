"""What a source's text means: a directory or a Hub id, a revision, an adapter on top."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Reference:
    """One model or adapter: `directory` where it is local, else the Hub's `repo` at `revision`."""

    text: str
    directory: Path | None = None
    repo: str = ""
    revision: str | None = None

    @property
    def short(self) -> str:
        """The last part of the path, which names an expert that has no name of its own."""
        return last_part(self.directory or self.repo)


def last_part(path: str | Path) -> str:
    """The last part of a path or Hub id; `model` of a home directory, whose name is a person's."""
    full, home = (os.path.abspath(os.path.expanduser(one)) for one in (path, "~"))  # noqa: PTH100, PTH111
    return (os.path.basename(full) if full != home else "") or "model"  # noqa: PTH119


def places(named: str, beside: Path | None) -> tuple[Path, ...]:
    """Where a path in a config may lead: from the working directory, then `beside` its file."""
    path = Path(os.path.expanduser(named))  # noqa: PTH111 (it raises nothing)
    return (path, beside / path) if beside else (path,)


def is_hub_id(text: str) -> bool:
    """Whether the text has the form `user/name`, and not that of a file's name."""
    files = (".txt", ".md", ".json", ".jsonl")
    named = _HUB_ID.fullmatch(text) and text.count("/") == 1 and ".." not in text
    return bool(named) and not text.endswith(files)


def parse_source(text: str, beside: Path | None = None) -> tuple[Reference, Reference | None]:
    """Split `model[@revision][+adapter[@revision]]` into the model and the adapter, if any.

    A directory that exists under the whole text or a part of it is that directory, relative to
    the working directory or else to `beside` (the config file's folder).

    Raises:
        ValueError: a part is neither a directory nor a Hub id; the message says which and why.
    """
    text = text.strip()
    if _directory(text, beside):
        return _reference(text, beside), None
    model, plus, adapter = text.partition("+")
    for at in [found.start() for found in re.finditer(r"\+", text)]:
        if _directory(text[:at], beside):
            model, plus, adapter = text[:at], "+", text[at + 1 :]
    return _reference(model, beside), _reference(adapter, beside) if plus else None


def _reference(text: str, beside: Path | None) -> Reference:
    text = text.strip()
    if directory := _directory(text, beside):
        return Reference(text, directory=directory)
    repo, at, revision = text.partition("@")
    if directory := _directory(repo, beside):
        raise ValueError(f"{directory} is a directory, which has no revision {revision!r}")
    if text[:1] in ("", ".", "/", "~") or Path(repo).is_absolute() or repo.count("/") > 1:
        raise ValueError(f"there is no directory {text!r}")
    if not _HUB_ID.fullmatch(repo) or ".." in repo or (at and not revision):
        raise ValueError(f"{text!r} is neither a directory nor a Hub id `user/name[@revision]`")
    return Reference(text, repo=repo, revision=revision or None)


def _directory(text: str, beside: Path | None) -> Path | None:
    if not text.strip() or "\0" in text:
        return None
    for candidate in places(text.strip(), beside):
        try:
            if candidate.is_dir():
                return Path(os.path.abspath(candidate))  # noqa: PTH100 (resolves `..`, keeps links)
        except OSError:  # a name too long for the file system is no directory
            return None
    return None
