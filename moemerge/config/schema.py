"""YAML to `MergeConfig`: every key is known, every value has its type, every error has its line."""

from __future__ import annotations

import typing
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from moemerge.config.values import Choices, FileOrTexts, Picture, PromptText, SourceText, Values
from moemerge.config.yaml_nodes import Reader, compose, spoken
from moemerge.errors import Findings, InputError

DEFAULT_GATE_MODE = "ridge"


@dataclass(frozen=True)
class Expert:
    """One dense model whose MLPs become an expert, and the prompts that should be routed to it.

    `noise_scale` is the standard deviation of Gaussian noise that is added to its MLPs.
    `residual_scale` multiplies its down projections, and so everything it adds to the residual
    stream. A prompt is text, or a `Picture` for a base that sees. `calibration` names a text or
    jsonl file, a directory or a dataset on the Hub; its documents count as prompts. `body_weight`
    is its weight if the body is the experts' average. `renew` is the share of its neurons that are
    drawn again at random, for training (Drop-Upcycling).
    """

    source_model: SourceText
    positive_prompts: tuple[PromptText, ...] = ()
    negative_prompts: tuple[PromptText, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    name: str = ""
    calibration: str | None = None
    body_weight: float = 1.0
    renew: float = 0.0

    def __post_init__(self) -> None:
        _hold_types(self)


@dataclass(frozen=True)
class MergeConfig:
    """A merge, as a person wrote it.

    `text` is the YAML of `file` in `folder`; relative paths of sources are looked for there too.
    `lines` are line numbers by key. `dtype` None is the base model's dtype. `experts_per_token`
    None is 2, or 1 for a single expert. `gate` holds the gate mode's own options, and `mode`, for
    which `gate_mode` is short. `family` is the known one as which models of an unknown model_type
    are read. `body` says where attention, norms and embeddings come from: the `base` model, the
    `average` of the experts, or that with attention fitted to texts (`regmean`). `align` fits the
    experts' down projections to the body: `true`, `false`, or `auto`, where texts held out of the
    fit get more likely. `architecture` None is the one that fits.
    `architecture_options` are its own options, and `training` holds training keys of its
    config.json. Each expert is cut into `segments`; `split` cuts the base model's MLPs into experts
    instead. `tokenizer` is the `base` model's, the `union` of all, or the one of the source that it
    names; it gets `extra_tokens`, and its rows are padded to a multiple of `pad_vocabulary`.
    """

    base_model: SourceText
    experts: tuple[Expert, ...] = ()
    gate_mode: str | None = None
    gate: Choices = field(default_factory=dict)
    family: str | None = None
    body: str = "base"
    align: str = "false"
    dtype: str | None = None
    experts_per_token: int | None = None
    shared_experts: tuple[Expert, ...] = ()
    architecture: str | None = None
    architecture_options: Choices = field(default_factory=dict)
    segments: int = 1
    split: Choices = field(default_factory=dict)
    training: Choices = field(default_factory=dict)
    tokenizer: SourceText = "base"
    extra_tokens: FileOrTexts = ()
    pad_vocabulary: int = 1
    text: str = field(default="", compare=False, metadata={"internal": True})
    file: str = field(default="config", compare=False, metadata={"internal": True})
    folder: Path | None = field(default=None, compare=False, metadata={"internal": True})
    lines: dict[str, int] = field(
        default_factory=dict, compare=False, repr=False, metadata={"internal": True}
    )

    def __post_init__(self) -> None:
        _hold_types(self)

    @property
    def mode(self) -> str:
        """The gate mode, from `gate_mode` or `gate.mode`."""
        default = DEFAULT_GATE_MODE
        if self.split:
            default = "activation" if self.split.get("text") else "random"
        return str(self.gate.get("mode") or self.gate_mode or default)

    @property
    def aligns(self) -> bool:
        """Whether experts may be aligned to the body."""
        return self.align != "false"

    @property
    def fits(self) -> bool:
        """Whether the body or the experts are fitted to texts."""
        return self.body == "regmean" or self.aligns

    @property
    def every_expert(self) -> list[tuple[str, Expert]]:
        """Every expert, shared ones last, with its key in the config."""
        return [
            (f"{key}[{index}]", expert)
            for key in ("experts", "shared_experts")
            for index, expert in enumerate(getattr(self, key))
        ]

    @property
    def draws(self) -> bool:
        """Whether some of the experts' weights are drawn at random."""
        return any(expert.noise_scale or expert.renew for _, expert in self.every_expert)

    def as_yaml(self) -> str:
        """This config as YAML: the original text if it still says the same, otherwise new text."""
        said = replace(self, experts=()) if self.split else self  # those are made of it
        with suppress(InputError):
            if parse_config(self.text) == said:
                return self.text
        data = _changed(said)
        return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))

    def where(self, key: str) -> str:
        """The place `config.yaml:7: experts[1].source_model`, with the line of the nearest known
        key."""
        at = key
        while at and at not in self.lines:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        return f"{self.file}:{self.lines[at]}: {key}" if at else f"{self.file}: {key}"


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as a block."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """Plain or quoted as needed, otherwise a block."""
        if "\n" not in text:
            return super().represent_str(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|")


_Dumper.add_representer(str, _Dumper.represent_str)


def _hold_types(record: Expert | MergeConfig) -> None:
    """Check a record that was made in Python against its fields' types; lists become tuples, paths
    text."""
    values = Values(Findings())
    hints = typing.get_type_hints(type(record), include_extras=True)
    for f in spoken(record):
        at = f"{type(record).__name__}.{f.name}"
        value = values.value(getattr(record, f.name), hints[f.name], at)
        object.__setattr__(record, f.name, value)
    values.findings.refuse()


def _changed(record: Expert | MergeConfig | Picture) -> dict[str, Any]:
    """The fields that differ from the defaults, as plain data."""
    found = {}
    for f in spoken(record):
        value = getattr(record, f.name)
        if isinstance(value, tuple):
            value = [
                _changed(item) if isinstance(item, Expert | Picture) else item for item in value
            ]
        default = {} if f.default is MISSING else f.default
        if value != (list(default) if isinstance(default, tuple) else default):
            found[f.name] = value
    return found


def as_config(config: MergeConfig | str | Path) -> MergeConfig:
    """The config itself, or the one in the YAML file of that path."""
    return config if isinstance(config, MergeConfig) else load_config(config)


def load_config(path: str | Path) -> MergeConfig:
    """Read a config file.

    Raises:
        InputError: the file cannot be read, is not YAML, or has an unknown key.
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
    """Read a config from its YAML text; `file` is the name for errors.

    Raises:
        InputError: with every problem of the text, each with its line. `prepare` finds whether the
            values and the models fit together.
    """
    findings = Findings()
    reader = Reader(file, findings)
    root = compose(text, file)
    _refuse_dense_merges(root, file, findings)
    config: MergeConfig = reader.record(root, MergeConfig, "")
    findings.refuse()
    return replace(config, text=text, file=file, lines=reader.lines)


def _refuse_dense_merges(root: yaml.Node, file: str, findings: Findings) -> None:
    """Refuse a config of mergekit-yaml with one problem, not one for each of its keys."""
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    for key, _ in pairs:
        if key.value in ("merge_method", "slices", "models", "modules"):
            findings.problem(
                f"{file}:{key.start_mark.line + 1}: {key.value}",
                "is a key of mergekit-yaml, which merges models into one dense model",
                "run mergekit-yaml with it; a mixture's config has base_model and experts",
            )
            findings.refuse()
