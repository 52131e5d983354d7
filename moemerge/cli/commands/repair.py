"""The command `repair`."""

from __future__ import annotations

from moemerge.cli.describe import edit_line
from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Moe, Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options


@app.command()
@with_options(*BUILDING)
def repair(moe: Moe, out: Out, options: Options, terminal: Terminal) -> None:
    """Write a mixture with the tensor names and config.json that every reader knows."""
    from moemerge.mixture import repair

    built = repair(moe, out, options, terminal)
    terminal.result(
        edit_line(built) if built else f"{moe}: every reader knows its names; nothing to do"
    )
