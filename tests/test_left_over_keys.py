"""What a source's files still say of another life of it: judged by what is there, and said.

A quantised training, code that does not go along, ids that no embedding has.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config, write_config
from test_laws import all_tensors, logits
from transformers import AutoTokenizer

from moemerge import InputError, make_plan, merge
from moemerge.config.schema import parse_config
from moemerge.mixture.edit import top_k
from moemerge.mixture.repairing import repair

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LEFT_OVER: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"quantization_config": BNB},
    "in words": {"quantization_config": "awq"},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "both": {"quantization_config": {"quant_method": "fp8"}, "compression_config": {"a": 1}},
    "empty": {"quantization_config": {}, "compression_config": None},
}
MATRIX = "model.layers.0.mlp.gate_proj.weight"


def edit(path: Path, **changes: Any) -> Path:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))
    return path


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def merged(tmp_path: Path, base: Path | str, *experts: Path | str) -> tuple[Path, list[str]]:
    text = simple_config(base, list(experts), "gate_mode: random")
    notes = make_plan(parse_config(text)).notes
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    merge(write_config(tmp_path / "c.yaml", text), out)
    return out, list(notes)


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_plain_weights_are_taken_whatever_trained_them(tmp_path: Path, kind: str) -> None:
    """As the base, as an expert, under an adapter; and the mixture says nothing of it."""
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    plain, _ = merged(tmp_path, base, base, base)
    adapter = make_adapter(tmp_path / "adapter", base)
    edit(base / "config.json", **LEFT_OVER[kind])
    for experts in ([base, base], [base, f"{base}+{adapter}"]):
        out, notes = merged(tmp_path, base, *experts)
        config = read(out / "config.json")
        assert not config.keys() & LEFT_OVER[kind].keys()
        said = [note for note in notes if "every tensor is of plain floats" in note]
        assert len(said) == sum(map(bool, LEFT_OVER[kind].values()))
    same, _ = merged(tmp_path, base, base, base)
    assert (same / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    assert (logits(same) - logits(plain)).abs().max() == 0


def stored(**tensors: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Other tensors in the place of a matrix, as a quantiser leaves them; `weight` by its dtype."""

    def change(state: dict[str, torch.Tensor]) -> None:
        matrix = state.pop(MATRIX)
        for leaf, dtype in tensors.items():
            state[MATRIX.removesuffix("weight") + leaf.replace("__", ".")] = matrix.to(dtype)

    return change


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("gptq", stored(qweight=torch.int32, qzeros=torch.int32, scales=torch.float16)),
        ("bitsandbytes", stored(weight=torch.uint8, weight__absmax=torch.float32)),
        ("bitsandbytes", stored(weight=torch.int8, SCB=torch.float32)),
        ("fp8", stored(weight=torch.float8_e4m3fn, weight_scale_inv=torch.float32)),
        ("fp8", stored(weight=torch.bfloat16, weight_scale=torch.float32)),
        ("compressed-tensors", stored(weight_packed=torch.int32, weight_scale=torch.bfloat16)),
        ("hqq", stored(W_q=torch.uint8, scale=torch.float16, zero=torch.float16)),
        ("aqlm", stored(codes=torch.int16, codebooks=torch.float16, scales=torch.float16)),
    ],
)
def test_quantised_weights_are_refused_by_their_tensors(
    tmp_path: Path, babies: dict[str, Path], method: str, change: Any
) -> None:
    model = shutil.copytree(babies["first"], tmp_path / "model")
    edit(model / "config.json", quantization_config={"quant_method": method})
    state = all_tensors(model)
    change(state)
    save_weights(model, state)
    with pytest.raises(InputError) as caught:
        make_plan(parse_config(simple_config(model, [babies["first"]] * 2)))
    [problem] = map(str, caught.value.problems)
    assert f"is quantised ({method})" in problem and "original weights" in problem
    assert MATRIX.removesuffix("weight") in problem


CODE = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}


