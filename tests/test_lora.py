"""Adapters of mixtures: trained, resumed, loaded by PEFT as they are, and merged by streaming."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import WORDS, make_adapter, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_tune import data, made
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moemerge import InputError, Options, verify_checkpoint
from moemerge.cli import app
from moemerge.mixture.unfused import load
from moemerge.text.encoder import Encoder
from moemerge.training import lora as room
from moemerge.training.data import Passage, packed, passages_of
from moemerge.training.lora import Lora, chat_template, collate, finetune
from moemerge.training.merge_lora import merge_adapter
from moemerge.training.settings import Tuning

__all__ = ["data"]

pytestmark = pytest.mark.filterwarnings("ignore")


def tuning(data: str, **changes: Any) -> Tuning:
    return Tuning(
        (data,), **{"steps": 12, "batch": 4, "length": 32, "learning_rate": 1e-2, **changes}
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(4, 24)[None]).logits
    return found


MIXTURES = {
    "mixtral": ("llama", ""), "qwen3_moe": ("qwen3", ""), "flex_olmo": ("olmo2", ""),
    "granitemoe": ("granite", ""), "qwen2_moe": ("qwen2", "shared_experts"),
    "glm4_moe": ("llama", "shared_experts"), "granitemoeshared": ("granite", "shared_experts"),
    "granitemoehybrid": ("llama", "shared_experts"), "dots1": ("qwen3", "shared_experts"),
}  # fmt: skip


def mixture(folder: Path, architecture: str) -> Path:
    family, shared = MIXTURES[architecture]
    head = f"gate_mode: random\narchitecture: {architecture}"
    if shared:
        head += f"\nshared_experts:\n  - source_model: {folder / 'm1'}"
    return made(folder, family, head, **({"head_dim": 8} if family == "qwen3" else {}))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_peft_loads_it_and_merging_is_the_same(
    tmp_path: Path, data: str, architecture: str
) -> None:
    out = mixture(tmp_path, architecture)
    done = finetune(str(out), tmp_path / "a", tuning(data), Lora(rank=4))
    assert done.after < done.before
    plain = AutoModelForCausalLM.from_pretrained(out)
    was = logits(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|inconsisten).*")
        loaded = PeftModel.from_pretrained(plain, tmp_path / "a")
    ours = logits(loaded)
    assert (ours - was).abs().max() > 1e-2
    merge_adapter(str(out), str(tmp_path / "a"), tmp_path / "new")
    verify_checkpoint(tmp_path / "new")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new"))
    assert (merged - ours).abs().max() < 1e-4
    names = set(load_file(tmp_path / "a/adapter_model.safetensors"))
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert any(".experts." in name for name in names)
    shared = {name for name in names if ".shared_" in name}
    assert bool(shared) == bool(MIXTURES[architecture][1])


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "granitemoe"])
@pytest.mark.parametrize(
    "targets",
    [
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_parameters": ["experts.down_proj"], "use_rslora": True},
        {"target_parameters": ["experts.gate_up_proj"], "rank_pattern": {r".*gate_up_proj": 5}},
    ],
)
def test_what_plain_peft_trained_on_stacked_experts_is_merged(
    tmp_path: Path, architecture: str, targets: dict[str, Any]
) -> None:
    out = mixture(tmp_path, architecture)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **targets}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(out), LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "a")
    merge_adapter(str(out), str(tmp_path / "a"), tmp_path / "new")
    verify_checkpoint(tmp_path / "new")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert (logits(merged) - logits(model)).abs().max() < 1e-3
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(out))).abs().max() > 0.1


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_only_what_is_meant_changes(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, embeddings: bool, tied: bool
) -> None:
    models, before = [], {}

    def kept(*arguments: Any) -> Any:
        models.append(load(*arguments))
        before.update({name: p.detach().clone() for name, p in models[0].named_parameters()})
        return models[0]

    monkeypatch.setattr(room, "load", kept)
    out = made(tmp_path, tie_word_embeddings=tied)
    wanted = Lora(rank=4, embeddings=embeddings, save_every=5)
    done = finetune(str(out), tmp_path / "a", tuning(data), wanted)
    assert done.after < done.before
    after = dict(models[0].named_parameters(remove_duplicate=False))
    frozen = {re.sub(r"\.(base_layer|original_module)", "", name): name for name in after}
    assert all(torch.equal(after[frozen.pop(name)], was) for name, was in before.items())
    if tied:
        assert torch.equal(after[frozen.pop("lm_head.weight")], before["model.embed_tokens.weight"])
    trained = [name for name in frozen if after[name].requires_grad]
    assert trained == list(frozen)
    own = {name for name in trained if ".lora_" not in name}
    ends = {"model.embed_tokens", "lm_head"} if embeddings else set()
    assert own == {f"{name}.modules_to_save.default.weight" for name in ends}
    assert len({after[name].data_ptr() for name in own}) == (0 if not own else 2 - tied)
    for name in own:
        was = before[
            "lm_head.weight" if "lm_head" in name and not tied else "model.embed_tokens.weight"
        ]
        assert not torch.equal(after[name], was)
    assert all(after[name].any() for name in trained if ".lora_B." in name)
    assert not [name for name in trained if ".gate." in name or "norm" in name]

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), tmp_path / "a")
    merge_adapter(str(out), str(tmp_path / "a"), tmp_path / "new")
    verify_checkpoint(tmp_path / "new")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert (logits(merged) - logits(loaded)).abs().max() < 1e-4
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_of_embeddings_and_head_only_the_new_rows_change(
    tmp_path: Path, data: str, tied: bool
) -> None:
    out = made(tmp_path, tie_word_embeddings=tied)
    wanted = Lora(rank=4, embeddings=True, first_row=10)
    finetune(str(out), tmp_path / "a", tuning(data), wanted)
    finetune(
        str(out), tmp_path / "b", tuning(data), dataclasses.replace(wanted, embedding_rate=1e-7)
    )
    first = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changes = []
        for adapter in ("a", "b"):
            saved = load_file(tmp_path / adapter / "adapter_model.safetensors")
            (key,) = (key for key in saved if key.endswith(name))
            changes.append((saved[key] - first[name]).abs())
        assert changes[0][:10].max() == changes[1][:10].max() == 0
        assert changes[0][10:].max() > 1e-3 > 1e-5 > changes[1][10:].max()


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (Lora(first_row=3), "first_row: is|first_row: has"),
        (Lora(embedding_rate=1e-3), "embedding_rate: "),
        (Lora(embeddings=True, first_row=10**6), "first_row: is|first_row: has"),
        (Lora(embeddings=True, embedding_rate=0.0), "embedding_rate: "),
    ],
)
def test_rows_that_are_not_there_are_refused(
    tmp_path: Path, data: str, wrong: Lora, where: str
) -> None:
    out = made(tmp_path)
    with pytest.raises(InputError, match=where):
        finetune(str(out), tmp_path / "a", tuning(data), wrong)
    assert not (tmp_path / "a").exists()


def test_four_bits_learn_too(tmp_path: Path, data: str) -> None:
    out = made(tmp_path)
    options = Options(load_in_4bit=True)
    done = finetune(str(out), tmp_path / "a", tuning(data), Lora(rank=4), options)
    assert done.after < done.before


CHILD = """
import json, os, signal, sys, warnings
warnings.simplefilter("ignore")
from moemerge.training import lora as room
from moemerge.training import Tuning

