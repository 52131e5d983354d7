"""Fused tensors as their parts: each is the bytes it was cut from; no claim is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import (
    SIZES,
    make_adapter,
    make_model,
    save_weights,
    simple_config,
    write_config,
)
from fake_hub import FakeHub
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from moemerge import merge, verify_checkpoint
from moemerge.checkpoint.donor import Donor, Opener
from moemerge.checkpoint.location import read_bytes
from moemerge.checkpoint.not_a_model import SourceProblem
from moemerge.checkpoint.open import Checkpoint, open_checkpoint
from moemerge.checkpoint.reference import parse_source
from moemerge.errors import Findings
from moemerge.plan import recipe
from moemerge.plan.arithmetic import load

ROOT = Path(__file__).parents[1]
HEADS = {"pad_token_id": 0, "num_attention_heads": 4, "num_key_value_heads": 2}


def opened(directory: Path) -> Checkpoint:
    return open_checkpoint(parse_source(str(directory))[0])


def content(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    at = checkpoint.tensors[name]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[at.dtype]
    return torch.frombuffer(read_bytes(at), dtype=dtype).reshape(at.shape)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("phi3") / "phi3", "phi3", **HEADS)


@pytest.mark.parametrize("how", ["one file", "shards", "bins", "bfloat16"])
def test_a_phi3_is_opened_as_the_mistral_that_it_is(phi3: Path, tmp_path: Path, how: str) -> None:
    made = make_model(
        tmp_path / "phi3",
        "phi3",
        shards=3 if how == "shards" else 1,
        bins=how == "bins",
        dtype=torch.bfloat16 if how == "bfloat16" else torch.float32,
        **HEADS,
    )
    found = opened(made)
    assert not [name for name in found.tensors if "qkv" in name or "gate_up" in name]
    config = AutoConfig.for_model("mistral", **SIZES, sliding_window=None)
    dense = AutoModelForCausalLM.from_config(config).float()
    state = {name: content(found, name).float() for name in found.tensors}
    dense.load_state_dict(state, strict=True)
    whole = made if how == "bfloat16" else phi3
    original = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(dense(tokens).logits, original(tokens).logits, atol=1e-5)


def donor(text: str) -> Donor:
    findings = Findings()
    made = Opener(findings).donor(text, "base")
    assert made and not findings.problems, findings.problems
    return made


@pytest.mark.parametrize("saved", [None, ["gate_up_proj"]])
def test_an_adapter_of_fused_projections_does_what_peft_does(
    phi3: Path, tmp_path: Path, saved: list[str] | None
) -> None:
    settings: dict[str, Any] = {"modules_to_save": saved} if saved else {}
    targets = ["qkv_proj", "o_proj"] if saved else "all-linear"
    adapter = make_adapter(tmp_path / "a", phi3, target_modules=targets, **settings)
    plain = AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    made = donor(f"{phi3}+{adapter}")
    assert made.adapter
    checkpoints = [made.model, made.adapter.checkpoint]
    sources = {one.reference.text: one.tensors for one in checkpoints}
    layer = "model.layers.1."
    for fused, parts in {
        "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj": ["mlp.down_proj"],
    }.items():
        pieces = []
        for part in parts:
            name = f"{layer}{part}.weight"
            shape = made.model.tensors[name].shape
            pieces.append(load(name, shape, recipe.of_donor(made, name), sources).clone())
        assert torch.allclose(torch.cat(pieces), merged[f"{layer}{fused}.weight"], atol=1e-5)


def test_one_adapter_on_two_models_is_cut_for_both(phi3: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "phi3", seed=4, **{**HEADS, "num_key_value_heads": 4})
    assert other
    adapter = make_adapter(tmp_path / "a", phi3, target_modules=["gate_up_proj", "down_proj"])
    opener = Opener(Findings())
    first, second = (opener.donor(f"{one}+{adapter}", "x") for one in (phi3, other))
    assert first and second and first.adapter and second.adapter
    assert first.adapter.deltas == second.adapter.deltas
    assert not opener.findings.problems


def test_a_merge_of_phi3s_is_a_merge_of_mistrals(phi3: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", phi3, target_modules="all-linear")
    other = make_model(tmp_path / "other", "phi3", seed=5, shards=2, **HEADS)
    text = simple_config(phi3, [other, f"{phi3}+{adapter}"], "gate_mode: random")
    out = tmp_path / "out"
    merged = merge(write_config(tmp_path / "c.yaml", text), out)
    assert merged.plan.config["model_type"] == "mixtral"
    checked = verify_checkpoint(out)
    assert checked.compared == checked.tensors - 2
    have = load_file(next(out.glob("*2-of-*.safetensors")))
    fused = opened(other)
    for dense, name in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
        expected = content(fused, f"model.layers.0.mlp.{dense}.weight")
        assert torch.equal(
            have[f"model.layers.0.block_sparse_moe.experts.0.{name}.weight"], expected
        )


def test_streamed_and_fetched_they_are_the_same_bytes(tmp_path: Path) -> None:
    names = ["base", "first"]
    text = "base_model: user/base\ngate_mode: random\nexperts:\n" + "".join(
        f"  - {{source_model: user/{name}}}\n" for name in ["first", "base+user/adapter"]
    )
    config = write_config(tmp_path / "c.yaml", text)
    with FakeHub() as hub:
        for seed, name in enumerate(names):
            made = make_model(tmp_path / name, "phi3", seed=seed, shards=1 + seed, **HEADS)
            hub.publish(f"user/{name}", made)
        adapter = make_adapter(tmp_path / "a", tmp_path / "base", target_modules="all-linear")
        hub.publish("user/adapter", adapter)
        for how in (["cached"], ["streamed", "--stream"]):
            command = [config, tmp_path / how[0], *how[1:]]
            done = subprocess.run(
                [sys.executable, "-m", "moemerge", *map(str, command)],
                env={**os.environ, **hub.environment(tmp_path / "home" / how[0]),
                     "PYTHONPATH": str(ROOT)},
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "cached").glob("*.safetensors"))
    assert files
    for name in files:
        assert (tmp_path / "cached" / name).read_bytes() == (
            tmp_path / "streamed" / name
        ).read_bytes()


COMMON = {**SIZES, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"num_experts": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 3},
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    "granitemoe": {"num_local_experts": 3},
}


def make_mixture(directory: Path, family: str, fused: bool, bins: bool = False) -> Path:
    """A random mixture under the names of transformers 5's memory, or as it saves them."""
    directory.mkdir()
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **COMMON, **MIXTURES[family])
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    if fused:
        (directory / "model.safetensors").unlink()
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_weights(directory, state, shards=2, bins=bins)
    return directory


