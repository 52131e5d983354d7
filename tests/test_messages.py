"""Messages that lead somewhere: what a model is, what a path was meant to be, each thing once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_model, save_weights, simple_config, write_config
from safetensors.torch import load_file, save_file
from test_refusals import BASE, FIRST, GOOD, invoke, refused, refused_config
from transformers import AutoConfig

from moemerge import (
    InputError,
    extract,
    make_plan,
    merge,
    parse_config,
    repair,
    top_k,
    verify_checkpoint,
)
from moemerge.checkpoint.location import read_bytes
from moemerge.checkpoint.open import open_checkpoint
from moemerge.checkpoint.reference import Reference
from moemerge.gates.statistics import verdict
from moemerge.prepare.choose import no_host

# what a model is

FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    # model_type: (what transformers would not write by itself, what is said of it)
    "llava": ({}, "it reads more than text (vision_config); save its text model, a 'llama'"),
    "mistral3": ({}, "it reads more than text (vision_config); save its text model, a 'mistral'"),
    "gemma3": ({}, "it norms queries and keys but not values"),
    "qwen2_5_vl": ({}, "it reads more than text (vision_config)"),
    "qwen2_vl": ({}, "it reads more than text (vision_config)"),
    "internvl": ({}, "it reads more than text (vision_config)"),
    "mllama": ({}, "it reads more than text (vision_config)"),
    "llama4": ({}, "it reads more than text (vision_config)"),
    "gpt2": ({}, "its MLPs have no gate"),
    "gpt_neox": ({}, "its MLPs have no gate"),
    "gptj": ({}, "its MLPs have no gate"),
    "opt": ({}, "its MLPs have no gate"),
    "mpt": ({}, "its MLPs have no gate"),
    "bloom": ({}, "its MLPs have no gate"),
    "falcon": ({}, "its MLPs have no gate"),
    "t5": ({}, "it is an encoder and a decoder"),
    "bart": ({"is_encoder_decoder": True}, "it is an encoder and a decoder"),
    "dbrx": ({}, "it is a mixture already; use a model of type"),
    "mamba": ({}, "it has no MLPs"),
    "mixtral": (
        {"num_hidden_layers": 1},
        "it is a mixture already; make a dense model of one expert, `moemerge extract",
    ),
    "qwen3_moe": ({"num_hidden_layers": 1}, "make a dense model of one expert"),
    "deepseek_v3": ({}, "it is a mixture already"),
    "gpt_oss": ({}, "it is a mixture already"),
    "gemma2": ({}, "softcaps"),
    "cohere": ({}, "its attention and MLP are parallel"),
    "bert": ({}, "no mixture class is known to reproduce it"),
    "of_next_year": ({"hidden_size": 8}, "no mixture class is known to reproduce it"),
}


def of_family(directory: Path, family: str, more: dict[str, Any]) -> Path:
    """A model of which its config.json is enough to know that it cannot be."""
    told: dict[str, Any] = {}
    if family != "of_next_year":
        told = json.loads(json.dumps(AutoConfig.for_model(family).to_dict(), default=str))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**told, **more, "model_type": family}))
    save_file({"x": torch.zeros(2, 2)}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_which_no_mixture_can_be_made_is_named_by_its_type(
    family: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    """Once, whatever is made of it, and nothing follows from it."""
    more, words = FAMILIES[family]
    model = of_family(tmp_path / "model", family, more)
    text = GOOD.replace("{base}", str(model)).replace("{first}", str(model))
    [problem] = refused_config(text.replace("{second}", str(model)), babies, tmp_path)
    assert problem.startswith(f"  {BASE}: is a {family!r} model: ") and words in problem
    assert "segments" not in problem
    if words != FAMILIES["bert"][1]:  # else it may be a Llama by another name: --allow-crimes
        found = refused_config(GOOD.replace("{first}", str(model)), babies, tmp_path)
        assert [line.startswith(f"  {FIRST}: is a {family!r} model: ") for line in found] == [True]


def test_what_mixtures_are_made_of_is_not_refused() -> None:
    assert no_host({"model_type": "llama", "num_experts": 0}) == ("", "")


def test_a_mixture_is_made_dense_as_the_message_says(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    base, first, _ = babies.values()
    text = simple_config(base, [first, base], "gate_mode: random")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "moe")
    [added] = refused("add", tmp_path / "moe", tmp_path / "moe", tmp_path / "more")
    [problem] = refused_config(GOOD.replace("{base}", str(tmp_path / "moe")), babies, tmp_path)
    assert problem.removeprefix(f"  {BASE}") == added.removeprefix("  SOURCE")
    command = problem.split("`moemerge ")[1].split("`")[0].split()
    out = {"MOE": tmp_path / "moe", "OUT": tmp_path / "dense"}
    assert invoke(*(out.get(word, word) for word in command)).exit_code == 0
    make_plan(parse_config(simple_config(tmp_path / "dense", [base, first])))


ARCHITECTURES = {
    # base: (what a config asks for, the key's place, what would do)
    "qwen3": ("qwen", "a qwen2_moe cannot be made of a 'qwen3' model", "qwen3_moe"),
    "qwen2": ("qwen3_moe", "a qwen3_moe cannot be made of a 'qwen2' model", "granitemoe"),
    "llama": ("qwen3", "a qwen3_moe cannot be made of a 'llama' model", "mixtral"),
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_architecture_of_another_family_is_the_keys_fault(tmp_path: Path, family: str) -> None:
    said, words, better = ARCHITECTURES[family]
    base = make_model(tmp_path / "base", family)
    text = simple_config(base, [base, base], f"architecture: {said}")
    with pytest.raises(InputError) as no:
        make_plan(parse_config(text))
    [problem] = no.value.problems
    assert problem.where == "config:2: architecture" and words in problem.what
    assert problem.fix.startswith(f"write {better}")
    make_plan(parse_config(text.replace(f"architecture: {said}", f"architecture: {better}")))


DENSE = {
    "ties": "models:\n  - model: a\n  - model: b\nmerge_method: ties\nbase_model: c\n"
            "parameters: { normalize: true }\ndtype: bfloat16\n",
    "slerp": "slices:\n  - sources:\n      - { model: a, layer_range: [0, 4] }\n"
             "merge_method: slerp\nbase_model: a\nparameters: { t: 0.5 }\n",
    "a graph of modules": "modules: { text: {} }\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", DENSE)
def test_a_config_of_mergekit_yaml_is_called_that_once(
    kind: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    [problem] = refused_config(DENSE[kind], babies, tmp_path)
    assert problem.startswith("  config.yaml:1: ") and "of mergekit-yaml" in problem
    assert "run mergekit-yaml with it" in problem


# where a path leads


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, babies: dict[str, Path]) -> Path:
    """A working directory with a model in a folder; whoever asks a network fails the test."""

    def ask(*args: object) -> None:
        raise AssertionError("asked the Hub")

    made = tmp_path / "work"
    shutil.copytree(babies["first"], made / "models" / "tiny-llama")
    monkeypatch.chdir(made)
    monkeypatch.setattr("moemerge.hub.download.open_snapshot", ask)
    return made


PATHS = {
    "./models/tiny-lama": "models/tiny-llama",
    "models/tiny-lama": "models/tiny-llama",
    "models/Tiny-LLaMA": "models/tiny-llama",
    "./model/tiny-llama": "models/tiny-llama",
    "../work/models/tiny": "",
    "{folder}/models/tinyllama": "{folder}/models/tiny-llama",
    "{folder}/modles/tiny-llama": "{folder}/models/tiny-llama",
    "./modeles/tiny": "models",
    "models/xyz": "",
    "~/nothing-like-it": "",
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("role", ["base", "adapter", "beside"])
def test_a_path_that_leads_nowhere_gets_the_nearest_one(
    path: str, role: str, folder: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    named, meant = (text.replace("{folder}", str(folder)) for text in (path, PATHS[path]))
    text = f"{babies['base']}+{named}" if role == "adapter" else named
    if role == "beside":  # of the config's folder
        monkeypatch.chdir("/")
    [problem] = refused_config(GOOD.replace("{base}", text), babies, folder)
    assert f"there is no directory {named!r}" in problem
    if role == "beside" and named.startswith(".."):
        return
    assert ("did you mean" in problem) == bool(meant), problem
    assert not meant or f"did you mean {meant!r}?" in problem
    other = not named.startswith((".", "/", "~"))
    assert ("if the Hub's is meant, write models/" in problem) == other


def test_commands_for_mixtures_say_it_too(folder: Path) -> None:
    [problem] = refused("extract", "models/tiny-lama", folder / "x", "--expert", "0")
    assert "did you mean 'models/tiny-llama'?" in problem
    [problem] = refused("verify", "models/tiny-lama")
    assert "did you mean 'models/tiny-llama'?" in problem


def test_what_is_neither_here_nor_on_the_hub_may_have_been_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, babies: dict[str, Path]
) -> None:
    """A name without a folder is asked for first; then the nearest directory is named."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(babies["first"], tmp_path / "tiny-llama")
    for named, near in (("tiny-lama", True), ("lab/tiny-lama", False), ("quite-other", False)):
        [problem] = refused_config(GOOD.replace("{base}", named), babies, tmp_path)
        assert "is neither a directory nor in the Hub's cache" in problem
        assert ("did you mean 'tiny-llama'?" in problem) == near, problem
        assert "check the name" in problem


