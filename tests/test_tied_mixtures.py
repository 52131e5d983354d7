"""A tied mixture's head is in the files, a copy of the embeddings; edits keep the two equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model, simple_config, write_config
from peft import PeftModel
from safetensors.torch import load_file
from test_take_apart import HOSTS
from test_vocabulary import baby
from transformers import AutoModelForCausalLM

from moemerge import make_plan, merge, regate, verify_checkpoint
from moemerge.architectures import types
from moemerge.cli.describe import plan_lines
from moemerge.families.names import EMBEDDING, HEAD
from moemerge.mixture.edit import add, drop, top_k
from moemerge.mixture.extraction import extract
from moemerge.options import Options
from moemerge.plan import recipe
from moemerge.training.merge_lora import merge_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = Options(shard_size="16KB")
TOKENS = torch.arange(4, 24)[None]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def is_tied(directory: Path) -> bool:
    """Whether config.json says so, and the file's head is the embeddings, bit for bit."""
    said = json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    assert isinstance(said, bool)
    found = weights(directory)
    equal = HEAD in found and torch.equal(found[HEAD], found[EMBEDDING])
    assert equal or not said
    return said


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = model.eval()(TOKENS).logits
    return made


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Four tied models of each family."""
    root = tmp_path_factory.mktemp("tied")
    return {
        family: [
            make_model(root / f"{family}-{n}", family, seed=n, tie_word_embeddings=True)
            for n in range(4)
        ]
        for family in set(HOSTS.values())
    }


def config_of(models: list[Path], host: str, root: Path, mode: str = "random") -> Path:
    head = f"architecture: {host}\ngate_mode: {mode}"
    return write_config(root / "c.yaml", simple_config(models[0], list(models[1:3]), head))


@pytest.mark.parametrize("host", HOSTS)
def test_the_head_is_there_through_every_edit_and_extract_drops_it(
    host: str, tied: dict[str, list[Path]], tmp_path: Path
) -> None:
    models = tied[HOSTS[host]]
    config, out = config_of(models, host, tmp_path), tmp_path / "out"
    made = merge(config, out, SMALL)
    [head] = [tensor for tensor in made.plan.tensors if tensor.name == HEAD]
    assert isinstance(head.recipe, recipe.Read) and head.recipe.tensor == EMBEDDING  # bytes
    assert is_tied(out)
    regate(out, config_of(models, host, tmp_path, "zeros"))
    add(str(out), str(models[3]), tmp_path / "more", options=SMALL)
    drop(str(tmp_path / "more"), "0", tmp_path / "fewer", SMALL)
    top_k(str(tmp_path / "fewer"), 1, tmp_path / "one", SMALL)
    for edited in ("out", "more", "fewer", "one"):
        assert is_tied(tmp_path / edited)
        verify_checkpoint(tmp_path / edited)
    extract(str(tmp_path / "one"), "0", tmp_path / "dense", SMALL)
    assert weights(tmp_path / "dense").keys() == weights(models[0]).keys()
    assert json.loads((tmp_path / "dense/config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("head", ["body: average", "tokenizer: union", "extra_tokens: [code chat]"])
def test_a_head_of_new_or_averaged_rows_is_the_embeddings(tmp_path: Path, head: str) -> None:
    base = baby(tmp_path / "base", tie_word_embeddings=True)
    more = [] if "average" in head else ["<|a|>"]
    chat = baby(tmp_path / "chat", *more, seed=1, tie_word_embeddings=True)
    text = simple_config(base, [chat, chat], f"gate_mode: random\n{head}")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert is_tied(tmp_path / "out")
    verify_checkpoint(tmp_path / "out")
    assert not torch.equal(weights(tmp_path / "out")[HEAD], weights(base)[EMBEDDING])


def test_plan_tells_of_the_copy_and_counts_its_parameters_once(
    tied: dict[str, list[Path]], tmp_path: Path
) -> None:
    ready = make_plan(config_of(tied["llama"], "mixtral", tmp_path))
    [told] = [line for line in plan_lines(ready, Options()) if HEAD in line]
    assert "a copy of the tied embeddings" in told
    merge(config_of(tied["llama"], "mixtral", tmp_path), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ready.plan.parameters == sum(one.numel() for one in model.parameters())


@pytest.mark.parametrize("host", ["mixtral", "granitemoe"])
def test_a_mixture_of_before_without_a_head_is_worked_on_as_ever(
    host: str, tied: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It verifies, is regated and edited, and nobody gives it a head that it had not."""
    module, models, out = types.find(host), tied[HOSTS[host]], tmp_path / "out"
    with monkeypatch.context() as before:
        whole = module.slots
        without = lambda *given: (one for one in whole(*given) if one.name != HEAD)  # noqa: E731
        before.setattr(module, "slots", without)
        merge(config_of(models, host, tmp_path), out, SMALL)
    assert HEAD not in weights(out)
    verify_checkpoint(out)
    regate(out, config_of(models, host, tmp_path, "zeros"), SMALL)
    add(str(out), str(models[3]), tmp_path / "more", options=SMALL)
    for edited in ("out", "more"):
        assert HEAD not in weights(tmp_path / edited)
        verify_checkpoint(tmp_path / edited)
    extract(str(out), "0", tmp_path / "dense", SMALL)
    assert weights(tmp_path / "dense").keys() == weights(models[0]).keys()


ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "both, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "embeddings alone": ({"modules_to_save": ["embed_tokens"]}, False),
    "the head alone": ({"modules_to_save": ["lm_head"]}, False),
    "LoRA on the head": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "LoRA on the embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "neither": ({}, True),
}


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_leaves_head_and_embeddings_equal_or_unties_them(
    what: str, written: bool, tied: dict[str, list[Path]], tmp_path: Path
) -> None:
    """What is merged computes what PEFT computes, whether the file held the head or not."""
    settings, stays = ADAPTERS[what]
    out = tmp_path / "out"
    merge(config_of(tied["llama"], "mixtral", tmp_path), out)
    if not written:
        drop_head(out)
    given = {"target_modules": ["q_proj", "v_proj"], **settings}
    adapter = make_adapter(tmp_path / "adapter", out, **given)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), adapter)
    merge_adapter(str(out), str(adapter), tmp_path / "new")
    verify_checkpoint(tmp_path / "new")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert (logits(merged) - logits(theirs)).abs().max() < 1e-3
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["tie_word_embeddings"] == stays
    if written:
        assert is_tied(tmp_path / "new") == stays


def drop_head(out: Path) -> None:
    """The mixture as transformers 4 saves it: the tied head is in no file."""
    from safetensors.torch import save_file

    index = out / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    file = out / told["weight_map"].pop(HEAD)
    state = load_file(file)
    del state[HEAD]
    save_file(state, file, metadata={"format": "pt"})
    index.write_text(json.dumps(told))
    (out / "moemerge.json").unlink()
