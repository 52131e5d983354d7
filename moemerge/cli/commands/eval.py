"""The command `eval`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.options import READING, with_options
from moemerge.cli.program import Out, Texts, app, check_file_to_write, texts_by_name
from moemerge.cli.terminal import Terminal
from moemerge.errors import InputError, Problem
from moemerge.options import Options
from moemerge.reporting import count

if TYPE_CHECKING:
    from moemerge.report import Evaluation


@app.command("eval")
@with_options(*READING)
def evaluate(
    out: Out,
    options: Options,
    terminal: Terminal,
    typed: frozenset[str],
    text: Texts = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME|FILE",
            show_default=False,
            help="A task of lm-eval, a task file (.yaml), or a directory of them. Give the option "
            "again for more. Needs moemerge[eval].",
        ),
    ] = None,
    length: Annotated[
        int, typer.Option("--length", min=2, help="The most tokens of a text read at once.")
    ] = 1024,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, show_default=False, help="The most documents of a task."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            min=0,
            show_default=False,
            help="Examples before each question.  [default: the task's own number]",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Requests at once, for lm-eval.")
    ] = 1,
    card: Annotated[
        bool, typer.Option("--card", help="Write the results into OUT's README.md.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", show_default=False, help="Write the results as JSON."
        ),
    ] = None,
) -> None:
    """Compare the mixture in OUT with its sources: perplexity of texts, and lm-eval's tasks."""
    from moemerge.card import tell_evaluation
    from moemerge.evaluation import EvalSpec, evaluate
    from moemerge.output import writing

    of = {"limit": "--tasks", "num_fewshot": "--tasks", "batch_size": "--tasks", "length": "--text"}
    given = {"--tasks": tasks, "--text": text}
    if idle := [name for name in of if name in typed and not given[of[name]]]:
        flags = {name: "--" + name.replace("_", "-") for name in idle}
        raise InputError(
            [Problem(flags[n], f"has no effect without {of[n]}", "remove it") for n in idle]
        )
    if file:
        check_file_to_write(file)
    if terminal.quiet or not sys.stderr.isatty():  # before anything imports tqdm
        os.environ["TQDM_DISABLE"] = "1"
    wanted = EvalSpec(
        texts_by_name(text or ()), tuple(tasks or ()), length, limit, num_fewshot, batch_size
    )
    found = evaluate(out, wanted, options, terminal)
    for line in evaluation_lines(found):
        terminal.result(line)
    if file:
        with writing(file):
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if card and tell_evaluation(out, found, terminal):
        terminal.result(f"{out}: README.md tells it")


def evaluation_lines(found: Evaluation) -> Iterator[str]:
    """The results as one table: a row for each text and metric, a column for each model."""
    from moemerge.card import cells, metric_of

    table = [["", *found["columns"], "of"]]
    for row in found["rows"]:
        unit = "tokens" if row["kind"] == "text" else "documents"
        name = f"{row['name']}: {metric_of(row)}"
        table.append([name, *cells(row), f"{count(row['samples'])} {unit}"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        first, *rest = zip(line, widths, strict=True)
        yield "  ".join([first[0].ljust(first[1]), *(one.rjust(width) for one, width in rest)])
