"""The commands; the only room that prints or exits."""

from __future__ import annotations

import io
import signal
import sys

from moemerge.cli import building, changing, evaluating
from moemerge.cli.app import INTERRUPTED, app

__all__ = ["app", "building", "changing", "evaluating", "main"]


def main() -> None:
    """Run the command line; the console script. What is interrupted ends with 130 and one line."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the terminal's encoding cannot
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        app(prog_name="moemerge")
    except Exception:  # an import that Ctrl-C cuts off may end as any error
        if not interrupts:
            raise
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
