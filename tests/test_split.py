"""One dense model cut into slices, and experts into segments: nothing is lost while all is on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import make_model, simple_config, write_config
from test_cli import run
from test_laws import BODIES, HOSTED, PROMPT, all_tensors, files, load, logits, raw

from moemerge import InputError, MergeConfig, Options, make_plan, merge, regate, verify_checkpoint
from moemerge.architectures import types
from moemerge.config.schema import parse_config
from moemerge.plan.blocks import generator
from moemerge.split import neurons

TEXT = "code python function class return story scene write dragon castle to please explain " * 20
BASES = {(name, BODIES[body].get("family", "llama")): body for name, body in reversed(HOSTED)}
PLACES = [(host, body) for (host, _), body in sorted(BASES.items())]


def split_config(base: Path, split: str = "slices: 4", head: str = "gate_mode: zeros") -> str:
    text = base.parent / "text.txt"
    text.write_text(TEXT)
    named = f", text: {text}" if "coactivation" in split or "activation" in head else ""
    return f"base_model: {base}\n{head}\nsplit: {{{split}{named}}}\n"


def made(base: Path, split: str, head: str, out: Path, options: Options | None = None) -> Path:
    merge(write_config(out.with_suffix(".yaml"), split_config(base, split, head)), out, options)
    return out


@pytest.mark.parametrize("assign", neurons.ASSIGNMENTS)
@pytest.mark.parametrize(("architecture", "body"), PLACES)
def test_all_slices_on_are_the_dense_model(
    tmp_path: Path, architecture: str, body: str, assign: str
) -> None:
    base = make_model(tmp_path / "base", **BODIES[body])
    shared = 1 if types.find(architecture).SHARED else 0
    head = f"architecture: {architecture}\ngate_mode: zeros\nexperts_per_token: {4 - shared}"
    split = f"slices: 4, shared: {shared}, assign: {assign}"
    out = made(base, split, head, tmp_path / "out")
    dense = logits(base)
    assert dense.std() > 0.1
    assert (dense - logits(out)).abs().max() <= 1e-5


@pytest.mark.parametrize(("architecture", "body"), PLACES)
def test_segments_are_the_whole_experts(tmp_path: Path, architecture: str, body: str) -> None:
    """With real prompts and routers, and as many segments on as two experts have."""
    base, *others = (make_model(tmp_path / f"{n}", seed=n, **BODIES[body]) for n in range(3))
    text = simple_config(base, [base, *others], f"architecture: {architecture}")
    outs = []
    for segments in (1, 3):
        outs.append(tmp_path / f"out{segments}")
        config = write_config(tmp_path / "c.yaml", f"segments: {segments}\n{text}")
        merge(config, outs[-1])
    whole, cut = (logits(out) for out in outs)
    assert (whole - cut).abs().max() <= 1e-5
    said = json.loads((outs[1] / "config.json").read_text())
    assert said["num_experts_per_tok"] == 6


@pytest.mark.parametrize("assign", neurons.ASSIGNMENTS)
def test_slices_hold_each_neuron_once(tmp_path: Path, babies: dict[str, Path], assign: str) -> None:
    out = made(babies["base"], f"slices: 4, assign: {assign}", "gate_mode: zeros", tmp_path / "o")
    dense, cut = all_tensors(babies["base"]), all_tensors(out)
    stem = "model.layers.1.block_sparse_moe"
    fused = cut.get(f"{stem}.input_linear.weight")
    gates = (
        fused[:, : fused.shape[1] // 2].reshape(-1, fused.shape[2])
        if fused is not None
        else torch.cat([cut[f"{stem}.experts.{n}.w1.weight"] for n in range(4)])
    )
    wanted = dense["model.layers.1.mlp.gate_proj.weight"]
    assert sorted(map(raw, gates)) == sorted(map(raw, wanted))


@pytest.mark.parametrize("mode", ["activation", "random", "uniform_random", "zeros"])
def test_same_seed_same_bytes(tmp_path: Path, babies: dict[str, Path], mode: str) -> None:
    """Whatever the jobs, the shards and who reads layer by layer."""
    split, head = "slices: 4, assign: coactivation", f"gate_mode: {mode}\nexperts_per_token: 2"
    one = made(babies["base"], split, head, tmp_path / "one")
    two = made(babies["base"], split, head, tmp_path / "two", Options(jobs=3, lazy=True))
    assert files(one) == files(two)
    assert verify_checkpoint(one).tensors


def test_another_seed_draws_other_slices(tmp_path: Path, babies: dict[str, Path]) -> None:
    heads = [
        all_tensors(made(babies["base"], "slices: 4, assign: random", "gate_mode: zeros",
                         tmp_path / f"{seed}", Options(seed=seed)))
        for seed in (0, 1)
    ]  # fmt: skip
    assert any(raw(heads[0][name]) != raw(heads[1][name]) for name in heads[0])


def test_a_slice_that_is_always_on_is_full_on(tmp_path: Path, babies: dict[str, Path]) -> None:
    """Of two slices, one shared and one routed to, nothing is chosen: the routers do not matter."""
    split, head = "slices: 2, shared: 1, assign: kmeans", "gate_mode: random\nexperts_per_token: 1"
    out = made(babies["base"], split, head, tmp_path / "out")
    assert (logits(babies["base"]) - logits(out)).abs().max() <= 1e-5


def test_a_fitted_router_finds_the_slices_that_text_activates(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    """On the text that it was fitted to, it is nearer to the dense model than routers at random."""
    ids = PROMPT[:, :20]
    dense = logits(babies["base"], ids)

    def off(mode: str, assign: str) -> float:
        out = tmp_path / f"{mode}-{assign}"
        head = f"gate_mode: {mode}\nexperts_per_token: 2"
        made(babies["base"], f"slices: 4, assign: {assign}", head, out)
        return float((logits(out, ids) - dense).square().mean())

    (tmp_path / "text.txt").write_text(TEXT)
    assert off("activation", "coactivation") < off("random", "coactivation")


def test_neurons_that_fire_together_come_together() -> None:
    random = generator(0, "test", 0)
    group = random.permutation(48) % 4
    on = random.random((300, 4)) < 0.4
    strengths = (on[:, group] * np.abs(random.standard_normal((300, 48))) + 0.01).astype("f4")
    order = neurons.by_activation(strengths, 4, 0, 2, random)
    assert all(len(set(group[part])) == 1 for part in np.split(order, 4))


def test_neurons_that_point_together_come_together() -> None:
    random = generator(0, "test", 0)
    group = random.permutation(48) % 4
    centres = random.standard_normal((4, 16))
    rows = (centres[group] + 0.1 * random.standard_normal((48, 16))).astype("f4")
    order = neurons.by_weights(rows, np.ones(48, "f4"), 4, 0, random)
    assert all(len(set(group[part])) == 1 for part in np.split(order, 4))


@pytest.mark.parametrize("shared", [1, 2])
def test_the_strongest_neurons_are_always_on(shared: int) -> None:
    random = generator(0, "test", 0)
    strengths = random.random((50, 48), dtype="f4") * np.linspace(1, 9, 48, dtype="f4")
    order = neurons.by_activation(strengths, 4, shared, 1, random)
    strongest = np.argsort(
        -np.square(strengths / np.linalg.norm(strengths, axis=1)[:, None]).mean(0)
    )
    assert set(order[: 12 * shared]) == set(strongest[: 12 * shared])


@pytest.mark.parametrize(
    ("split", "head", "where", "what"),
    [
        ("slices: 5", "", "split.slices", "48"),
        ("slices: 1", "", "split.slices", "2"),
        ("slices: 4, shared: 4", "", "split.shared", "4 of 4"),
        ("slices: 4, shared: -1", "", "split.shared", "-1"),
        ("slices: 4, assign: kmean", "", "split.assign", "kmeans"),
        ("slices: 4, asign: kmeans", "", "split.asign", "assign"),
        ("slices: many", "", "split.slices", "whole number"),
        ("assign: 'coactivation'", "gate_mode: zeros", "split.text", "missing"),
        ("slices: 4, text: nowhere.txt", "", "split.text", "nowhere.txt"),
        ("slices: 4", "gate_mode: activation", "split.text", "missing"),
        ("slices: 4", "gate_mode: ridge", "gate_mode", "prompts"),
        ("slices: 4", "experts_per_token: 5", "experts_per_token", "5"),
        ("slices: 4", "segments: 2", "segments", "split"),
        ("slices: 4", "body: average", "body", "split"),
        ("slices: 4", "experts: [{source_model: x}]", "experts", "split"),
        ("slices: 4, shared: 1", "architecture: mixtral", "base_model", "shared"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, babies: dict[str, Path], split: str, head: str, where: str, what: str
) -> None:
    text = f"base_model: {babies['base']}\n{head}\nsplit: {{{split}}}\n"
    with pytest.raises(InputError) as error:
        make_plan(parse_config(text))
    told = [f"{problem}" for problem in error.value.problems if where in problem.where]
    assert any(what in line for line in told), error.value


def test_a_text_is_for_a_split(babies: dict[str, Path]) -> None:
    text = simple_config(babies["base"], [babies["first"]], "gate_mode: activation")
    with pytest.raises(InputError, match="split"):
        make_plan(parse_config(text))


def test_a_split_needs_no_experts_and_says_so_again(babies: dict[str, Path]) -> None:
    config = MergeConfig(str(babies["base"]), split={"slices": 4}, gate_mode="zeros")
    ready = make_plan(config)
    assert len(ready.plan.experts) == 4
    assert parse_config(ready.config.as_yaml()) == config


def test_half_of_the_slices_are_on_if_nothing_is_said(babies: dict[str, Path]) -> None:
    def on(split: dict[str, Any]) -> int:
        return make_plan(MergeConfig(str(babies["base"]), split=split)).plan.experts_per_token

    assert (on({"slices": 8}), on({"slices": 6, "shared": 2})) == (4, 1)


def test_zeros_leave_experts_of_a_merge_alike(tmp_path: Path, babies: dict[str, Path]) -> None:
    """Both experts of two weigh one half."""
    text = simple_config(babies["base"], [babies["base"], babies["first"]], "gate_mode: zeros")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    model = load(tmp_path / "out")
    named = {n: p for n, p in model.named_parameters() if "gate.weight" in n or "router" in n}
    assert named
    assert not any(p.any() for p in named.values())


def test_nobody_reads_where_the_text_lay(tmp_path: Path, babies: dict[str, Path]) -> None:
    out = made(babies["base"], "slices: 4, assign: coactivation", "gate_mode: zeros",
               tmp_path / "out")  # fmt: skip
    assert str(babies["base"].parent) not in (out / "README.md").read_text()


def test_the_command_wants_a_split(
    tmp_path: Path, babies: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "c.yaml", split_config(babies["base"]))
    assert run("split", config, tmp_path / "out") == 0
    merge(config, tmp_path / "again")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    plain = write_config(tmp_path / "d.yaml", simple_config(babies["base"], [babies["first"]]))
    assert run("split", plain, tmp_path / "no") == 2
    assert "split: is missing" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_split_keeps_its_routers(tmp_path: Path, babies: dict[str, Path]) -> None:
    """They belong to its slices, which new ones would know nothing of."""
    out = made(babies["base"], "slices: 4", "gate_mode: random", tmp_path / "out")
    with pytest.raises(InputError, match="split the model again"):
        regate(out, tmp_path / "out.yaml")
