"""The meaning of a source's text: a directory, a GGUF file or a Hub id, a revision, an adapter."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

GGUF = ".gguf"
"""The suffix of a file that is a model by itself."""

_HUB_FILE = re.compile(
    r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^:@/]+))?[:/]([\w.-]+(?:/[\w.-]+)*\.gguf)"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w.-]*")


class NoSource(ValueError):
    """A text that is neither a directory nor a Hub id, and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.fix = fix


@dataclass(frozen=True)
class Reference:
    """One model or adapter: a local `directory`, otherwise the Hub's `repo` at `revision`.

    `directory` may also be a GGUF file; on the Hub, `file` is one of the repository. A relative
    path may have been meant relative to `beside`.
    """

    text: str
    directory: Path | None = None
    repo: str = ""
    revision: str | None = None
    file: str = ""
    beside: Path | None = field(default=None, compare=False)

    @property
    def short(self) -> str:
        """The last part of the path, which names an expert that has no name of its own."""
        return last_part(self.directory or self.file or self.repo).removesuffix(GGUF)


def last_part(path: str | Path) -> str:
    """The last part of a path or Hub id; `model` for a home directory, because its name is a
    person's."""
    full, home = (os.path.abspath(os.path.expanduser(one)) for one in (path, "~"))  # noqa: PTH100, PTH111
    return (os.path.basename(full) if full != home else "") or "model"  # noqa: PTH119


def places(named: str, beside: Path | None) -> tuple[Path, ...]:
    """The places where a path in a config may be: in the working directory, then in `beside`."""
    path = Path(os.path.expanduser(named))  # noqa: PTH111 (it raises nothing)
    return (path, beside / path) if beside else (path,)


def is_hub_id(text: str) -> bool:
    """Whether the text has the form `user/name`, and is not a file's name."""
    files = (".txt", ".md", ".json", ".jsonl")
    named = _HUB_ID.fullmatch(text) and text.count("/") == 1 and ".." not in text
    return bool(named) and not text.endswith(files)


def parse_source(text: str, beside: Path | None = None) -> tuple[Reference, Reference | None]:
    """Split `model[@revision][+adapter[@revision]]` into the model and the adapter, if any.

    If the whole text or a part of it is a directory, it means that directory, in the working
    directory or otherwise in `beside` (the config file's folder).

    Raises:
        NoSource: a part is neither a directory nor a Hub id; the message says which and why.
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
    text, check = text.strip(), "check the path, or write user/name"
    if directory := _directory(text, beside):
        return Reference(text, directory=directory)
    repo, at, revision = text.partition("@")
    if directory := _directory(repo, beside):
        what = f"{directory} is a directory, which has no revision {revision!r}"
        raise NoSource(what, check)
    if (found := _HUB_FILE.fullmatch(text)) and ".." not in text:
        return Reference(text, repo=found[1], revision=found[2], file=found[3], beside=beside)
    if text[:1] in ("", ".", "/", "~") or Path(repo).is_absolute() or repo.count("/") > 1:
        kind = "file" if repo.endswith(GGUF) else "directory"
        raise NoSource(f"there is no {kind} {text!r}", nearest_directory(text, beside) or check)
    if repo.endswith(GGUF):
        raise NoSource(f"there is no file {text!r}", "check the path")
    if not _HUB_ID.fullmatch(repo) or ".." in repo or (at and not revision):
        what = f"{text!r} is neither a directory nor a Hub id `user/name[@revision]`"
        raise NoSource(what, nearest_directory(text, beside) or check)
    first = repo.partition("/")[0]
    if repo != first and not at and _directory(first, beside):
        fix = nearest_directory(text, beside) or "check the path"
        what = f"there is no directory {text!r}, though there is a {first!r}"
        raise NoSource(what, f"{fix}; if the Hub's is meant, write {repo}@main")
    return Reference(text, repo=repo, revision=revision or None, beside=beside)


def nearest_directory(text: str, beside: Path | None) -> str:
    """The directory that a wrong path probably means; empty if there is none."""
    typed = Path(os.path.expanduser(text))  # noqa: PTH111
    for base in (Path(), *([beside] if beside else [])):
        there, gone = base / typed, list[str]()
        with suppress(OSError, ValueError):
            while there.name and not there.is_dir():
                there, gone = there.parent, [there.name, *gone]
            names = {path.name.lower(): path.name for path in there.iterdir() if path.is_dir()}
            close = difflib.get_close_matches(gone[0].lower(), names, n=1) if gone else []
            for rest in (gone[1:], []) if close and len(gone) <= len(typed.parts) else ():
                head = typed.parts[: len(typed.parts) - len(gone)]
                found = Path(*head, names[close[0]], *rest)
                if (base / found).is_dir():
                    return f"did you mean {str(found)!r}?"
    return ""


def _directory(text: str, beside: Path | None) -> Path | None:
    if not text.strip() or "\0" in text:
        return None
    for candidate in places(text.strip(), beside):
        try:
            if candidate.is_dir() or (candidate.suffix == GGUF and candidate.is_file()):
                return Path(os.path.abspath(candidate))  # noqa: PTH100 (resolves `..`, keeps links)
        except OSError:  # a name too long for the file system is no directory
            return None
    return None
