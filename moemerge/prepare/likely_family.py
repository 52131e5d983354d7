"""A model of an unknown model_type, compared with the known families by names and shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moemerge.architectures import dense_shapes
from moemerge.checkpoint import TIED, Checkpoint, Donor
from moemerge.dense import differs_by
from moemerge.errors import InputError, Problem, no_effect
from moemerge.families import ATTENTION, HEAD, RECORDS, normalise, record_of
from moemerge.files import read_json
from moemerge.prepare.records import Prepared

_ALIKE = 1e-5
"""The largest share of the output by which equal layers may differ: float32 rounds so much."""

_PLAINEST = ("llama", "qwen2", "qwen3", "olmo2", "seed_oss")
"""Families whose tensors may be equal to others', the most usual first."""


def likely_family(model: Checkpoint) -> str:
    """The family whose models have exactly these tensors, or the most usual one of several.

    Empty if there is none: a tensor that nothing would read, such as a norm's bias, counts too.
    """
    order = sorted(RECORDS, key=lambda name: (name not in _PLAINEST, name))
    plain = [name for name in order if RECORDS[name].layers == ATTENTION]
    found = [name for name in plain if not RECORDS[name].body and _fits(model, name)]
    return found[0] if found else ""


def read_as(donor: Donor, family: str) -> Donor:
    """The donor, with its config read as that family's.

    Raises:
        ValueError: a value of its config.json is not of the type that the family's class expects.
    """
    config = normalise({**donor.model.config, "model_type": family})
    return replace(donor, model=replace(donor.model, config=config))


def unread(model: Checkpoint, config: dict[str, Any]) -> str:
    """A tensor of the model that a dense model of this normalised config lacks; empty if none."""
    wanted = dense_shapes(config)
    more = {name for name in model.tensors.keys() - wanted.keys() if not name.endswith("inv_freq")}
    return min(more - ({HEAD} if config[TIED] else set()), default="")


def check_family(ready: Prepared) -> str:
    """Compare a layer of the base with its own class in transformers; what came of it, in words.

    Raises:
        InputError: the classes compute different things.
    """
    base, config = ready.base, ready.base.model.config
    raw = read_json(base.model.directory / "config.json")
    kind, family = raw.get("model_type"), config["model_type"]
    if record_of(raw) or "wrapper" in config:
        return no_effect(["--probe"], ": the base model's own family is known")
    found = differs_by(raw, config)
    if found is None:
        claim = f"that a {kind!r} computes what a {family} does stays unchecked"
        return f"probe: transformers has no class for it, so {claim}"
    if found > _ALIKE:
        what = f"a layer of a {kind!r} and of a {family} differ by {found:.2g} of the output"
        raise InputError([Problem(base.where, what, "leave out family: it is none")])
    return f"probe: a layer of a {kind!r} and of a {family} differ by {found:.0e} of the output"


def _fits(model: Checkpoint, family: str) -> bool:
    try:
        config = normalise({**model.config, "model_type": family})
    except (ValueError, TypeError):
        return False
    if record_of(config) is None:
        return False
    found = {name: at.shape for name, at in model.tensors.items()}
    wanted = dense_shapes(config)
    return wanted.items() <= found.items() and not unread(model, config)
