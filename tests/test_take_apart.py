"""Mixtures repaired, taken apart and put together: the same bytes under other names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import (
    LLAMA3_ROPE,
    make_adapter,
    make_model,
    save_weights,
    simple_config,
    write_config,
)
from fake_hub import FakeHub
from safetensors.torch import load_file
from test_fused import make_mixture
from test_laws import BODIES, USUAL
from test_readers import ROOT, python_of, read
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moemerge import InputError, Options, merge, regate, routing_report, verify_checkpoint
from moemerge.architectures import types
from moemerge.card.sharing import shareable
from moemerge.cli import app
from moemerge.families import RECORDS
from moemerge.mixture.edit import add, drop, top_k
from moemerge.mixture.extraction import extract
from moemerge.mixture.repairing import repair
from moemerge.output.manifest import read_manifest
from moemerge.plan.plan import Plan

SMALL = Options(shard_size="16KB")
OWN = {"qwen2_moe": "qwen2", **dict.fromkeys(
    ("granitemoe", "granitemoehybrid", "granitemoeshared"), "granite"
)}  # fmt: skip
HOSTS = {
    name: OWN.get(
        name,
        next(
            f for f in types.find(name).HOLDS.families if f in BODIES and not RECORDS[f].interleaved
        ),
    )
    for name in USUAL
    if not types.find(name).READING.names.closed
}
KINDS = ("with a manifest", "without", "as transformers 5 holds it")
TOKENS = torch.arange(24)[None]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def files(directory: Path) -> dict[str, bytes]:
    paths = directory.rglob("*") if directory.is_dir() else ()
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths if p.is_file()}


def logits(directory: Path) -> torch.Tensor:
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    wrong = [list(found[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert wrong == [[], [], []]
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Four models of each family: a base and three experts."""
    root = tmp_path_factory.mktemp("dense")
    return {
        family: [make_model(root / f"{family}-{n}", family, seed=n) for n in range(4)]
        for family in set(HOSTS.values())
    }


