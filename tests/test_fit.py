"""A body fitted to texts (RegMean), and experts aligned to it: what is computed, and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import make_adapter, make_model, write_config
from gguf_files import make_wide
from kinds import make_kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moemerge import InputError, Options, export, merge, regate, verify_checkpoint
from moemerge.checkpoint import read_bytes
from moemerge.checkpoint.gguf.header import read_header
from moemerge.cli import app
from moemerge.fit import passes, targets
from moemerge.fit.align import correction
from moemerge.fit.regmean import LAMBDA, RegMean
from moemerge.gates.modes import self as writing

TEXTS = [
    ["def f(x):", "import os", "print(x)", "for i in range(3):", "return x", "x = [1, 2]"],
    ["the cat sat", "once upon a time", "she said hello", "a long walk", "the end", "in the sea"],
]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(root: Path, base: Path, experts: list[Any], head: str) -> Path:
    """Experts with several texts each."""
    lines = [f"base_model: {base}", head, "experts:"]
    for number, expert in enumerate(experts):
        lines += [f"  - source_model: {expert}", "    positive_prompts:"]
        lines += [f"      - {json.dumps(text)}" for text in TEXTS[number % 2]]
        if number > 1:
            lines.append(f"      - text of expert {number}")
    return write_config(root / "c.yaml", "\n".join(lines))


@pytest.mark.parametrize("tokens", [5, 40])
def test_regmean_is_its_formula(tokens: int) -> None:
    """In both forms, tokens by tokens and features by features."""
    drawn = torch.Generator().manual_seed(0)
    own = [torch.randn(7, 12, generator=drawn) for _ in range(2)]
    inputs = [torch.randn(tokens, 12, generator=drawn) * (n + 1) for n in range(2)]
    mean = sum(own) / 2
    lacking = [x @ (w - mean).T for x, w in zip(inputs, own, strict=True)]
    made, before, after = RegMean(inputs, [0.5, 0.5]).fit(mean, lacking)
    assert 0 < after < before
    grams = [x.T @ x for x in inputs]
    grams = [g / g.diagonal().mean() for g in grams]
    penalty = LAMBDA * sum(g.diagonal().mean() for g in grams) * torch.eye(12)
    wanted = sum(g @ w.T for g, w in zip(grams, own, strict=True)) + penalty @ mean.T
    wanted = torch.linalg.solve(sum(grams) + penalty, wanted).T
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


def test_alignment_is_ridge_regression_with_weighted_rows() -> None:
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 20, generator=drawn), torch.randn(6, 4, generator=drawn)
    state = torch.randn(6, 4, generator=drawn)
    up, down = correction(x, y, state)
    weights = 1 / state.square().mean(1, keepdim=True).sqrt()
    a, b = x * weights, y * weights
    penalty = 0.3 * (a @ a.T).diagonal().mean() * torch.eye(20)
    wanted = torch.linalg.solve(a.T @ a + penalty, a.T @ b).T
    torch.testing.assert_close(up @ down, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factored", [False, True])
def test_experts_that_are_the_base_leave_it_as_it_is(
    tmp_path: Path, babies: dict[str, Path], factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 1: the mixture's logits are the dense model's."""
    monkeypatch.setattr(targets, "is_factored", lambda *sizes: factored)
    base = babies["base"]
    head = "body: regmean\nalign: true\ngate_mode: random\ndtype: float32"
    merge(config_of(tmp_path, base, [base, base], head), tmp_path / "out")
    models = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in
              (base, tmp_path / "out"))  # fmt: skip
    ids = torch.arange(3, 20)[None]
    one, other = (model(ids).logits for model in models)
    torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)
    assert verify_checkpoint(tmp_path / "out").tensors


HEADS = {
    "regmean": "body: regmean\ngate_mode: random",
    "regmean, aligned": "body: regmean\nalign: true",
    "auto": "body: average\nalign: auto",
    "own text": "body: regmean\nalign: auto\ngate: { mode: self, samples: 4, tokens: 6 }",
    "base": "align: true\ngate_mode: hidden",
}  # fmt: skip


