"""Readers of mixtures whose layers are not all attention: the docs' table, cell by cell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from babies import simple_config, write_config
from kinds import KINDS, enlarge
from seeing import SEEING
from test_kinds import PAIRS
from test_readers import READERS, ROOT, WIDE, asked, read_all
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from moemerge import make_plan, merge

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")

TABLE: dict[str, Any] = json.loads((ROOT / "tests/readers/table.json").read_text())
NEWEST, OURS = "transformers newest", "transformers 5"
ORDINARY = ("transformers 5", "transformers 4.57", "llama.cpp", "mlx-lm")
"""The others' environments are made by `scripts/test --full` alone."""
ASKED = [pytest.param(one, marks=[pytest.mark.full] * (one not in ORDINARY)) for one in READERS]

__all__ = ["asked"]

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
CASES: list[tuple[str, str]] = [
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


def says(directory: Path, kind: str, asked: dict[str, Any]) -> list[list[int]]:
    """The dense model's greedy texts."""
    auto = AutoModelForCausalLM if kind in KINDS else AutoModelForImageTextToText
    model, found = auto.from_pretrained(directory).eval(), []
    for prompt in asked["token_ids"]:
        with torch.inference_mode():
            made = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=asked["new_tokens"],
                do_sample=False,
                eos_token_id=None,
            )
        found.append(made[0, len(prompt) :].tolist())
    return found


@dataclass
class Made:
    """Mixtures of one dense model each, what it says, and what `plan` says of their readers."""

    mixtures: list[Path] = field(default_factory=list)
    wanted: list[list[list[int]]] = field(default_factory=list)
    told: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def made(
    smollm2: Path, asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    root, found = tmp_path_factory.mktemp("kinds"), Made()
    for number, case in enumerate(CASES):
        dense = make_wide(root / f"dense{number}", case[1], smollm2)
        text = simple_config(dense, [dense] * 2, f"architecture: {case[0]}")
        config = write_config(root / "c.yaml", text)
        ready, out = make_plan(config), root / f"mixture{number}"
        merge(config, out)
        target = ready.target
        caveats = dict(target.architecture.caveats(ready.base.model.config, target.mixture))
        for reader in READERS:
            known = {NEWEST: OURS}.get(reader, reader)
            line = caveats.get(known, "" if known in target.architecture.READERS else "cannot")
            cell = "refused" if "cannot" in line else "wrong" if line else "right"
            found.told.setdefault(case, {})[reader] = cell
        found.mixtures.append(out)
        found.wanted.append(says(dense, case[1], asked))
        shutil.rmtree(dense)
    yield found
    shutil.rmtree(root)


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_the_table_says_what_plan_says(architecture: str, kind: str, made: Made) -> None:
    cells = TABLE["kinds"][architecture][kind]
    short = {one: cell if cell in ("right", "wrong") else "refused" for one, cell in cells.items()}
    assert short == made.told[architecture, kind]


@pytest.mark.parametrize("reader", ASKED)
def test_each_reader_does_what_the_table_says(
    reader: str, made: Made, asked: dict[str, Any], tmp_path: Path
) -> None:
    off: dict[Any, Any] = {}
    answers = read_all(reader, made.mixtures, tmp_path / "w", **asked)
    for (architecture, kind), wanted, answer in zip(CASES, made.wanted, answers, strict=True):
        cell = TABLE["kinds"][architecture][kind][reader]
        odd = [
            f"{why}: {name}" for why in ("missing", "unexpected") for name in answer.get(why, ())
        ]
        came = answer.get("error") or "\n".join(odd)
        came = came or ("right" if answer["generated"] == wanted else "wrong")
        if cell not in came or (cell in ("right", "wrong") and came != cell):
            off[architecture, kind] = cell, came[-600:]
    assert not off
