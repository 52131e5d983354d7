"""The errors a user can meet, and the list that gathers problems so that all are told at once.

MoemergeError        something a person can act on; anything else that escapes is our bug
├── InputError       the config, a source or the output directory is wrong (exit code 2)
└── RunError         a failure on the way (exit code 1)
    ├── ReadError    a source cannot be read to its end, or holds what no model should
    ├── WriteError   the output cannot be written (disk full, permissions)
    └── VerifyError  what was written is not what was planned
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 4

_SPELLED = {
    "checksums": "checksum", "card_config": "config-in-card",
    "untrained_ok": "i-understand-this-is-not-useful-without-training",
}  # fmt: skip
"""The options whose flags have another name."""

ARGUMENTS = {
    **{flag: name for name, flag in _SPELLED.items()}, "text": "texts",
    "gradient-checkpointing": "checkpointing", "qlora": "load_in_4bit", "png": "path",
    "ADAPTER": "adapter", "MOE": "old", "OUT": "out", "SOURCE": "source",
}  # fmt: skip
"""The arguments whose names differ from their flags, by the flags' names."""

SWITCHES = {
    "allow_crimes", "checkpointing", "embeddings", "lazy", "load_in_4bit", "load_in_8bit",
    "overwrite", "packing", "private", "push_as_you_go", "resume", "stream", "untrained_ok",
}  # fmt: skip
"""The arguments whose flags take no value."""


class Line(str):
    """A line for a person, which names options. `typed` is the line as it was written, with flags
    (`--shard-size`), for a person who types commands. As a string it has the names of Python
    arguments (`shard_size`). Text between backticks, such as a command, is the same in both."""

    typed: str
    __slots__ = ("typed",)

    def __new__(cls, typed: str) -> Line:
        """Take a text that has flags; a `Line` is returned unchanged."""
        if isinstance(typed, Line):
            return typed
        parts = [ARGUMENTS.get(typed, typed)] if typed.isupper() else typed.split("`")
        parts[::2] = (_FLAG.sub(_as_argument, part) for part in parts[::2])
        line = super().__new__(cls, "`".join(parts))
        line.typed = typed
        return line

    def __reduce__(self) -> tuple[type[Line], tuple[str]]:
        return Line, (self.typed,)


_FLAG = re.compile(
    r"(?<![\w-])--(?P<no>no-)?(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)(?![\w-])"
    r"(?P<pair> NAME=FILE)?(?P<device> (?:cpu|cuda|mps)\b)?"
)


def _as_argument(found: re.Match[str]) -> str:
    name = ARGUMENTS.get(found["name"], found["name"].replace("-", "_"))
    if found[0] == found.string:  # it is where a problem stands
        return name
    if found["no"] or name in SWITCHES:
        return f"{name}={not found['no']}"
    if found["pair"]:
        return f"{name}={{NAME: FILE}}"
    return f"{name}={found['device'].strip()!r}" if found["device"] else name


def flag(name: str, value: object = True) -> str:
    """The flag of an option, as a person types it: `--no-...` if its value is False."""
    return f"--{'no-' * (value is False)}{_SPELLED.get(name, name).replace('_', '-')}"


class MoemergeError(Exception):
    """Base of every error that is meant for a person. `exit_code` is what the command returns. As a
    string, the error names Python arguments; `typed` names flags."""

    exit_code = 1

    def __init__(self, text: str):
        super().__init__(Line(text))

    @property
    def typed(self) -> str:
        """The text for a person who types commands."""
        return Line(self.args[0]).typed


@dataclass(frozen=True)
class Problem:
    """One problem of the input: where it is, what is wrong, and what would work."""

    where: str
    what: str
    fix: str

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            object.__setattr__(self, name, Line(text))

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}; {self.fix}")

    @property
    def typed(self) -> str:
        """The text for a person who types commands."""
        return one_line("{}: {}; {}".format(*(Line(text).typed for text in vars(self).values())))


class InputError(MoemergeError):
    """The input is wrong; no weight was read and no byte written."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[tuple[Problem, ...]]]:
        return InputError, (self.problems,)

    @property
    def typed(self) -> str:
        """The text for a person who types commands."""
        return "\n".join(problem.typed for problem in self.problems)


class RunError(MoemergeError):
    """Something failed on the way: disk, network, a source, verification."""


class ReadError(RunError):
    """A source cannot be read to its end, has changed since it was opened, or holds NaN or Inf."""


class WriteError(RunError):
    """The output directory cannot be written."""


class DiskFull(WriteError):
    """The output's disk has no space left."""


class VerifyError(RunError):
    """The files on disk are not what the plan says."""


class Findings:
    """Problems and notes of all checks, gathered so that a person gets them together.

    A problem stops the merge. A note tells something that a person may accept.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[Line] = []
        self._groups: dict[str, tuple[list[str], Line]] = {}

    def problem(self, where: str, what: str, fix: str) -> None:
        """Record one problem, once."""
        found = Problem(where, what, fix)
        if found not in self.problems:
            self.problems.append(found)

    def note(self, line: str) -> None:
        """Record a note, once."""
        if (said := Line(line)) not in self.notes:
            self.notes.append(said)

    def note_of(self, who: str, what: str) -> None:
        """Record a note about a model; one note about several models is told once, with all
        names."""
        self._grouped(what, who, lambda names: f"{listed(names)}: {what}")

    def without_effect(self, what: str, why: str) -> None:
        """Record an option that has no effect; options with the same reason share one line."""
        self._grouped(f"no effect{why}", what, lambda names: no_effect(names, why))

    def _grouped(self, key: str, name: str, line: Callable[[list[str]], str]) -> None:
        names, before = self._groups.get(key, ([], Line("")))
        names = [*names, *([] if name in names else [name])]
        now = Line(line(names))
        if before in self.notes:
            self.notes[self.notes.index(before)] = now
        else:
            self.note(now)
        self._groups[key] = names, now

    def refuse(self) -> None:
        """Raise `InputError` with every problem so far; do nothing if there is none."""
        if self.problems:
            raise InputError(self.problems)


def listed(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"


def no_effect(names: Sequence[str], why: str) -> str:
    """The line about options that have no effect; `why` is the text after that."""
    several = len(names) > 1 or names[0] == "prompts"
    return f"{listed(names)} {'have' if several else 'has'} no effect{why}"


def one_line(text: str) -> str:
    """The text on one line: line breaks and terminal control characters are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """The first line of another library's error, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Say which of the `valid` words a misspelled `word` probably means."""
    names = sorted(valid)
    close = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(names)}"
