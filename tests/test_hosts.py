"""Which architecture is chosen for which models, and what is said where none is or another is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from babies import make_model, simple_config
from test_laws import BODIES

from moemerge import InputError, make_plan
from moemerge.architectures import types
from moemerge.config.schema import parse_config
from moemerge.prepare import choose as hosts

ALWAYS = "\nshared_experts:\n  - source_model: {base}\n"
GATED = ALWAYS + "    positive_prompts: [chat hello]\n"

GRANITE = "granitemoeshared granitemoehybrid"
"""A Granite's class with shared experts, or its newer one, whichever more programs read."""


def plan_of(base: Path, head: str = "", tail: str = "") -> Any:
    text = simple_config(base, [base, base], f"gate_mode: random\n{head}")
    return make_plan(parse_config(text + tail.format(base=base)))


def problems_of(base: Path, head: str = "", tail: str = "") -> list[str]:
    with pytest.raises(InputError) as caught:
        plan_of(base, head, tail)
    return list(map(str, caught.value.problems))


@pytest.mark.parametrize(
    ("body", "shared", "chosen"),
    [
        ("llama", "", "mixtral"),
        ("mistral window", "", "mixtral"),
        ("phi3", "", "mixtral"),
        ("phi3 partial", "", "glm4_moe"),
        ("qwen2", "", "granitemoehybrid"),
        ("granite biases", "", "granitemoehybrid"),
        ("qwen2", ALWAYS, "granitemoehybrid"),
        ("qwen2 window", "", "qwen2_moe"),
        ("seed_oss head_dim", "", "glm4_moe"),
        ("qwen3", "", "qwen3_moe"),
        ("olmo2", "", "flex_olmo"),
        ("granite", "", "granitemoe"),
        ("llama", ALWAYS, GRANITE),
        ("mistral window", ALWAYS, "qwen2_moe"),
        ("llama head_dim", ALWAYS, "glm4_moe"),
        ("qwen2 window", ALWAYS, "qwen2_moe"),
        ("qwen3", ALWAYS, "glm4_moe"),
        ("qwen3 biases", ALWAYS, "dots1"),
        ("granite", ALWAYS, GRANITE),
        ("llama", GATED, "qwen2_moe"),
        ("qwen2", GATED, "qwen2_moe"),
    ],
)
def test_the_exact_host_that_most_programs_read(
    tmp_path: Path, body: str, shared: str, chosen: str
) -> None:
    base = make_model(tmp_path / "base", **BODIES[body])
    ready = plan_of(base, tail=shared)
    found = ready.plan.architecture
    assert found in chosen.split()
    why = [note for note in ready.notes if note.startswith(f"architecture: {found}, exact for")]
    assert len(why) == (found != "mixtral")


@pytest.mark.parametrize(
    ("body", "tail", "why"),
    [
        ("olmo2", ALWAYS, "a flex_olmo has no shared experts"),
        ("qwen3", GATED, "a dots1's shared experts are always on"),
        ("granite", GATED, "a granitemoeshared's shared experts are always on"),
    ],
)
def test_what_no_host_holds_is_refused(tmp_path: Path, body: str, tail: str, why: str) -> None:
    base = make_model(tmp_path / "base", **BODIES[body])
    assert any(why in line for line in problems_of(base, tail=tail))


@pytest.mark.parametrize("family", [*hosts.NO_HOST, "a family of next year"])
def test_a_family_without_a_host_is_refused_with_the_reason(
    family: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    base = babies["base"]
    config = json.loads((base / "config.json").read_text())
    copied = tmp_path / "base"
    copied.mkdir()
    for file in base.iterdir():
        (copied / file.name).symlink_to(file)
    (copied / "config.json").unlink()
    (copied / "config.json").write_text(json.dumps({**config, "model_type": family}))
    reason = hosts.NO_HOST.get(family, "it is not known, but its tensors are those of a llama")
    assert f"is a {family!r} model: {reason}" in problems_of(copied)[0]


@pytest.mark.parametrize(
    ("said", "body", "meant"),
    [
        ("qwen", "qwen2", "qwen2_moe"),
        ("Qwen3", "qwen3", "qwen3_moe"),
        ("granite", "granite", "granitemoe"),
        ("GLM4_MoE", "qwen3", "glm4_moe"),
    ],
)
def test_an_architecture_goes_by_other_names(
    tmp_path: Path, said: str, body: str, meant: str
) -> None:
    base = make_model(tmp_path / "base", **BODIES[body])
    assert plan_of(base, f"architecture: {said}").plan.architecture == meant


def test_no_two_architectures_go_by_one_name() -> None:
    said = [*types.names()]
    said += [alias for name in said[:] for alias in types.find(name).ALIASES]
    assert len(set(said)) == len(said)


@pytest.mark.parametrize(
    ("head", "where", "line"),
    [
        ("architecture: qwen3_moe", "base", "a qwen3_moe cannot be made of a 'llama' model"),
        ("architecture: glm5", "architecture", "'glm5' is no architecture that moemerge writes"),
        ("architecture_options: { groups: 3 }", "architecture_options.groups", "is 3 with 2"),
        ("architecture_options: { moons: 3 }", "architecture_options", "fit no architecture"),
        ("architecture: mixtral\narchitecture_options: { groups: 1 }",
         "architecture_options.groups", "is no option of a mixtral"),
        ("training: { router_aux_los_coef: 0.1 }", "training.router_aux_los_coef",
         "did you mean 'router_aux_loss_coef'?"),
        ("training: { output_router_logits: 1 }", "training.output_router_logits", "is 1"),
        ("architecture: glm4_moe\ntraining: { router_jitter_noise: 0.1 }",
         "training.router_jitter_noise", "is no training key of a glm4_moe's config"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_architecture_is_refused(
    babies: dict[str, Path], head: str, where: str, line: str
) -> None:
    [problem] = problems_of(babies["base"], head)
    assert where in problem and line in problem


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("mixtral", "mixtral"),
        ("Mixtral", "mixtral"),
        ("qwen", "qwen2_moe"),
        ("Qwen MoE", "qwen2_moe"),
        ("Qwen3 MoE", "qwen3_moe"),
        ("DeepSeek MoE", "granitemoehybrid"),
        ("qwen9", None),
    ],
)
def test_the_peers_names_are_known(said: str, name: str | None) -> None:
    assert hosts.find_name(said) == name
