"""The command `chat`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.options import READING, with_options
from moemerge.cli.program import app
from moemerge.cli.terminal import Terminal
from moemerge.errors import InputError, Problem
from moemerge.options import Options

if TYPE_CHECKING:
    from moemerge.chat import Answers, Asked, Piece

_COLOURS = (36, 33, 35, 32, 34, 31, 96, 93, 95, 92, 94, 91)
"""ANSI's colours of the experts, in their order."""

Model = Annotated[
    Path, typer.Argument(metavar="MOE", help="A mixture: a directory, or a GGUF file.")
]
Prompt = Annotated[
    str,
    typer.Option("--prompt", metavar="TEXT", show_default=False, help="One question, one answer."),
]
Count = Annotated[int, typer.Option("--tokens", min=1, help="The longest answer, in tokens.")]
Warmth = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")
]
Likeliest = Annotated[
    int, typer.Option("--top-k", min=0, help="Draw from the K likeliest tokens; 0: from all.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
Layer = Annotated[
    int | None,
    typer.Option(
        "--layer", metavar="N", show_default=False,
        help="Colour tokens by this layer's first expert, not by the mean of all layers.",
    ),
]  # fmt: skip


@app.command()
@with_options(*READING)
def chat(
    moe: Model,
    options: Options,
    terminal: Terminal,
    prompt: Prompt = "",
    tokens: Count = 256,
    temperature: Warmth = 0.7,
    top_k: Likeliest = 40,
    seed: Seed = 0,
    layer: Layer = None,
) -> None:
    """Talk with a mixture; each token has the colour of its first expert.

    Without a terminal, lines of standard input are asked one after another, and answers go to
    standard output without colours.
    """
    from moemerge.chat import Asked, open_speaker

    if not moe.exists():
        raise InputError([Problem(str(moe), "is not there", "name a mixture's directory or file")])
    speaker = open_speaker(moe, options, terminal)
    asked = Asked(tokens, temperature, top_k, seed, layer)
    if layer is not None and not 0 <= layer < getattr(speaker, "layers", 0):
        what, most = f"is {layer}", getattr(speaker, "layers", 0) - 1
        fix = f"write a number from 0 to {most}" if most > 0 else "leave it out for a GGUF file"
        raise InputError([Problem("--layer", what, fix)])
    if prompt:
        _answer(speaker, [{"role": "user", "content": prompt}], asked, terminal)
        return
    turns: list[dict[str, str]] = []
    for question in _questions():
        turns.append({"role": "user", "content": question})
        said = _answer(speaker, turns, asked, terminal)
        turns.append({"role": "assistant", "content": said})


def _questions() -> Iterator[str]:
    """What a person types, until an empty line, Ctrl-D or `/bye`; or the lines of a pipe."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("\n> " if typed else "").strip()
        except EOFError:
            return
        if (typed and not line) or line == "/bye":
            return
        if line:
            yield line


def _answer(speaker: Answers, turns: list[dict[str, str]], asked: Asked, terminal: Terminal) -> str:
    """Print an answer as it is made, and who spoke; returns its text."""
    from moemerge.chat import spoken

    coloured = sys.stdout.isatty() and bool(speaker.experts) and "NO_COLOR" not in os.environ
    pieces: list[Piece] = []
    try:
        for piece in speaker.answer(turns, asked):
            pieces.append(piece)
            sys.stdout.write(_painted(piece) if coloured else piece.text)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if who := spoken(pieces, speaker.experts):
        legend = who
        if coloured:
            for number, name in enumerate(speaker.experts):
                legend = legend.replace(f"{name} ", f"{_code(number)}{name}\x1b[0m ")
        terminal.print(legend) if coloured else terminal.say(who)
    return "".join(piece.text for piece in pieces)


def _painted(piece: Piece) -> str:
    return piece.text if piece.expert is None else f"{_code(piece.expert)}{piece.text}\x1b[0m"


def _code(expert: int) -> str:
    return f"\x1b[{_COLOURS[expert % len(_COLOURS)]}m"