out, adapter, last, lora, tuning = json.loads(sys.argv[1])
whole, read = room.collate, []

def collate(passages):
    read.append(passages)
    if len(read) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(passages)

room.collate = collate
room.finetune(out, adapter, Tuning(**tuning), room.Lora(**lora))
"""


def losses(adapter: Path) -> list[tuple[int, float]]:
    told = json.loads((adapter / "checkpoints/checkpoint-12/trainer_state.json").read_text())
    return [(one["step"], one["loss"]) for one in told["log_history"] if "loss" in one]


def test_killed_training_goes_on_as_if_it_had_not_been(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[Passage]] = []

    def noted(passages: list[Passage]) -> dict[str, Any]:
        read.append(passages)
        return collate(passages)

    monkeypatch.setattr(room, "collate", noted)
    out = str(made(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True))
    lora = Lora(rank=4, save_every=5, embeddings=True)
    finetune(out, tmp_path / "a", tuning(data), lora)
    held, whole = (len(read) - 12) // 2, list(read)
    assert whole[:held] == whole[-held:]

    told = [out, str(tmp_path / "b"), held + 8, vars(lora), vars(tuning(data))]
    command = [sys.executable, "-c", CHILD, json.dumps(told)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "b/checkpoints").glob("check*")] == ["checkpoint-5"]
    assert not (tmp_path / "b/adapter_model.safetensors").exists()

    read.clear()
    finetune(out, tmp_path / "b", tuning(data), dataclasses.replace(lora, resume=True))
    assert read == whole[held + 5 :]
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert [step for step, _ in losses(tmp_path / "b")] == list(range(1, 13))
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path, data: str) -> None:
    out = str(made(tmp_path))
    lora = Lora(rank=4, save_every=5, packing=False)
    first = finetune(out, tmp_path / "a", tuning(data), lora)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/checkpoints/checkpoint-12/trainer_state.json").write_text('{"log_his')
    (tmp_path / "b/adapter_model.safetensors").unlink()
    again = dataclasses.replace(lora, resume=True)
    for done in (finetune(out, tmp_path / "b", tuning(data), again) for _ in range(2)):
        assert done == dataclasses.replace(first, adapter=tmp_path / "b")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    for name, changed, rank in (("steps: ", {"steps": 9}, 4), ("rank: ", {}, 3)):
        with pytest.raises(InputError, match=name):
            other = dataclasses.replace(again, rank=rank)
            finetune(out, tmp_path / "b", tuning(data, **changed), other)
    with Path(data).open("a") as file:
        file.write('\n{"text": "hello please code python"}')
    with pytest.raises(InputError, match="data: is not what"):
        finetune(out, tmp_path / "b", tuning(data), again)
    shutil.rmtree(tmp_path / "b/checkpoints")
    (tmp_path / "b/checkpoints").mkdir()
    assert finetune(out, tmp_path / "b", tuning(data, steps=3), again).steps == 3


def test_packed_texts_do_not_see_each_other(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made(tmp_path))
    parts = [Passage(tuple(range(a, a + 8)), (False, *(True,) * 7)) for a in (4, 12)]
    both = collate(packed(parts, 16))
    found = model(
        input_ids=both["input_ids"], position_ids=both["position_ids"], use_cache=False
    ).logits
    alone = model(input_ids=both["input_ids"][:, 8:]).logits
    assert (found[:, 8:] - alone).abs().max() < 1e-5


def test_only_the_assistants_turns_are_learnt(tmp_path: Path) -> None:
    def template(turns: Any, asked: bool) -> str:
        said = " ".join(f"{turn['role']} {turn['content']}" for turn in turns)
        return (said + " assistant ") if asked else said

    turns = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "tell me"})
    (made_of,) = passages_of(turns, Encoder(made(tmp_path)), 64, template)
    assert made_of.counted == (False, False, False, True, True)


CHATML = """{% for turn in messages %}{{ '<|user|> ' if turn.role == 'user' else '<s> ' }}
{{- turn.content }} </s>{% endfor %}{% if add_generation_prompt %}<s> {% endif %}"""


def chat(path: Path, count: int = 12) -> Path:
    """Conversations of two questions and answers."""
    asked, told = ("hello please", "count the number"), ("tell me", "code python function")
    turns = [
        {"role": role, "content": f"{text} {WORDS[at]}"}
        for at in range(2)
        for role, text in (("user", asked[at]), ("assistant", told[at]))
    ]
    path.write_text("\n".join([json.dumps({"messages": turns})] * count))
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_line_from_chat_to_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = set()

    def noted(passages: list[Passage]) -> dict[str, Any]:
        learnt.update(tuple(p.ids[n] for n, own in enumerate(p.counted) if own) for p in passages)
        return collate(passages)

    monkeypatch.setattr(room, "collate", noted)
    out = made(tmp_path)
    (out / "chat_template.jinja").write_text(CHATML)
    told = ["--data", chat(tmp_path / "chat.jsonl"), "--steps", 3, "--batch", 2, "--rank", 2]
    told += ["--no-packing", "--length", 32]
    for name, how in (("plain", []), ("quantised", ["--qlora"])):
        adapter = tmp_path / name
        done = run("tune", "lora", out, adapter, *how, *told, "--embeddings", "--save-every", 2)
        assert done.exit_code == 0, done.output
        assert "trained for 3 steps, held-out loss" in done.output
        done = run("tune", "lora", out, adapter, *how, *told, "--embeddings", "--resume")
        assert done.exit_code == 0, done.output
        assert "checkpoint-3" in done.output
        done = run("merge-adapter", out, adapter, tmp_path / f"new-{name}")
        assert done.exit_code == 0, done.output
        verify_checkpoint(tmp_path / f"new-{name}")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    said = "tell me code </s> code python function python </s>"
    assert learnt == {tuple(tokenizer.encode(said, add_special_tokens=False).ids)}


def test_a_real_chat_template_is_learnt_from_the_answer_to_its_end(smollm2: Path) -> None:
    encoder, template = Encoder(smollm2), chat_template(smollm2)
    turns = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}) * 2
    (one,) = passages_of(turns, encoder, 512, template)
    counted = [token for token, own in zip(one.ids, one.counted, strict=True) if own]
    assert encoder.tokenizer.decode(counted, skip_special_tokens=False) == (
        "Nobody.<|im_end|>\nNobody.<|im_end|>\n"
    )


@pytest.mark.full
def test_two_processes_train_one_adapter(tmp_path: Path, data: str) -> None:
    out = made(tmp_path)
    told = ["tune", "lora", out, tmp_path / "a", "--data", data, "--steps", 4, "--batch", 2]
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "moemerge"]
    command = [sys.executable, "-m", *map(str, (*launch, *told))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("trained for 4 steps, held-out loss") == 1
    states = (tmp_path / "a/checkpoints/checkpoint-4").glob("rng_state_*.pth")
    assert len(list(states)) == 2
    with pytest.raises(InputError, match="num_processes"):
        wanted = tuning(data, steps=4, batch=2, length=None, learning_rate=2e-4)
        finetune(str(out), tmp_path / "a", wanted, Lora(resume=True))
    again = subprocess.run([*command, "--resume"], check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    merge_adapter(str(out), str(tmp_path / "a"), tmp_path / "new")
    verify_checkpoint(tmp_path / "new")


def test_bad_input_is_told_once(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, broken = made(tmp_path), tmp_path / "broken.jsonl"
    broken.write_text('{"text": "hello"}\n{"text": ')
    spoken = chat(tmp_path / "chat.jsonl")
    for adapter, arguments, said in (
        ("a", ["--data", broken], "broken.jsonl"),
        ("a", ["--data", spoken], "does not tell the assistant's turns apart"),
        ("a", ["--data", data, "--rank", "0"], "--rank"),
        ("a", ["--data", data, "--alpha", "nan"], "--alpha"),
        ("a", ["--data", data, "--resume"], "holds no checkpoints"),
        ("m0", ["--data", data], "is there already"),
        ("a", ["--data", data, "--steps", "0"], "--steps"),
    ):
        done = run("tune", "lora", out, tmp_path / adapter, *arguments)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 2), done.output
        assert said in done.stderr
    (out / "chat_template.jinja").unlink()
    assert "has no chat template" in run("tune", "lora", out, "a", "--data", spoken).stderr
    make_adapter(tmp_path / "other", make_model(tmp_path / "wide", hidden_size=64))
    for adapter, said in (("other", "trained on"), ("m0", "adapter"), ("none", "none")):
        done = run("merge-adapter", out, tmp_path / adapter, tmp_path / "new")
        assert (done.exit_code, done.stderr.count("\n")) == (2, 2), done.output
        assert said in done.stderr
    monkeypatch.setitem(sys.modules, "peft", None)
    done = run("tune", "lora", out, tmp_path / "a", "--data", data)
    assert done.exit_code == 2
    assert "pip install 'moemerge[train]'" in done.stderr
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "new").exists()
