"""YAML nodes to dataclasses by the dataclasses' own fields; every error has its line."""

from __future__ import annotations

import math
import typing
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from typing import Any

import yaml

from moemerge.config.values import NUMBERS, Picture, Values
from moemerge.errors import Findings, InputError, Problem, nearest


def compose(text: str, file: str) -> yaml.Node:
    """The YAML's root node.

    Raises:
        InputError: the text is not YAML, or is empty.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        where, what = f"{file}:{line}", f"is not YAML ({error.problem})"
        raise InputError([Problem(where, what, "check indentation and quotes")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        why = "it is nested too deeply" if deep else str(error).splitlines()[0]
        raise InputError([Problem(file, f"is not YAML ({why})", "write plain text")]) from error
    if root is None:
        raise InputError([Problem(file, "is empty", "give it at least base_model and experts")])
    return root


class Reader(Values):
    """Reads YAML nodes by type hints of the dataclass that they become."""

    def __init__(self, file: str, findings: Findings):
        super().__init__(findings)
        self.file = file
        self.lines: dict[str, int] = {}

    def problem(self, node: yaml.Node, key: str, what: str, fix: str) -> None:
        """Record a problem at the node's line."""
        where = f"{self.file}:{node.start_mark.line + 1}"
        self.findings.problem(f"{where}: {key}" if key else where, what, fix)

    def record(self, node: yaml.Node, into: type[Any], at: str) -> Any:
        """Build dataclass `into`; None after any problem."""
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, at, f"is {_kind(node)}", f"write {into.__name__} as `key: value`")
            return None
        hints = typing.get_type_hints(into, include_extras=True)
        known = {f.name: f for f in spoken(into)}
        values: dict[str, Any] = {}
        for key, child in self.pairs(node, at):
            path = f"{at}.{key}" if at else key
            self.lines[path] = child.start_mark.line + 1
            if key not in known:
                self.problem(child, path, "is not a key moemerge knows", nearest(key, known))
            elif not _is_null(child):
                values[key] = self.value(child, hints[key], path)
        for name, f in known.items():
            required = f.default is MISSING and f.default_factory is MISSING
            if required and name not in values:
                self.problem(node, at, f"{name} is missing", f"add `{name}: ...`")
        return None if self.findings.problems else into(**values)

    def pairs(self, node: yaml.MappingNode, at: str) -> list[tuple[str, yaml.Node]]:
        """The node's keys and values; `<<` merges are resolved, duplicates refused."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.problem(key, at, f"has a key that is {_kind(key)}", "write `key: value`")
            elif key.value in seen:
                self.problem(
                    key,
                    f"{at}.{key.value}" if at else str(key.value),
                    f"stands twice (first on line {seen[key.value]})",
                    "keep one of them",
                )
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = line
        try:
            yaml.SafeLoader("").flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            self.problem(node, at, f"has a bad `<<` ({error.problem})", "merge mappings only")
        scalars = [pair for pair in node.value if isinstance(pair[0], yaml.ScalarNode)]
        return [(str(key.value), child) for key, child in scalars]

    def sequence(self, node: yaml.Node, hint: Any, at: str) -> tuple[Any, ...]:
        """A list of values of type `hint`."""
        if not isinstance(node, yaml.SequenceNode):
            self.problem(node, at, f"is {_kind(node)}", "write a list, one `- item` a line")
            return ()
        items = []
        for index, child in enumerate(node.value):
            path = f"{at}[{index}]"
            self.lines[path] = child.start_mark.line + 1
            items.append(self.value(child, hint, path))
        return tuple(items)

    def number(self, node: yaml.Node, hint: type[int] | type[float], at: str) -> Any:
        """An int or a finite float. YAML reads `1e-3` as text; here it is a number."""
        tags = ("int",) if hint is int else ("int", "float", "str")
        if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in tags:
            try:
                value = hint(node.value.replace("_", ""))
                if hint is int or math.isfinite(value):
                    return value
            except ValueError:
                pass
        self.problem(node, at, f"is {_kind(node)}", f"write {NUMBERS[hint]}")
        return None

    def text(self, node: yaml.Node, at: str) -> str:
        """Any scalar as it is written: a prompt `42` or `yes` is text."""
        if not isinstance(node, yaml.ScalarNode):
            self.problem(node, at, f"is {_kind(node)}", "write text, in quotes if it holds `: `")
            return ""
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            self.problem(node, at, "holds half a character (a surrogate)", "write it whole")
        return str(node.value)

    def file_or_texts(self, node: yaml.Node, at: str) -> Any:
        """A file's name, or a list of texts."""
        listed = isinstance(node, yaml.SequenceNode)
        return self.sequence(node, str, at) if listed else self.text(node, at)

    def prompt(self, node: yaml.Node, at: str) -> Any:
        """Text, or a mapping with an `image`; another mapping is text that lacks quotes."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        is_picture = any(key.value == "image" for key, _ in pairs)
        return self.record(node, Picture, at) if is_picture else self.text(node, at)

    def choices(self, node: yaml.Node, at: str) -> dict[str, Any]:
        """A mapping of scalars as YAML reads them, except that text such as `1e-3` becomes a
        number."""
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, at, f"is {_kind(node)}", "write `key: value`")
            return {}
        found: dict[str, Any] = {}
        for key, child in self.pairs(node, at):
            self.lines[f"{at}.{key}"] = child.start_mark.line + 1
            if not isinstance(child, yaml.ScalarNode):
                self.problem(child, f"{at}.{key}", f"is {_kind(child)}", "write one value")
                continue
            try:
                value = yaml.SafeLoader("").construct_object(child)
            except (yaml.YAMLError, ValueError, OverflowError):
                self.problem(child, f"{at}.{key}", f"is {_kind(child)}", "write it plainly")
                continue
            if isinstance(value, str) and child.style is None:
                with suppress(ValueError):
                    value = float(value)
            if value is not None:
                found[key] = value
        return found

    def source(self, node: yaml.Node, at: str) -> str:
        """A source as text, or as mergekit's mapping `{model: {path, revision}, lora: ...}`."""
        if not isinstance(node, yaml.MappingNode):
            return self.text(node, at)
        parts = {}
        for key, child in self.pairs(node, at):
            if key in ("model", "lora") and isinstance(child, yaml.MappingNode):
                inner = {k: self.text(v, at) for k, v in self.pairs(child, at) if not _is_null(v)}
                for unknown in inner.keys() - {"path", "revision"}:
                    self.problem(child, f"{at}.{key}.{unknown}", "is not known", "path or revision")
                if "path" not in inner:
                    self.problem(child, f"{at}.{key}", "path is missing", "add `path: ...`")
                revision = f"@{inner['revision']}" if "revision" in inner else ""
                parts[key] = inner.get("path", "") + revision
            elif key in ("model", "lora", "path", "revision"):
                parts[key] = "" if _is_null(child) else self.text(child, at)
            else:
                keys = ("model", "lora", "path", "revision")
                self.problem(child, f"{at}.{key}", "is not known", nearest(key, keys))
        model = parts.get("model") or parts.get("path", "")
        if not model:
            self.problem(node, at, "names no model", "write `user/name` or a directory")
        revision = f"@{parts['revision']}" if parts.get("revision") else ""
        return model + revision + (f"+{parts['lora']}" if parts.get("lora") else "")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        shown = node.value if len(node.value) <= 40 else node.value[:37] + "..."
        return f"{shown!r}" if shown else "empty"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def spoken(record: Any) -> list[Field[Any]]:
    """The fields that a config can have, of a record or its class."""
    return [f for f in fields(record) if not f.metadata.get("internal")]
