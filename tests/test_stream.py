"""Sources on the Hub read in ranges: the same bytes as through the cache, and nothing kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from babies import make_adapter, make_model, write_config
from fake_hub import FakeHub

ROOT = Path(__file__).parents[1]
SIZES = {
    "hidden_size": 256, "intermediate_size": 1536, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 3,
}  # fmt: skip
CONFIG = """\
base_model: user/base
gate_mode: {mode}
experts:
  - {{source_model: user/first, positive_prompts: [code python, function class]}}
  - {{source_model: user/second, positive_prompts: [story scene, dragon castle]}}
  - {{source_model: user/base+user/adapter, positive_prompts: [maths solve, number sum]}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        name: make_model(root / name, seed=seed, shards=seed, **SIZES)
        for seed, name in enumerate(["base", "first", "second"], start=1)
    }
    return {**made, "adapter": make_adapter(root / "adapter", made["base"])}


@pytest.fixture
def hub(models: dict[str, Path]):  # type: ignore[no-untyped-def]
    with FakeHub() as served:
        for name, directory in models.items():
            served.publish(f"user/{name}", directory)
        yield served


def run(hub: FakeHub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moemerge", *map(str, arguments)],
        env={**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("mode", ["random", "ridge"])
def test_streaming_gives_the_bytes_of_the_cache(
    tmp_path: Path, hub: FakeHub, models: dict[str, Path], mode: str
) -> None:
    config = write_config(tmp_path / "config.yaml", CONFIG.format(mode=mode))
    done = run(hub, tmp_path / "a", config, tmp_path / "cached")
    assert done.returncode == 0, done.stderr
    plan = json.loads(run(hub, tmp_path / "b", "plan", config, "--stream", "--json").stdout)
    before = sent(hub)
    done = run(hub, tmp_path / "b", config, tmp_path / "streamed", "--stream")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "streamed") == weights(tmp_path / "cached")
    ranges = plan["transfer"]["ranges"]
    # Headers are read anew, by a block of 64 KiB a file, which real models do not notice.
    headers = 7 * (1 << 16)
    assert ranges <= sent(hub) - before <= 1.02 * ranges + headers
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    assert f"read {ranges / 1e6:.1f} MB from the Hub" in done.stdout
    verified = run(hub, tmp_path / "b", "verify", tmp_path / "streamed")
    assert verified.returncode == 0, verified.stderr
    assert "user/first: not compared (the Hub's cache has no weights of it)" in verified.stderr


def sent(hub: FakeHub) -> int:
    """The bytes of weight files that the Hub sent so far."""
    return sum(one.sent for one in hub.requests if one.file.endswith(".safetensors"))


def test_with_a_cache_a_second_run_transfers_nothing(tmp_path: Path, hub: FakeHub) -> None:
    config = write_config(tmp_path / "config.yaml", CONFIG.format(mode="random"))
    assert run(hub, tmp_path, config, tmp_path / "one").returncode == 0
    before = sent(hub)
    done = run(hub, tmp_path, config, tmp_path / "two", "--stream")
    assert done.returncode == 0 and sent(hub) == before
    assert "--stream has no effect" in done.stderr


def test_the_plan_counts_what_is_to_come(tmp_path: Path, hub: FakeHub) -> None:
    config = write_config(tmp_path / "config.yaml", CONFIG.format(mode="random"))
    made = run(hub, tmp_path, "plan", config)
    assert "to download into the cache" in made.stdout and "with --stream" in made.stdout
    modes = {
        mode: json.loads(run(hub, tmp_path, "plan", write_config(tmp_path / f"{number}.yaml",
              CONFIG.format(mode="ridge").replace("gate_mode: ridge", mode)), "--json").stdout)
        for number, mode in enumerate(["gate_mode: random", "gate: {on_policy: false}",
                                       "gate_mode: ridge", "gate_mode: self"])
    }  # fmt: skip
    ranges = [plan["transfer"]["ranges"] for plan in modes.values()]
    assert ranges == sorted(set(ranges))  # each reads more than the one before
