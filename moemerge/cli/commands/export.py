"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Moe, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options
from moemerge.reporting import size

File = Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")]


@app.command()
@with_options("type", "exact", "imatrix", *(name for name in BUILDING if name != "copy_tokenizer"))
def export(moe: Moe, out: File, options: Options, terminal: Terminal) -> None:
    """Write a mixture as a GGUF file, for llama.cpp and the programs made of it."""
    from moemerge.gguf import export

    made = export(moe, out, options, terminal)
    checked = "verified" if options.verify else "not verified"
    kind, nbytes = made.plan.dtype, size(made.plan.nbytes)
    terminal.result(f"{out}: {nbytes}, mostly {kind}, {checked}, in {made.seconds:.1f} s")
