"""Experts that are always on, routing by sigmoids, and mixtures that are made to be trained."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import make_model, write_config
from test_laws import all_tensors, load, logits, raw, same_bytes

from moemerge import InputError, Options, make_plan, merge, parse_config
from moemerge.architectures.slots import Mixture
from moemerge.gates.load_balance import biases
from moemerge.gates.task import Example, Routers
from moemerge.text.encoder import Prompt

HALF = "residual_scale: 0.5"
ALWAYS_ON = {
    "granitemoeshared": "llama",
    "glm4_moe": "qwen2",
    "dots1": "qwen3",
    "qwen2_moe": "llama",
}


def text_of(base: Path, experts: list[Path], head: str, each: str = "", shared: str = "") -> str:
    listed = "".join(
        f"  - {{ source_model: {expert}, positive_prompts: [{prompt}], {each} }}\n"
        for expert, prompt in zip(experts, ["code python", "story scene", "maths"], strict=False)
    )
    return f"base_model: {base}\n{head}\nexperts:\n{listed}{shared}"


def merged(tmp_path: Path, text: str, name: str = "out", **options: Any) -> Path:
    merge(write_config(tmp_path / f"{name}.yaml", text), tmp_path / name, Options(**options))
    return tmp_path / name


def model(directory: Path, family: str, **changes: Any) -> Path:
    head = {"head_dim": 8} if family == "qwen3" else {}
    return make_model(directory, family=family, **head, **changes)


@pytest.mark.parametrize("architecture", ALWAYS_ON)
@pytest.mark.parametrize("count", [1, 2])
def test_shared_experts_add_what_they_are(tmp_path: Path, architecture: str, count: int) -> None:
    """Half the MLP in the routed experts and half in the shared ones is the dense model."""
    base = model(tmp_path / "base", ALWAYS_ON[architecture])
    one = f"  - {{ source_model: {base}, residual_scale: {0.5 / count} }}\n"
    text = text_of(base, [base] * 3, f"architecture: {architecture}", HALF,
                   "shared_experts:\n" + one * count)  # fmt: skip
    out = merged(tmp_path, text)
    assert (logits(base) - logits(out)).abs().max() <= 1e-5


@pytest.mark.parametrize("architecture", ALWAYS_ON)
def test_a_shared_expert_is_its_own_model(tmp_path: Path, architecture: str) -> None:
    """Without the routed experts' part, a mixture of the base is the shared model's MLPs in it."""
    family = ALWAYS_ON[architecture]
    base, other = model(tmp_path / "base", family), model(tmp_path / "other", family, seed=1)
    shared = f"shared_experts:\n  - source_model: {other}\n"
    text = text_of(base, [base] * 2, f"architecture: {architecture}", "residual_scale: 0", shared)
    out = merged(tmp_path, text)
    expected = load(base)
    theirs = load(other).state_dict()
    expected.load_state_dict({n: t for n, t in theirs.items() if ".mlp." in n}, strict=False)
    with torch.inference_mode():
        ids = torch.tensor([[1, *range(3, 40)]])
        assert (expected(ids).logits - load(out)(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_shared_expert_is_half_open_and_its_gate_not_zero(tmp_path: Path, dtype: str) -> None:
    """llama.cpp makes NaN of a gate's logit of zero."""
    base = model(tmp_path / "base", "qwen2")
    shared = f"shared_experts:\n  - source_model: {base}\n"
    head = f"architecture: qwen2_moe\ndtype: {dtype}"
    mixture, seen = load(merged(tmp_path, text_of(base, [base] * 2, head, shared=shared))), []
    for layer in mixture.model.layers:
        layer.mlp.shared_expert_gate.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.inference_mode():
        mixture(torch.tensor([[1, *range(3, 40)]]))
    logits = torch.stack(seen)
    assert (logits != 0).all()
    assert (logits.sigmoid() - 0.5).abs().max() <= (1e-6 if dtype == "float16" else 0)


def test_prompts_gate_a_shared_expert(tmp_path: Path) -> None:
    """What its prompts make the layer see opens the gate; what other prompts do closes it."""
    base, other = model(tmp_path / "base", "qwen2"), model(tmp_path / "other", "qwen2", seed=1)
    shared = f"shared_experts:\n  - {{ source_model: {other}, positive_prompts: [chat hello] }}\n"
    text = text_of(base, [base, other], "gate: { mode: ridge, on_policy: false }", shared=shared)
    assert make_plan(parse_config(text)).plan.architecture == "qwen2_moe"
    out = merged(tmp_path, text)
    mixture, seen = load(out), []
    for layer in mixture.model.layers:
        layer.mlp.shared_expert_gate.register_forward_hook(lambda m, a, out: seen.append(out))
    words = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    with torch.inference_mode():
        for prompt in ("chat hello", "code python"):
            mixture(torch.tensor([[1, *(words[word] for word in prompt.split())]]))
    own, foreign = seen[:2], seen[2:]
    assert own[0][..., 1:, :].min() > 0 > foreign[0][..., 1:, :].max()


