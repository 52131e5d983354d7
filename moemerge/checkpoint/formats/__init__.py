"""Source formats, one file each: what a weights file says about its tensors."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from moemerge.checkpoint.location import Location


class Format(Protocol):
    """What a file of this folder defines. A file whose name begins with `_` is a helper of
    another."""

    SUFFIXES: tuple[str, ...]
    """The suffix of its files' names."""

    MODEL: str
    ADAPTER: str
    """The names of the file that holds a whole model, and of the file that holds an adapter, as
    patterns (`*.npz`). A file with that name plus `.index.json` lists the shards of a larger one.
    """

    ORDER: int
    """If a folder holds weights in several formats, the one with the lowest number is read."""

    STREAMS: bool
    """Whether a header that was read on the Hub says where each tensor is, so that one tensor can
    be read there. Otherwise files are downloaded whole, even with --stream."""

    FIX: str
    """The fix for a file that cannot be read."""

    def read_header(self, path: Path, remote: BinaryIO | None = None) -> dict[str, Location]:
        """The tensors of a file by name, without their values; nothing in the file is believed
        unchecked.

        With `remote`, the file is read there, and `path` is where it will be.

        Raises:
            ValueError: the file is damaged or claims what cannot be; says which.
            OSError: the file cannot be read.
        """


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The names of all formats."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def find(name: str) -> Format:
    """The format `name`, one of `names()`."""
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


@lru_cache(maxsize=1)
def in_order() -> tuple[Format, ...]:
    """The formats in their order; the first wins."""
    return tuple(sorted(map(find, names()), key=lambda one: one.ORDER))


@lru_cache(maxsize=1)
def weight_suffixes() -> tuple[str, ...]:
    """The suffixes of weight files in all formats."""
    return tuple(suffix for one in in_order() for suffix in one.SUFFIXES)


def suffix_pattern() -> str:
    """The suffixes as a regular expression."""
    return f"({'|'.join(map(re.escape, weight_suffixes()))})"


def format_of(file: str) -> Format:
    """The format of a file, by its name.

    Raises:
        ValueError: no format has its suffix.
    """
    for one in in_order():
        if file.endswith(one.SUFFIXES):
            return one
    raise ValueError(f"its name ends with none of {', '.join(weight_suffixes())}")


def read_header(path: Path, remote: BinaryIO | None = None) -> dict[str, Location]:
    """The tensors of a weights file by name; see `Format.read_header`."""
    return format_of(path.name).read_header(path, remote)
