"""Which files are the model: the ones that transformers and PEFT load, who are asked; else why."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config
from safetensors.torch import load_file, save_file
from test_refusals import edit_json, invoke

from moemerge.checkpoint.location import numpy_dtype, read_bytes
from moemerge.checkpoint.not_a_model import SourceProblem
from moemerge.checkpoint.open import Checkpoint, open_checkpoint
from moemerge.checkpoint.reference import parse_source

ASK = """
import json, sys
import torch, transformers
transformers.utils.logging.set_verbosity(50)
transformers.utils.logging.disable_progress_bar()
def loaded(folder):
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception:
        return None
    return {name: float(tensor.flatten()[0]) for name, tensor in model.state_dict().items()}
"""
"""What transformers loads: each tensor's first value; None where it loads nothing."""

FILES = {
    # a kind of save: its single file and its shards
    "safetensors": ("model.safetensors", "model-*.safetensors"),
    "bin": ("pytorch_model.bin", "pytorch_model-*.bin"),
}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(parse_source(str(folder))[0])


def first_values(checkpoint: Checkpoint) -> dict[str, float]:
    return {
        name: float(np.frombuffer(read_bytes(at), numpy_dtype(at.dtype))[0])
        for name, at in checkpoint.tensors.items()
    }


def save(
    folder: Path, state: dict[str, torch.Tensor], value: float, shards: int, bins: bool
) -> None:
    """Save tensors that all hold `value`."""
    save_weights(folder, {n: torch.full_like(t, value) for n, t in state.items()}, shards, bins)
    for index in folder.glob("*.index.json"):
        edit_json(index, metadata={})  # transformers wants the key


def many_saves(root: Path, baby: Path) -> Iterator[Path]:
    """Folders with each combination of saves: a single file or none; an index with its shards,
    without them, or none; safetensors and bin. The weights of each save differ.
    """
    state = load_file(baby / "model.safetensors")
    for kinds in itertools.product(("", "one"), ("", "shards", "index"), repeat=2):
        folder = root / "-".join(kind or "no" for kind in kinds)
        folder.mkdir()
        shutil.copy(baby / "config.json", folder)
        for number, kind in enumerate(kinds):
            if kind:
                save(folder, state, number + 2.0, 1 if kind == "one" else 2, number > 1)
            if kind == "index":
                suffix = "bin" if number > 1 else "safetensors"
                for shard in folder.glob(f"*-of-*.{suffix}"):
                    shard.unlink()
        yield folder


