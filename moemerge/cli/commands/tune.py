"""The command `tune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.options import TUNING, with_options
from moemerge.cli.program import Out, app
from moemerge.cli.terminal import Terminal
from moemerge.errors import InputError, Problem, nearest
from moemerge.options import Options
from moemerge.reporting import count

if TYPE_CHECKING:
    pass


_OF_LORA = {
    "adapter": "ADAPTER", "rank": "--rank", "alpha": "--alpha", "packing": "--[no-]packing",
    "checkpointing": "--[no-]gradient-checkpointing", "save_every": "--save-every",
    "resume": "--resume", "embeddings": "--embeddings", "first_row": "--first-row",
    "embedding_rate": "--embedding-rate",
}  # fmt: skip
_OF_ROUTERS = {"balance": "--balance", "distil": "--distil"}
_OF_TRAINING = {
    "data": "--data", "steps": "--steps", "batch": "--batch", "length": "--length",
    "learning_rate": "--learning-rate", "held_out": "--held-out", "seed": "--seed",
    "device": "--device", "load_in_4bit": "--load-in-4bit",
}  # fmt: skip
"""Which flags of `tune` are only of some of what it does."""


@app.command()
@with_options(*TUNING)
def tune(
    out: Out,
    options: Options,
    terminal: Terminal,
    typed: frozenset[str],
    adapter: Annotated[
        Path | None, typer.Argument(metavar="[ADAPTER]", help="Where --lora writes its adapter.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            show_default=False,
            help="Text to learn from, plain or jsonl; again for more.",
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            "--only",
            metavar="routers",
            show_default=False,
            help="What is trained; all else is frozen.",
        ),
    ] = "",
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a LoRA adapter of all linears and experts.")
    ] = False,
    qlora: Annotated[
        bool, typer.Option("--qlora", help="The same, with what is frozen in 4 bits.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", help="The adapter's.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="Its scale times its rank.")] = 32,
    packing: Annotated[
        bool,
        typer.Option("--packing/--no-packing", help="Put short texts side by side in a row."),
    ] = True,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute each layer twice, and hold less in memory.",
        ),
    ] = True,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps to a checkpoint.")] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from ADAPTER's last checkpoint.")
    ] = False,
    embeddings: Annotated[
        bool,
        typer.Option("--embeddings", help="Train embeddings and head too, whole, in the adapter."),
    ] = False,
    first_row: Annotated[
        int,
        typer.Option("--first-row", help="Of these, train the rows from here on: new tokens'."),
    ] = 0,
    embedding_rate: Annotated[
        float | None,
        typer.Option(
            "--embedding-rate",
            show_default=False,
            help="Their learning rate, if not --learning-rate.",
        ),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Give it back the routers from before the last tuning.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="At most so many.")] = 100,
    batch: Annotated[int, typer.Option("--batch", help="Passages a step.")] = 8,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            show_default=False,
            help="Tokens a passage, at most.  [default: 256, or the model's context if less]",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            show_default=False,
            help="Its highest; then a cosine.  [default: 0.1 for routers, 2e-4 for LoRA]",
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option("--held-out", help="The share of the data never trained on.")
    ] = 0.1,
    balance: Annotated[
        float | None,
        typer.Option(
            "--balance",
            show_default=False,
            help="The weight of the load-balancing loss, if not as config.json says.",
        ),
    ] = None,
    distil: Annotated[
        float,
        typer.Option(
            "--distil",
            help="The share of the loss that is the distance to what the best "
            "expert for each passage says alone.",
        ),
    ] = 0.0,
) -> None:
    """Train the mixture in OUT: its routers, in place (--only routers), or a LoRA adapter of it."""
    from moemerge.training import Tuning, shape, tune
    from moemerge.training import undo as undo_tuning

    ways = {"--only routers": bool(only), "--lora": lora, "--qlora": qlora, "--undo": undo}
    chosen = [way for way, one in ways.items() if one]
    if only not in ("", "routers"):
        what = f"{only!r} is nothing that can be trained alone"
        raise InputError([Problem("--only", what, nearest(only, ["routers"]))])
    if len(chosen) != 1:
        fix = f"write one of {', '.join(ways)}"
        raise InputError([Problem("tune", "needs one thing to do", fix)])
    idle = {**({} if lora or qlora else _OF_LORA), **({} if only else _OF_ROUTERS)}
    idle |= _OF_TRAINING if undo else {}
    if wrong := [flag for name, flag in idle.items() if name in typed]:
        what = f"has no effect with {chosen[0]}"
        raise InputError([Problem(flag, what, "remove it") for flag in wrong])
    if undo:
        undo_tuning(out, terminal)
        terminal.result(f"{out}: has the routers from before its last tuning")
        return
    usual = Tuning.learning_rate if only else 2e-4
    rate = usual if learning_rate is None else learning_rate
    tuning = Tuning(tuple(data or ()), steps, batch, length, rate, held_out, balance, distil)
    if not only:
        from moemerge.training import Lora, finetune, is_first_process

        if adapter is None:
            fix = "name a new directory for the adapter"
            raise InputError([Problem("ADAPTER", "is missing", fix)])
        if qlora:
            options = dataclasses.replace(options, load_in_4bit=True)
        wanted = Lora(rank, alpha, packing, checkpointing, save_every, resume, embeddings)
        wanted = dataclasses.replace(wanted, first_row=first_row, embedding_rate=embedding_rate)
        made = finetune(str(out), adapter, tuning, wanted, options, terminal)
        if is_first_process():
            terminal.result(
                f"{adapter}: {count(made.parameters)} parameters trained for {made.steps} steps, "
                f"held-out loss {made.before:.4f} to {made.after:.4f}"
            )
        return
    done = tune(out, tuning, options, terminal)
    trained = done.trained
    terminal.result(
        f"{out}: held-out loss {trained.before:.4f} to {trained.after:.4f} at step {trained.best}, "
        f"{done.seconds:.0f} s ({shape(trained.curve)})"
    )
