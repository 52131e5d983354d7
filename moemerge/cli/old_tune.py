"""Old spellings of `tune`, such as `tune OUT --only routers`, translated to its commands."""

from __future__ import annotations

from collections.abc import Iterable

from moemerge.errors import InputError, Problem, nearest

_WAYS = {"--only": "routers", "--lora": "lora", "--qlora": "lora", "--undo": "undo"}
"""What an old flag asked for."""

_FIX = "write `moemerge tune routers`, `moemerge tune lora` or `moemerge tune undo`"


def is_old(args: list[str]) -> bool:
    """Whether the arguments after `tune` are an old spelling.

    They are if the first word is no command of `tune`. If it is one, it may still be a directory
    OUT of that name; then a flag of the old spelling, which the command does not have, decides.
    """
    first, flags = args[0], {flag for flag, _ in _flags(args)}
    if first in _WAYS.values():
        return bool(flags - {"--qlora"} if first == "lora" else flags)
    return first not in ("--help", "-h")


def as_today(args: list[str]) -> list[str]:
    """The arguments of an old spelling, translated.

    Raises:
        InputError: they name no command, or several.
    """
    flags = list(_flags(args))
    for flag, value in flags:
        if flag == "--only" and value != "routers":
            what = f"{value!r} is nothing that can be trained alone"
            raise InputError([Problem("--only", what, nearest(value, ["routers"]))])
    if len({flag for flag, _ in flags}) != 1:
        raise InputError([Problem("tune", "needs one thing to do", _FIX)])
    command = _WAYS[flags[0][0]]
    end = args.index("--") if "--" in args else len(args)
    rest, left = iter(args[:end]), list[str]()
    for one in rest:
        if one == "--only":
            next(rest)
        elif one == "--qlora" or one.partition("=")[0] not in _WAYS:
            left.append(one)
    return [command, *left, *args[end:]]


def _flags(args: list[str]) -> Iterable[tuple[str, str]]:
    """The old flags among the arguments, each with the value that `--only` has."""
    end = args.index("--") if "--" in args else len(args)
    for one, after in zip(args[:end], [*args[1:end], ""], strict=True):
        flag, equals, value = one.partition("=")
        if flag in _WAYS:
            yield flag, value if equals else after
