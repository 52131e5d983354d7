"""Options that a dataclass declares: values from a config, checked against the fields' types."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moemerge.config.values import Values
from moemerge.errors import Findings, nearest

T = TypeVar("T")


def option_types(declared: type[Any] | None) -> dict[str, Any]:
    """The types of a dataclass's options by their keys; the key of a field `lambda_` is
    `lambda`."""
    hints = typing.get_type_hints(declared) if declared else {}
    return {name.rstrip("_"): hint for name, hint in hints.items()}


def read_settings(
    declared: type[T] | None,
    said: Mapping[str, Any],
    where: Callable[[str], str],
    what: str,
    findings: Findings,
) -> T | None:
    """An instance of `declared` with the config's options; None after a problem, or if `declared`
    is None.

    `where` gives the place of a key. `what` is the problem of a key that is not an option.
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
    """The given values, each checked against its type; a key without a type is a problem."""
    found, values = {}, Values(findings)
    for key, value in said.items():
        if key in types:
            found[key] = values.value(value, types[key], where(key))
        else:
            fix = nearest(key, types) if types else "remove it: it has none"
            findings.problem(where(key), what, fix)
    return found