@pytest.fixture(scope="module")
def mixtures(
    dense: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A mixture for each host: of its family's expert 1, expert 2 and the base."""
    root = tmp_path_factory.mktemp("mixtures")
    made = {}
    for host, family in HOSTS.items():
        base, first, second, _ = dense[family]
        text = simple_config(base, [first, second, base], head_of(host))
        made[host] = root / host
        merge(write_config(root / f"{host}.yaml", text), made[host], SMALL)
    return made


def head_of(host: str) -> str:
    return f"architecture: {host}\ngate_mode: random\nexperts_per_token: 2"


def as_kind(mixture: Path, kind: str, to: Path) -> Path:
    """A mixture as moemerge leaves it, without its manifest, or under transformers 5's names."""
    shutil.copytree(mixture, to)
    if kind != KINDS[0]:
        (to / "moemerge.json").unlink()
    if kind == KINDS[2]:
        model = AutoModelForCausalLM.from_pretrained(to)
        for path in (*to.glob("*.safetensors"), *to.glob("*.index.json")):
            path.unlink()
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_weights(to, state, shards=2)
    return to


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_an_expert_taken_out_is_its_own_mlps_in_the_base(
    host: str, kind: str, mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    moe = as_kind(mixtures[host], kind, tmp_path / "moe")
    base, first, *_ = map(weights, dense[HOSTS[host]])
    extract(str(moe), "0", tmp_path / "first")
    expected = {name: (first if ".mlp." in name else base)[name] for name in base}
    assert same(weights(tmp_path / "first"), expected)
    extract(str(moe), "2", tmp_path / "base")
    assert same(weights(tmp_path / "base"), base)
    difference = logits(tmp_path / "base") - logits(dense[HOSTS[host]][0])
    assert difference.abs().max() <= 1e-5
    verified = verify_checkpoint(tmp_path / "first")
    assert verified.compared == verified.tensors == len(base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_what_is_added_and_dropped_leaves_every_tensor_as_it_was(
    host: str, kind: str, mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    moe = as_kind(mixtures[host], kind, tmp_path / "moe")
    more, again = tmp_path / "more", tmp_path / "again"
    built = add(str(moe), str(dense[HOSTS[host]][3]), more)
    assert len(built.plan.experts) == 4
    verify_checkpoint(more)
    old, new = weights(mixtures[host]), weights(more)
    routers = [name for name in old if name.endswith((".gate.weight", "router.layer.weight"))]
    assert len(routers) == 2
    for name in routers:
        assert torch.equal(new[name][:3], old[name])
        assert torch.allclose(new[name][3], old[name].mean(0), atol=1e-6)
    assert logits(more).isfinite().all()
    extract(str(more), "3", tmp_path / "third")
    third, taken = weights(dense[HOSTS[host]][3]), weights(tmp_path / "third")
    assert all(torch.equal(taken[name], third[name]) for name in third if ".mlp." in name)
    drop(str(more), "3", again)
    assert same(weights(again), old)
    repair(str(moe), tmp_path / "repaired")
    config = (tmp_path / "repaired" if kind == KINDS[2] else moe) / "config.json"
    assert json.loads((again / "config.json").read_text()) == json.loads(config.read_text())
    verify_checkpoint(again)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("host", ["mixtral", "granitemoe", "dots1"])
def test_without_an_expert_it_is_the_merge_of_the_others(
    host: str, number: int, mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    base, first, second, _ = dense[HOSTS[host]]
    left = [one for n, one in enumerate([first, second, base]) if n != number]
    text = simple_config(base, left, head_of(host))
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "merged", SMALL)
    drop(str(mixtures[host]), str(number), tmp_path / "dropped")
    merged, dropped = weights(tmp_path / "merged"), weights(tmp_path / "dropped")
    assert merged.keys() == dropped.keys()
    rows = [row for row in range(3) if row != number]
    old = weights(mixtures[host])
    for name, tensor in dropped.items():
        of_router = "gate." in name or "router" in name
        assert torch.equal(tensor, old[name][rows] if of_router else merged[name]), name
    config = json.loads((tmp_path / "dropped/config.json").read_text())
    assert config == json.loads((tmp_path / "merged/config.json").read_text())


def test_fewer_experts_than_a_token_chooses_are_all_chosen(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    drop(str(mixtures["mixtral"]), "2", tmp_path / "two")
    drop(str(tmp_path / "two"), "1", tmp_path / "one")
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (1, 1)
    with pytest.raises(InputError, match="the only one there is"):
        drop(str(tmp_path / "one"), "0", tmp_path / "none")


@pytest.mark.parametrize("host", ["mixtral", "glm4_moe", "granitemoe"])
def test_regate_takes_what_was_added_for_merged(
    host: str, mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    base, first, second, third = dense[HOSTS[host]]
    text = simple_config(base, [first, second, base, third], head_of(host))
    config = write_config(tmp_path / "c.yaml", text.replace("random", "cheap_embed"))
    merge(config, tmp_path / "merged", SMALL)
    add(str(mixtures[host]), str(third), tmp_path / "added")
    regate(tmp_path / "added", config)
    assert same(weights(tmp_path / "added"), weights(tmp_path / "merged"))
    verify_checkpoint(tmp_path / "added")
    drop(str(tmp_path / "added"), "1", tmp_path / "dropped")
    fewer = simple_config(base, [first, base, third], head_of(host))
    regate(tmp_path / "dropped", write_config(tmp_path / "d.yaml", fewer))
    verify_checkpoint(tmp_path / "dropped")


@pytest.mark.parametrize("drawn", ["noise_scale: 0.1", "renew: 0.5"])
@pytest.mark.parametrize("host", ["mixtral", "granitemoe"])
def test_what_was_drawn_for_another_name_is_kept_as_it_is(
    host: str, drawn: str, dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    base, first, second, _ = dense[HOSTS[host]]
    text = simple_config(base, [first, second], head_of(host), drawn)
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "moe", SMALL)
    drop(str(tmp_path / "moe"), "0", tmp_path / "left")
    verified = verify_checkpoint(tmp_path / "left")
    assert verified.compared == verified.tensors
    extract(str(tmp_path / "moe"), "1", tmp_path / "old")
    extract(str(tmp_path / "left"), "0", tmp_path / "new")
    assert same(weights(tmp_path / "old"), weights(tmp_path / "new"))


def test_whole_files_are_copied_and_none_is_linked(
    mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    moe = mixtures["mixtral"]
    built = add(str(moe), str(dense["llama"][3]), tmp_path / "added")
    old = sum(path.stat().st_size for path in moe.glob("*.safetensors"))
    assert built.copied > 0.95 * old
    inodes = {path.stat().st_ino for path in moe.iterdir()}
    assert not inodes & {path.stat().st_ino for path in (tmp_path / "added").iterdir()}


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied, llama3 rope, head_dim": (
        "llama", {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 16}
    ),
    "sliding window": ("mistral", {"sliding_window": 7}),
    "fused projections": ("phi3", {"pad_token_id": 0}),
    "biases": ("qwen2", {"rope_theta": 500000.0}),
    "multipliers": ("granite", {"residual_multiplier": 0.5, "logits_scaling": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_the_base_taken_out_says_what_it_said(body: str, tmp_path: Path) -> None:
    family, changes = BODIES[body]
    base, other = (make_model(tmp_path / str(n), family, seed=n, **changes) for n in range(2))
    text = simple_config(base, [other, base], "gate_mode: random")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "moe")
    built = extract(str(tmp_path / "moe"), "1", tmp_path / "out")
    assert built.plan.architecture == {"phi3": "llama", "qwen2": "granite"}.get(family, family)
    assert (logits(tmp_path / "out") - logits(base)).abs().max() <= 1e-5


def test_what_is_always_on_is_no_part_of_an_expert(tmp_path: Path) -> None:
    base, other = (make_model(tmp_path / str(n), seed=n) for n in range(2))
    text = simple_config(base, [other, base], "architecture: granitemoeshared\ngate_mode: random")
    text += f"shared_experts:\n  - source_model: {other}\n"
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "moe")
    arguments = ["extract", str(tmp_path / "moe"), str(tmp_path / "out"), "--expert", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "shared experts, which are always on" in result.stderr
    assert (logits(tmp_path / "out") - logits(base)).abs().max() <= 1e-5


def test_an_adapter_on_a_model_is_an_expert_too(
    mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    base, first, second, third = dense["llama"]
    adapter = make_adapter(tmp_path / "adapter", third)
    add(str(mixtures["mixtral"]), f"{third}+{adapter}", tmp_path / "more")
    text = simple_config(base, [first, second, base, f"{third}+{adapter}"], head_of("mixtral"))
    config = write_config(tmp_path / "c.yaml", text)
    merge(config, tmp_path / "merged", SMALL)
    regate(tmp_path / "more", config)
    assert same(weights(tmp_path / "more"), weights(tmp_path / "merged"))
    verified = verify_checkpoint(tmp_path / "more")
    assert verified.compared == verified.tensors - 2


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_a_mixture_on_the_hub_is_taken_apart_too(
    how: list[str], mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    moe = as_kind(mixtures["qwen3_moe"], KINDS[2], tmp_path / "moe")
    with FakeHub() as hub:
        hub.publish("user/moe", moe)
        run = ["-m", "moemerge", "extract", "user/moe", tmp_path / "out", "--expert", "2", *how]
        done = subprocess.run(
            [sys.executable, *map(str, run)],
            env={**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "out"), weights(dense["qwen3"][0]))


def test_what_is_pushed_tells_no_paths(mixtures: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS[:2]:
        moe = as_kind(mixtures["mixtral"], kind, tmp_path / kind)
        drop(str(moe), "0", tmp_path / f"{kind} fewer")
        shared = shareable(read_manifest(tmp_path / f"{kind} fewer"))
        assert str(tmp_path) not in json.dumps(shared.to_json())


def test_routing_asks_for_texts_where_no_prompts_are_known(
    mixtures: dict[str, Path], tmp_path: Path
) -> None:
    moe = as_kind(mixtures["mixtral"], KINDS[1], tmp_path / "moe")
    drop(str(moe), "0", tmp_path / "out")
    with pytest.raises(InputError, match="its prompts are not known; name texts"):
        routing_report(tmp_path / "out")
    (tmp_path / "a.txt").write_text("code python function class return story scene " * 9)
    assert routing_report(tmp_path / "out", {"a": tmp_path / "a.txt"})["experts_per_token"] == 2


@pytest.mark.parametrize("kind", KINDS[:2])
def test_experts_a_token_change_in_place(
    kind: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    moe = as_kind(mixtures["mixtral"], kind, tmp_path / "moe")
    before = files(moe)
    top_k(str(moe), 3, tmp_path / "other")
    assert files(moe) == before
    top_k(str(moe), 3)
    after = files(moe)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == ({"config.json", "moemerge.json"} if kind == KINDS[0] else {"config.json"})
    assert torch.equal(logits(moe), logits(tmp_path / "other"))
    assert not torch.equal(logits(moe), logits(mixtures["mixtral"]))
    verify_checkpoint(tmp_path / "other")
    if kind == KINDS[0]:
        verify_checkpoint(moe)
        assert "experts_per_token: 3" in json.loads(after["moemerge.json"])["config"]


@pytest.mark.parametrize("host", HOSTS)
def test_repaired_it_is_what_it_was_under_every_readers_names(
    host: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    moe = as_kind(mixtures[host], KINDS[2], tmp_path / "moe")
    config = json.loads((moe / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    (moe / "config.json").write_text(json.dumps(config))
    assert repair(str(moe), tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(mixtures[host]))
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert made == json.loads((mixtures[host] / "config.json").read_text())
    assert repair(str(tmp_path / "out"), tmp_path / "again") is None
    assert not (tmp_path / "again").exists()


def test_repair_leaves_what_is_right(mixtures: dict[str, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["repair", str(mixtures["mixtral"]), str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert "nothing to do" in result.stdout and not (tmp_path / "out").exists()


def test_cut_off_the_same_call_goes_on(
    mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = (str(mixtures["dots1"]), str(dense["qwen3"][3]))
    add(*arguments, tmp_path / "whole")

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    for place in ("write_shard", "verify_shards", "Change.finish"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"moemerge.mixture.rebuild.{place}", die)
            add(*arguments, tmp_path / "out")
        assert not (tmp_path / "out/config.json").exists()
    add(*arguments, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def peer(*arguments: object) -> None:
    program = Path(python_of("mergekit")).with_name("mergekit-moe")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def peers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2 twice in a mixture, as mergekit 0.1.5 writes it (`moe`), and `repaired`."""
    root = tmp_path_factory.mktemp("peer")
    (root / "again").symlink_to(smollm2)
    text = simple_config(smollm2, [smollm2, root / "again"], "gate_mode: hidden\ndtype: bfloat16")
    peer(write_config(root / "c.yaml", text), root / "moe", "--quiet")
    assert repair(str(root / "moe"), root / "repaired")
    yield root
    shutil.rmtree(root)


REQUEST = {"prompts": ["The capital of France is"], "new_tokens": 8}


@pytest.fixture(scope="module")
def said(peers: Path) -> list[list[int]]:
    """What transformers 5, which reads both, makes of both."""
    found = [
        read("transformers 5", peers / model, peers / f"w-{model}", **REQUEST)["generated"]
        for model in ("moe", "repaired")
    ]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.full
@pytest.mark.parametrize("reader", ["transformers 4.57", "llama.cpp", "mlx-lm"])
def test_readers_that_refused_a_peers_mixture_take_the_repaired_one(
    reader: str, peers: Path, said: list[list[int]], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        read(reader, peers / "moe", tmp_path / "before", **REQUEST)
    found = read(reader, peers / "repaired", tmp_path / "after", **REQUEST)
    assert found["generated"] == said


QWEN = """\
shared_experts:
  - source_model: {0}
    positive_prompts: [please]
    residual_scale: 0.5
"""


@pytest.mark.full
def test_a_peers_qwen_moe_gets_a_config_that_version_4_understands(tmp_path: Path) -> None:
    models = [make_model(tmp_path / str(n), "qwen2", seed=n, rope_theta=500000.0) for n in range(3)]
    text = simple_config(models[0], models[1:], "gate_mode: hidden\ndtype: float32")
    config = write_config(tmp_path / "c.yaml", text + QWEN.format(models[0]))
    peer(config, tmp_path / "moe", "--quiet")
    assert repair(str(tmp_path / "moe"), tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "moe"))

    def of(reader: str, model: str) -> np.ndarray[Any, Any]:
        request = {"token_ids": [list(range(24))], "new_tokens": 1, "logits": True}
        found = read(reader, tmp_path / model, tmp_path / f"{reader} {model}", **request)
        logits: np.ndarray[Any, Any] = np.load(found["logits_npy"])["arr_0"]
        return logits

    expected = of("transformers 5", "moe")
    assert np.abs(of("transformers 4.57", "moe") - expected).max() > 1e-2
    for reader in ("transformers 5", "transformers 4.57"):
        assert np.abs(of(reader, "out") - expected).max() <= 1e-5


BAD: dict[str, tuple[list[str], str]] = {
    "no such expert": (["extract", "{moe}", "{out}", "--expert", "3"], "none of its 3 experts"),
    "no number": (["drop", "{moe}", "{out}", "--expert", "-1"], "none of its 3 experts"),
    "too many a token": (["top-k", "{moe}", "4", "{out}"], "4 of 3 experts"),
    "none a token": (["top-k", "{moe}", "0"], "0 of 3 experts"),
    "a dense model": (["repair", "{dense}", "{out}"], "no mixture that is known"),
    "nothing": (["drop", "./nowhere", "{out}", "--expert", "0"], "there is no directory"),
    "itself": (["drop", "{moe}", "{moe}", "--expert", "0"], "is one of the sources"),
    "another depth": (["add", "{moe}", "{deep}", "{out}"], "num_hidden_layers is 3"),
    "another family": (["add", "{moe}", "{qwen}", "{out}"], "model_type is 'qwen3'"),
    "not to be had": (["add", "{moe}", "./nowhere", "{out}"], "there is no directory"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_and_nothing_is_written(
    what: str, mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    deep = make_model(tmp_path / "deep", num_hidden_layers=3) if what == "another depth" else ""
    places = {"moe": mixtures["mixtral"], "dense": dense["llama"][0], "deep": deep,
              "qwen": dense["qwen3"][0], "out": tmp_path / "out"}  # fmt: skip
    command, words = BAD[what]
    before = files(mixtures["mixtral"])
    result = CliRunner().invoke(app, [part.format(**places) for part in command])
    assert result.exit_code == 2, result.output
    assert words in result.stderr and not result.stdout
    assert not (tmp_path / "out").exists() and files(mixtures["mixtral"]) == before


CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "more experts": ({"num_local_experts": 4}, "config.json says 4 experts"),
    "no number": ({"num_local_experts": "3"}, "number of experts is '3'"),
    "two numbers": ({"num_experts": 2}, "num_experts and num_local_experts disagree"),
    "another width": ({"hidden_size": 16}, "config.json says"),
    "no rope": ({"rope_theta": None, "rope_parameters": None}, "does not say rope_theta"),
    "none a token": ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    "kinds that are no list": ({"layer_types": 1}, "layer_types is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_config_that_lies_is_refused(
    claim: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    moe = as_kind(mixtures["mixtral"], KINDS[1], tmp_path / "moe")
    changes, words = CLAIMS[claim]
    config = {**json.loads((moe / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (moe / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        extract(str(moe), "0", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["not JSON", "changed", "forged"])
def test_a_manifest_that_cannot_be_believed_is_not_used(
    how: str, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    moe = as_kind(mixtures["mixtral"], KINDS[0], tmp_path / "moe")
    data = json.loads((moe / "moemerge.json").read_text())
    data["plan"]["shards"][1]["tensors"][0]["recipe"]["read"]["source"] = [1]
    if how == "forged":
        data["plan_digest"] = Plan.from_json({**data["plan"], "sources": data["sources"]}).digest
    text = "{" if how == "not JSON" else json.dumps(data)
    (moe / "moemerge.json").write_text(text)
    arguments = ["drop", str(moe), str(tmp_path / "out"), "--expert", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "its moemerge.json is not used: " in result.stderr
    assert verify_checkpoint(tmp_path / "out").compared


@pytest.mark.parametrize("fused", [True, False])
def test_a_mixture_that_no_merge_makes_is_taken_apart_but_for_its_body(
    fused: bool, tmp_path: Path
) -> None:
    moe = make_mixture(tmp_path / "moe", "olmoe", fused)
    drop(str(moe), "1", tmp_path / "fewer")
    assert logits(tmp_path / "fewer").isfinite().all()
    with pytest.raises(InputError, match="whose body is no"):
        extract(str(moe), "0", tmp_path / "out")


def test_an_expert_with_a_hole_is_refused(mixtures: dict[str, Path], tmp_path: Path) -> None:
    moe = as_kind(mixtures["mixtral"], KINDS[1], tmp_path / "moe")
    state = weights(moe)
    for path in (*moe.glob("*.safetensors"), *moe.glob("*.index.json")):
        path.unlink()
    del state["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    save_weights(moe, state)
    with pytest.raises(InputError, match=r"model\.layers\.1 holds 8 matrices of experts"):
        drop(str(moe), "0", tmp_path / "out")


def test_the_commands_say_what_came_of_it(
    mixtures: dict[str, Path], dense: dict[str, list[Path]], tmp_path: Path
) -> None:
    moe, third = mixtures["mixtral"], dense["llama"][3]
    run = CliRunner().invoke
    result = run(app, ["add", str(moe), str(third), str(tmp_path / "a"), "--name", "third"])
    assert result.exit_code == 0, result.stderr
    assert "mixtral, 4 experts, 2 a token; wrote" in result.stdout and "regate" in result.stdout
    result = run(app, ["extract", str(tmp_path / "a"), str(tmp_path / "e"), "--expert", "third"])
    assert result.exit_code == 0 and "llama, wrote" in result.stdout, result.stderr
    result = run(app, ["drop", str(tmp_path / "a"), str(tmp_path / "d"), "--expert", "third", "-q"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "d/README.md").is_file() and (tmp_path / "d/tokenizer.json").is_file()
