"""Options that a dataclass declares: what a config says of them, held to their fields' types."""

from __future__ import annotations

import numbers
import os
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from moemerge.config.yaml_nodes import Choices, FileOrTexts, SourceText, without_none
from moemerge.errors import Findings, nearest

T = TypeVar("T")


def option_types(declared: type[Any] | None) -> dict[str, Any]:
    """The types of a dataclass's options by their keys; a field `lambda_` has the key `lambda`."""
    hints = typing.get_type_hints(declared) if declared else {}
    return {name.rstrip("_"): hint for name, hint in hints.items()}


def read_settings(
    declared: type[T] | None,
    said: Mapping[str, Any],
    where: Callable[[str], str],
    what: str,
    findings: Findings,
) -> T | None:
    """What a config said of the options that `declared` has; None after a problem, or without it.

    `where` gives a key's place; `what` is the problem of a key that is no option.
    """
    before = len(findings.problems)
    values = read_options(option_types(declared), said, where, what, findings)
    if declared is None or len(findings.problems) > before:
        return None
    names = {name.rstrip("_"): name for name in typing.get_type_hints(declared)}
    return declared(**{names[key]: value for key, value in values.items()})


def read_options(
    types: Mapping[str, Any],
    said: Mapping[str, Any],
    where: Callable[[str], str],
    what: str,
    findings: Findings,
) -> dict[str, Any]:
    """The values of what was said, each held to its type; keys without a type are problems."""
    found = {}
    for key, value in said.items():
        if key in types:
            found[key] = held(value, types[key], where(key), findings)
        else:
            fix = nearest(key, types) if types else "remove it: it has none"
            findings.problem(where(key), what, fix)
    return found


def held(value: Any, hint: Any, at: str, findings: Findings) -> Any:
    """The value as a field of type `hint` holds it; a problem, recorded at `at`, if it is not."""
    hint, optional = without_none(hint)
    if value is None and optional:
        return None
    if hint == FileOrTexts:
        hint = SourceText if isinstance(value, str | os.PathLike) else tuple[str, ...]
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            inner = typing.get_args(hint)[0]
            return tuple(
                held(item, inner, f"{at}[{index}]", findings) for index, item in enumerate(value)
            )
        expected = "a list"
    elif hint == Choices:
        if isinstance(value, Mapping):
            return {str(key): item for key, item in value.items() if item is not None}
        expected = "a mapping"
    elif hint is bool:
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif hint == SourceText:
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
        expected = "text or a path"
    elif hint is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
        expected = "a whole number"
    elif hint is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            with suppress(OverflowError):
                return float(value)
        expected = "a number"
    else:
        if isinstance(value, hint):
            return value
        expected = "text" if hint is str else f"an {hint.__name__}"
    findings.problem(at, f"is {value!r}", f"write {expected}")
    return value
