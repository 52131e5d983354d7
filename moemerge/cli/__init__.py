"""The commands; the only room that prints or exits."""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False  # as typing's, whose import takes time in which Ctrl-C may come
if TYPE_CHECKING:
    import signal
    from typing import Any, TextIO

    from moemerge.cli.program import app
else:
    import _signal as signal  # the same without its enums, which take time, too

__all__ = ["app", "main"]

INTERRUPTED = "interrupted; run the same command again to go on"
_MOST_SECONDS = 3.0  # for what others have registered for the end, as Ray to stop its cluster


def main() -> None:
    """Run the command line; the console script.

    The handler of Ctrl-C is set before anything else is imported. At any moment, Ctrl-C ends the
    process with one line and exit code 130. Files stay as after a kill, and the next run goes on.
    """
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the terminal's encoding cannot
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    gc.set_threshold(100_000, 50, 100)  # at Python's 700, imports of torch spend a second on it
    from moemerge.cli import app

    try:
        app(prog_name="moemerge")
    finally:
        _let_go(sys.stderr)


def __getattr__(name: str) -> Any:
    """The commands, imported when they are asked for."""
    if name != "app":
        raise AttributeError(f"module 'moemerge.cli' has no attribute {name!r}")
    from moemerge.cli import commands  # noqa: F401  (they register)
    from moemerge.cli.program import app

    return app


def _open_closed_streams() -> None:
    """Put the null device where a standard stream is closed.

    Otherwise the next opened file gets the number of the closed stream, and what is printed to the
    stream is written into that file.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the closed one's
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def _let_go(stream: TextIO) -> None:
    """Flush a stream; if that fails, Python does not complain at exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave(number: int, frame: object) -> None:
    """End the process now; a second Ctrl-C ends it without a line.

    No exception is raised, because imports turn it into another error, and callbacks print it and
    go on.
    """
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    begin = "\n" if os.isatty(2) else ""  # the terminal shows ^C in the line of the bar
    try:
        os.write(2, f"{begin}{INTERRUPTED}\n".encode())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    except OSError:
        pass
    import atexit
    import threading
    from contextlib import suppress

    with suppress(BaseException):
        limit = threading.Timer(_MOST_SECONDS, os._exit, (130,))
        limit.daemon = True
        limit.start()
        atexit._run_exitfuncs()
    os._exit(130)
