"""How the library reports what it does: lines and progress, silent unless someone listens."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

from moemerge.errors import InputError, Line, Problem, one_line

EVERY = 15.0
"""Seconds between two lines about a long piece of work, where no terminal can show a bar."""


class Reporter(Protocol):
    """What the library needs of a listener. `Console` is one, and a program may have its own."""

    def say(self, line: str) -> None:
        """Report one line that a person should know."""

    def detail(self, line: str) -> None:
        """Report one line of detail, for `--verbose`."""

    def progress(
        self, what: str, total: int, unit: str
    ) -> AbstractContextManager[Callable[[int], object]]:
        """Open a progress display over `total` units; call the result with each step's size."""


class Silent:
    """The listener of a library call: it drops everything."""

    def say(self, line: str) -> None:
        """Drop the line."""

    def detail(self, line: str) -> None:
        """Drop the line."""

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Count nothing."""
        yield lambda step: None


class Console:
    """The listener that prints notes and progress to standard error.

    Progress is a bar on a terminal. Elsewhere, long work gets a line every `EVERY` seconds of the
    `clock`. `verbose` prints details too.
    """

    def __init__(self, verbose: bool = False, clock: Callable[[], float] = time.monotonic):
        self.verbose, self.clock = verbose, clock

    def say(self, line: str) -> None:
        """Print a note."""
        self.print(one_line(f"note: {Line(line)}"))

    def detail(self, line: str) -> None:
        """Print a detail, with `verbose`."""
        if self.verbose:
            self.print(Line(line))

    def print(self, line: str) -> None:
        """Print a line; nothing if standard error is closed."""
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A bar, or a line now and then, until the block ends."""
        if sys.stderr is not None and sys.stderr.isatty():
            with _bar(what, total, unit) as advance:
                yield advance
            return
        work, ended = Work(what, total, unit, self.clock, self.print), threading.Event()

        def watch() -> None:
            while not ended.wait(1):
                work.tell_if_due()

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield work.advance
        finally:
            ended.set()


class Work:
    """A long piece of work that tells its progress now and then."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        clock: Callable[[], float],
        tell: Callable[[str], object],
    ):
        self.what, self.total, self.unit, self.clock, self.tell = what, total, unit, clock, tell
        self.begun = self.told = clock()
        self.done = 0
        self.lock = threading.Lock()

    def advance(self, step: int) -> None:
        """Count a step."""
        with self.lock:
            self.done += step
        self.tell_if_due()

    def tell_if_due(self) -> None:
        """Print the progress if the last line is old enough."""
        with self.lock:
            now = self.clock()
            if now - self.told < EVERY:
                return
            self.told = now
        self.tell(f"{self.what}: {self._how_far()}{now - self.begun:.0f} s")

    def _how_far(self) -> str:
        if self.total < 2:
            return ""
        if self.unit == "B":
            of = f"{size(self.done)} of {size(self.total)}"
        else:
            of = f"{self.done} of {self.total} {self.unit}s"
        return f"{of} ({self.done / self.total:.0%}), "


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar that appears after one second; bytes are shown as such."""
    from tqdm import tqdm

    with tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        delay=1,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update


def listener(reporter: Reporter | None, progress: bool) -> Reporter:
    """The listener of a call: the `reporter`, a `Console` with `progress`, or `Silent`.

    Raises:
        InputError: both are given.
    """
    if reporter and progress:
        fix = "keep one of them: a reporter has a progress of its own"
        raise InputError([Problem("progress", "and reporter cannot both be", fix)])
    return reporter or (Console() if progress else Silent())


def count(parameters: int) -> str:
    """Parameters for a person: 24.15B."""
    for power, unit in ((9, "B"), (6, "M"), (3, "K")):
        if parameters >= 10**power:
            return f"{parameters / 10**power:.2f}{unit}"
    return str(parameters)


def size(nbytes: int) -> str:
    """Bytes for a person: 48.3 GB."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "KB")):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:.1f} {unit}"
    return f"{nbytes} B"
