"""A manifest as others may read it: nothing in it tells where models lay on this machine."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from moemerge.checkpoint.reference import is_hub_id
from moemerge.config import Expert, MergeConfig, parse_config
from moemerge.output import Manifest
from moemerge.plan import Plan


def shareable(manifest: Manifest) -> Manifest:
    """The manifest with `./name` for each directory that models were read from.

    The weights' digests stay, the plan's is made anew. Prompts, and what was found of them, stay
    out where the person wanted them out of the card.
    """
    names = _names(manifest.plan)
    plan = manifest.plan.to_json()
    for source in plan["sources"]:
        source.update(directory=None, modified=None)
        source["reference"] = names.get(source["reference"], source["reference"])
    for shard in plan["shards"]:
        for tensor in shard["tensors"]:
            tensor["recipe"] = _with_names(tensor["recipe"], names)
    if not manifest.config:  # of a mixture that came without a manifest
        return dataclasses.replace(manifest, plan=Plan.from_json(plan), folder=None)
    config = _shareable_config(parse_config(manifest.config), manifest.plan)
    routing = manifest.routing
    if not manifest.card.get("config", True):
        silent = partial(
            dataclasses.replace, positive_prompts=(), negative_prompts=(), calibration=None
        )
        config = dataclasses.replace(
            config,
            experts=tuple(map(silent, config.experts)),
            shared_experts=tuple(map(silent, config.shared_experts)),
        )
        routing = {}
    return dataclasses.replace(
        manifest, config=config.as_yaml(), plan=Plan.from_json(plan), routing=routing, folder=None
    )


def _shareable_config(config: MergeConfig, plan: Plan) -> MergeConfig:
    """The config that a plan was made of, with `./name` for each directory and file in it, and
    without its comments."""
    names = _names(plan)
    known = {source.reference for source in plan.sources}

    def source(text: str) -> str:
        splits = [[text]] + [
            [text[:at], text[at + 1 :]] for at, sign in enumerate(text) if sign == "+"
        ]
        for parts in splits:
            stripped = [part.strip() for part in parts]
            if known.issuperset(stripped):
                return "+".join(names.get(part, part) for part in stripped)
        return text

    def extra(said: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"./{Path(said).name}" if isinstance(said, str) else said

    def calibration(text: str | None) -> str | None:
        return text if not text or is_hub_id(text) else f"./{Path(text).name}"

    def expert(one: Expert) -> Expert:
        return dataclasses.replace(
            one,
            source_model=source(one.source_model),
            calibration=calibration(one.calibration),
        )

    return dataclasses.replace(
        config,
        base_model=source(config.base_model),
        experts=tuple(map(expert, config.experts)),
        shared_experts=tuple(map(expert, config.shared_experts)),
        tokenizer=source(config.tokenizer),
        extra_tokens=extra(config.extra_tokens),
        split={k: calibration(str(v)) if k == "text" else v for k, v in config.split.items()},
        text="",
    )


def _names(plan: Plan) -> dict[str, str]:
    """What each directory's reference becomes: its last part, with a number where that is taken.

    It begins with a dot, so that nobody takes it for the name of a repository.
    """
    names: dict[str, str] = {}
    for source in plan.sources:
        if source.directory:
            path = Path(source.directory)
            own = path.name if path != Path.home() else "model"  # home bears a person's name
            name, number = own, 1
            while f"./{name}" in names.values():
                number += 1
                name = f"{own}-{number}"
            names[source.reference] = f"./{name}"
    return names


def _with_names(recipe: Any, names: dict[str, str]) -> Any:
    """A recipe as plain data with its sources renamed."""
    if isinstance(recipe, list):
        return [_with_names(part, names) for part in recipe]
    if not isinstance(recipe, dict):
        return recipe
    renamed = {key: _with_names(value, names) for key, value in recipe.items()}
    if isinstance(recipe.get("source"), str):
        renamed["source"] = names.get(recipe["source"], recipe["source"])
    return renamed
