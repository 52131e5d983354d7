"""Configs made in Python: their types are held, and what they say is what is kept of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from babies import simple_config

from moemerge import Expert, InputError, MergeConfig, make_plan, parse_config
from moemerge.gates import modes as gates


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
        (lambda: MergeConfig("m", (), gate="ridge"), "MergeConfig.gate", "write a mapping"),
        (lambda: MergeConfig("m", (), gate=["ridge"]), "MergeConfig.gate", "write a mapping"),
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


GATES: list[dict[str, Any]] = [
    {"mode": "ridge", "lambda": 1e-5, "on_policy": True},
    {"mode": "self", "samples": 3, "temperature": 0.7},
    {"kappa": 20},
]


@pytest.mark.parametrize("gate", GATES)
def test_a_gates_options_of_python_are_those_of_yaml(
    gate: dict[str, Any], babies: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    experts = (Expert(str(base), ("code",)), Expert(str(first), ("story",), body_weight=2.0))
    config = MergeConfig(str(base), experts, gate=gate, body="average")
    assert config.mode == gate.get("mode", "ridge")
    again = parse_config(config.as_yaml())
    assert again == config
    assert make_plan(again).plan == make_plan(config).plan


def test_nothing_said_of_the_gate_is_the_default() -> None:
    for text in ("", "gate:\n", "gate: {}\n", "gate: { mode: }\n", "gate: { mode: ridge }\n",
                 "gate_mode: ridge\ngate: { mode: ridge }\n"):  # fmt: skip
        config = parse_config(f"base_model: a\n{text}experts: []\n")
        assert config.mode == "ridge"


@pytest.mark.parametrize("mode", gates.for_merges())
def test_every_option_of_a_gate_mode_can_be_said_as_it_is(
    mode: str, babies: dict[str, Path]
) -> None:
    """What a file of the folder declares, with its own defaults, changes nothing."""
    declared = getattr(gates.find(mode), "Settings", None)
    said = {name.rstrip("_"): value for name, value in vars(declared()).items()} if declared else {}
    base, first, _ = babies.values()
    plain = parse_config(simple_config(base, [base, first], f"gate: {{ mode: {mode} }}"))
    full = replace(plain, gate={"mode": mode, **said})
    assert make_plan(parse_config(full.as_yaml())).plan == make_plan(plain).plan
    with pytest.raises(InputError, match=rf"gate\.nonsense: is no option of gate mode {mode}"):
        make_plan(replace(plain, gate={"mode": mode, "nonsense": 1}))
