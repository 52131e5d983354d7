"""The well-known 4x7B example at its true size, planned from headers alone."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from stand_ins import MODELS, make_cache, make_model

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "configs" / "beyonder-4x7b.yaml"
PLAN = f"""
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
sys.argv = ["moemerge", "plan", {str(CONFIG)!r}, *sys.argv[1:]]
from moemerge.cli import main
main()
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache"))


def plan(cache: Path, *options: str) -> tuple[str, list[str], set[str]]:
    """What the plan prints, its notes, and every module that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PLAN, "--cache-dir", str(cache), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *notes, modules = done.stderr.splitlines()
    return done.stdout, notes, set(json.loads(modules))


def test_the_plan_of_four_mistrals(cache: Path) -> None:
    printed, notes, modules = plan(cache)
    assert "24.15B parameters in all, 12.88B active a token" in printed
    assert "579 of 579 tensors are copied byte for byte" in printed
    vocabulary = [note for note in notes if "vocab_size" in note]
    assert len(vocabulary) == 1
    assert (
        "CodeNinja-1.0-OpenChat-7B: vocab_size is 32002, the base model's is 32000"
        in (vocabulary[0])
    )
    assert not modules & {"torch", "transformers", "httpx", "httpx2", "requests"}


def test_its_numbers(cache: Path) -> None:
    """Mixtral 8x7B's shapes with 4 experts: the body once, MLPs and routers by expert."""
    printed, _, _ = plan(cache, "--json")
    made = json.loads(printed)
    attention = 4096 * (4096 + 1024 + 1024 + 4096)
    norms, router, mlp = 2 * 4096, 4 * 4096, 3 * 4096 * 14336
    outside = 2 * 32000 * 4096 + 4096
    assert made["parameters"] == outside + 32 * (attention + norms + router + 4 * mlp)
    assert made["active_parameters"] == outside + 32 * (attention + norms + router + 2 * mlp)
    assert made["config"]["num_local_experts"] == 4
    assert made["config"]["sliding_window"] == 4096


def test_from_a_hub_it_costs_less_than_5_mb(tmp_path: Path) -> None:
    """Headers of twelve shards, small files, and each vocabulary once: of 58 GB of weights."""
    with FakeHub() as hub:
        for repo, vocabulary in MODELS.items():
            directory = tmp_path / repo
            make_model(directory, vocabulary)
            for path in directory.glob("*.safetensors"):  # hashing its hole would take minutes
                hub.know(path, hashlib.sha256(str(path).encode()).hexdigest())
            hub.publish(repo, directory)
        done = subprocess.run(
            [sys.executable, "-m", "moemerge", "plan", str(CONFIG), "--json"],
            env={**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert sum(request.sent for request in hub.requests) < 5e6
    made = json.loads(done.stdout)["transfer"]
    assert made["files"] == made["sources"] > 57e9 and made["cached"] == 0
