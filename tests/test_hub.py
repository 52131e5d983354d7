"""Sources on the Hub: what is asked, what is downloaded, what works without a network.

Each law runs the command line in a process of its own, against a Hub on loopback: huggingface_hub
reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

from moemerge.hub.client import Patience

ROOT = Path(__file__).parents[1]
HEADER_BYTES = 100_001
"""What huggingface_hub reads of a file to find its header."""

SHARDS = {
    "rest": ("embed_tokens", "lm_head", "model.norm"),
    "attention": ("self_attn", "layernorm"),
    "mlp": (".mlp.",),
}
CONFIG = """\
base_model: {base}
gate_mode: random
experts:
  - source_model: {base}
  - source_model: {coder}
  - source_model: {base}+{adapter}
"""
SECRET = "hf_secretsecretsecret"


@dataclass(frozen=True)
class Models:
    """Directories of models, each in three shards: MLPs, attention, and the rest."""

    base: Path
    coder: Path
    newer_coder: Path
    adapter: Path
    bins: Path

    def config(self, path: Path) -> Path:
        """The config that merges the directories."""
        path.write_text(CONFIG.format(base=self.base, coder=self.coder, adapter=self.adapter))
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1024}
    made = [make_model(root / name, seed=seed, **sizes) for seed, name in enumerate("bcn")]
    adapter = make_adapter(root / "adapter", made[0], rank=64)
    (adapter / "config.json").write_bytes((made[0] / "config.json").read_bytes())
    bins = make_model(root / "bins", seed=7, bins=True, shards=2, **sizes)
    for directory in made:
        _split(directory)
    return Models(*made, adapter, bins)


@pytest.fixture(scope="module")
def hub(models: Models) -> FakeHub:
    with FakeHub() as hub:
        hub.publish("lab/base", models.base)
        hub.publish("lab/coder", models.coder, "v1", "refs/pr/1")
        hub.publish("lab/coder", models.newer_coder)
        hub.publish("lab/adapter", models.adapter)
        hub.publish("lab/bins", models.bins)
        hub.publish("lab/gated", models.base, gated=True)
        hub.publish("lab/private", models.base, private=True)
        yield hub


def run(
    environment: dict[str, str], *arguments: object, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run `moemerge`, with nothing of huggingface_hub's in the environment but what is given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [python, "-m", "moemerge", *map(str, arguments)],
        env={**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "", **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@dataclass(frozen=True)
class Flow:
    """Plan, merge, merge again, then without a network: plan, merge, verify."""

    out: Path
    again: Path
    offline: Path
    planned: dict[str, object]
    planned_offline: dict[str, object]
    verified: str
    sent_by_plan: dict[str, int]
    sent_by_merge: dict[str, int]
    sent_by_again: dict[str, int]
    cached_by_plan: set[str]
    cached: set[str]
    asked_offline: int
    tokenizers_sent: dict[str, int]


FULL = pytest.param("transformers4", marks=pytest.mark.full)


@pytest.fixture(scope="module", params=["this", FULL])
def flow(
    request: pytest.FixtureRequest, hub: FakeHub, tmp_path_factory: pytest.TempPathFactory
) -> Flow:
    python = sys.executable if request.param == "this" else request.getfixturevalue(request.param)
    tmp = tmp_path_factory.mktemp("flow")
    text = CONFIG.format(base="lab/base", coder="lab/coder@v1", adapter="lab/adapter")
    config = write(tmp / "config.yaml", text)
    online, home = hub.environment(tmp / "home"), tmp / "home"
    offline = {**online, "HF_HUB_OFFLINE": "1"}

    def step(environment: dict[str, str], *arguments: object) -> tuple[str, dict[str, int]]:
        hub.forget()
        done = run(environment, *arguments, python=python)
        assert done.returncode == 0, done.stderr
        files = {(asked.repo, asked.file) for asked in hub.asked() if "safetensors" in asked.file}
        sent = {f"{repo}/{file}": hub.sent(repo, file) for repo, file in files}
        return done.stdout, sent

    planned, sent_by_plan = step(online, "plan", config, "--json")
    repositories = ("lab/base", "lab/coder")
    tokenizers = {repo: hub.sent(repo, "tokenizer.json") for repo in repositories}
    cached_by_plan = _cached(home)
    _, sent_by_merge = step(online, config, tmp / "out")
    cached = _cached(home)
    _, sent_by_again = step(online, config, tmp / "again")
    planned_offline, _ = step(offline, "plan", config, "--json")
    asked = len(hub.asked())
    step(offline, config, tmp / "offline")
    asked += len(hub.asked())
    verified, _ = step(offline, "verify", tmp / "out")
    asked += len(hub.asked())
    return Flow(
        tmp / "out", tmp / "again", tmp / "offline", without_transfer(planned),
        without_transfer(planned_offline), verified, sent_by_plan, sent_by_merge, sent_by_again,
        cached_by_plan, cached, asked, tokenizers,
    )  # fmt: skip


def without_transfer(plan: str) -> dict[str, Any]:
    """A plan but for what is still to come from the Hub, which the first merge changes."""
    return {key: value for key, value in json.loads(plan).items() if key != "transfer"}


@pytest.fixture(scope="module")
def local(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same merge of the same directories, without a Hub."""
    tmp = tmp_path_factory.mktemp("local")
    done = run({"HF_HUB_OFFLINE": "1"}, models.config(tmp / "config.yaml"), tmp / "out")
    assert done.returncode == 0, done.stderr
    return tmp / "out"


