"""Every config in examples/ works, on the real small model or on stand-ins of true size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from try_package import copy_to

from moemerge import load_config, make_plan, merge, verify_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "examples/configs").glob("*.yaml"))
MODELS = ROOT / "examples/models"


@pytest.fixture(scope="module", autouse=True)
def demo_model(smollm2: Path) -> None:
    """What the quickstart makes: the small model where the example configs look for it."""
    MODELS.mkdir(exist_ok=True)
    link = MODELS / smollm2.name
    if link.resolve() != smollm2.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(smollm2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_is_a_config(path: Path) -> None:
    config = load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    prompted = all(expert.positive_prompts for expert in config.experts)
    assert prompted or config.gate_mode == "random"


def test_the_quickstart_config_merges_and_verifies(tmp_path: Path) -> None:
    config = ROOT / "examples/configs/quickstart.yaml"
    ready = make_plan(config)
    assert ready.plan.experts == ("c", "french", "legal", "sql")
    merge(config, tmp_path / "out")
    checked = verify_checkpoint(tmp_path / "out")
    assert checked.compared == checked.tensors - len(ready.plan.shards[0].tensors)


def test_the_split_config_finds_its_text() -> None:
    ready = make_plan(ROOT / "examples/configs/split.yaml")
    assert ready.cutting
    assert ready.cutting.text
    assert (len(ready.plan.experts), ready.plan.experts_per_token) == (7, 3)


@pytest.mark.full
def test_the_quickstart_script(tmp_path: Path) -> None:
    """From a fresh copy with nothing installed, as a newcomer runs it."""
    clone = copy_to(tmp_path / "clone")
    done = subprocess.run(
        [clone / "scripts/quickstart", tmp_path / "out"], check=True, capture_output=True, text=True
    )
    assert done.stdout.count("--- ") == 4


@pytest.mark.full
def test_the_vocabulary_script(tmp_path: Path) -> None:
    """All its steps, and a few of training; what it prints last is the table."""
    script = ROOT / "examples/extend_vocabulary.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "out", "--tokens=300", "--steps=3", "--batch=2"],
        check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[-3:]]
    base, before, after = ([float(number) for number in row[1:]] for row in rows)
    assert before[0] == after[0] < base[0]
    assert before[1:] != after[1:]
