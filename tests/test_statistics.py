"""What a merge keeps of its prompts, and an expert added later without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_model, simple_config, write_config
from safetensors.torch import load_file
from typer.testing import CliRunner

from moemerge import InputError, Options, add, merge, verify_checkpoint
from moemerge.cli import app
from moemerge.files import STATISTICS_FILE
from moemerge.output import read_manifest
from moemerge.publish.leaving import leaving

KEEP = Options(statistics=True)
TEXT = "once upon a time there was a long walk\n\nthe cat sat in the sea and said hello\n"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "more.txt"
    path.write_text(TEXT)
    return path


HEADS = {
    "ridge": ("gate_mode: ridge", {}),
    "its settings": ("gate: { mode: ridge, lambda: 0.3, kappa: 9 }", {}),
    "off policy": ("gate: { mode: ridge, on_policy: true }\ndtype: float32", {}),
    "negative": ("gate_mode: ridge", {"per_expert": "negative_prompts: [poem]"}),
    "stacked": ("gate_mode: ridge\narchitecture: qwen3_moe", {"family": "qwen3"}),
    "selection bias": ("gate_mode: ridge\narchitecture: glm4_moe", {}),
    "own": ("gate: { mode: self, samples: 3, tokens: 6 }", {}),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADS)
def test_an_added_expert_gives_the_routers_of_a_fresh_merge(
    tmp_path: Path, text: Path, what: str
) -> None:
    """With the same body: no old text is read, and all rows are equal within 1e-5."""
    head, more = HEADS[what]
    family, each = more.get("family", "llama"), more.get("per_expert", "")
    base, *experts, new = (
        make_model(tmp_path / f"m{n}", family, seed=n, dtype=torch.float32) for n in range(4)
    )
    old = simple_config(base, experts, head, each)
    merge(write_config(tmp_path / "c.yaml", old), tmp_path / "old", KEEP)
    fresh = old + f"  - source_model: {new}\n    calibration: {text}\n"
    if what != "own":  # `self` would let the new expert write
        merge(write_config(tmp_path / "d.yaml", fresh), tmp_path / "fresh")
    for prompt in ("code python", "dragon castle"):  # the old texts are gone
        assert prompt not in (tmp_path / "old" / STATISTICS_FILE).read_bytes().decode("latin1")
    add(tmp_path / "old", new, tmp_path / "added", text=str(text))
    assert verify_checkpoint(tmp_path / "added").tensors
    made = tensors(tmp_path / "added")
    routers = [name for name in made if "gate.weight" in name]
    assert all(made[name].shape[0] == 3 and made[name].isfinite().all() for name in routers)
    if what == "own":
        return
    wanted = tensors(tmp_path / "fresh")
    assert made.keys() == wanted.keys()
    for name, one in wanted.items():
        if name.endswith("e_score_correction_bias"):  # the load is not measured anew
            continue
        torch.testing.assert_close(made[name], one, atol=1e-5, rtol=1e-5)


def test_what_is_kept_stays_here(tmp_path: Path, babies: dict[str, Path]) -> None:
    """It is not pushed, it is verified, and it says what it can give away."""
    base, *experts = babies.values()
    config = write_config(tmp_path / "c.yaml", simple_config(base, list(experts)))
    merge(config, tmp_path / "out", KEEP)
    kept = tmp_path / "out" / STATISTICS_FILE
    content = kept.read_bytes()
    head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert "can give them away" in head["about"]
    out = tmp_path / "out"
    assert STATISTICS_FILE not in leaving(read_manifest(out), lambda name: out / name)
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = CliRunner().invoke(app, ["verify", str(out)])
    assert result.exit_code == 1 and "router-inputs" in result.output
    merge(config, out, Options(overwrite=True))
    assert not kept.exists()


BROKEN: dict[str, Any] = {
    "nothing was kept": (lambda kept: kept.unlink(), "has no statistics/"),
    "a cut file": (lambda kept: kept.write_bytes(kept.read_bytes()[:-4]), "is damaged"),
    "another file": (lambda kept: kept.write_bytes(b"no"), "is damaged"),
    "of another width": (lambda kept: _narrow(kept), "is not of this mixture"),
}


def _narrow(kept: Path) -> None:
    content = kept.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:size])
    for name, one in head.items():
        if name != "__metadata__":
            rows, width = one["shape"]
            one["shape"] = [rows * 2, width // 2]
    told = json.loads(head["__metadata__"]["moemerge"])
    told["tokens"] = [2 * number for number in told["tokens"]]
    head["__metadata__"]["moemerge"] = json.dumps(told)
    text = json.dumps(head).encode()
    kept.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])


@pytest.mark.parametrize("what", BROKEN)
def test_what_was_kept_is_not_believed(
    tmp_path: Path, babies: dict[str, Path], text: Path, what: str
) -> None:
    base, *experts = babies.values()
    config = write_config(tmp_path / "c.yaml", simple_config(base, list(experts)))
    merge(config, tmp_path / "old", KEEP)
    change, why = BROKEN[what]
    change(tmp_path / "old" / STATISTICS_FILE)
    with pytest.raises(InputError, match=why):
        add(tmp_path / "old", base, tmp_path / "new", "third", text=str(text))
    assert not (tmp_path / "new" / "config.json").exists()


def test_text_must_be_there(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, *experts = babies.values()
    config = write_config(tmp_path / "c.yaml", simple_config(base, list(experts)))
    merge(config, tmp_path / "old", KEEP)
    with pytest.raises(InputError, match="there is no nowhere"):
        add(tmp_path / "old", base, tmp_path / "new", "third", text="nowhere.txt")
    text = simple_config(base, list(experts), "gate_mode: random")
    made = merge(write_config(tmp_path / "d.yaml", text), tmp_path / "other", KEEP)
    assert any("gate_mode: random fits nothing to router inputs" in str(n) for n in made.notes)
