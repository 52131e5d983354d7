"""The command `merge-adapter`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options

if TYPE_CHECKING:
    pass
from moemerge.cli.commands.edit import tell_of


@app.command()
@with_options(*BUILDING)
def merge_adapter(
    moe: Annotated[str, typer.Argument(metavar="MOE", help="A directory or user/name.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A directory or user/name.")],
    out: Out,
    options: Options,
    terminal: Terminal,
) -> None:
    """Write a mixture with a LoRA adapter merged into it: a full checkpoint."""
    from moemerge.training import merge_adapter

    tell_of(merge_adapter(moe, adapter, out, options, terminal), terminal)
