"""YAML nodes to dataclasses, driven by the dataclasses' own fields; every error has its line."""

from __future__ import annotations

import math
import typing
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeAlias

import yaml

from moemerge.errors import Findings, nearest

SourceText: TypeAlias = Annotated[str, "source"]
"""A source as the config names it: `path`, `user/name@revision`, `model+adapter`."""

FileOrTexts: TypeAlias = Annotated[str | tuple[str, ...], "file or texts"]
"""A file's name, or a list of texts."""

Choices: TypeAlias = Annotated[dict[str, Any], "choices"]
"""A mapping of plain values whose keys somebody else declares and checks."""


def compose(text: str, file: str, findings: Findings) -> yaml.Node | None:
    """The YAML's root node; None, with a problem recorded, where there is none."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        findings.problem(
            f"{file}:{line}", f"is not YAML ({error.problem})", "check indentation and quotes"
        )
        return None
    except (yaml.YAMLError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        why = "it is nested too deeply" if deep else str(error).splitlines()[0]
        findings.problem(file, f"is not YAML ({why})", "write plain text")
        return None
    if root is None:
        findings.problem(file, "is empty", "give it at least base_model and experts")
    return root


class Reader:
    """Nodes to values, driven by the dataclasses' own fields."""

    def __init__(self, file: str, findings: Findings):
        self.file, self.findings = file, findings
        self.lines: dict[str, int] = {}

    def problem(self, node: yaml.Node, key: str, what: str, fix: str) -> None:
        """Record a problem where the node stands."""
        where = f"{self.file}:{node.start_mark.line + 1}"
        self.findings.problem(f"{where}: {key}" if key else where, what, fix)

    def mapping(self, node: yaml.Node | None, into: type[Any], at: str) -> Any:
        """Build dataclass `into`; None after any problem."""
        if not isinstance(node, yaml.MappingNode):
            assert node is not None
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

    def value(self, node: yaml.Node, hint: Any, at: str) -> Any:
        """One value of type `hint`."""
        hint, _ = without_none(hint)
        if typing.get_origin(hint) is tuple:
            return self.sequence(node, typing.get_args(hint)[0], at)
        if hint == SourceText:
            return self.source(node, at)
        if hint == FileOrTexts:
            listed = isinstance(node, yaml.SequenceNode)
            return self.sequence(node, str, at) if listed else self.text(node, at)
        if hint == Choices:
            return self.choices(node, at)
        if hint in (int, float):
            return self.number(node, hint, at)
        if hint is str:
            return self.text(node, at)
        return self.mapping(node, hint, at)

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
        """An int or a finite float; YAML reads `1e-3` as text, which is a number all the same."""
        word = {int: "a whole number", float: "a number"}[hint]
        tags = ("int",) if hint is int else ("int", "float", "str")
        if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in tags:
            try:
                value = hint(node.value.replace("_", ""))
                if hint is int or math.isfinite(value):
                    return value
            except ValueError:
                pass
        self.problem(node, at, f"is {_kind(node)}", f"write {word}")
        return None

    def text(self, node: yaml.Node, at: str) -> str:
        """Any scalar as it is written: a prompt `42` or `yes` is text."""
        if not isinstance(node, yaml.ScalarNode):
            self.problem(node, at, f"is {_kind(node)}", "write text, in quotes if it holds `: `")
            return ""
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            self.problem(node, at, "holds half a character (a surrogate)", "write it whole")
        return str(node.value)

    def choices(self, node: yaml.Node, at: str) -> dict[str, Any]:
        """A mapping of scalars as YAML reads them, but for numbers as `1e-3`, which it takes for
        text.
        """
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


def without_none(hint: Any) -> tuple[Any, bool]:
    """A type without its `| None`, and whether it had one."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return next(argument for argument in arguments if argument is not type(None)), True
    return hint, False


def spoken(record: Any) -> list[Field[Any]]:
    """The fields that a config can say, of a record or its class."""
    return [f for f in fields(record) if not f.metadata.get("internal")]
