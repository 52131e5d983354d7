"""The command `merge-adapter`."""

from __future__ import annotations

from typing import Annotated

import typer

from moemerge.cli.describe import edit_line
from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Moe, Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options


@app.command()
@with_options(*BUILDING)
def merge_adapter(
    moe: Moe,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A directory or user/name.")],
    out: Out,
    options: Options,
    terminal: Terminal,
) -> None:
    """Merge a LoRA adapter into a mixture and write the result, a full checkpoint."""
    from moemerge.training import merge_adapter

    terminal.result(edit_line(merge_adapter(moe, adapter, out, options, terminal)))