@pytest.mark.parametrize("what", HEADS)
def test_a_fit_is_the_same_each_time_also_after_a_kill(
    tmp_path: Path, babies: dict[str, Path], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the fit, after it, and while routers are made."""
    base, first, second = babies.values()
    config = config_of(tmp_path, base, [first, second], HEADS[what])
    merge(config, tmp_path / "a")
    wanted = tensors(tmp_path / "a")
    assert verify_checkpoint(tmp_path / "a").compared < len(wanted)  # the others by checksum
    written = list[object]()
    write, layer = writing.write, passes._Run.layer
    monkeypatch.setattr(writing, "write", lambda task: written.append(1) or write(task))

    def killed(self: Any, number: int, advance: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        layer(self, number, advance)

    monkeypatch.setattr(passes._Run, "layer", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(config, tmp_path / "b")
    monkeypatch.setattr(passes._Run, "layer", layer)
    with monkeypatch.context() as patch:
        patch.setattr("moemerge.merging.pipeline.make_routers", killed_at_once)
        with pytest.raises(KeyboardInterrupt):
            merge(config, tmp_path / "b")
    merge(config, tmp_path / "b", Options(lazy=True))
    made = tensors(tmp_path / "b")
    assert all(torch.equal(made[name], one) for name, one in wanted.items())
    assert len(written) == (1 if what == "own text" else 0)  # texts are written once


def killed_at_once(*arguments: Any, **named: Any) -> None:
    raise KeyboardInterrupt


def test_a_fitted_body_says_more_of_what_experts_say(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    """On an expert's own texts, its fitted matrices are nearer to its own than the mean is; norms
    and embeddings are the mean."""
    base, first, second = babies.values()
    for body in ("average", "regmean"):
        head = f"body: {body}\ngate_mode: random\ndtype: float32"
        merge(config_of(tmp_path, base, [first, second], head), tmp_path / body)
    mean, fitted = (tensors(tmp_path / body) for body in ("average", "regmean"))
    for name, one in mean.items():
        if "_proj" in name and "self_attn" in name:
            assert not torch.equal(one, fitted[name])
        elif "gate" not in name:
            assert torch.equal(one, fitted[name]), name


def test_alignment_is_kept_where_held_out_texts_get_more_likely(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, second = babies.values()
    head = "body: average\nalign: auto\ngate_mode: random"
    merge(config_of(tmp_path, base, [first, second], head), tmp_path / "out")
    told = json.loads((tmp_path / "out/moemerge.json").read_text())["fitted"]
    own = [tensors(one) for one in (first, second)]
    made = tensors(tmp_path / "out")
    for number, expert in enumerate(told["experts"]):
        without, aligned = expert["losses"]
        assert expert["aligned"] == (aligned < without)
        for layer in range(2):
            name = f"model.layers.{layer}"
            mine = made[f"{name}.block_sparse_moe.experts.{number}.w2.weight"]
            same = torch.equal(mine, own[number][f"{name}.mlp.down_proj.weight"])
            assert same != expert["aligned"]
    drift = np.array(told["drift"])
    assert drift.shape == (2, 2) and (drift > 0).all()


def test_alignment_brings_the_state_back(tmp_path: Path, babies: dict[str, Path]) -> None:
    """On texts like those of the fit."""
    base, first, second = babies.values()
    text = config_of(tmp_path, base, [first, second], "body: average\nalign: auto").read_text()
    text = text.replace("the end", "the cat sat").replace("for i in range(3):", "def f(x):")
    merge(write_config(tmp_path / "d.yaml", text), tmp_path / "out")
    told = json.loads((tmp_path / "out/moemerge.json").read_text())["fitted"]
    assert all(after < before for before, after in told["drift"])


SETTINGS: dict[str, dict[str, Any]] = {
    "phi3": {"pad_token_id": 0},
    "qwen3": {},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": {},
}  # fmt: skip


@pytest.mark.parametrize("family", [*SETTINGS, "gemma4", "lfm2", "qwen3.5", "cohere2"])
def test_every_family_is_fitted_where_it_can_be(tmp_path: Path, family: str) -> None:
    models = [
        make_model(tmp_path / f"m{n}", family, seed=n, **SETTINGS[family])
        if family in SETTINGS
        else make_kind(tmp_path / f"m{n}", family, seed=n)
        for n in range(2)
    ]
    head = "body: regmean\nalign: true\ngate_mode: random"
    merge(config_of(tmp_path, models[0], models, head), tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").tensors
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loaded(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_adapters_are_fitted(tmp_path: Path, babies: dict[str, Path]) -> None:
    base = babies["base"]
    lora = [make_adapter(tmp_path / f"lora{n}", base, seed=n) for n in range(2)]
    head = "body: regmean\nalign: true\ngate_mode: ridge"
    config = config_of(tmp_path, base, [f"{base}+{one}" for one in lora], head)
    merge(config, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out").tensors


def test_new_routers_read_the_fitted_body(tmp_path: Path, babies: dict[str, Path]) -> None:
    """From the mixture itself: the routers are those of the merge."""
    base, first, second = babies.values()
    head = "body: regmean\nalign: true\ngate_mode: {}"
    merge(config_of(tmp_path, base, [first, second], head.format("ridge")), tmp_path / "whole")
    merge(config_of(tmp_path, base, [first, second], head.format("random")), tmp_path / "out")
    regate(tmp_path / "out", config_of(tmp_path, base, [first, second], head.format("ridge")))
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert verify_checkpoint(tmp_path / "out").tensors


@pytest.mark.parametrize(
    ("head", "why"),
    [
        ("body: regmeam", "is no body"),
        ("align: maybe", "is none of auto, true, false"),
        ("align: true\nsplit: {slices: 2}", "align"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, babies: dict[str, Path], head: str, why: str
) -> None:
    with pytest.raises(InputError, match=why):
        merge(config_of(tmp_path, babies["base"], [babies["base"]], head), tmp_path / "out")


def test_a_fit_needs_texts(tmp_path: Path, babies: dict[str, Path]) -> None:
    text = f"base_model: {babies['base']}\nbody: regmean\ngate_mode: random\nexperts:\n"
    text += f"  - source_model: {babies['base']}\n" * 2
    with pytest.raises(InputError, match="body: regmean needs them"):
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")


def test_the_fit_is_told(tmp_path: Path, babies: dict[str, Path]) -> None:
    """At the end of the merge, in the card, and by `moemerge routing`."""
    base, first, second = babies.values()
    config = config_of(tmp_path, base, [first, second], "body: regmean\nalign: auto")
    result = CliRunner().invoke(app, [str(config), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    shown = CliRunner().invoke(app, ["routing", str(tmp_path / "out")]).output
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    for line in ("from the experts' own on their texts", "loss on held-out texts", "drift: "):
        assert all(line in " ".join(text.split()) for text in (result.output, shown, card))
    assert "fitted to their texts (RegMean)" in card


def test_a_fitted_body_becomes_a_gguf_file(tmp_path: Path, smollm2: Path) -> None:
    """With the values that it has in a directory."""
    models = [make_wide(tmp_path / f"m{n}", n) for n in range(2)]
    config = config_of(tmp_path, models[0], models, "body: regmean\nalign: true\ndtype: float32")
    merge(config, tmp_path / "out")
    merge(config, tmp_path / "one.gguf", Options(type="f32"))
    export(tmp_path / "out", tmp_path / "other.gguf", Options(type="f32"))
    one, other = (read_header(tmp_path / f"{name}.gguf") for name in ("one", "other"))
    for name, at in one.tensors.items():
        assert read_bytes(at) == read_bytes(other.tensors[name]), name
    merge(config, tmp_path / "small.gguf", Options(type="q8_0"))
    assert verify_checkpoint(tmp_path / "small.gguf").tensors
