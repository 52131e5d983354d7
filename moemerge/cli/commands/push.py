"""The command `push`."""

from __future__ import annotations

from typing import Annotated

import typer

from moemerge.cli.program import Out, app
from moemerge.cli.terminal import Terminal


@app.command()
def push(
    out: Out,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository a private one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Upload the new files of a finished OUT to the Hub, in one commit. Run again to resume."""
    from moemerge.publish import push

    terminal = Terminal(quiet, False)
    terminal.result(f"{out}: pushed to {push(out, repo, private, terminal)}")
