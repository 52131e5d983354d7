"""The commands that change a mixture: new routers, training, and taking it apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.describe import experts_line
from moemerge.cli.options import BUILDING, with_options
from moemerge.cli.program import Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options
from moemerge.reporting import size

if TYPE_CHECKING:
    from moemerge.mixture import EditResult


Moe = Annotated[str, typer.Argument(metavar="MOE", help="A mixture: a directory or user/name.")]
One = Annotated[
    str, typer.Option("--expert", metavar="N|NAME", show_default=False, help="Which, from 0.")
]


@app.command()
@with_options(*BUILDING)
def repair(moe: Moe, out: Out, options: Options, terminal: Terminal) -> None:
    """Give a mixture the names and config.json that every reader knows, whoever wrote it."""
    from moemerge.mixture import repair

    built = repair(moe, out, options, terminal)
    if built is None:
        terminal.result(f"{moe}: is as every reader knows it; nothing to do")
    else:
        tell_of(built, terminal)


@app.command()
@with_options("shard_size", *BUILDING)
def extract(moe: Moe, out: Out, options: Options, terminal: Terminal, expert: One) -> None:
    """Make one expert of a mixture a dense model: its MLPs in the mixture's body."""
    from moemerge.mixture import extract

    tell_of(extract(moe, expert, out, options, terminal), terminal)


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
) -> None:
    """Give a mixture one more expert; its routers' new row is the mean of the others: regate."""
    from moemerge.mixture import add

    built = add(moe, source, out, name, options, terminal)
    tell_of(built, terminal)
    terminal.result("its row of the routers is the others' mean: `moemerge regate` fits them all")


@app.command()
@with_options(*BUILDING)
def drop(moe: Moe, out: Out, options: Options, terminal: Terminal, expert: One) -> None:
    """Take one expert out of a mixture, and its row out of the routers."""
    from moemerge.mixture import drop

    tell_of(drop(moe, expert, out, options, terminal), terminal)


@app.command()
@with_options(*BUILDING)
def top_k(
    moe: Moe,
    k: Annotated[int, typer.Argument(metavar="K", help="Experts a token.")],
    options: Options,
    terminal: Terminal,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The output directory; or MOE itself.")
    ] = None,
) -> None:
    """Let each token of a mixture choose K experts; without OUT only config.json changes."""
    from moemerge.mixture import top_k

    tell_of(top_k(moe, k, out, options, terminal), terminal)


def tell_of(built: EditResult, terminal: Terminal) -> None:
    """Print what an edit wrote."""
    plan = built.plan
    experts = f"{experts_line(plan)}; "
    terminal.result(
        f"{built.out}: {plan.architecture}, {experts if len(plan.experts) > 1 else ''}"
        f"wrote {size(built.written)}, copied {size(built.copied)} of {size(plan.nbytes)}"
    )