# once


def test_what_is_in_vain_is_said_once(babies: dict[str, Path], tmp_path: Path) -> None:
    text = simple_config(
        babies["base"], list(babies.values()), "gate_mode: random", "body_weight: 2\ncalibration: t"
    )
    config = write_config(tmp_path / "c.yaml", text)
    done = invoke("plan", config, "--lazy", "--device=cpu", "--overwrite", "--jobs=2")
    said = [line for line in done.stderr.splitlines() if "no effect" in line]
    assert sorted(said) == [
        "note: --lazy, --device have no effect: gate_mode: random runs no model",
        "note: --overwrite, --jobs have no effect: plan writes nothing",
        "note: experts[0].body_weight, experts[1].body_weight, experts[2].body_weight have no "
        "effect: body is base",
        "note: prompts, calibration have no effect with gate_mode: random",
    ]


def test_what_is_true_of_many_experts_is_said_once(babies: dict[str, Path], tmp_path: Path) -> None:
    experts = [make_model(tmp_path / f"e{n}", seed=n, vocab_size=70) for n in range(7)]
    for expert in experts:
        (expert / "tokenizer.json").unlink()
    text = simple_config(babies["base"], [*experts], "gate_mode: random")
    notes, names = make_plan(parse_config(text)).notes, "e0, e1, e2, e3 and 3 more"
    line = f"{names}: vocab_size is 70, the base model's is 64; its embeddings are not used"
    assert line in notes
    assert [note for note in notes if "cannot be compared" in note] == [
        f"{names}: its tokens cannot be compared with the base's: there is no tokenizer.json"
    ]


