"""The program: the default command, and the arguments that commands share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moemerge.cli.options import UNHEARD, meaningful, with_ray_address
from moemerge.cli.terminal import explained
from moemerge.errors import InputError, Problem, nearest
from moemerge.reporting import Console
from moemerge.version import __version__

OWN = ("--help", "-h", "--version")
"""What the program itself takes, without a command."""


class DefaultToMerge(TyperGroup):
    """`moemerge CONFIG OUT` is `moemerge merge CONFIG OUT`."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run the program; an error for the user ends it with a message and an exit code."""
        with explained():
            return super().main(*args, **more)

    def list_commands(self, ctx: Any) -> list[str]:
        """The default command first, the others by name."""
        return sorted(self.commands, key=lambda name: (name != "merge", name))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Add `merge` if no command is named."""
        args = self._as_meant(args)
        if args and args[0] not in self.commands and args[0] not in OWN:
            args = ["merge", *args]
        return super().parse_args(ctx, args)

    def _as_meant(self, args: list[str]) -> list[str]:
        """The arguments, with `help` and `version` translated to their flags.

        Raises:
            InputError: the first is a misspelt command.
        """
        first = args[0] if args else "-"
        if first.startswith("-") or first in self.commands or Path(first).exists():
            return args
        if first in ("help", "version"):
            meant = ["--version"] if first == "version" else [*args[1:], "--help"]
            Console().say(f"the usual way: `{' '.join(['moemerge', *meant])}`")
            return self._as_meant(meant)
        if nearest(first, self.commands).startswith("did") and not set(first) & {".", os.sep}:
            check_config_path(Path(first))
        return args


class AsMergekit(TyperCommand):
    """A command that takes mergekit-moe's flags too, and notes those that mean nothing here.

    Write `@app.command(cls=AsMergekit)`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Drop flags that mean nothing here, and add the address of `--ray`."""
        unheard: list[str] = ctx.meta.setdefault(UNHEARD, [])
        args = list(meaningful(list(with_ray_address(args)), unheard))
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultToMerge,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Make one mixture-of-experts language model out of several dense ones.\n\n"
    "`moemerge CONFIG OUT` merges; the commands below do the rest.",
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The output directory.")]

Moe = Annotated[str, typer.Argument(metavar="MOE", help="A mixture: a directory or user/name.")]
One = Annotated[
    str,
    typer.Option("--expert", metavar="N|NAME", show_default=False, help="Number, from 0, or name."),
]

Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="NAME=FILE",
        show_default=False,
        help="A text for the expert NAME (or any other name), plain or jsonl. Give the option "
        "again for more.",
    ),
]


def check_config_path(config: Path) -> None:
    """Refuse a missing config file, which may be a misspelt command."""
    try:
        config.stat()
    except FileNotFoundError:
        pass
    except OSError:
        return  # reading it will say what is wrong
    else:
        return
    program: Any = typer.main.get_command(app)
    guess = nearest(str(config), program.commands)
    fix = f"{guess} (a command)" if guess.startswith("did") else "name a YAML file"
    raise InputError([Problem(str(config), "there is no such config file", fix)])


def check_file_to_write(path: Path) -> None:
    """Refuse a file to write whose directory is missing, or that is a directory."""
    if not path.absolute().parent.is_dir():
        fix = "name a file in a directory that exists"
        raise InputError([Problem(str(path), "its directory does not exist", fix)])
    if path.is_dir():
        raise InputError([Problem(str(path), "is a directory", "name a file")])


def texts_by_name(given: Iterable[str]) -> dict[str, Path]:
    """The files of all `--text NAME=FILE` by their names."""
    texts: dict[str, Path] = {}
    for one in given:
        name, equals, file = one.partition("=")
        if not equals or not name or not file:
            raise InputError([Problem("--text", f"{one!r} is no NAME=FILE", "write NAME=FILE")])
        if name in texts:
            raise InputError([Problem("--text", f"{name} stands twice", "keep one of them")])
        texts[name] = Path(file)
    return texts


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moemerge {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
