"""The command `top-k`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.describe import edit_line
from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Moe, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options


@app.command()
@with_options(*BUILDING)
def top_k(
    moe: Moe,
    k: Annotated[int, typer.Argument(metavar="K", help="Experts per token.")],
    options: Options,
    terminal: Terminal,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The output directory; without it, MOE.")
    ] = None,
) -> None:
    """Let each token of a mixture choose K experts; without OUT, only config.json changes."""
    from moemerge.mixture import top_k

    terminal.result(edit_line(top_k(moe, k, out, options, terminal)))