def test_the_selection_bias_spreads_the_load() -> None:
    rng = np.random.default_rng(0)
    lean = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    layer = [rng.normal(size=(50, 4)).astype(np.float32) + lean for _ in range(4)]
    texts = tuple(Example(Prompt((1,), 0), expert) for expert in range(4))
    made = Routers([np.zeros((4, 8), np.float32)], texts, (layer,))
    (bias,) = biases(made, Mixture(4, 2, 8))

    def load_with(bias: Any) -> Any:
        scores = 1 / (1 + np.exp(-np.concatenate(layer))) + bias
        first = np.argsort(-scores, axis=1)[:, :2]
        return np.bincount(first.ravel(), minlength=4) / first.size

    assert np.ptp(load_with(0)) > 0.4
    assert np.ptp(load_with(bias)) < 0.02
    none = Routers([np.ones((4, 8), np.float32)] * 2, (), ())
    assert [one.tolist() for one in biases(none, Mixture(4, 2, 8))] == [[0.0] * 4] * 2


def test_groups_and_scaling_are_the_architectures_own(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "qwen3")
    head = (
        "architecture: dots1\narchitecture_options: { groups: 2, groups_per_token: 1, "
        "routed_scaling_factor: 2.0 }"
    )
    experts = "".join(
        f"  - {{ source_model: {base}, positive_prompts: [{word}], {HALF} }}\n"
        for word in ("code", "story", "maths", "chat")
    )
    out = merged(tmp_path, f"base_model: {base}\n{head}\nexperts:\n{experts}")
    config = json.loads((out / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (2, 1)
    assert (logits(base) - logits(out)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("groups: 3", "groups: is 3 with 2 experts"),
        ("groups: 2", "groups: is 2 with 2 experts"),
        ("groups: two", "groups: is 'two'"),
        ("groups_per_token: 2", "groups_per_token: is 2 with 1 groups"),
        ("routed_scaling_factor: 0", "routed_scaling_factor: is 0"),
        ("grups: 1", "grups: is no option of a glm4_moe"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, babies: dict[str, Path], options: str, line: str
) -> None:
    base = babies["base"]
    head = f"architecture: glm4_moe\narchitecture_options: {{ {options} }}"
    with pytest.raises(InputError) as caught:
        make_plan(parse_config(text_of(base, [base, base], head)))
    assert line in str(caught.value)


def test_training_keys_are_kept(tmp_path: Path, babies: dict[str, Path]) -> None:
    base = babies["base"]
    head = "training: { router_aux_loss_coef: 0.02, output_router_logits: true }"
    config = make_plan(parse_config(text_of(base, [base, base], head))).plan.config
    assert config["router_aux_loss_coef"] == 0.02
    assert config["output_router_logits"] is True
    assert config["router_jitter_noise"] == 0.0
    for wrong, line in (
        ("{ router_aux_loss_coef: much }", "router_aux_loss_coef: is 'much'"),
        ("{ learning_rate: 1 }", "learning_rate: is no training key of a mixtral's config"),
    ):
        with pytest.raises(InputError) as caught:
            make_plan(parse_config(text_of(base, [base, base], f"training: {wrong}")))
        assert line in str(caught.value)


def test_renewed_neurons_are_drawn_from_their_matrixs_statistics(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    """The same neurons in an expert's three matrices, others in the next; the rest are copies."""
    base = babies["base"]
    text = text_of(base, [base, base], "gate_mode: random", "renew: 0.25")
    out = all_tensors(merged(tmp_path, text, seed=3))
    dense = all_tensors(base)
    anew = {}
    for layer in range(2):
        for expert in range(2):
            found = []
            for which, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                ours = out[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
                theirs = dense[f"model.layers.{layer}.mlp.{which}.weight"]
                if which == "down_proj":
                    ours, theirs = ours.T, theirs.T
                changed = (ours != theirs).any(dim=1)
                assert (ours != theirs)[changed].all()
                found.append(changed)
                new = ours[changed]
                assert (
                    abs(float(new.mean() - theirs.mean())) < 4 * theirs.std() / new.numel() ** 0.5
                )
                assert abs(float(new.std() / theirs.std()) - 1) < 0.2
            assert all(torch.equal(found[0], one) for one in found)
            assert found[0].sum() == 12
            anew[layer, expert] = found[0]
    assert len({tuple(one.tolist()) for one in anew.values()}) == 4
    again = all_tensors(merged(tmp_path, text, "again", seed=3, jobs=8))
    assert same_bytes(out, again)
    other = all_tensors(merged(tmp_path, text, "other", seed=4))
    w1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert raw(other[w1]) != raw(out[w1])


def test_statistics_are_those_of_the_file_that_is_there_now(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    """A second merge in this process, after the file was replaced by one of its size and times."""
    base, weights = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    shutil.copytree(babies["base"], base)
    text = text_of(base, [base, base], "gate_mode: random", "renew: 0.25")
    merged(tmp_path, text, "first")
    times = weights.stat()
    weights.write_bytes((babies["first"] / "model.safetensors").read_bytes())
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    out = all_tensors(merged(tmp_path, text, "second"))
    text = text.replace(str(base), str(babies["first"]))
    assert same_bytes(out, all_tensors(merged(tmp_path, text, "of the other")))


def test_a_share_to_renew_is_a_share(tmp_path: Path, babies: dict[str, Path]) -> None:
    base = babies["base"]
    with pytest.raises(InputError, match=r"renew: is 1\.5"):
        make_plan(parse_config(text_of(base, [base, base], "", "renew: 1.5")))
