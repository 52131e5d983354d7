"""The command `architectures`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moemerge.cli.program import app
from moemerge.cli.terminal import show


@app.command()
def architectures(
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """List the output classes: their dense families, shared experts and readers."""
    from moemerge.prepare import listing

    rows = listing()
    if as_json:
        show(json.dumps(rows, indent=1))
        return
    for row in rows:
        show(row.pop("architecture"))
        for what, which in row.items():
            show(f"  {what:15} {which}")
