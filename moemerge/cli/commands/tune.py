"""The commands `tune routers`, `tune lora` and `tune undo`."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moemerge.cli.old_tune import as_today, is_old
from moemerge.cli.options import SAYING, TRAINING, UNHEARD, with_options
from moemerge.cli.program import Out, app
from moemerge.cli.terminal import Terminal
from moemerge.options import Options
from moemerge.reporting import count


class Tune(TyperGroup):
    """The commands of `tune`; the old spellings work too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate an old spelling, and say the new one."""
        if args and is_old(args):
            args = as_today(args)
            told = f"the usual way: `{shlex.join(['moemerge', 'tune', *args])}`"
            ctx.meta.setdefault(UNHEARD, []).append(told)
        return super().parse_args(ctx, args)


tuning = typer.Typer(
    cls=Tune,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train the mixture in OUT: its routers, in place, or a LoRA adapter of it.\n\n\b\n"
    "moemerge tune routers OUT --data FILE\n"
    "moemerge tune lora OUT ADAPTER --data FILE [--qlora]\n"
    "moemerge tune undo OUT",
)
app.add_typer(tuning, name="tune")

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        show_default=False,
        help="A training text, plain or jsonl. Give the option again for more files.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", help="The most training steps.")]
Batch = Annotated[int, typer.Option("--batch", help="Passages per step.")]
Length = Annotated[
    int | None,
    typer.Option(
        "--length",
        show_default=False,
        help="The most tokens per passage.  [default: 256, or the model's context if shorter]",
    ),
]
Rate = Annotated[
    float,
    typer.Option(
        "--learning-rate", help="The highest learning rate; it then falls along a cosine."
    ),
]
HeldOut = Annotated[
    float,
    typer.Option("--held-out", help="The share of the data that is used only to measure the loss."),
]


_HELPS = {
    "seed": "Seed of the order of the data and of new weights.",
    "device": "Device to train on.",
    "load_in_4bit": "Hold the frozen weights in 4 bits (bitsandbytes).",
}
"""Help of shared options, in the words of training."""


@tuning.command()
@with_options("seed", "device", "cuda", "load_in_4bit", *TRAINING, **_HELPS)
def routers(
    out: Out,
    options: Options,
    terminal: Terminal,
    data: Data = None,
    steps: Steps = 100,
    batch: Batch = 8,
    length: Length = None,
    learning_rate: Rate = 0.1,
    held_out: HeldOut = 0.1,
    balance: Annotated[
        float | None,
        typer.Option(
            "--balance",
            show_default=False,
            help="The weight of the load-balancing loss.  [default: as in config.json]",
        ),
    ] = None,
    distil: Annotated[
        float,
        typer.Option(
            "--distil",
            help="The share of distillation in the loss: the distance to the output of the "
            "expert that is best for each passage alone.",
        ),
    ] = 0.0,
) -> None:
    """Train the routers of OUT in place. All other weights are frozen."""
    from moemerge.training import Tuning, shape, tune

    files = tuple(data or ())
    wanted = Tuning(files, steps, batch, length, learning_rate, held_out, balance, distil)
    done = tune(out, wanted, options, terminal)
    trained = done.trained
    terminal.result(
        f"{out}: held-out loss {trained.before:.4f} to {trained.after:.4f} at step {trained.best}, "
        f"{done.seconds:.0f} s ({shape(trained.curve)})"
    )


@tuning.command()
@with_options("seed", "device", "cuda", *TRAINING, **_HELPS)
def lora(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The mixture.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The directory for the adapter.")
    ],
    options: Options,
    terminal: Terminal,
    data: Data = None,
    qlora: Annotated[
        bool,
        typer.Option(
            "--qlora", "--load-in-4bit", help="Hold the frozen weights in 4 bits (bitsandbytes)."
        ),
    ] = False,
    steps: Steps = 100,
    batch: Batch = 8,
    length: Length = None,
    learning_rate: Rate = 2e-4,
    held_out: HeldOut = 0.1,
    rank: Annotated[int, typer.Option("--rank", help="The LoRA rank.")] = 16,
    alpha: Annotated[
        float, typer.Option("--alpha", help="LoRA alpha: the adapter is scaled by alpha / rank.")
    ] = 32,
    packing: Annotated[
        bool,
        typer.Option("--packing/--no-packing", help="Pack several short texts into one sequence."),
    ] = True,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Save memory: compute each layer's activations twice.",
        ),
    ] = True,
    save_every: Annotated[
        int, typer.Option("--save-every", help="Steps between two checkpoints.")
    ] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in ADAPTER.")
    ] = False,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings", help="Also train the full embeddings and head; the adapter holds them."
        ),
    ] = False,
    first_row: Annotated[
        int,
        typer.Option(
            "--first-row",
            help="With --embeddings, train only the rows from this one on (new tokens).",
        ),
    ] = 0,
    embedding_rate: Annotated[
        float | None,
        typer.Option(
            "--embedding-rate",
            show_default=False,
            help="The learning rate of embeddings and head.  [default: --learning-rate]",
        ),
    ] = None,
) -> None:
    """Train a LoRA adapter for every linear and expert of OUT, and write it to ADAPTER."""
    from moemerge.training import Lora, Tuning, finetune, is_first_process

    tuning = Tuning(tuple(data or ()), steps, batch, length, learning_rate, held_out)
    wanted = Lora(
        rank, alpha, packing, checkpointing, save_every, resume, embeddings, first_row,
        embedding_rate,
    )  # fmt: skip
    options = dataclasses.replace(options, load_in_4bit=qlora)
    made = finetune(out, adapter, tuning, wanted, options, terminal)
    if is_first_process():
        terminal.result(
            f"{adapter}: {count(made.parameters)} parameters trained for {made.steps} steps, "
            f"held-out loss {made.before:.4f} to {made.after:.4f}"
        )


@tuning.command()
@with_options(*SAYING)
def undo(out: Out, options: Options, terminal: Terminal) -> None:
    """Put back the routers from before the last `tune routers` of OUT."""
    from moemerge.training import undo

    undo(out, terminal)
    terminal.result(f"{out}: has the routers from before its last tuning")
