"""Mixtures that are exact up to some length: `plan` and the card say how long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from babies import make_model, simple_config, write_config
from test_laws import logits

from moemerge import InputError, make_plan, merge

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
SCALED = {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.5}, "head_dim": 8, "pad_token_id": 0}
LIMITED = {
    "ministral3": (SCALED, "exact up to 24 tokens, its original context"),
    "olmo3": (
        {"sliding_window": 24, "rope_theta": 500000.0},
        "exact up to 24 tokens: beyond, an olmo3 has windows",
    ),
}
FREE = {
    "ministral3": {**SCALED, "rope_scaling": YARN},
    "olmo3": {"sliding_window": 4096, "rope_theta": 500000.0},
}


@pytest.mark.parametrize("family", LIMITED)
def test_exact_up_to_the_limit_that_plan_and_card_say(tmp_path: Path, family: str) -> None:
    settings, said = LIMITED[family]
    base = make_model(tmp_path / "base", family, **settings)
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
    assert any(said in note.typed for note in make_plan(config).notes)
    merge(config, tmp_path / "out")
    assert said in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    ids = torch.tensor([[1, *range(3, 60)]])
    difference = (logits(base, ids) - logits(tmp_path / "out", ids)).abs().amax((0, 2))
    assert difference[:24].max() <= 1e-5 < 1e-3 < difference[30:].max()


@pytest.mark.parametrize("family", FREE)
def test_without_a_limit_nothing_is_said(tmp_path: Path, family: str) -> None:
    base = make_model(tmp_path / "base", family, **FREE[family])
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
    assert not any("exact up to" in note.typed for note in make_plan(config).notes)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("ministral3", {"rope_scaling": None}, "which a ministral3 needs"),
        ("olmo3", {"rope_theta": 7e4}, "rope differs between its kinds of layers"),
    ],
)
def test_what_such_a_family_reads_otherwise_is_refused(
    tmp_path: Path, family: str, more: dict[str, object], said: str
) -> None:
    settings, _ = LIMITED[family]
    base = make_model(tmp_path / "base", family, **settings)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    with pytest.raises(InputError, match=said):
        make_plan(write_config(tmp_path / "c.yaml", simple_config(base, [base, base])))
