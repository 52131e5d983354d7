"""Numbers of experts that a class cannot run are refused; every other runs as it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from babies import make_model, simple_config, write_config
from test_cli import run
from test_laws import BODIES
from test_take_apart import HOSTS, SMALL, files, logits

from moemerge import InputError, merge, verify_checkpoint
from moemerge.architectures import types
from moemerge.config.schema import parse_config
from moemerge.mixture.edit import top_k
from moemerge.mixture.repairing import repair
from moemerge.plan.plan import Plan

ALONE = [(name, BODIES.get(family, {"family": family})) for name, family in HOSTS.items()]
ALONE += [("", BODIES["seed_oss"]), ("", BODIES["seed_oss head_dim"]), ("", BODIES["qwen3"])]


@pytest.mark.parametrize(
    ("name", "body"), ALONE, ids=[f"{name}-{body['family']}" for name, body in ALONE]
)
def test_one_expert_is_the_dense_model_or_refused(
    name: str, body: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = make_model(tmp_path / "base", **body)
    head = "gate_mode: random\n" + (f"architecture: {name}" if name else "")
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base], head))
    code, out = run(config, tmp_path / "out", "--quiet"), tmp_path / "out"
    if code == 0:
        assert (logits(out) - logits(base)).abs().max() <= 1e-5
        assert not name or types.find(name).SCORES == "softmax"
    else:
        assert code == 2 and "one expert alone" in capfd.readouterr().err and not out.exists()
        assert not name or types.find(name).SCORES == "sigmoid"


def split_of(base: Path, name: str, per_token: int, split: str, out: Path) -> Path:
    text = f"base_model: {base}\narchitecture: {name}\ngate_mode: random\n"
    text += f"experts_per_token: {per_token}\nsplit: {{{split}, assign: kmeans}}\n"
    merge(write_config(out.with_suffix(".yaml"), text), out, SMALL)
    return out


@pytest.mark.parametrize("per_token", [0, -1, 4])
def test_a_split_chooses_slices_that_there_are(
    per_token: int, babies: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"experts_per_token: is .* 1 to 3"):
        split_of(babies["base"], "glm4_moe", per_token, "slices: 4, shared: 1", tmp_path / "out")


def test_one_slice_left_to_choose_is_refused(babies: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one expert alone"):
        split_of(babies["base"], "glm4_moe", 1, "slices: 2, shared: 1", tmp_path / "out")


TOLD = ("by config.json", "by the manifest", "by both")


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe"])
def test_slices_weigh_what_they_weigh_in_a_split_of_that_number(
    name: str, told: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    split = "slices: 6, shared: 1" if types.find(name).SHARED else "slices: 6"
    moe = split_of(babies["base"], name, 3, split, tmp_path / "moe")
    config, manifest = (json.loads((moe / n).read_text()) for n in ("config.json", "moemerge.json"))
    if told == TOLD[0]:
        (moe / "moemerge.json").unlink()
    if told == TOLD[1]:
        for one in (config, manifest["plan"]["config"]):
            del one["moemerge_split_factor"]
        (moe / "config.json").write_text(json.dumps(config))
        plan = Plan.from_json({**manifest["plan"], "sources": manifest["sources"]})
        (moe / "moemerge.json").write_text(json.dumps({**manifest, "plan_digest": plan.digest}))
    for number, per_token in enumerate((5, 2)):
        out = tmp_path / f"out{number}"
        top_k(str(moe), per_token, out)
        verify_checkpoint(out)
        anew = split_of(babies["base"], name, per_token, split, tmp_path / f"anew{number}")
        assert (logits(out) - logits(anew)).abs().max() <= 1e-5
        if told == TOLD[2]:
            text = json.loads((out / "moemerge.json").read_text())["config"]
            assert parse_config(text).experts_per_token == per_token
        moe = out
    before = files(moe)
    if types.find(name).SCORES == "sigmoid":
        top_k(str(moe), 5)
        assert (logits(moe) - logits(tmp_path / "anew0")).abs().max() <= 1e-5
    else:
        assert run("top-k", moe, 5) == 2 and files(moe) == before


def test_parts_of_mlps_are_no_experts(
    babies: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moe, out = split_of(babies["base"], "mixtral", 2, "slices: 4", tmp_path / "moe"), tmp_path / "o"
    thin = make_model(tmp_path / "thin", intermediate_size=12)
    for command in (["add", moe, thin, out], ["extract", moe, out, "--expert", 1]):
        assert run(*command) == 2
        assert "parts of MLPs (slices" in capfd.readouterr().err
    assert run("drop", moe, out, "--expert", 1) == 2
    assert "is a split" in capfd.readouterr().err and not out.exists()


@pytest.fixture(scope="module")
def grouped(babies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts in two groups, of which a token may use one."""
    out = tmp_path_factory.mktemp("grouped") / "moe"
    text = simple_config(babies["base"], [babies["base"]] * 4, "architecture: glm4_moe")
    text += "gate_mode: random\nexperts_per_token: 1\narchitecture_options:\n"
    text += "  groups: 2\n  groups_per_token: 1\n"
    merge(write_config(out.with_suffix(".yaml"), text), out, SMALL)
    return out


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["top-k", "{moe}", "3", "{out}"], "a number from 1 to 2"),
        (["top-k", "{moe}", "3"], "a number from 1 to 2"),
        (["drop", "{moe}", "{out}", "--expert", "0"], "in 2 groups, which 3 cannot be"),
        (["add", "{moe}", "{base}", "{out}"], "in 2 groups, which 5 cannot be"),
    ],
)
def test_groups_hold_equal_parts_and_all_that_a_token_chooses(
    command: list[str], why: str, grouped: Path, babies: dict[str, Path], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"moe": grouped, "out": tmp_path / "out", "base": babies["base"]}
    before = files(grouped)
    assert run(*(part.format(**places) for part in command)) == 2
    assert why in capfd.readouterr().err
    assert files(grouped) == before and not (tmp_path / "out").exists()


def test_the_last_but_one_expert_of_such_a_class_stays(
    babies: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = simple_config(babies["base"], [babies["base"]] * 2, "architecture: glm4_moe")
    moe, out = tmp_path / "moe", tmp_path / "out"
    merge(write_config(tmp_path / "c.yaml", f"{text}gate_mode: random\n"), moe, SMALL)
    assert run("drop", moe, out, "--expert", 0) == 2
    assert "use extract: one expert is a dense model" in capfd.readouterr().err
    assert not out.exists()


def test_groups_that_hold_what_is_chosen_run(
    grouped: Path, babies: dict[str, Path], tmp_path: Path
) -> None:
    top_k(str(grouped), 2, tmp_path / "two")
    assert (logits(tmp_path / "two") - logits(babies["base"])).abs().max() <= 1e-5


def test_a_mixture_that_its_class_cannot_run_is_not_written_again(
    grouped: Path, tmp_path: Path
) -> None:
    config = json.loads((grouped / "config.json").read_text()) | {"n_group": 4, "topk_group": 4}
    del config["rope_theta"]
    moe = tmp_path / "moe"
    moe.mkdir()
    for path in grouped.glob("*.safetensors*"):
        (moe / path.name).symlink_to(path)
    (moe / "config.json").write_text(json.dumps(config))
    for edit in (lambda out: top_k(str(moe), 2, out), lambda out: repair(str(moe), out)):
        with pytest.raises(InputError, match="best two experts of each of 4 groups"):
            edit(tmp_path / "out")
    assert not (tmp_path / "out").exists()
