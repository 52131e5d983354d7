"""The hidden pass runs on what a stranger's checkpoint holds, and takes of it what it needs."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_model, save_weights, simple_config, write_config
from safetensors.torch import load_file
from test_laws import BODIES, PROMPT, logits
from transformers import AutoModel

from moemerge import Options, make_plan, merge
from moemerge.config.schema import parse_config
from moemerge.dense.calls import calls_of
from moemerge.dense.run import whole_model

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


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("body", ["llama tied", "phi3", "phi3 partial longrope", "granite biases"])
def test_the_model_that_writes_texts_is_the_dense_one(
    tmp_path: Path, body: str, lazy: bool
) -> None:
    base = make_model(tmp_path / "base", **BODIES[body])
    ready = make_plan(parse_config(simple_config(base, [base, base])))
    sources = {text: opened.tensors for text, opened in ready.checkpoints.items()}
    model = whole_model(ready.body.config, ready.body.recipe, sources, Options(lazy=lazy))
    with torch.inference_mode():
        assert (model(PROMPT).logits - logits(base)).abs().max() <= 1e-5


def test_the_weights_of_a_layer_go_with_its_copy(tmp_path: Path) -> None:
    """At once: a circle would keep them in memory until the collector comes."""
    model = AutoModel.from_pretrained(make_model(tmp_path / "m"))
    with torch.inference_mode():
        entered = calls_of(model, model.layers, input_ids=PROMPT)
    assert len(entered.layers) == len(model.layers)
    gc.disable()
    try:
        copied = copy.deepcopy(model.layers[0])
        gone = weakref.ref(copied)
        del copied
        assert gone() is None
    finally:
        gc.enable()