@pytest.mark.parametrize("family", MIXTURES)
def test_stacked_experts_are_opened_as_every_experts_own(tmp_path: Path, family: str) -> None:
    fused = opened(make_mixture(tmp_path / "fused", family, fused=True, bins=family == "olmoe"))
    plain = opened(make_mixture(tmp_path / "plain", family, fused=False))
    assert fused.views
    assert fused.tensors.keys() == plain.tensors.keys()
    for name in plain.tensors:
        assert torch.equal(content(fused, name), content(plain, name)), name


def shaped(tmp_path: Path, family: str, wrong: dict[str, tuple[int, ...]]) -> Path:
    """A model with some tensors of other shapes."""
    made = tmp_path / "made"
    if family == "phi3":
        make_model(made, "phi3", **HEADS)
    else:
        make_mixture(made, family, fused=True)
    state: dict[str, torch.Tensor] = {}
    for file in made.glob("*.safetensors"):
        state |= load_file(file)
        file.unlink()
    (made / "model.safetensors.index.json").unlink(missing_ok=True)
    state |= {f"model.layers.0.{name}": torch.zeros(shape) for name, shape in wrong.items()}
    save_weights(made, state)
    return made


STACK = "mlp.experts.gate_up_proj"
WRONG: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "rows that no heads have": ("phi3", {"self_attn.qkv_proj.weight": (63, 32)}, "not cut into 8"),
    "an odd MLP": ("phi3", {"mlp.gate_up_proj.weight": (95, 32)}, "not cut into 2 parts"),
    "no rows": ("phi3", {"mlp.gate_up_proj.weight": (0, 32)}, "not cut into 2 parts"),
    "a number": ("phi3", {"mlp.gate_up_proj.weight": ()}, "not cut into 2 parts"),
    "both": ("phi3", {"self_attn.q_proj.weight": (32, 32)}, "is there, and in"),
    "more experts": ("mixtral", {STACK: (4, 96, 32)}, r"says \[3, '2F', 32\]"),
    "another width": ("mixtral", {STACK: (3, 96, 16)}, r"says \[3, '2F', 32\]"),
    "an odd height": ("mixtral", {STACK: (3, 95, 32)}, r"says \[3, '2F', 32\]"),
    "a matrix": ("mixtral", {STACK: (96, 32)}, r"says \[3, '2F', 32\]"),
    "nothing inside": ("qwen3_moe", {"mlp.experts.down_proj": (3, 32, 0)}, r"says \[3, 32, 'F'\]"),
    "on its side": ("qwen3_moe", {"mlp.experts.down_proj": (3, 24, 32)}, r"says \[3, 32, 'F'\]"),
    "twice": ("mixtral", {"block_sparse_moe.experts.1.w2.weight": (32, 48)}, "is there, and in"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused(tmp_path: Path, what: str) -> None:
    family, wrong, words = WRONG[what]
    with pytest.raises(SourceProblem, match=words):
        opened(shaped(tmp_path, family, wrong))


def test_claims_of_many_parts_are_refused_before_they_cost_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_mixture(tmp_path / "made", "mixtral", fused=True)
    monkeypatch.setattr("moemerge.checkpoint.fused.MAX_PARTS", 10)
    with pytest.raises(SourceProblem, match="more parts than any model has"):
        opened(made)


def test_a_count_that_is_no_number_is_refused(tmp_path: Path) -> None:
    made = make_mixture(tmp_path / "made", "mixtral", fused=True)
    config = json.loads((made / "config.json").read_text())
    for count in ("3", None, [3], -3):
        (made / "config.json").write_text(json.dumps({**config, "num_local_experts": count}))
        with pytest.raises(SourceProblem, match="says"):
            opened(made)
