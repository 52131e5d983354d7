"""What is written runs everywhere: the real readers, each in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import LLAMA3_ROPE, make_adapter, make_model, simple_config, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from moemerge import merge, verify_checkpoint

ROOT = Path(__file__).resolve().parent.parent
READERS = {
    "transformers 5": ("test", "read_transformers.py"),
    "transformers 4.57": ("transformers4", "read_transformers.py"),
    "llama.cpp": ("readers", "read_llamacpp.py"),
    "mlx-lm": ("readers", "read_mlx.py"),
}
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
]


@cache
def python_of(environment: str) -> str:
    """The environment's Python; this one where it is the tests' own."""
    if environment == "test":
        return sys.executable
    script = ROOT / "scripts/environment"
    made = subprocess.run([script, environment], check=True, capture_output=True, text=True)
    return f"{made.stdout.strip()}/bin/python"


def read(reader: str, model: Path, work: Path, **request: Any) -> dict[str, Any]:
    """Run a reader on a model; nothing may be missing, unexpected or of another shape."""
    environment, program = READERS[reader]
    work.mkdir()
    (work / "request.json").write_text(json.dumps(request))
    files = [work / "request.json", work / "response.json"]
    command = [python_of(environment), ROOT / "tests/readers" / program, model, *files]
    done = subprocess.run([*command, "--work", work], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    response: dict[str, Any] = json.loads((work / "response.json").read_text())
    for kind in ("missing", "unexpected", "mismatched"):
        assert response[kind] == [], (reader, kind)
    return response


@pytest.fixture(scope="module")
def real_identity(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a mixture of itself, three times."""
    root = tmp_path_factory.mktemp("identity")
    head = "experts_per_token: 2\ngate_mode: cheap_embed"
    config = write_config(root / "c.yaml", simple_config(smollm2, [smollm2] * 3, head))
    merge(config, root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> dict[str, Any]:
    """What the dense model says: logits, and 16 greedy tokens a prompt, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    said: dict[str, Any] = {"logits": [], "generated": []}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            said["logits"].append(model(ids).logits[0].numpy())
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=16,
                max_new_tokens=16,
                do_sample=False,
            )
        said["generated"].append(made[0, ids.shape[1] :].tolist())
    return said


@pytest.mark.parametrize("reader", READERS)
def test_a_real_model_says_what_the_dense_one_says(
    reader: str, real_identity: Path, dense: dict[str, Any], tmp_path: Path
) -> None:
    found = read(reader, real_identity, tmp_path / "w", prompts=PROMPTS, new_tokens=16, logits=True)
    assert found["generated"] == dense["generated"]
    tolerance = 1e-5 if "transformers" in reader else 5e-5  # other libraries round otherwise
    if found["logits_npy"]:
        arrays = np.load(found["logits_npy"])
        for number, expected in enumerate(dense["logits"]):
            difference = np.abs(arrays[f"arr_{number}"] - expected).max()
            assert difference <= tolerance * np.abs(expected).max()


BODIES: dict[str, dict[str, Any]] = {
    "llama3 rope": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "mistral window and head_dim": {"family": "mistral", "sliding_window": 7, "head_dim": 16},
}


@pytest.mark.parametrize("body", BODIES)
def test_transformers_4_computes_what_5_computes(tmp_path: Path, body: str) -> None:
    """The config is written in both dialects: rope and window mean the same to either version."""
    base = make_model(tmp_path / "base", dialect=5, **BODIES[body])
    expert = make_model(tmp_path / "expert", seed=1, **BODIES[body])
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [base, expert])), tmp_path / "out")
    ids = [[1, *range(3, 40)]]
    found = [
        np.load(
            read(
                f"transformers {version}",
                tmp_path / "out",
                tmp_path / version,
                token_ids=ids,
                new_tokens=1,
                logits=True,
            )["logits_npy"]
        )["arr_0"]
        for version in ("5", "4.57")
    ]
    assert np.abs(found[0] - found[1]).max() <= 1e-5


def test_the_real_model_verifies_and_its_adapters_merge(smollm2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", smollm2)
    text = simple_config(smollm2, [smollm2, f"{smollm2}+{adapter}"])
    merged = merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    checked = verify_checkpoint(tmp_path / "out")
    assert checked.compared == checked.tensors - merged.plan.config["num_hidden_layers"]
