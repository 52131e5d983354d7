"""A manifest and a config as others may read them: without the places of models on this disk."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

from moemerge.checkpoint import is_hub_id, last_part
from moemerge.config import Expert, MergeConfig, Picture, PromptText, parse_config
from moemerge.output import Manifest
from moemerge.plan import Plan
from moemerge.text import find

_LOCAL = re.compile(r"(?:^|[\s\"'(\[=:,])(?:~|/|\\\\|[A-Za-z]:\\)[\w.~-]", re.MULTILINE)


def shareable(manifest: Manifest) -> Manifest:
    """The manifest with `./name` for each directory that models were read from.

    The digests of weights are kept; the digest of the plan is made again. Prompts, and what was
    measured with them, are left out if the card must not show them.
    """
    names = _names(manifest.plan)
    plan = manifest.plan.to_json()
    for source in plan["sources"]:
        source.update(directory=None, modified=None)
        source["reference"] = names.get(source["reference"], source["reference"])
    for shard in plan["shards"]:
        for tensor in shard["tensors"]:
            tensor["recipe"] = _with_names(tensor["recipe"], names)
    public = dataclasses.replace(manifest, plan=Plan.from_json(plan), folder=None)
    if not manifest.card.get("config", True):
        public = dataclasses.replace(public, routing={})
    if not manifest.config:  # of a mixture that came without a manifest
        return public
    folder = Path(manifest.folder) if manifest.folder else None
    config = dataclasses.replace(parse_config(manifest.config), folder=folder)
    config = shareable_config(config, manifest.plan)
    if not manifest.card.get("config", True):
        silent = partial(
            dataclasses.replace, positive_prompts=(), negative_prompts=(), calibration=None
        )
        config = dataclasses.replace(
            config,
            experts=tuple(map(silent, config.experts)),
            shared_experts=tuple(map(silent, config.shared_experts)),
        )
    return dataclasses.replace(public, config=config.as_yaml())


def shareable_config(config: MergeConfig, plan: Plan) -> MergeConfig:
    """The config of a plan, with `./name` for each directory and file in it.

    If the config has a path, its original text is not used, because comments may contain paths too.
    """
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
        return "+".join(map(elsewhere, text.split("+")))

    def elsewhere(part: str) -> str:
        """A source from which no weight is read, such as the one of a tokenizer."""
        part = part.strip()
        if part in ("base", "union") or is_hub_id(part.partition("@")[0]):
            return part
        return f"./{last_part(part)}"

    def extra(said: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"./{last_part(said)}" if isinstance(said, str) else said

    def texts(named: str | None) -> str | None:
        if not named or (is_hub_id(named) and not find(named, config.folder)):
            return named
        return f"./{last_part(named)}"

    def prompts(said: tuple[PromptText, ...]) -> tuple[PromptText, ...]:
        return tuple(
            Picture(f"./{last_part(one.image)}", one.text) if isinstance(one, Picture) else one
            for one in said
        )

    def expert(one: Expert) -> Expert:
        return dataclasses.replace(
            one,
            source_model=source(one.source_model),
            calibration=texts(one.calibration),
            positive_prompts=prompts(one.positive_prompts),
            negative_prompts=prompts(one.negative_prompts),
        )

    public = dataclasses.replace(
        config,
        base_model=source(config.base_model),
        experts=tuple(map(expert, config.experts)),
        shared_experts=tuple(map(expert, config.shared_experts)),
        tokenizer=source(config.tokenizer),
        extra_tokens=extra(config.extra_tokens),
        split={k: texts(str(v)) if k == "text" else v for k, v in config.split.items()},
    )
    told = public == config and not _LOCAL.search(config.text)
    return public if told else dataclasses.replace(public, text="")


def _names(plan: Plan) -> dict[str, str]:
    """The new reference of each directory: its last part, with a number if that is taken.

    It begins with a dot, so that nobody takes it for the name of a repository.
    """
    names: dict[str, str] = {}
    for source in plan.sources:
        if source.directory:
            own, number = last_part(source.directory), 1
            name = own
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
