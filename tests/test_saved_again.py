"""Mixtures as transformers 5 saves them after training: read, repaired and edited as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from babies import make_model, make_tokenizer, simple_config, write_config
from test_laws import BODIES
from test_readers import read
from test_take_apart import HOSTS, SMALL, head_of, logits, same, weights
from transformers import AutoModelForCausalLM

from moemerge import merge, routing_report, verify_checkpoint
from moemerge.families.names import HEAD
from moemerge.mixture.edit import add, drop, top_k
from moemerge.mixture.extraction import extract
from moemerge.mixture.repairing import repair

PLACES = [(host, family if family in BODIES else "llama") for host, family in HOSTS.items()]
PLACES += [
    ("mixtral", "mistral window"), ("mixtral", "llama llama3 rope"), ("qwen2_moe", "qwen2 window"),
    ("qwen3_moe", "qwen3 window"), ("dots1", "qwen3 window"), ("glm4_moe", "phi3 longrope"),
    ("granitemoehybrid", "qwen2 tied"),
]  # fmt: skip
EDITS: dict[str, Callable[[str, str, Path], object]] = {
    "repair": lambda moe, base, out: repair(moe, out),
    "extract": lambda moe, base, out: extract(moe, "1", out),
    "top-k": lambda moe, base, out: top_k(moe, 1, out),
    "add": lambda moe, base, out: add(moe, base, out),
    "drop": lambda moe, base, out: drop(moe, "0", out),
}


def merged(host: str, body: str, root: Path) -> tuple[Path, Path]:
    """A model, and a mixture of it alone."""
    base = make_model(root / "base", **BODIES[body])
    text = simple_config(base, [base, base, base], head_of(host))
    merge(write_config(root / "c.yaml", text), root / "moe", SMALL)
    return base, root / "moe"


def saved_again(moe: Path, to: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(moe).save_pretrained(to)
    make_tokenizer(to)
    return to


@pytest.mark.parametrize(("host", "body"), PLACES)
def test_what_is_made_of_it_computes_what_it_did(host: str, body: str, tmp_path: Path) -> None:
    base, moe = merged(host, body, tmp_path)
    saved = saved_again(moe, tmp_path / "saved")
    dense = logits(base)
    for name, edit in EDITS.items():
        out = tmp_path / name
        assert edit(str(saved), str(base), out), name
        verify_checkpoint(out)
        assert (logits(out) - dense).abs().max() <= 1e-5, name
        if name != "extract":  # nothing is left to repair
            assert repair(str(out), tmp_path / "again") is None, name
    made, meant = weights(tmp_path / "repair"), weights(moe)
    if HEAD not in weights(saved):  # transformers writes no tied head; edits keep what is there
        del meant[HEAD]
    assert same(made, meant)
    ours, first = (
        json.loads((one / "config.json").read_text()) for one in (tmp_path / "repair", moe)
    )
    assert {key: ours.get(key) for key in first} == first


@pytest.mark.parametrize("host", ["qwen2_moe", "granitemoehybrid"])
def test_it_is_looked_at_as_it_is(host: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("code python function class return story scene " * 9)
    _, moe = merged(host, "qwen2", tmp_path)
    saved = saved_again(moe, tmp_path / "saved")
    texts = {"a": tmp_path / "a.txt"}
    found = [routing_report(one, texts)["texts"][0]["perplexity"]["moe"] for one in (saved, moe)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("host", "body"), PLACES)
def test_transformers_4_reads_what_was_repaired(host: str, body: str, tmp_path: Path) -> None:
    base, moe = merged(host, body, tmp_path)
    repair(str(saved_again(moe, tmp_path / "saved")), tmp_path / "out")
    request = {"token_ids": [list(range(24))], "new_tokens": 1, "logits": True}
    found = read("transformers 4.57", tmp_path / "out", tmp_path / "work", **request)
    theirs = torch.from_numpy(np.load(found["logits_npy"])["arr_0"])
    assert (theirs - logits(base)).abs().max() <= 1e-5
