"""What a person sees: lines, bars, and every error as its message and exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from moemerge.errors import InputError, MoemergeError, WriteError, one_line


class Terminal:
    """The listener that prints: lines and bars to standard error, results to standard output."""

    def __init__(self, quiet: bool, verbose: bool):
        self.quiet, self.verbose = quiet, verbose
        # Hints to programmers, as many as there are layers: "inputs will be cast from ...".
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if quiet:  # before anything imports huggingface_hub, which has bars of its own
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def say(self, line: str) -> None:
        """Print a note."""
        if not self.quiet:
            print(one_line(f"note: {line}"), file=sys.stderr)

    def detail(self, line: str) -> None:
        """Print a line for the curious."""
        if self.verbose:
            print(line, file=sys.stderr)

    def result(self, line: str) -> None:
        """Print the one line that the command ends with."""
        if not self.quiet:
            show(line)

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """A bar for anything over a second; none when quiet or not on a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda step: None
            return
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


def show(line: str) -> None:
    """Print to standard output.

    Raises:
        WriteError: it takes no more, a pipe that nobody reads (which typer ends for) apart.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (Python would try again at its end)
        raise WriteError(f"standard output: cannot be written ({error.strerror})") from error


@contextmanager
def explained() -> Iterator[None]:
    """Every error meant for a person as its message and exit code; Ctrl-C as 130."""
    try:
        yield
    except InputError as error:
        count = len(error.problems)
        print(f"error: {count} problem{'s' * (count > 1)}, nothing written", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except MoemergeError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):  # getrusage counts what the parent held, too
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
