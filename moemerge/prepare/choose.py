"""Chooses the output architecture: the config's choice, or the best that computes the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moemerge.architectures import COUNTS, Architecture, Holds, Mixture, find, names, reading_of
from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig, option_types, read_options, read_settings
from moemerge.errors import Findings, nearest
from moemerge.families import NO_HOST, RECORDS, record_of

_COUNTS = (*COUNTS, "moe_num_experts")


@dataclass(frozen=True)
class Target:
    """An output architecture that was chosen, with its options."""

    name: str
    architecture: Architecture
    mixture: Mixture


def find_target(
    config: MergeConfig, base: Donor, mixture: Mixture, findings: Findings
) -> Target | None:
    """The architecture that the config names, or the exact one that most programs read.

    None, with a problem recorded, if there is none. The choice is noted, and so is what some
    programs do not compute.
    """
    if config.architecture:
        target = _named(config, base, mixture, findings)
    else:
        target = _best(config, base, mixture, findings)
    if target:
        for _, line in caveats(target.architecture, base.model.config, target.mixture):
            findings.note(line)
    return target


def no_host(config: dict[str, Any], known_alone: bool = False, likely: str = "") -> tuple[str, str]:
    """Why no mixture can be made of a model, and the fix; two empty texts if one can be made.

    With `known_alone`, an unknown family is not refused. `likely` is the known family with the same
    tensors, if any.
    """
    family = config.get("model_type")
    if record_of(config):
        return "", ""
    fix = f"use a model of type {', '.join(sorted(RECORDS))}"
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    ffn = config.get("ffn_config")  # DBRX has its keys here
    said = [config, inner, ffn if isinstance(ffn, dict) else {}]
    counts = [one[key] for one in said for key in _COUNTS if type(one.get(key)) is int]
    more = [key for key in config if re.fullmatch(r"(vision|audio|vq|image)\w*_config", key)]
    if more or text:
        what = f"it reads more than text ({more[0]})" if more else "its text model is only one part"
        kind = inner.get("model_type")
        if kind in RECORDS:
            fix = f"save its text model, a {kind!r}, as a model of its own, and name that"
    elif counts and max(counts) > 1:
        what = "it is a mixture already"
        if reading_of(family, ()):
            fix = (
                "make a dense model of one expert, `moemerge extract MOE OUT --expert 0`: name OUT"
            )
    elif config.get("is_encoder_decoder"):
        what = "it is an encoder and a decoder"
    elif known_alone and family not in NO_HOST:
        return "", ""
    elif likely:
        what = f"it is not known, but its tensors are those of a {likely}"
        fix = f"write `family: {likely}` if it computes the same; `moemerge plan --probe` compares"
    else:
        what = "no mixture class is known to reproduce it"
    return f"is a {family!r} model: {NO_HOST.get(str(family), what)}", fix


def listing() -> list[dict[str, str]]:
    """Every architecture in words: its families, shared experts, router and reading programs."""
    shared = {"": "none", "always": "always on", "gated": "scaled by a gate"}
    rows = []
    for name in names():
        host = find(name)
        own = host.HOLDS.families
        families = [*own, *(name for name, one in RECORDS.items() if one.body in own)]
        rows.append(
            {
                "architecture": ", ".join((name, *host.ALIASES)),
                "made of": ", ".join(families),
                "shared experts": shared[host.SHARED],
                "router": host.SCORES,
                "read by": ", ".join(host.READERS),
            }
        )
    return rows


def find_name(said: str) -> str | None:
    """The architecture's name for a name in a config, an alias, or mergekit's `Qwen MoE`."""
    name = said.strip().lower().replace(" ", "_").replace("-", "_")
    if name in names():
        return name
    short = name.removesuffix("_moe")
    return next((n for n in names() if short in find(n).ALIASES), None)


def refusals(
    host: Architecture, name: str, config: dict[str, Any], mixture: Mixture
) -> Iterator[tuple[str, str]]:
    """Each reason why the architecture cannot hold this model and mixture, with a fix."""
    family = str(config.get("model_type"))
    if family not in host.HOLDS.families:
        families = " or ".join(host.HOLDS.families)
        yield (
            f"a {name} cannot be made of a {family!r} model",
            f"use a base model of type {families}",
        )
        return
    if mixture.shared and not host.SHARED:
        yield f"a {name} has no shared experts", "remove them, or make them ordinary experts"
    if mixture.gated and host.SHARED == "always":
        what = f"a {name}'s shared experts are always on, so prompts cannot gate them"
        yield what, "remove their prompts"
    yield from host.HOLDS.refusals(config, name)
    yield from host.refusals(config, mixture)


def caveats(
    host: Architecture, config: dict[str, Any], mixture: Mixture
) -> Iterator[tuple[str, str]]:
    """What is not computed exactly: (reader, line). The reader is empty if it is so in all."""
    record = record_of(config)
    if record and (limit := record.limit(config)):
        yield "", limit
    yield from host.caveats(config, mixture)


def readers(host: Architecture, config: dict[str, Any], mixture: Mixture) -> tuple[str, ...]:
    """The programs that compute this model exactly."""
    others = {reader for reader, _ in caveats(host, config, mixture)}
    return tuple(reader for reader in host.READERS if reader not in others)


def _named(config: MergeConfig, base: Donor, mixture: Mixture, findings: Findings) -> Target | None:
    name = find_name(str(config.architecture))
    if name is None:
        findings.problem(
            config.where("architecture"),
            f"{config.architecture!r} is no architecture that moemerge writes",
            nearest(str(config.architecture), names()),
        )
        return None
    if name != str(config.architecture).lower():
        findings.note(f"architecture: {config.architecture} is written as a {name}")
    host = find(name)
    model = base.model.config
    found = list(refusals(host, name, model, mixture))
    for what, fix in found:
        where = base.where
        if model.get("model_type") not in host.HOLDS.families:
            where, fix = config.where("architecture"), _others(model, mixture)
        findings.problem(where, what, fix)
    return None if found else Target(name, host, _with_options(config, name, mixture, findings))


def _others(model: dict[str, Any], mixture: Mixture) -> str:
    """The fix for a wrong architecture: the best one for this base model."""
    named = {name: find(name) for name in names()}
    fit = [name for name, host in named.items() if not [*refusals(host, name, model, mixture)]]
    best = min(fit, key=lambda name: _rank(name, named[name], model, mixture), default="")
    return f"write {best} for this base model, or leave the key out" if best else "leave it out"


def _rank(
    name: str, host: Architecture, model: dict[str, Any], mixture: Mixture, asked: bool = False
) -> tuple[bool, int, bool, bool, str]:
    """A sort key; the smallest is best: a simple architecture, exact in many programs."""
    spare = bool(host.SHARED) and not mixture.shared
    odd = host.SCORES != "softmax" and not asked
    return odd, -len(readers(host, model, mixture)), spare, Holds() != host.HOLDS, name


def _best(config: MergeConfig, base: Donor, mixture: Mixture, findings: Findings) -> Target | None:
    model = base.model.config
    family = str(model.get("model_type"))
    fitting: list[tuple[bool, int, bool, bool, str]] = []
    refused: list[tuple[str, str]] = []
    for name in names():
        host = find(name)
        why = list(refusals(host, name, model, mixture))
        known = option_types(getattr(host, "Settings", None)).keys()
        asked = config.architecture_options.keys()
        if why or not asked <= known:
            refused += why if family in host.HOLDS.families else []
            continue
        fitting.append(_rank(name, host, model, mixture, bool(asked)))
    if not fitting:
        _refuse(config, base, family, refused, findings)
        return None
    name = min(fitting)[-1]
    host = find(name)
    if name != "mixtral":
        model_type = model.get("saved_as", family)
        shared = " with shared experts" if mixture.shared else ""
        said = ", ".join(readers(host, model, mixture))
        findings.note(f"architecture: {name}, exact for a {model_type}{shared}; {said} read it")
    return Target(name, host, _with_options(config, name, mixture, findings))


def _refuse(
    config: MergeConfig,
    base: Donor,
    family: str,
    refused: list[tuple[str, str]],
    findings: Findings,
) -> None:
    if family in RECORDS:
        for what, fix in dict(refused).items():
            findings.problem(base.where, what, fix)
        if not refused:
            where, what = config.where("architecture_options"), "fit no architecture for this model"
            findings.problem(where, what, "see `moemerge architectures`")
        return
    findings.problem(base.where, *no_host(base.model.config))


def _with_options(config: MergeConfig, name: str, mixture: Mixture, findings: Findings) -> Mixture:
    """The mixture with the architecture's options and training keys, after checks."""
    host = find(name)
    declared = getattr(host, "Settings", None)
    settings = read_settings(
        declared,
        config.architecture_options,
        lambda key: config.where(f"architecture_options.{key}"),
        f"is no option of a {name}",
        findings,
    )
    training = read_options(
        {key: type(value) for key, value in host.TRAINING.items()},
        config.training,
        lambda key: config.where(f"training.{key}"),
        f"is no training key of a {name}'s config",
        findings,
    )
    if settings is not None:
        for key, what, fix in settings.problems(mixture):
            findings.problem(config.where(f"architecture_options.{key}"), what, fix)
    return dataclasses.replace(mixture, settings=settings, training=tuple(training.items()))