def odd_saves(root: Path, baby: Path) -> Iterator[Path]:
    """Folders where config.json, the index and the shards say different things."""
    state = load_file(baby / "model.safetensors")

    def one(name: str) -> Path:
        folder = root / name
        folder.mkdir()
        shutil.copy(baby / "config.json", folder)
        save(folder, state, 2.0, 2, False)
        return folder

    folder = one("config names a file")
    save_file({n: torch.full_like(t, 7.0) for n, t in state.items()}, folder / "other.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    yield folder
    folder = one("config names an index")
    save(folder, state, 8.0, 1, False)
    edit_json(folder / "config.json", transformers_weights="model.safetensors.index.json")
    yield folder
    folder = one("config names nothing")
    edit_json(folder / "config.json", transformers_weights="gone.safetensors")
    yield folder
    folder = one("a tensor stands in two shards")
    for number, shard in enumerate(sorted(folder.glob("model-*"))):
        held = load_file(shard)
        held["model.norm.weight"] = torch.full_like(state["model.norm.weight"], 5.0 + number)
        save_file(held, shard, metadata={"format": "pt"})
    yield folder


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("saves")
    baby = make_model(root / "baby", hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    return [*many_saves(root, baby), *odd_saves(root, baby)]


@pytest.fixture(scope="module")
def asked(saves: list[Path], transformers4: str) -> dict[str, list[dict[str, float] | None]]:
    """What either version of transformers loads from each folder."""
    here: dict[str, Any] = {}
    exec(ASK, here)
    script = ASK + "print(json.dumps([loaded(folder) for folder in sys.argv[1:]]))"
    said = subprocess.run(
        [transformers4, "-c", script, *map(str, saves)], capture_output=True, text=True, check=True
    ).stdout
    four = json.loads(said.splitlines()[-1])
    return {
        folder.name: [here["loaded"](folder), old] for folder, old in zip(saves, four, strict=True)
    }


def test_the_weights_are_those_that_transformers_loads(
    saves: list[Path], asked: dict[str, list[dict[str, float] | None]]
) -> None:
    for folder in saves:
        five, four = asked[folder.name]
        assert five == four, folder.name
        if five is None:
            with pytest.raises(SourceProblem):
                opened(folder)
        else:
            assert first_values(opened(folder)) == five, folder.name


def test_a_tensor_that_no_index_names_is_read_as_transformers_5_reads_it(
    saves: list[Path], tmp_path: Path
) -> None:
    """Version 4 makes it at random."""
    folder = Path(
        shutil.copytree(next(p for p in saves if p.name == "no-shards-no-no"), tmp_path / "m")
    )
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={n: f for n, f in weight_map.items() if n != "lm_head.weight"})
    here: dict[str, Any] = {}
    exec(ASK, here)
    assert first_values(opened(folder)) == here["loaded"](folder)
    [note] = opened(folder).notes
    assert "lm_head.weight" in note and "index" in note


def test_what_is_passed_over_is_said(saves: list[Path]) -> None:
    for folder in saves:
        if folder.name.startswith("one-shards-one"):
            [note] = opened(folder).notes
            assert "model.safetensors," in note and "model-00001-of-00002.safetensors" in note
        if folder.name.startswith("one-no-no-no"):
            assert opened(folder).notes == ()


def test_an_adapters_weights_are_those_that_peft_loads(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    from peft.utils.save_and_load import load_peft_weights

    adapter = make_adapter(tmp_path / "adapter", babies["base"])
    state = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceProblem, match=r"adapter_model\.safetensors"):
        opened(adapter)
    for number, name in enumerate(("adapter_model.bin", "adapter_model.safetensors")):
        other = {key: tensor + number for key, tensor in state.items()}
        torch.save(other, adapter / name) if name[-1] == "n" else save_file(other, adapter / name)
        theirs = {n: float(t.flatten()[0]) for n, t in load_peft_weights(str(adapter)).items()}
        assert first_values(opened(adapter)) == theirs
    [note] = opened(adapter).notes
    assert "adapter_model.bin" in note


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1234567\n" % ("0" * 64)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def instead(*files: str, config: bool = True) -> Callable[[Path], None]:
    """Other files than weights."""

    def damage(folder: Path) -> None:
        no_weights(folder)
        if not config:
            (folder / "config.json").unlink()
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(b"0")

    return damage


def in_shards(folder: Path, bins: bool = False) -> None:
    state = load_file(folder / "model.safetensors")
    no_weights(folder)
    save_weights(folder, state, shards=2, bins=bins)


def pointer(file: str, shards: bool = False, bins: bool = False) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        if shards or bins:
            in_shards(folder, bins)
        (folder / file).write_text(POINTER)

    return damage


def dangling(file: str, shards: bool = False) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        if shards:
            in_shards(folder)
        (folder / file).unlink()
        (folder / file).symlink_to("../../blobs/gone")

    return damage


def without(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        in_shards(folder)
        (folder / file).unlink()

    return damage


def naming_too_much(folder: Path) -> None:
    in_shards(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "lm_head.bias": "model-00001-of-00002.safetensors"})


def stale_index_beside_a_bin(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    without("model-00001-of-00002.safetensors")(folder)
    save_weights(folder, state, bins=True)


def emptied(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros(0) for name in state}, folder / "model.safetensors")


def both_kinds(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")


def rank_files(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state, folder / "shard-00000-model-00001-of-00001.safetensors")


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
LFS, ZERO = "git lfs pull", "zero_to_fp32.py"
NO_MODELS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what it is: (how it is made of a good model, the file that is named, words of the fix)
    "shards without an index": (without(INDEX), SHARD[:5] + "-00001-of", ".index.json"),
    "an index without a shard": (without(SHARD), SHARD, "download it again"),
    "a stale index beside a .bin": (stale_index_beside_a_bin, INDEX, "the model is pytorch_model"),
    "an index of a tensor that is not there": (naming_too_much, "lm_head.bias", "again"),
    "Mistral's format": (instead("consolidated.safetensors"), "consolidated.safet", "transformers"),
    "Meta's format": (instead("original/consolidated.00.pth", "original/params.json"),
                      "original/consolidated.00.pth", "transformers' format"),
    "Mistral's format alone": (instead("consolidated.safetensors", "params.json", config=False),
                               "consolidated.safetensors", "transformers' format"),
    "DeepSpeed's": (instead("global_step9/mp_rank_00_model_states.pt", "latest", ZERO),
                    "global_step9", f"python {ZERO}"),
    "DeepSpeed's, inside": (instead("mp_rank_00_model_states.pt"), "mp_rank_00_model_states.pt",
                            ZERO),
    "DeepSpeed's, without config.json": (instead("global_step9/x", ZERO, config=False),
                                         "global_step9", ZERO),
    "DeepSpeed's, emptied": (emptied, "model.safetensors", ZERO),
    "FSDP's": (instead("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"),
               "pytorch_model_fsdp_0", "accelerate merge-weights"),
    "FSDP's, inside": (instead("__0_0.distcp", ".metadata", config=False), "__0_0.distcp",
                       "accelerate merge-weights"),
    "rank files of transformers 5": (rank_files, "shard-00000-model", "consolidate_distributed"),
    "GGUF": (instead("model.Q8_0.gguf"), "model.Q8_0.gguf", "original weights"),
    "TensorFlow": (instead("tf_model.h5"), "tf_model.h5", "from_tf"),
    "a variant": (instead("model.fp16.safetensors"), "model.fp16.safetensors", "variant"),
    "a variant in shards": (instead("model.safetensors.index.fp16.json",
                                    "model.fp16-00001-of-00001.safetensors"),
                            "model.fp16-00001-of-00001.safetensors", "variant"),
    "a file of torch.save": (instead("model.pt"), "model.pt", "transformers' format"),
    "a training's folder": (instead("checkpoint-90/config.json", "checkpoint-100/config.json"),
                            "checkpoint-100", "name that folder"),
    "a cache's folder": (instead("refs/main", "snapshots/0a/config.json", config=False),
                         "Hub's cache", "snapshots/0a"),
    "model and adapter": (both_kinds, "adapter_model.safetensors", "model+adapter"),
    "a pointer": (pointer("model.safetensors"), "model.safetensors is a pointer", LFS),
    "a pointer to a shard": (pointer(SHARD, shards=True), SHARD, LFS),
    "a pointer to a bin": (pointer("pytorch_model-00001-of-00002.bin", bins=True),
                           "pytorch_model-00001-of-00002.bin", LFS),
    "a pointer to an index": (pointer(INDEX, shards=True), INDEX, LFS),
    "a pointer to config.json": (pointer("config.json"), "config.json", LFS),
    "a pointer to a tokenizer": (pointer("tokenizer.json"), "tokenizer.json", LFS),
    "a link to nothing": (dangling("model.safetensors"), "model.safetensors", "again"),
    "a link to no shard": (dangling(SHARD, shards=True), SHARD, "again"),
    "a link to no index": (dangling(INDEX, shards=True), INDEX, "again"),
    "a link to no config.json": (dangling("config.json"), "config.json", "again"),
    "a link to no tokenizer": (dangling("tokenizer.json"), "tokenizer.json", "again"),
    "a link to no tokenizer_config": (dangling("tokenizer_config.json"), "tokenizer_", "again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MODELS)
def test_a_folder_that_is_no_model_is_refused_with_what_helps(
    kind: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    damage, named, fix = NO_MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(babies["first"], folder)
    damage(folder)
    with pytest.raises(SourceProblem) as caught:
        opened(folder)
    assert named in caught.value.what + caught.value.fix and fix in caught.value.fix
    shown = f"{caught.value.what}; {caught.value.fix}"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"base_model: {babies['base']}\ngate_mode: random\nexperts:\n"
        f"  - source_model: {folder}\n  - source_model: {babies['base']}\n"
    )
    result = invoke(config, tmp_path / "out")
    assert result.exit_code == 2 and shown in result.stderr.replace("\n", "")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cached(babies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the repository lab/one in the Hub's cache; there is no network."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "hub" / "models--lab--one"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(babies["base"], snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(repository.parent))
    return snapshot


def test_a_cache_without_a_tokenizer_makes_no_mixture_without_one(
    cached: Path, tmp_path: Path
) -> None:
    """As an expert's is left, whose tokenizer is the base's."""
    config = tmp_path / "config.yaml"
    config.write_text(simple_config("lab/one", ["lab/one", "lab/one"], "gate_mode: random"))
    assert invoke("plan", config).exit_code == 0
    (cached / "tokenizer.json").unlink()
    result = invoke("plan", config)
    assert result.exit_code == 2 and "lab/one" in result.stderr and "tokenizer" in result.stderr
    assert invoke("plan", config, "--no-copy-tokenizer").exit_code == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_a_cache_whose_blobs_are_gone_is_refused_by_the_files_name(
    shards: int, cached: Path
) -> None:
    snapshot = cached
    if shards == 2:
        in_shards(snapshot)
    [reference, _] = parse_source("lab/one")
    assert open_checkpoint(reference, None).tensors
    for name in sorted(path.name for path in snapshot.iterdir()):
        kept = (snapshot / name).read_bytes()
        dangling(name)(snapshot)
        with pytest.raises(SourceProblem, match=name) as caught:
            open_checkpoint(reference, None)
        assert "network" in caught.value.fix
        (snapshot / name).unlink()
        (snapshot / name).write_bytes(kept)
