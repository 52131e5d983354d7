"""Models of an unknown model_type: a known family is proposed, and compared if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from babies import make_model, simple_config, write_config
from safetensors.torch import load_file, save_file
from test_laws import logits

from moemerge import InputError, check_family, make_plan, merge
from moemerge.cli import app


def renamed(model: Path, kind: str, **more: Any) -> Path:
    """The model under another model_type."""
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": kind, **more}))
    return model


def with_more(model: Path, name: str) -> Path:
    """The model with one tensor more."""
    file = model / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(32)}, file)
    return model


@pytest.mark.parametrize(
    ("family", "settings", "proposed"),
    [
        ("llama", {}, "llama"),
        ("llama", {"tie_word_embeddings": True}, "llama"),
        ("qwen2", {}, "qwen2"),
        ("qwen3", {"head_dim": 8}, "qwen3"),
        ("olmo2", {}, "olmo2"),
    ],
)
def test_a_renamed_model_is_proposed_and_made(
    tmp_path: Path, family: str, settings: dict[str, Any], proposed: str
) -> None:
    plain = make_model(tmp_path / "plain", family, **settings)
    base = renamed(make_model(tmp_path / "base", family, **settings), "yi")
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
    with pytest.raises(InputError, match=f"those of a {proposed}; write `family: {proposed}`"):
        make_plan(config)
    text = simple_config(base, [base, base], f"family: {proposed}")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert (logits(plain) - logits(tmp_path / "out")).abs().max() <= 1e-5
    notes = [note.typed for note in make_plan(tmp_path / "c.yaml").notes]
    assert any(f"a 'yi', read as a {proposed}: unchecked" in note for note in notes)


@pytest.mark.parametrize(
    "name", ["model.layers.0.input_layernorm.bias", "model.layers.1.self_attn.sinks"]
)
def test_a_tensor_that_nothing_would_read_refuses_the_proposal(tmp_path: Path, name: str) -> None:
    base = with_more(renamed(make_model(tmp_path / "base"), "yi"), name)
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
    with pytest.raises(InputError, match="no mixture class is known to reproduce it"):
        make_plan(config)
    write_config(config, simple_config(base, [base, base], "family: llama"))
    with pytest.raises(InputError, match=f"has {name}, which a llama does not have"):
        make_plan(config)


def test_a_family_that_is_not_known_is_told(tmp_path: Path) -> None:
    base = renamed(make_model(tmp_path / "base"), "yi")
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base], "family: lama"))
    with pytest.raises(InputError, match=r"'lama' is no known family.*did you mean 'llama'"):
        make_plan(config)


@pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")
def test_a_probe_compares_a_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal, different, and without a class to compare with."""

    def planned(kind: str, family: str = "llama", **more: Any) -> Path:
        base = renamed(make_model(tmp_path / f"{kind} {family}"), kind, **more)
        text = simple_config(base, [base, base], f"family: {family}")
        return write_config(tmp_path / f"{kind}-{family}.yaml", text)

    same = check_family(make_plan(planned("iquestcoder", head_dim=8)))
    assert "of a 'iquestcoder' and of a llama differ by" in same
    unchecked = check_family(make_plan(planned("yi")))
    assert "transformers has no class for it" in unchecked and "stays unchecked" in unchecked
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}
    with pytest.raises(InputError, match="of a 'ministral' and of a llama differ by"):
        check_family(make_plan(planned("ministral", head_dim=8, **windows)))
    with pytest.raises(SystemExit) as ended:
        app(["plan", str(planned("yi")), "--probe"])
    assert ended.value.code in (0, None)
    assert "stays unchecked" in capsys.readouterr().err
