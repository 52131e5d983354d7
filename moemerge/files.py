"""Small files that are read and written whole, paths that stay inside a directory, and flushing."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

CONFIG_FILE = "config.json"
WEIGHTS_SUFFIX = ".safetensors"
"""The suffixes of the weight files that are written here."""

STATISTICS_FILE = "statistics/router-inputs.safetensors"
"""The router inputs that a merge keeps; programs do not read weights from a folder within."""

PART_SUFFIX = ".part"

GGUF_SUFFIX = ".gguf"
BESIDE = ".moemerge"
"""The folder of a GGUF file's manifest, card and state is the file's name with this behind it."""


def write_json(path: Path, data: object, scratch: Path | None = None) -> None:
    """Write JSON so that the file is either the old one or the whole new one.

    The new file is first written in `scratch`, by default the file's own directory.
    """
    part = (scratch or path.parent) / f"{path.name}{PART_SUFFIX}"
    with part.open("w", encoding="utf-8") as file:
        file.write(as_json(data))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    flush_directory(path.parent)


def as_json(data: object) -> str:
    """Data as the JSON text that every file here has."""
    return json.dumps(data, indent=2, ensure_ascii=True) + "\n"


def is_inside(name: object) -> bool:
    """Whether a name from a file can only mean a file within its directory."""
    if not isinstance(name, str) or "\0" in name or PureWindowsPath(name).drive:
        return False
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def place_of(out: Path, name: str) -> Path:
    """Where the file `name` of an output is: in its folder, but a GGUF file is beside it."""
    whole = out.name.removesuffix(BESIDE)
    if whole != out.name and whole.endswith(GGUF_SUFFIX):
        stem = re.escape(whole.removesuffix(GGUF_SUFFIX))
        if re.fullmatch(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.gguf", name):
            return out.parent / name
    return out / name


def folder_of(out: Path) -> Path:
    """The folder of an output: `out` itself; of a GGUF file, the folder beside it."""
    return out.with_name(out.name + BESIDE) if out.suffix == GGUF_SUFFIX else out


def shown(out: Path) -> Path:
    """An output as a person names it; see `folder_of`."""
    whole = out.with_name(out.name.removesuffix(BESIDE))
    return whole if whole.suffix == GGUF_SUFFIX else out


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no file that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def flush_directory(path: Path) -> None:
    """Make renames in a directory durable. Where directories cannot be opened, the system does
    that."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
