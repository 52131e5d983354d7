"""The command `routing`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.describe import routing_lines
from moemerge.cli.options import READING, with_options
from moemerge.cli.program import Out, Texts, app, check_file_to_write, texts_by_name
from moemerge.cli.terminal import Terminal, show
from moemerge.errors import InputError, Problem
from moemerge.options import Options


@app.command()
@with_options(*READING)
def routing(
    out: Out,
    options: Options,
    terminal: Terminal,
    text: Texts = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the page.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write the heat map.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show how the mixture in OUT routes its config's prompts (held out), or given texts."""
    from moemerge.evaluation import report
    from moemerge.output import writing
    from moemerge.report import heat_map, page

    texts = texts_by_name(text or ())
    for path in filter(None, (html, png)):
        check_file_to_write(path)
    if png and importlib.util.find_spec("matplotlib") is None:
        fix = "pip install 'moemerge[report]'"
        raise InputError([Problem("--png", "matplotlib is not installed", fix)])
    found = report(out, texts, options, terminal)
    if html:
        with writing(html):
            html.write_text(page.render(found), encoding="utf-8")
    if png:
        with writing(png):
            heat_map.save(found, png)
    if as_json:
        show(json.dumps(found))
        return
    for line in routing_lines(found):
        terminal.result(line)
