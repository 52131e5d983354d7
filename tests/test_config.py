"""Configs made in Python: their types are held, and what they say is what is kept of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from babies import simple_config

from moemerge import Expert, InputError, MergeConfig, make_plan, parse_config


def test_paths_lists_and_whole_numbers_are_taken() -> None:
    config = MergeConfig(
        Path("models/base"),  # type: ignore[arg-type]
        [Expert(Path("a"), ["code", "python"], noise_scale=1)],  # type: ignore[list-item, arg-type]
    )
    expert = Expert("a", ("code", "python"), noise_scale=1.0)
    assert config == MergeConfig("models/base", (expert,))
    assert type(config.experts[0].noise_scale) is float


@pytest.mark.parametrize(
    "make, where, what",
    [
        (lambda: Expert("m", "code"), "Expert.positive_prompts", "is 'code'; write a list"),
        (lambda: Expert("m", ("a", 3)), "Expert.positive_prompts[1]", "is 3; write text"),
        (lambda: Expert(None), "Expert.source_model", "is None; write text or a path"),
        (lambda: Expert("m", noise_scale="1"), "Expert.noise_scale", "is '1'; write a number"),
        (lambda: MergeConfig("m", ("a",)), "MergeConfig.experts[0]", "is 'a'; write an Expert"),
        (lambda: MergeConfig("m", (), experts_per_token=1.5), "MergeConfig.experts_per_token",
         "is 1.5; write a whole number"),
        (lambda: MergeConfig("m", (), dtype=float), "MergeConfig.dtype", "write text"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused(make: Any, where: str, what: str) -> None:
    with pytest.raises(InputError) as refused:
        make()
    [problem] = str(refused.value).splitlines()
    assert problem.startswith(f"{where}: ") and what in problem


def test_a_config_of_python_is_kept_as_yaml_that_says_the_same() -> None:
    prompts = ("code: #1", "42", "ü\n```\n", "null")
    expert = Expert("user/name@main", prompts, ("no",), 1e-5, 0.5, "ten")
    config = MergeConfig("base", (expert, Expert("other")), "random", experts_per_token=1)
    assert parse_config(config.as_yaml()) == config
    assert "dtype" not in config.as_yaml()


def test_the_text_is_kept_as_long_as_it_is_what_the_config_says() -> None:
    text = "# mine\nbase_model: a\nexperts:\n  - source_model: b\n"
    config = parse_config(text)
    assert config.as_yaml() == text
    changed = replace(config, gate_mode="random")
    assert parse_config(changed.as_yaml()) == changed


def test_a_name_that_is_given_is_kept(babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    config = parse_config(simple_config(base, [first, base]))
    experts = (config.experts[0], replace(config.experts[1], name="first"))
    assert make_plan(replace(config, experts=experts)).plan.experts == ("first-2", "first")
