"""moemerge in forks of one warm process, which may be killed just before any change of a directory.

with Forks() as forks:
    ran = forks.run("merge", config, out, under=out)      # ran.begun: the changes that there were
    forks.run("merge", config, out, under=out, kill_at=7)  # dies before the eighth of them

A change is an open for writing, a rename, removal, link or truncation of a file, or a directory
made or removed, as Python's audit hooks tell it. A fork costs no import, so hundreds are a matter
of a minute.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Ran:
    """How a run ended: its exit status (-9: killed), the changes it began, and what it said."""

    rc: int
    begun: list[str]
    said: str


class Forks:
    """The warm process, asked for one run after another; with more in its environment, if given."""

    def __init__(self, environment: dict[str, str] | None = None, cwd: Path | None = None):
        self._environment, self._cwd = environment or {}, cwd

    def __enter__(self) -> Forks:
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **self._environment},
            cwd=self._cwd,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, *argv: object, under: Path | None = None, kill_at: int | None = None) -> Ran:
        """`moemerge ARGV...` in a fork, killed before change `kill_at` of what is `under`."""
        asked = {
            "argv": list(map(str, argv)),
            "under": str(under or ""),
            "kill_at": kill_at,
        }
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))


def serve() -> None:
    """Answer each line of the standard input with a fork's end."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch
    import transformers
    import transformers.models.mixtral.modeling_mixtral

    import moemerge.training  # noqa: F401
    from moemerge import cli  # noqa: F401

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            pid = os.fork()
            if pid == 0:
                _run(asked, *(file.fileno() for file in files))
            rc = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for file in files:
                file.seek(0)
            said, begun, imported = (file.read().decode(errors="replace") for file in files)
        for name in imported.splitlines():
            with suppress(Exception):
                importlib.import_module(name)
        answers.write(json.dumps({"rc": rc, "begun": begun.splitlines(), "said": said}) + "\n")
        answers.flush()


def _run(asked: dict[str, Any], said: int, counter: int, imported: int) -> None:
    """The fork: it ends here."""
    rc, warm = 99, set(sys.modules)
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        if asked["under"]:
            _listen(asked["under"], asked["kill_at"], counter)
        sys.argv = ["moemerge", *asked["argv"]]
        from moemerge.cli import main

        try:
            main()
            rc = 0
        except SystemExit as end:
            rc = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os.write(imported, "\n".join(sys.modules.keys() - warm).encode())
        os._exit(rc)


def _listen(under: str, kill_at: int | None, counter: int) -> None:
    begun = 0

    def hear(event: str, args: tuple[Any, ...]) -> None:
        nonlocal begun
        where = [path for path in _changed(event, args) if path.startswith(under)]
        if where:
            if begun == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            begun += 1
            os.write(counter, f"{event} {' '.join(where)}\n".encode())

    sys.addaudithook(hear)


def _changed(event: str, args: tuple[Any, ...]) -> list[str]:
    """The paths that an audited event is about to change."""
    if event == "open":
        writes = isinstance(args[2], int) and args[2] & WRITES
        return [_where(args[0], -1)] if writes else []
    if event in ("os.rename", "os.link"):
        return [_where(args[0], args[2]), _where(args[1], args[3])]
    if event == "os.symlink":
        return [_where(args[1], args[2])]
    if event == "os.truncate":
        return [_where(args[0], -1)]
    return [_where(args[0], args[-1])] if event in ("os.remove", "os.rmdir", "os.mkdir") else []


def _where(path: Any, folder: Any) -> str:
    """A path made absolute; `folder` is the descriptor that it is relative to, if any."""
    if not isinstance(path, str | os.PathLike):
        return ""
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)  # noqa: PTH115, PTH118
    return os.path.abspath(path)  # noqa: PTH100


if __name__ == "__main__":
    serve()
