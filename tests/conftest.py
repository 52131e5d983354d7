"""Fixtures that many tests share: baby models, made once."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
from babies import make_model


@pytest.fixture(scope="session")
def babies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three Llamas of one shape and other weights: base, first, second."""
    root = tmp_path_factory.mktemp("babies")
    return {
        name: make_model(root / name, seed=seed)
        for seed, name in enumerate(["base", "first", "second"])
    }
