"""The command `drop`."""

from __future__ import annotations

from moemerge.cli.describe import edit_line
from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Moe, One, Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options


@app.command()
@with_options(*BUILDING)
def drop(moe: Moe, out: Out, options: Options, terminal: Terminal, expert: One) -> None:
    """Write a mixture without one of its experts, and without its row of the routers."""
    from moemerge.mixture import drop

    terminal.result(edit_line(drop(moe, expert, out, options, terminal)))
