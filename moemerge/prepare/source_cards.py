"""Reads the YAML heads of model cards: a source's README.md, and a card that a person wrote."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moemerge.errors import Findings

_MOST_BYTES, _MOST_VALUES = 1 << 18, 100
_HEAD = re.compile(r"\s*^---[ \t]*\n(.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_FORMS = {
    "license": r"[a-z0-9][a-z0-9.+-]{0,49}",
    "license_name": r"[A-Za-z0-9][A-Za-z0-9 .+_-]{0,79}",
    "license_link": r"https://[A-Za-z0-9./_%~-]{1,200}",
    "language": r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})?|code|multilingual",
    "datasets": rf"{_NAME}(/{_NAME})?",
}


@dataclass(frozen=True)
class Claims:
    """A model's licence, languages and datasets, by its own card; empty if the card has none.

    The fields are the Hub's keys. `license` is one identifier; if it is `other`, `license_name` and
    `license_link` say which licence it is.
    """

    license: str = ""
    license_name: str = ""
    license_link: str = ""
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    @property
    def terms(self) -> str:
        """The licence for a person: its name if `license` is `other`, otherwise its identifier."""
        return self.license_name if self.license == "other" else self.license


def claims_of(directory: Path) -> Claims:
    """The claims of the README.md in a model's directory.

    Anybody may have written this file, so only plain text of an expected form and length is taken.
    YAML nodes are read without constructing objects, so that no alias or `<<` can expand to
    gigabytes.
    """
    path = directory / "README.md"
    try:
        if not path.is_file():
            return Claims()
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES)
        head, _ = _split(content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n"))
        root = yaml.compose(head, Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return Claims()
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    nodes = {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}
    found = {
        key: tuple(dict.fromkeys(_sane(nodes[key], form)))
        for key, form in _FORMS.items()
        if key in nodes
    }
    one = {
        key: found[key][0] for key in _FORMS if "license" in key and len(found.get(key, ())) == 1
    }
    return Claims(**one, language=found.get("language", ()), datasets=found.get("datasets", ()))


def _sane(node: yaml.Node, form: str) -> Iterator[str]:
    """The texts that match `form`, from one value or a list of values."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for one in itertools.islice(nodes, _MOST_VALUES):
        text = one.value if isinstance(one, yaml.ScalarNode) and "null" not in one.tag else ""
        if re.fullmatch(form, text) and not re.search(r"\.\.|--", text):
            yield text


def read_own(path: str | Path, findings: Findings) -> str:
    """The text of a card that a person wrote; empty, with a problem recorded, if unusable."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        split_own(text)
        return text
    except OSError as error:
        what, fix = f"cannot be read ({error.strerror})", "name a markdown file"
    except UnicodeDecodeError:
        what, fix = "is not UTF-8 text", "save it as UTF-8"
    except ValueError as error:
        what, fix = str(error), "write `key: value` between the two lines ---"
    findings.problem(f"--card {path}", what, fix)
    return ""


def split_own(text: str) -> tuple[dict[str, Any], str]:
    """A card cut in two: the keys of its YAML head, and its text. Without a head, no keys.

    Raises:
        ValueError: the head is not a YAML mapping.
    """
    head, body = _split(text)
    try:
        keys = yaml.safe_load(head)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"its head is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(keys, dict | None):
        raise ValueError("its head is not a mapping")
    return {str(key): value for key, value in (keys or {}).items()}, body.strip()


def _split(text: str) -> tuple[str, str]:
    found = _HEAD.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)
