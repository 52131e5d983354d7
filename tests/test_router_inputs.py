"""The hidden pass runs on what a stranger's checkpoint holds, and takes of it what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_model, save_weights, simple_config, write_config
from safetensors.torch import load_file

from moemerge import merge

EXTRA = {
    "a norm that a Llama has not": ("self_attn.q_norm.weight", torch.ones(8)),
    "a scale without dimensions": ("self_attn.k_scale", torch.tensor(1.0)),
    "an old buffer": ("self_attn.rotary_emb.inv_freq", torch.ones(4)),
}
WISHES: list[dict[str, Any]] = [
    {"attn_implementation": "flash_attention_2"},
    {"return_dict": False},
    {"num_labels": "x"},
    {"output_hidden_states": True, "use_cache": "maybe", "architectures": 7},
]


def routers(base: Path, out: Path) -> bytes:
    merge(write_config(out.with_suffix(".yaml"), simple_config(base, [base, base])), out)
    return (out / "model-00001-of-00002.safetensors").read_bytes()


@pytest.mark.parametrize("what", EXTRA)
def test_a_tensor_that_the_layer_does_not_have_is_left_alone(tmp_path: Path, what: str) -> None:
    base = make_model(tmp_path / "base")
    wanted = routers(base, tmp_path / "without")
    name, tensor = EXTRA[what]
    state = load_file(base / "model.safetensors")
    save_weights(base, {**state, f"model.layers.1.{name}": tensor})
    assert routers(base, tmp_path / "with") == wanted


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: next(iter(wish)))
def test_wishes_of_a_config_for_its_program_change_nothing(
    tmp_path: Path, wish: dict[str, Any]
) -> None:
    base = make_model(tmp_path / "base")
    wanted = routers(base, tmp_path / "without")
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wish}))
    assert routers(base, tmp_path / "with") == wanted
