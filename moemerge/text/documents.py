"""An expert's calibration texts: the documents of a file, a directory or a dataset on the Hub."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moemerge.checkpoint import is_hub_id, places

MOST_DOCUMENTS = 4096
_COLUMNS = ("text", "content", "messages", "conversations")


def texts_of(path: Path) -> list[str]:
    """The documents of a file: each line of a jsonl, otherwise the whole file.

    Raises:
        ValueError: it cannot be read, or a line is not a JSON object with text; says which.
    """
    return list(_texts(rows_of(path), str(path)))


def rows_of(path: Path) -> list[Any]:
    """The rows of a jsonl; any other file is one row, with its text in the column `text`.

    Raises:
        ValueError: it cannot be read; says why.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    if path.suffix not in (".jsonl", ".json"):
        return [{"text": content}] if content.strip() else []
    lines = [line for line in content.split("\n") if line.strip()]  # U+2028 may stand in a text
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not jsonl, one JSON object a line ({error})") from error


def documents_of(named: str, beside: Path | None) -> list[str]:
    """The documents of a file, a directory or a dataset on the Hub; a relative path may be in
    `beside`.

    Raises:
        ValueError: it cannot be read; says why.
    """
    try:
        path = find(named, beside)
    except OSError as error:  # a name that no disk takes
        raise ValueError(f"{named} cannot be read ({error.strerror})") from error
    if path and path.is_file():
        return texts_of(path)
    if path is None and not is_hub_id(named):
        raise ValueError(f"there is no {named}")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{named} is a dataset, which needs pip install 'moemerge[datasets]'")
    from datasets import load_dataset

    try:
        documents = load_dataset(str(path or named), split="train", streaming=True)
        rows = list(islice(documents, MOST_DOCUMENTS))
    except Exception as error:  # the library lets many kinds through
        raise ValueError(f"{named} cannot be loaded as a dataset ({error})") from error
    return list(_texts(rows, named))


def find(named: str, beside: Path | None) -> Path | None:
    """The file or directory of that name, otherwise of that name in `beside`; None if there is
    none.

    Raises:
        OSError: no disk takes such a name.
    """
    return next((place for place in places(named, beside) if place.exists()), None)


def _texts(rows: Iterable[Any], where: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        column = next((name for name in _COLUMNS if isinstance(row, dict) and name in row), None)
        if column is None:
            columns = ", ".join(_COLUMNS)
            raise ValueError(f"{where}: row {number} has none of {columns}")
        value = row[column]
        turns = value if isinstance(value, list) else [value]
        parts = [t.get("content", t.get("value")) if isinstance(t, dict) else t for t in turns]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where}: row {number}: {column} is not text")
        text = "\n".join(map(str, parts))
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{where}: row {number} holds half a character (a surrogate)")
        if text.strip():
            yield text