@pytest.mark.parametrize(
    ("said", "becomes", "note"),
    [
        ({"tokenizer_class": "OwnTokenizer", "auto_map": CODE}, "PreTrainedTokenizerFast",
         "OwnTokenizer, whose code does not go along"),
        ({"tokenizer_class": "QWenTokenizer"}, "PreTrainedTokenizerFast", "QWenTokenizer, whose"),
        ({"tokenizer_class": None, "auto_map": CODE["AutoTokenizer"]}, "PreTrainedTokenizerFast",
         "tokenization_own.OwnTokenizer, whose code"),
        ({"tokenizer_class": "GPT2Tokenizer", "auto_map": CODE}, "GPT2Tokenizer",
         "its auto_map names program code"),
        ({"tokenizer_class": "LlamaTokenizerFast", "auto_map": {}}, "LlamaTokenizerFast",
         "its auto_map names program code"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "PreTrainedTokenizerFast", ""),
    ],
)  # fmt: skip
def test_a_tokenizer_of_code_becomes_the_generic_one(
    tmp_path: Path, said: dict[str, Any], becomes: str, note: str
) -> None:
    base = make_model(tmp_path / "base")
    ids = AutoTokenizer.from_pretrained(base)("code python maths").input_ids
    before = edit(base / "tokenizer_config.json", **said).read_bytes()
    out, notes = merged(tmp_path, base, base, base)
    made = read(out / "tokenizer_config.json")
    assert made["tokenizer_class"] == becomes and "auto_map" not in made
    found = [one for one in notes if one.startswith("tokenizer_config.json: ")]
    assert len(found) == bool(note) and all(note in one for one in found)
    if becomes == "PreTrainedTokenizerFast":
        assert AutoTokenizer.from_pretrained(out)("code python maths").input_ids == ids
    if not note:
        assert (out / "tokenizer_config.json").read_bytes() == before


def test_a_tokenizer_of_code_without_a_generic_file_is_said(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    edit(base / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=CODE)
    out, notes = merged(tmp_path, base, base, base)
    said = "tokenizer_config.json: OwnTokenizer is program code, which does not go along: copy it"
    assert said in notes
    assert read(out / "tokenizer_config.json") == read(base / "tokenizer_config.json")


def test_a_model_of_code_is_what_its_model_type_says(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    dense = logits(base)
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(base / "config.json", auto_map=code, custom_pipelines={"own": {}}, trust_remote_code=True)
    out, notes = merged(tmp_path, base, base, base)
    assert not read(out / "config.json").keys() & {"auto_map", "custom_pipelines"}
    assert any("auto_map and custom_pipelines" in note and "read as a llama" in note
               for note in notes)  # fmt: skip
    assert (logits(out) - dense).abs().max() <= 1e-5


@pytest.mark.parametrize("said", [-1, 64, 50256])
def test_ids_beyond_the_vocabulary_are_nobodys(tmp_path: Path, said: int) -> None:
    """In config.json and for generation; a list keeps those that there are."""
    base = make_model(tmp_path / "base")
    dense = logits(base)
    ids = {"pad_token_id": said, "bos_token_id": said, "eos_token_id": [2, said]}
    edit(base / "config.json", **ids)
    edit(base / "generation_config.json", **ids, temperature=0.5)
    out, notes = merged(tmp_path, base, base, base)
    made = read(out / "config.json")
    assert [made[key] for key in ids] == [None, None, [2]]
    assert read(out / "generation_config.json") == {"eos_token_id": [2], "temperature": 0.5}
    assert sum("the vocabulary has 64 ids" in note for note in notes) == 6
    assert (logits(out) - dense).abs().max() <= 1e-5


def test_mixtures_are_mended_too(tmp_path: Path, babies: dict[str, Path]) -> None:
    """What is left over in a mixture's files does not outlive an edit; repair knows it."""
    base = babies["base"]
    out, _ = merged(tmp_path, base, base, base)
    seen = logits(out)
    (out / "moemerge.json").unlink()
    edit(out / "config.json", quantization_config=BNB, auto_map={"a": "b.c"}, pad_token_id=64)
    edit(out / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=CODE)
    edit(out / "generation_config.json", pad_token_id=64)
    assert repair(str(out), tmp_path / "repaired") is not None
    top_k(str(out), 1, tmp_path / "one")
    for made in (tmp_path / "repaired", tmp_path / "one"):
        config = read(made / "config.json")
        assert not config.keys() & {"quantization_config", "auto_map"}
        assert config["pad_token_id"] is None
        assert read(made / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "pad_token_id" not in read(made / "generation_config.json")
    assert (logits(tmp_path / "repaired") - seen).abs().max() == 0
    assert repair(str(tmp_path / "repaired"), tmp_path / "again") is None
