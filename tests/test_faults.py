"""Merges while the Hub fails in every way it can: the right bytes, or one clear error."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from babies import make_adapter, make_model, write_config
from fake_hub import FAULTS, FakeHub

ROOT = Path(__file__).parents[1]
CONFIG = """\
base_model: user/base
gate_mode: cheap_embed
experts:
  - {source_model: user/first, positive_prompts: [code python, function class]}
  - {source_model: user/base+user/adapter, positive_prompts: [maths solve, number sum]}
"""
READING = sorted(kind for kind in FAULTS if not kind.startswith(("put", "commit")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base", seed=1, hidden_size=64, intermediate_size=512)
    first = make_model(root / "first", seed=2, shards=2, hidden_size=64, intermediate_size=512)
    return {"base": base, "first": first, "adapter": make_adapter(root / "adapter", base)}


@pytest.fixture(scope="module")
def right(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights that every run must come to: those of a Hub where nothing fails."""
    tmp = tmp_path_factory.mktemp("right")
    with serving(models) as hub:
        config = write_config(tmp / "config.yaml", CONFIG)
        done = run(hub.environment(tmp), sys.executable, config, tmp / "out")
    assert done.returncode == 0, done.stderr
    return weights(tmp / "out")


@contextmanager
def serving(models: dict[str, Path]) -> Iterator[FakeHub]:
    with FakeHub() as served:
        for name, directory in models.items():
            served.publish(f"user/{name}", directory)
        yield served


@pytest.fixture
def hub(models: dict[str, Path]) -> Iterator[FakeHub]:
    with serving(models) as served:
        yield served


def run(
    environment: dict[str, str], python: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "moemerge", *map(str, arguments)],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def check(
    hub: FakeHub, home: Path, right: dict[str, bytes], python: str, seed: int, rate: float
) -> str:
    """One run under faults, and one more without; how the first ended."""
    config = write_config(home / "config.yaml", CONFIG)
    out, choice = home / "out", random.Random(seed)
    options = ["--stream"] if choice.random() < 0.6 else []
    kinds = choice.sample(READING, choice.randint(1, len(READING)))
    fault = hub.fault(*kinds, rate=rate, seed=seed, times=choice.randint(1, 12), retry_after=0)
    done = run(hub.environment(home / "hf"), python, config, out, *options)
    fired = [kind for kind, _ in hub.fired()]
    told = f"seed {seed}, {options}, {fired}: {done.returncode}\n{done.stderr}"
    if done.returncode == 0:
        assert weights(out) == right, told
        return "merged"
    assert done.returncode in (1, 2), told
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, told
    assert not (out / "config.json").exists(), told
    fault.times = 0
    done = run(hub.environment(home / "hf"), python, config, out, *options)
    if done.returncode != 0 and "changed" in fired:  # a source is another now: said, not mixed
        assert done.stderr.count("error: ") == 1 and done.returncode in (1, 2), told + done.stderr
        return "changed"
    assert done.returncode == 0, told + done.stderr
    assert weights(out) == right or "changed" in fired, told
    return "resumed"


@pytest.mark.parametrize("seed", range(4))
def test_faults_end_well(tmp_path: Path, hub: FakeHub, right: dict[str, bytes], seed: int) -> None:
    check(hub, tmp_path, right, sys.executable, seed, 0.3)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 200))
def test_a_hundred_times(tmp_path: Path, hub: FakeHub, right: dict[str, bytes], seed: int) -> None:
    check(hub, tmp_path, right, sys.executable, seed, random.Random(seed).choice([0.05, 0.2, 0.5]))


def test_faults_end_well_with_huggingface_hub_0(
    tmp_path: Path, hub: FakeHub, right: dict[str, bytes], transformers4: str
) -> None:
    for seed in range(2):
        home = tmp_path / str(seed)
        home.mkdir()
        check(hub, home, right, transformers4, seed, 0.3)