@pytest.mark.parametrize("mode", ["self", "ridge", "hidden"])
def test_poor_routers_are_not_told_to_do_what_they_did(mode: str) -> None:
    found = {"t1": 0.3, "collisions": [], "idle": [], "blind_layers": []}
    *_, advice = verdict(found, ["a", "b"], mode)
    assert advice.startswith("what would help: ")
    assert ("gate_mode: self" in advice) == (mode != "self")


# names


def renamed(directory: Path, change: Callable[[str], str], shards: int = 1) -> None:
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    save_weights(directory, {change(name): tensor for name, tensor in state.items()}, shards)


def within(name: str) -> str:
    return name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")


NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "torch.compile": (lambda n: f"_orig_mod.{n}", "without _orig_mod."),
    "data parallel": (lambda n: f"module.{n}", "without module."),
    "both": (lambda n: f"module._orig_mod.{n}", "without _orig_mod. and without module."),
    "doubled": (lambda n: f"model.{n}", "without model."),
    "doubled but for the head": (
        lambda n: n if n.startswith("lm_head") else f"model.{n}", "without model."
    ),
    "a prefix of any name": (lambda n: f"actor.net.{n}", "without actor.net."),
    "wrapped layers": (within, "without _checkpoint_wrapped_module."),
    "a layer compiled": (
        lambda n: n.replace("layers.1.", "layers.1._orig_mod."), "without _orig_mod."
    ),
    "a body alone": (lambda n: n.removeprefix("model."), "with model. before them"),
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", NAMES)
def test_names_with_something_before_them_are_understood(
    kind: str, shards: int, babies: dict[str, Path], tmp_path: Path
) -> None:
    change, words = NAMES[kind]
    other = shutil.copytree(babies["first"], tmp_path / "first")
    renamed(other, change, shards)
    found, plain = (open_checkpoint(Reference(str(d), d)) for d in (other, babies["first"]))
    assert found.notes == (f"its tensors' names are read {words}",)
    assert found.tensors.keys() == plain.tensors.keys()
    for name, at in plain.tensors.items():
        assert read_bytes(found.tensors[name]) == read_bytes(at), name


