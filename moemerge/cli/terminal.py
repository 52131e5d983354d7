"""Output to a terminal: lines, progress bars, and errors with their exit codes."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moemerge.errors import InputError, Line, MoemergeError, one_line
from moemerge.reporting import Console, Reporter, Silent


class Terminal(Console):
    """The reporter of a command: results go to standard output, the rest to standard error."""

    def __init__(self, quiet: bool, verbose: bool):
        super().__init__(verbose)
        self.quiet = quiet
        # Hints to programmers, as many as there are layers: "inputs will be cast from ...".
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if quiet:  # before anything imports huggingface_hub, which has bars of its own
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def say(self, line: str) -> None:
        """Print a note."""
        if not self.quiet:
            self.print(one_line(f"note: {Line(line).typed}"))

    def detail(self, line: str) -> None:
        """Print a line if --verbose."""
        if self.verbose:
            self.print(Line(line).typed)

    def result(self, line: str) -> None:
        """Print a line of the result."""
        if not self.quiet:
            show(line)

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A progress bar, or a line every 15 seconds without a terminal; nothing if --quiet."""
        listening: Reporter = Silent() if self.quiet else Console(self.verbose, self.clock)
        with listening.progress(what, total, unit) as advance:
            yield advance


def show(line: str) -> None:
    """Print to standard output and flush."""
    print(line, flush=True)


@contextmanager
def explained() -> Iterator[None]:
    """Print an error for the user as its message, and exit with its code.

    A full standard output is such an error. A closed one ends the command without a line.
    """
    tell = Console().print
    try:
        yield
    except InputError as error:
        count = len(error.problems)
        tell(f"error: {count} problem{'s' * (count > 1)}, nothing written")
        for problem in error.problems:
            tell(f"  {problem.typed}")
        sys.exit(error.exit_code)
    except MoemergeError as error:
        tell(one_line(f"error: {error.typed}"))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:  # no room for a file is a WriteError
            raise
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (Python would try again at its end)
        tell(f"error: standard output: cannot be written ({error.strerror})")
        sys.exit(1)


def peak_memory() -> int:
    """The peak memory of this process in bytes; 0 if the system does not say."""
    with suppress(OSError, ValueError, IndexError):  # getrusage counts what the parent held, too
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
