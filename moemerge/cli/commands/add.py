"""The command `add`."""

from __future__ import annotations

from typing import Annotated

import typer

from moemerge.cli.describe import edit_line
from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Moe, Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options


@app.command()
@with_options("shard_size", "allow_crimes", *BUILDING)
def add(
    moe: Moe,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="model, or model+adapter.")],
    out: Out,
    options: Options,
    terminal: Terminal,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", show_default=False, help="The expert's name.")
    ] = "",
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="FILE",
            show_default=False,
            help="The expert's text. All router rows are solved anew, if MOE was merged with "
            "--statistics.",
        ),
    ] = "",
) -> None:
    """Add an expert to a mixture; its router row is the mean of the others, so regate then."""
    from moemerge.mixture import add

    terminal.result(edit_line(add(moe, source, out, name, options, terminal, text=text)))
    if text:
        terminal.result("all router rows were solved anew")
        return
    terminal.result("the new router row is the mean of the others: `moemerge regate` fits them all")