def test_a_merge_of_such_a_model_is_one_of_the_model(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    base, first, _ = babies.values()
    outs = []
    for name in ("plain", "other"):
        model = shutil.copytree(first, tmp_path / name / "first")
        if name == "other":
            renamed(model, lambda n: f"module.{n}", 2)
        out = tmp_path / name / "out"
        text = simple_config(model, [base, model], "gate_mode: hidden")
        done = merge(write_config(tmp_path / "c.yaml", text), out)
        assert verify_checkpoint(out).compared
        outs.append({p.name: load_file(p) for p in sorted(out.glob("*.safetensors"))})
    assert f"{tmp_path}/other/first: its tensors' names are read without module." in done.notes
    assert outs[0].keys() == outs[1].keys()
    for file, tensors in outs[0].items():
        assert all(torch.equal(tensor, outs[1][file][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["two prefixes", "two tensors of one name"])
def test_names_that_are_no_models_are_not_guessed_at(
    kind: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(babies["first"], tmp_path / "first")
    if kind == "two prefixes":
        renamed(other, lambda n: f"{'a' if '0' in n else 'b'}.{n}")
    else:
        state = load_file(other / "model.safetensors")
        state["_orig_mod.model.norm.weight"] = state["model.norm.weight"] + 1
        save_weights(other, state)
        make_plan(parse_config(simple_config(babies["base"], [other])))
        return
    with pytest.raises(InputError, match="is missing"):
        make_plan(parse_config(simple_config(babies["base"], [other])))


def test_a_mixture_with_such_names_is_read_and_repaired(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    base, first, _ = babies.values()
    text = simple_config(base, [first, base], "gate_mode: random")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "moe")
    state = {}
    for path in (tmp_path / "moe").glob("*.safetensors"):
        state |= {f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}
        path.unlink()
    for name in ("model.safetensors.index.json", "moemerge.json"):
        (tmp_path / "moe" / name).unlink()
    save_weights(tmp_path / "moe", state)
    extract(str(tmp_path / "moe"), "0", tmp_path / "dense")
    made = load_file(next((tmp_path / "dense").glob("*.safetensors")))
    wanted = load_file(first / "model.safetensors")
    mlps = [name for name in wanted if ".mlp." in name]
    assert mlps and all(torch.equal(made[name], wanted[name]) for name in mlps)
    assert repair(str(tmp_path / "moe"), tmp_path / "repaired") is not None
    names = set(load_file(next((tmp_path / "repaired").glob("model-*.safetensors"))))
    assert not any("_orig_mod" in name for name in names)
    assert repair(str(tmp_path / "repaired"), tmp_path / "again") is None
    top_k(str(tmp_path / "repaired"), 1)
