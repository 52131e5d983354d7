"""YAML to `MergeConfig`: every key known, every value of its type, every error with its line."""

from __future__ import annotations

import math
import numbers
import os
import typing
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml

from moemerge.errors import Findings, InputError, nearest

SourceText: TypeAlias = Annotated[str, "source"]
"""A source as the config names it: `path`, `user/name@revision`, `model+adapter`."""


@dataclass(frozen=True)
class Expert:
    """One dense model whose MLPs become an expert, and the prompts that should find it.

    `noise_scale` is the standard deviation of Gaussian noise added to its MLPs; `residual_scale`
    multiplies its down projections, and so all that it adds to the residual stream.
    """

    source_model: SourceText
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        _hold_types(self)


@dataclass(frozen=True)
class MergeConfig:
    """What a merge is made of, as a person wrote it. `text` is the YAML of `file` in
    `folder`, where relative sources may stand too; `lines` its line numbers.

    `dtype` None is the base model's; `experts_per_token` None is 2, or 1 for a single expert.
    """

    base_model: SourceText
    experts: tuple[Expert, ...]
    gate_mode: str = "hidden"
    dtype: str | None = None
    experts_per_token: int | None = None
    shared_experts: tuple[Expert, ...] = ()
    architecture: str | None = None
    text: str = field(default="", compare=False, metadata={"internal": True})
    file: str = field(default="config", compare=False, metadata={"internal": True})
    folder: Path | None = field(default=None, compare=False, metadata={"internal": True})
    lines: dict[str, int] = field(
        default_factory=dict, compare=False, repr=False, metadata={"internal": True}
    )

    def __post_init__(self) -> None:
        _hold_types(self)

    def as_yaml(self) -> str:
        """This config as YAML: the text it was read from while that says the same, else anew."""
        with suppress(InputError):
            if parse_config(self.text) == self:
                return self.text
        return str(yaml.safe_dump(_changed(self), sort_keys=False, allow_unicode=True))

    def where(self, key: str) -> str:
        """`config.yaml:7: experts[1].source_model`, or the nearest enclosing line known."""
        at = key
        while at and at not in self.lines:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        return f"{self.file}:{self.lines[at]}: {key}" if at else f"{self.file}: {key}"


def _hold_types(record: Expert | MergeConfig) -> None:
    """Hold a record made in Python to its fields' types; lists become tuples, paths text."""
    findings = Findings()
    hints = typing.get_type_hints(type(record), include_extras=True)
    for f in _spoken(record):
        at = f"{type(record).__name__}.{f.name}"
        value = _held(getattr(record, f.name), hints[f.name], at, findings)
        object.__setattr__(record, f.name, value)
    findings.refuse()


def _held(value: Any, hint: Any, at: str, findings: Findings) -> Any:
    """The value as `hint`; a problem if it is not that."""
    hint, optional = _without_none(hint)
    if value is None and optional:
        return None
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            inner = typing.get_args(hint)[0]
            return tuple(
                _held(item, inner, f"{at}[{index}]", findings) for index, item in enumerate(value)
            )
        expected = "a list"
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


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without its `| None`, and whether it had one."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return next(argument for argument in arguments if argument is not type(None)), True
    return hint, False


def _spoken(record: Any) -> list[Field[Any]]:
    """The fields that a config can say, of a record or its class."""
    return [f for f in fields(record) if not f.metadata.get("internal")]


def _changed(record: Expert | MergeConfig) -> dict[str, Any]:
    """What differs from the defaults, as plain data."""
    found = {}
    for f in _spoken(record):
        value = getattr(record, f.name)
        if isinstance(value, tuple):
            value = [_changed(item) if isinstance(item, Expert) else item for item in value]
        if value != (list(f.default) if isinstance(f.default, tuple) else f.default):
            found[f.name] = value
    return found


def load_config(path: str | Path) -> MergeConfig:
    """Read a config file.

    Raises:
        InputError: the file cannot be read, is not YAML, or says something we do not know.
    """
    path = Path(path)
    findings = Findings()
    try:
        config = parse_config(path.read_text(encoding="utf-8-sig"), path.name)
        return replace(config, folder=path.absolute().parent)
    except OSError as error:
        findings.problem(str(path), f"cannot be read ({error.strerror})", "name a YAML file")
    except UnicodeDecodeError:
        findings.problem(str(path), "is not UTF-8 text", "save it as UTF-8")
    findings.refuse()
    raise AssertionError("unreachable")


