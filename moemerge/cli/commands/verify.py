"""The command `verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from moemerge.cli.program import Out, app
from moemerge.cli.terminal import Terminal
from moemerge.reporting import size


@app.command()
def verify(
    out: Out,
    cache_dir: Annotated[
        str | None, typer.Option("--cache-dir", metavar="DIR", help="The Hub's cache.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Check every byte of a finished OUT against its manifest and the available sources."""
    from moemerge.output import verify_checkpoint

    terminal = Terminal(quiet, False)
    found = verify_checkpoint(out, terminal, cache_dir)
    terminal.result(
        f"{out}: {size(found.bytes_read)} as the manifest says; {found.compared} of "
        f"{found.tensors} tensors equal to their sources'; {found.seconds:.1f} s"
    )
