"""Values checked against type hints: the one place that knows which hints a config may use."""

from __future__ import annotations

import numbers
import os
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from moemerge.errors import Findings

SourceText: TypeAlias = Annotated[str, "source"]
"""A source as the config names it: `path`, `user/name@revision`, `model+adapter`."""

FileOrTexts: TypeAlias = Annotated[str | tuple[str, ...], "file or texts"]
"""A file's name, or a list of texts."""


@dataclass(frozen=True, order=True)
class Picture:
    """A prompt with a picture: the file of the image, and the text after it."""

    image: str
    text: str = ""

    def __str__(self) -> str:
        return f"[{Path(self.image).name}] {self.text}".rstrip()


PromptText: TypeAlias = Annotated[str | Picture, "prompt"]
"""A prompt: text, or a mapping with the keys of a `Picture`."""

Choices: TypeAlias = Annotated[dict[str, Any], "choices"]
"""A mapping of plain values. The part of the program that uses them declares and checks the keys.
"""

NUMBERS = {int: "a whole number", float: "a number"}
"""The types of numbers, in words."""


class Values:
    """Reads Python values by their type hints; `Reader` does the same with YAML nodes.

    Each method takes a value and the place `at` that a problem names. After a problem it returns
    the value unchanged.
    """

    def __init__(self, findings: Findings):
        self.findings = findings

    def value(self, given: Any, hint: Any, at: str) -> Any:
        """One value of type `hint`."""
        hint, optional = _without_none(hint)
        if given is None and optional:
            return None
        if typing.get_origin(hint) is tuple:
            return self.sequence(given, typing.get_args(hint)[0], at)
        if hint == SourceText:
            return self.source(given, at)
        if hint == FileOrTexts:
            return self.file_or_texts(given, at)
        if hint == PromptText:
            return self.prompt(given, at)
        if hint == Choices:
            return self.choices(given, at)
        if hint in (int, float):
            return self.number(given, hint, at)
        if hint is str:
            return self.text(given, at)
        return self.record(given, hint, at)

    def sequence(self, given: Any, hint: Any, at: str) -> Any:
        """A tuple of values of type `hint`, from a list."""
        if not isinstance(given, list | tuple):
            return self._refused(given, at, "a list")
        return tuple(self.value(item, hint, f"{at}[{index}]") for index, item in enumerate(given))

    def source(self, given: Any, at: str) -> Any:
        """A source as text."""
        if isinstance(given, str | os.PathLike):
            return os.fspath(given)
        return self._refused(given, at, "text or a path")

    def file_or_texts(self, given: Any, at: str) -> Any:
        """A file's name, or a tuple of texts."""
        is_file = isinstance(given, str | os.PathLike)
        return self.source(given, at) if is_file else self.sequence(given, str, at)

    def prompt(self, given: Any, at: str) -> Any:
        """Text, or a picture with text."""
        return given if isinstance(given, Picture) else self.text(given, at)

    def choices(self, given: Any, at: str) -> Any:
        """A dict without the keys that have no value."""
        if isinstance(given, Mapping):
            return {str(key): item for key, item in given.items() if item is not None}
        return self._refused(given, at, "a mapping")

    def number(self, given: Any, hint: type[int] | type[float], at: str) -> Any:
        """An int or a float; numpy's numbers are read too."""
        kind: Any = {int: numbers.Integral, float: numbers.Real}[hint]
        if isinstance(given, kind) and not isinstance(given, bool):
            with suppress(OverflowError):
                return hint(given)
        return self._refused(given, at, NUMBERS[hint])

    def text(self, given: Any, at: str) -> Any:
        """Text."""
        return given if isinstance(given, str) else self._refused(given, at, "text")

    def record(self, given: Any, hint: type[Any], at: str) -> Any:
        """An instance of class `hint`."""
        if isinstance(given, hint):
            return given
        return self._refused(given, at, "true or false" if hint is bool else f"an {hint.__name__}")

    def _refused(self, given: Any, at: str, expected: str) -> Any:
        self.findings.problem(at, f"is {given!r}", f"write {expected}")
        return given


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without its `| None`, and whether it had one."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return next(argument for argument in arguments if argument is not type(None)), True
    return hint, False
