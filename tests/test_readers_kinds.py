"""Readers of mixtures whose layers are not all attention, each asked what the dense model says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from babies import simple_config, write_config
from kinds import KINDS, enlarge
from seeing import SEEING
from test_kinds import PAIRS
from test_readers import WIDE, fits, read_all
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moemerge import make_plan, merge

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")

ASKED = ("transformers 4.57", "llama.cpp", "mlx-lm")
PROMPT, NEW = [1, *range(300, 330)], 12
HEADS: dict[str, Any] = {
    "head_dim": 64, "global_head_dim": 128, "mamba_d_head": 64, "mamba_head_dim": 64,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "vocab_size_per_layer_input": WIDE["vocab_size"],
    "hidden_size_per_layer_input": 32,
}  # fmt: skip


EYES = {"out_hidden_size": WIDE["hidden_size"]}
ROPE = {
    "rope_type": "default", "rope_theta": 5e5, "mrope_section": [16, 8, 8],
    "mrope_interleaved": True,
}  # fmt: skip
CASES = [
    *PAIRS,
    ("qwen3_5_moe", "qwen3.5, seeing"),
    ("qwen3_vl_moe", "qwen3 vl, seeing"),
    ("gemma4", "gemma4, seeing"),
]


def make_wide(directory: Path, kind: str, tokenizer: Path) -> Path:
    """A model that every reader could take: SmolLM2's tokenizer, heads of 64."""
    torch.manual_seed(0)
    if kind in KINDS:
        config = AutoConfig.for_model(**widened(KINDS[kind]))
        model = AutoModelForCausalLM.from_config(config).float()
    else:
        own = SEEING[kind.partition(",")[0]]
        text, eyes = widened(own["text_config"]), {**own["vision_config"], **EYES}
        settings = {**own, "text_config": text, "vision_config": eyes}
        if "rope_parameters" in text:
            text["rope_parameters"] = ROPE
        config = AutoConfig.for_model(**settings)
        model = AutoModelForImageTextToText.from_config(config).float()
    enlarge(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)
    return directory


def widened(own: dict[str, Any]) -> dict[str, Any]:
    wide = {key: value for key, value in HEADS.items() if own.get(key)}
    return {**own, **WIDE, **wide, "shared_intermediate_size": WIDE["intermediate_size"]}


def says(directory: Path, kind: str) -> list[int]:
    """The dense model's greedy text."""
    auto = AutoModelForCausalLM if kind in KINDS else AutoModelForImageTextToText
    model = auto.from_pretrained(directory).eval()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    found: list[int] = made[0, len(PROMPT) :].tolist()
    return found


Cells = dict[tuple[str, str, str], tuple[str, str, str]]


@pytest.fixture(scope="module")
def cells(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    """Of each class, kind and reader: what `plan` says, what came of it, and why."""
    root = tmp_path_factory.mktemp("kinds")
    made, wanted, told = [], [], []
    for number, (architecture, kind) in enumerate(CASES):
        dense = make_wide(root / f"dense{number}", kind, smollm2)
        text = simple_config(dense, [dense] * 2, f"architecture: {architecture}")
        config = write_config(root / "c.yaml", text)
        ready, out = make_plan(config), root / f"mixture{number}"
        merge(config, out)
        target = ready.target
        caveats = dict(target.architecture.caveats(ready.base.model.config, target.mixture))
        told.append((target.architecture.READERS, caveats))
        made.append(out)
        wanted.append(says(dense, kind))
        shutil.rmtree(dense)
    found: Cells = {}
    for reader in ASKED:
        answers = read_all(reader, made, root / reader, prompts=[PROMPT], new_tokens=NEW)
        for at, (pair, answer) in enumerate(zip(CASES, answers, strict=True)):
            readers, caveats = told[at]
            line = caveats.get(reader, "" if reader in readers else "cannot: not among its readers")
            said = "right" if not line else "refused" if "cannot" in line else "wrong"
            right = fits(answer) and answer["generated"][0] == wanted[at]
            came = "right" if right else "wrong" if fits(answer) else "refused"
            found[(*pair, reader)] = said, came, str(answer.get("error", answer.get("missing")))
    yield found
    shutil.rmtree(root)


@pytest.mark.parametrize("reader", ASKED)
@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_a_reader_says_what_the_dense_model_says_or_plan_tells(
    architecture: str, kind: str, reader: str, cells: Cells
) -> None:
    said, came, why = cells[architecture, kind, reader]
    assert said == came, why
