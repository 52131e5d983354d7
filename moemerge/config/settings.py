"""Options that a dataclass declares: its fields' values, held to their types."""

from __future__ import annotations

import numbers
import os
import typing
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moemerge.config.yaml_nodes import Choices, FileOrTexts, SourceText, without_none
from moemerge.errors import Findings


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