def parse_config(text: str, file: str = "config") -> MergeConfig:
    """Read a config from its YAML text; `file` is the name that errors give.

    Raises:
        InputError: with every problem of the text, each with its line; whether its values and
            models fit together is found by `prepare`, in one list.
    """
    findings = Findings()
    reader = _Reader(file, findings)
    root = _compose(text, file, findings)
    findings.refuse()
    config: MergeConfig = reader.mapping(root, MergeConfig, "")
    findings.refuse()
    return replace(config, text=text, file=file, lines=reader.lines)


def _compose(text: str, file: str, findings: Findings) -> yaml.Node | None:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        findings.problem(
            f"{file}:{line}", f"is not YAML ({error.problem})", "check indentation and quotes"
        )
        return None
    except (yaml.YAMLError, RecursionError) as error:
        findings.problem(file, f"is not YAML ({str(error).splitlines()[0]})", "write plain text")
        return None
    if root is None:
        findings.problem(file, "is empty", "give it at least base_model and experts")
    return root


class _Reader:
    """Nodes to values, driven by the dataclasses' own fields."""

    def __init__(self, file: str, findings: Findings):
        self.file, self.findings = file, findings
        self.lines: dict[str, int] = {}

    def problem(self, node: yaml.Node, key: str, what: str, fix: str) -> None:
        where = f"{self.file}:{node.start_mark.line + 1}"
        self.findings.problem(f"{where}: {key}" if key else where, what, fix)

    def mapping(self, node: yaml.Node | None, into: type[Any], at: str) -> Any:
        """Build dataclass `into`; None after any problem."""
        if not isinstance(node, yaml.MappingNode):
            assert node is not None
            self.problem(node, at, f"is {_kind(node)}", f"write {into.__name__} as `key: value`")
            return None
        hints = typing.get_type_hints(into, include_extras=True)
        known = {f.name: f for f in _spoken(into)}
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
        hint, _ = _without_none(hint)
        if typing.get_origin(hint) is tuple:
            return self.sequence(node, typing.get_args(hint)[0], at)
        if hint == SourceText:
            return self.source(node, at)
        if hint in (int, float):
            return self.number(node, hint, at)
        if hint is str:
            return self.text(node, at)
        return self.mapping(node, hint, at)

    def sequence(self, node: yaml.Node, hint: Any, at: str) -> tuple[Any, ...]:
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


def check_values(config: MergeConfig, findings: Findings) -> None:
    """Record what is wrong with values of the right type."""
    if not config.experts:
        findings.problem(config.where("experts"), "is empty", "list at least one expert")
    count = config.experts_per_token
    if count is not None and not 1 <= count <= max(len(config.experts), 1):
        findings.problem(
            config.where("experts_per_token"),
            f"is {count} with {len(config.experts)} experts",
            f"write a number from 1 to {len(config.experts)}",
        )
    names: dict[str, str] = {}
    for index, expert in enumerate(config.experts):
        at = f"experts[{index}]"
        for name in ("noise_scale", "residual_scale"):
            scale = getattr(expert, name)
            if not abs(scale) <= 1e30:
                findings.problem(
                    config.where(f"{at}.{name}"),
                    f"is {scale:g}",
                    "write a number between -1e30 and 1e30",
                )
        if expert.noise_scale < 0:
            findings.problem(
                config.where(f"{at}.noise_scale"),
                f"is {expert.noise_scale:g}",
                "a standard deviation is 0 or more",
            )
        if expert.name and expert.name in names:
            findings.problem(
                config.where(f"{at}.name"),
                f"{expert.name!r} is {names[expert.name]}'s name too",
                "give each expert its own",
            )
        names.setdefault(expert.name, at)
        for kind in ("positive_prompts", "negative_prompts"):
            for number, prompt in enumerate(getattr(expert, kind)):
                if not prompt.strip():
                    findings.problem(
                        config.where(f"{at}.{kind}[{number}]"), "is empty", "write a prompt"
                    )
