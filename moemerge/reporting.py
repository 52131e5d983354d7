"""How a room tells a person what it does: lines and progress, silent unless someone listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Reporter(Protocol):
    """What the library needs of a listener; the command line brings one with bars."""

    def say(self, line: str) -> None:
        """Tell one line that a person should know."""

    def detail(self, line: str) -> None:
        """Tell one line that only a curious person wants."""

    def progress(
        self, what: str, total: int, unit: str
    ) -> AbstractContextManager[Callable[[int], object]]:
        """Open a progress display over `total` units; call the result with each step's size."""


class Silent:
    """The listener of a library call: hears nothing."""

    def say(self, line: str) -> None:
        """Drop the line."""

    def detail(self, line: str) -> None:
        """Drop the line."""

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Count nothing."""
        yield lambda step: None


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
