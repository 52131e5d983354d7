"""The command `extract`."""

from __future__ import annotations

from moemerge.cli.describe import edit_line
from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Moe, One, Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options


@app.command()
@with_options("shard_size", *BUILDING)
def extract(moe: Moe, out: Out, options: Options, terminal: Terminal, expert: One) -> None:
    """Write one expert of a mixture as a dense model: its MLPs in the mixture's body."""
    from moemerge.mixture import extract

    terminal.result(edit_line(extract(moe, expert, out, options, terminal)))