def test_plan_transfers_headers_only(flow: Flow) -> None:
    weights = {name: sent for name, sent in flow.sent_by_plan.items() if "index" not in name}
    assert len(weights) == 7
    assert all(0 < sent <= HEADER_BYTES for sent in weights.values())
    assert not any(name.endswith(".safetensors") for name in flow.cached_by_plan)


def test_plan_of_hub_ids_is_the_plan_of_their_directories(flow: Flow, local: Path) -> None:
    files = [local / name for name in _weights(local)]
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert flow.planned["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert flow.planned["bytes"] == sum(file.stat().st_size for file in files)


def test_merge_of_hub_ids_is_the_merge_of_their_directories(flow: Flow, local: Path) -> None:
    assert _weights(flow.out) == _weights(local)
    for name in _weights(local):
        ours, theirs = load_file(flow.out / name), load_file(local / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in ours)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (flow.out / name).read_bytes() == (local / name).read_bytes()


def test_only_shards_with_needed_tensors_are_downloaded(flow: Flow) -> None:
    weights = {name for name in flow.cached if name.endswith(".safetensors")}
    assert weights == {
        "models--lab--base/model-attention.safetensors",
        "models--lab--base/model-mlp.safetensors",
        "models--lab--base/model-rest.safetensors",
        "models--lab--coder/model-mlp.safetensors",
        "models--lab--adapter/adapter_model.safetensors",
    }


def test_a_tokenizer_that_two_models_have_is_downloaded_once(flow: Flow) -> None:
    base, coder = flow.tokenizers_sent.values()
    assert base and not coder
    names = {f"models--lab--{name}/tokenizer.json" for name in ("base", "coder")}
    assert names <= flow.cached_by_plan


def test_a_second_run_downloads_nothing(flow: Flow) -> None:
    """But the headers of shards that no run needed."""
    headers = {"lab/coder/model-attention.safetensors", "lab/coder/model-rest.safetensors"}
    assert set(flow.sent_by_again) <= headers
    assert all(sent <= HEADER_BYTES for sent in flow.sent_by_again.values())
    assert _bytes_of(flow.again) == _bytes_of(flow.out)


def test_the_manifest_records_the_commits(flow: Flow, hub: FakeHub) -> None:
    sources = json.loads((flow.out / "moemerge.json").read_text())["sources"]
    commits = {source["repo"]: source["commit"] for source in sources}
    assert commits == {
        "lab/base": hub.repositories["lab/base"].refs["main"],
        "lab/coder": hub.repositories["lab/coder"].refs["v1"],
        "lab/adapter": hub.repositories["lab/adapter"].refs["main"],
    }


def test_offline_the_cache_is_enough_and_nobody_is_asked(flow: Flow) -> None:
    assert flow.asked_offline == 0
    assert flow.planned_offline == flow.planned
    assert _bytes_of(flow.offline) == _bytes_of(flow.out)


def test_verify_offline_compares_every_tensor_but_the_routers(flow: Flow) -> None:
    tensors = sum(len(load_file(flow.out / name)) for name in _weights(flow.out))
    assert f"{tensors - 2} of {tensors} tensors equal" in flow.verified


def test_huggingface_hub_0_gives_the_same_bytes(
    flow: Flow, hub: FakeHub, tmp_path: Path, transformers4: str
) -> None:
    text = CONFIG.format(base="lab/base", coder="lab/coder@v1", adapter="lab/adapter")
    config = write(tmp_path / "config.yaml", text)
    environment = hub.environment(tmp_path)
    done = run(environment, config, tmp_path / "out", python=transformers4)
    assert done.returncode == 0, done.stderr
    assert _bytes_of(tmp_path / "out") == _bytes_of(flow.out)
    assert _cached(tmp_path) == flow.cached


def test_every_refusal_of_the_hub_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    sources = ["lab/gated", "lab/private", "lab/nothing", "lab/coder@v9", "lab/base+lab/gone"]
    config = _config(tmp_path, "lab/base", *sources)
    environment = hub.environment(tmp_path / "home", HF_TOKEN=SECRET)
    done = run(environment, config, tmp_path / "out")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "error: 5 problems, nothing written"
    told = dict(zip(sources, lines[1:], strict=True))
    for index, source in enumerate(sources):
        assert f"experts[{index}].source_model" in told[source]
        assert f": {source.rpartition('+')[2]}: " in told[source]
    assert "is gated; accept its licence" in told["lab/gated"]
    assert "has no such revision; name a branch" in told["lab/coder@v9"]
    for source in ("lab/private", "lab/nothing", "lab/base+lab/gone"):
        assert "nor a repository on the Hub that you can see; check the name" in told[source]
    assert SECRET not in done.stderr + done.stdout
    assert not (tmp_path / "out").exists()


def test_refusals_are_the_same_with_huggingface_hub_0(
    hub: FakeHub, tmp_path: Path, transformers4: str
) -> None:
    config = _config(tmp_path, "lab/base", "lab/gated", "lab/nothing", "lab/coder@v9")
    new, old = (
        run(hub.environment(tmp_path / python[-9:]), "plan", config, python=python)
        for python in (sys.executable, transformers4)
    )
    assert (old.returncode, old.stderr) == (2, new.stderr)


def test_a_refused_token_is_said_and_not_printed(hub: FakeHub, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home", HF_TOKEN=f"expired_{SECRET}")
    done = run(environment, "plan", _config(tmp_path, "lab/base", "lab/coder"))
    assert done.returncode == 2
    assert "lab/base: is refused by the Hub (HTTP 401); log in anew" in done.stderr
    assert SECRET not in done.stderr


@pytest.mark.parametrize("version", ["this", FULL])
@pytest.mark.parametrize("state", ["offline", "down"])
def test_without_network_and_cache_it_refuses_at_once(
    state: str, version: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = sys.executable if version == "this" else request.getfixturevalue(version)
    down = FakeHub()
    environment = down.environment(tmp_path, HF_TOKEN=SECRET, HF_HUB_OFFLINE=str(state[0] == "o"))
    down.close()
    config, begun = _config(tmp_path, "lab/base", "lab/base", "lab/coder@v1"), time.monotonic()
    done = run(environment, config, tmp_path / "out", python=python)
    assert time.monotonic() - begun < 10
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    why = {"offline": "HF_HUB_OFFLINE is set", "down": "the Hub cannot be reached"}[state]
    assert all(f"nor in the Hub's cache, and {why}" in line for line in lines[1:])
    assert all("download it where there is a network" in line for line in lines[1:])
    assert SECRET not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_path_is_never_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    config = _config(tmp_path, "./missing/dir", "/missing", "~/missing", "../missing", "a/b/c")
    hub.forget()
    done = run(hub.environment(tmp_path / "home"), "plan", config)
    assert done.returncode == 2
    assert done.stderr.count("there is no directory") == 5
    assert hub.asked() == []


def test_cache_dir_is_used(hub: FakeHub, tmp_path: Path) -> None:
    config = _config(tmp_path, "lab/base", "lab/base", "lab/coder@refs/pr/1")
    environment, cache = hub.environment(tmp_path / "home"), tmp_path / "cache"
    merged = run(environment, config, tmp_path / "out", "--cache-dir", cache)
    assert merged.returncode == 0, merged.stderr
    assert {path.name for path in cache.iterdir() if path.name.startswith("models--")} == {
        "models--lab--base", "models--lab--coder"
    }  # fmt: skip
    assert not (tmp_path / "home" / "hub").exists()
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    planned = run(offline, "plan", config, "--cache-dir", cache)
    assert planned.returncode == 0, planned.stderr
    verified = run(offline, "verify", tmp_path / "out", "--cache-dir", cache)
    assert "not compared" not in verified.stderr
    assert run(offline, "plan", config).returncode == 2


@pytest.mark.parametrize("told", [set(), {"size"}], ids=["names alone", "no digests"])
def test_an_endpoint_that_tells_less_of_its_files_is_served(
    told: set[str], hub: FakeHub, models: Models, tmp_path: Path
) -> None:
    """As mirrors and proxies do; what it does not tell of two files does not make them one."""
    text = CONFIG.format(base="lab/base", coder="lab/bins", adapter="lab/adapter")
    config = write(tmp_path / "config.yaml", text)
    whole, hub.listed = hub.listed, told
    try:
        planned = run(hub.environment(tmp_path), "plan", config, "--json")
        done = run(hub.environment(tmp_path), config, tmp_path / "out")
    finally:
        hub.listed = whole
    assert done.returncode == 0, done.stderr
    expected = sum(path.stat().st_size for path in models.bins.glob("*.bin"))
    assert json.loads(planned.stdout)["transfer"]["files"] > expected
    assert {"tokenizer.json", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_the_cache_serves_while_the_hub_is_down(hub: FakeHub, tmp_path: Path) -> None:
    """A shard that is needed and not cached is a refusal; one that no plan needs is not missed."""
    config = _config(tmp_path, "lab/base", "lab/base", "lab/coder")
    assert run(hub.environment(tmp_path), config, tmp_path / "out").returncode == 0
    down = FakeHub()
    environment = down.environment(tmp_path)
    down.close()
    planned = run(environment, "plan", config)
    assert planned.returncode == 0, planned.stderr
    for source in ("lab/base", "lab/coder"):
        assert f"note: {source}: the Hub cannot be reached" in planned.stderr
    backwards = write(
        tmp_path / "other.yaml",
        config.read_text().replace("base_model: lab/base", "base_model: lab/coder"),
    )
    refused = run(environment, "plan", backwards)
    assert refused.returncode == 2
    assert "base_model" in refused.stderr
    assert "download" in refused.stderr


class Answer(Exception):
    """An HTTP library's error, with the answer that it is about."""

    def __init__(self, status: int, **headers: str):
        self.response = SimpleNamespace(status_code=status, headers=headers)


def test_the_hub_is_asked_again_while_that_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks: each wait is twice the last, or as long as the Hub says, never over 30 s."""
    waits: list[float] = []
    monkeypatch.setattr("moemerge.hub.client.time.sleep", waits.append)
    patience = Patience()
    while patience.again(ConnectionError("reset")):
        pass
    assert waits == [0.5, 1, 2, 4, 8, 16, 30]
    patience.began_anew()
    assert patience.again(Answer(429, **{"retry-after": "7"})) and waits[-1] == 7
    assert patience.again(Answer(503, **{"retry-after": "700"})) and waits[-1] == 30
    for final in (Answer(404), Answer(403), ValueError("no JSON"), OSError(28, "full", "file")):
        assert not Patience().again(final)
    wrapped = RuntimeError("huggingface_hub's own")
    wrapped.__cause__ = Answer(500)
    assert Patience().again(wrapped)


@pytest.mark.full
@pytest.mark.parametrize("version", ["this", "transformers4"])
def test_a_download_that_does_not_come_is_said(
    version: str, hub: FakeHub, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The Hub goes away between the plan and the download; huggingface_hub tries for a while."""
    python = sys.executable if version == "this" else request.getfixturevalue(version)
    config = _config(tmp_path, "lab/base", "lab/base", "lab/coder")
    assert run(hub.environment(tmp_path), "plan", config, python=python).returncode == 0
    commit = hub.repositories["lab/base"].refs["main"]
    script = f"""
from moemerge.errors import ReadError
from moemerge.hub import Remote, download
try:
    download.fetch([Remote("lab/base", "{commit}", "model-mlp.safetensors", 0, "")], None)
except ReadError as error:
    print(error)
"""
    down = FakeHub()
    down.close()
    environment = {**os.environ, **down.environment(tmp_path)}
    done = subprocess.run(
        [python, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("lab/base: the download failed (")
    assert done.stdout.endswith("); run the same command again\n")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("version", ["this", FULL])
def test_a_repository_of_bin_files_is_planned_from_headers_and_merged(
    version: str, hub: FakeHub, models: Models, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = sys.executable if version == "this" else request.getfixturevalue(version)
    config = _config(tmp_path, "lab/base", "lab/base", "lab/bins")
    bins = sorted(path.name for path in models.bins.glob("*.bin"))
    hub.forget()
    planned = run(hub.environment(tmp_path), "plan", config, python=python)
    assert planned.returncode == 0, planned.stderr
    for name in bins:
        assert 0 < hub.sent("lab/bins", name) < (models.bins / name).stat().st_size / 3
    assert not {f"models--lab--bins/{name}" for name in bins} & _cached(tmp_path)
    done = run(hub.environment(tmp_path), config, tmp_path / "out", python=python)
    assert done.returncode == 0, done.stderr
    weights: dict[str, torch.Tensor] = {}
    for file in models.bins.glob("*.bin"):
        weights |= torch.load(file, weights_only=True)
    merged = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    assert torch.equal(merged[name], weights["model.layers.1.mlp.down_proj.weight"])


def test_the_fake_hub_serves_what_it_is_given(hub: FakeHub, models: Models) -> None:
    """The counts that the laws above rest on are right."""
    import urllib.request

    path = models.base / "model-mlp.safetensors"
    url = f"{hub.url}/lab/base/resolve/main/{path.name}"
    hub.forget()
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == path.read_bytes()
    assert hub.sent("lab/base", path.name) == path.stat().st_size
    part = urllib.request.Request(url, headers={"Range": "bytes=8-99"})
    with urllib.request.urlopen(part) as answer:
        assert (answer.status, answer.read()) == (206, path.read_bytes()[8:100])


def _split(directory: Path) -> None:
    """Divide a model's one file by SHARDS."""
    whole = directory / "model.safetensors"
    tensors, weight_map = load_file(whole), {}
    for kind, parts in SHARDS.items():
        names = [name for name in tensors if any(part in name for part in parts)]
        file = f"model-{kind}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    assert weight_map.keys() == tensors.keys()
    whole.unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def _config(tmp: Path, base: str, *experts: str) -> Path:
    lines = [f"base_model: {base}", "gate_mode: random", "experts:"]
    lines += [f"  - source_model: {expert}" for expert in experts]
    return write(tmp / "config.yaml", "\n".join(lines) + "\n")


def _cached(home: Path) -> set[str]:
    """The files that the cache holds, as `models--user--name/file`."""
    return {
        f"{path.parts[-4]}/{path.name}"
        for path in (home / "hub").glob("models--*/snapshots/*/*")
        if path.is_file()
    }


def _weights(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def _bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
