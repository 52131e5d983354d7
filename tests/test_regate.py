"""New routers for a built mixture: one small file changes, and what is there stays a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from babies import make_model, simple_config, write_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moemerge import InputError, Options, RunError, merge, output, verify_checkpoint
from moemerge.cli import app
from moemerge.merging.new_routers import regate
from moemerge.output.state import State

ROOT = Path(__file__).resolve().parent.parent
SMALL = Options(shard_size="16KB")
CHANGED = {"README.md", "moemerge.json", "config.json", "model.safetensors.index.json"}


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


@pytest.fixture
def config(tmp_path: Path, babies: dict[str, Path]) -> Path:
    base, first, second = babies.values()
    text = simple_config(base, [first, second, base], "gate_mode: random")
    return write_config(tmp_path / "c.yaml", text)


def changed(config: Path, *edits: tuple[str, str]) -> Path:
    """The config of the same name in another folder, edited."""
    text = config.read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    folder = config.parent / "new"
    folder.mkdir(exist_ok=True)
    return write_config(folder / config.name, text)


NEW: dict[str, list[tuple[str, str]]] = {
    "another gate mode": [("random", "ridge")],
    "options": [("gate_mode: random", "gate: { mode: ridge, kappa: 9, on_policy: true }")],
    "own text": [("gate_mode: random", "gate: { mode: self, samples: 3, tokens: 6 }")],
    "other prompts": [("random", "hidden"), ("code python", "explain python")],
    "documents": [
        ("random", "ridge"),
        ("    positive_prompts", "    calibration: a.txt\n    positive_prompts"),
    ],
    "more experts a token": [("gate_mode: random", "gate_mode: random\nexperts_per_token: 3")],
    "other names": [("    positive_prompts", "    name: coder\n    positive_prompts")],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("what", NEW)
def test_it_is_the_merge_anew_and_touches_one_shard(
    config: Path, tmp_path: Path, what: str
) -> None:
    out, anew = tmp_path / "out", tmp_path / "anew"
    merge(config, out, SMALL)
    before = {path.name: path.stat() for path in out.iterdir()}
    new = changed(config, *NEW[what])
    (new.parent / "a.txt").write_text("return the sum")
    done = regate(out, new)
    merge(new, anew, SMALL)
    assert files(out) == files(anew)
    assert not (out / ".moemerge").exists()
    first = done.plan.shards[0].file
    for name, was in before.items():
        if name not in CHANGED | {first}:
            now = (out / name).stat()
            assert (now.st_mtime_ns, now.st_ino) == (was.st_mtime_ns, was.st_ino), name
    verify_checkpoint(out)
    per_token = 3 if what == "more experts a token" else 2
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_experts_per_tok == per_token


def test_the_shards_keep_the_size_that_they_have(config: Path, tmp_path: Path) -> None:
    merge(config, tmp_path / "out", SMALL)
    regate(tmp_path / "out", changed(config, ("random", "ridge")))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    verify_checkpoint(tmp_path / "out")


def test_its_result_tells_how_the_routers_do(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert merge(config, out).routing == {}
    done = regate(out, changed(config, ("random", "ridge")))
    assert done.routing == output.read_manifest(out).routing
    assert 0 <= done.routing["t1"] <= 1
    assert done.written < 2000


OTHER: dict[str, tuple[list[tuple[str, str]], Options, str]] = {
    "another order": ([("{first}", "{second}"), ("{second}", "{first}")], Options(), "weights"),
    "one expert fewer": ([("  - source_model: {base}\n", "")], Options(), "weights"),
    "noise": ([("    positive_prompts", "    noise_scale: 0.1\n    positive_prompts")],
              Options(), "weights"),
    "residual scale": ([("    positive_prompts", "    residual_scale: 2\n    positive_prompts")],
                       Options(), "weights"),
    "dtype": ([("gate_mode: random", "dtype: bfloat16")], Options(), "weights"),
    "body": ([("gate_mode: random", "body: average")], Options(), "weights"),
    "base": ([("base_model: {base}", "base_model: {first}")], Options(), "weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_other_weights_are_refused(
    config: Path, tmp_path: Path, babies: dict[str, Path], kind: str
) -> None:
    out = tmp_path / "out"
    merge(config, out, SMALL)
    before = files(out)
    edits, options, words = OTHER[kind]
    text = config.read_text()
    if kind == "one expert fewer":
        text = text[: text.rindex("  - source_model")]
    elif kind == "another order":
        text = text.replace("/first\n", "/x\n").replace("/second\n", "/first\n")
        text = text.replace("/x\n", "/second\n")
    else:
        [(old, new)] = edits
        named = {f"{{{name}}}": str(path) for name, path in babies.items()}
        for mark, path in named.items():
            old, new = old.replace(mark, path), new.replace(mark, path)
        assert old in text
        text = text.replace(old, new, 1)
    other = write_config(tmp_path / "other.yaml", text)
    with pytest.raises(InputError, match=f"asks for other {words} .*merge again") as refused:
        regate(out, other, options)
    assert len(refused.value.problems) == 1
    assert files(out) == before and not (out / ".moemerge").exists()
    result = CliRunner().invoke(app, ["regate", str(out), str(other)])
    assert result.exit_code == 2 and "other weights" in result.stderr and not result.stdout
    assert files(out) == before


def test_noise_of_another_seed_is_other_weights(config: Path, tmp_path: Path) -> None:
    noisy = changed(config, ("    positive_prompts", "    noise_scale: 0.1\n    positive_prompts"))
    merge(noisy, tmp_path / "out", Options(seed=3))
    with pytest.raises(InputError, match="other weights"):
        regate(tmp_path / "out", noisy)
    regate(tmp_path / "out", noisy, Options(seed=3))
    verify_checkpoint(tmp_path / "out")


def test_a_source_that_changed_is_refused(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    other = make_model(tmp_path / "other", seed=7)
    config = write_config(
        tmp_path / "c.yaml", simple_config(base, [first, other], "gate_mode: random")
    )
    out = tmp_path / "out"
    merge(config, out)
    before = files(out)
    (other / "model.safetensors").unlink()
    make_model(other, seed=8, shards=2)
    with pytest.raises(InputError, match=f"{other}: it changed since {out} was made of it"):
        regate(out, config)
    assert files(out) == before


@pytest.mark.parametrize("what", ["missing", "a dense model", "unfinished", "a file"])
def test_what_is_no_finished_output_is_refused(
    config: Path, tmp_path: Path, babies: dict[str, Path], what: str
) -> None:
    out = babies["base"] if what == "a dense model" else tmp_path / "out"
    if what == "unfinished":
        merge(config, out, Options(shard_size="16KB", shards="0/2"))
    elif what == "a file":
        out.write_text("mine")
    before = files(out) if out.is_dir() else {}
    result = CliRunner().invoke(app, ["regate", str(out), str(config)])
    assert result.exit_code == 2
    assert f"{out}: holds no moemerge.json; name a directory that moemerge finished" in (
        result.stderr
    )
    assert (files(out) if out.is_dir() else {}) == before


def test_where_the_shards_were_pushed_and_are_gone_nothing_is_written(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(config, out)
    for file in (*out.glob("*.safetensors"), out / "config.json", *out.glob("*.index.json")):
        file.unlink()
    before = files(out)
    with pytest.raises(InputError, match=r"holds no shards; .* regate a downloaded copy"):
        regate(out, config)
    assert files(out) == before


def test_problems_of_the_config_are_told_and_nothing_changes(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(config, out)
    before = files(out)
    new = changed(config, ("gate_mode: random", "gate: { mode: ridge, kapa: 3 }"))
    result = CliRunner().invoke(app, ["regate", str(out), str(new)])
    assert result.exit_code == 2
    assert "gate.kapa: is no option of gate mode ridge; did you mean 'kappa'?" in result.stderr
    assert files(out) == before


class Death(BaseException):
    """The process ends here."""


PLACES = ["moemerge.merging.new_routers.write_shard", "moemerge.card.files.card.render",
          "moemerge.output.change.Change.finish", "moemerge.output.change._complete"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_stopped_between_it_loads_and_the_same_call_ends_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = tmp_path / "out"
    merge(config, out)
    new = changed(config, ("random", "ridge\nexperts_per_token: 1"))
    merge(new, tmp_path / "anew")

    def die(*args: Any, **more: Any) -> Any:
        raise Death

    with monkeypatch.context() as patched:
        patched.setattr(place, die)
        with pytest.raises(Death):
            regate(out, new)
    AutoModelForCausalLM.from_pretrained(out)
    regate(out, new)
    assert files(out) == files(tmp_path / "anew")
    assert not (out / ".moemerge").exists()


def test_stopped_and_given_another_config_it_takes_that(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    merge(config, out)

    def die(*args: Any, **more: Any) -> Any:
        raise Death

    with monkeypatch.context() as patched:
        patched.setattr("moemerge.output.change.Change.finish", die)
        with pytest.raises(Death):
            regate(out, changed(config, ("random", "ridge")))
    other = changed(config, ("random", "hidden_last"))
    regate(out, other)
    merge(other, tmp_path / "anew")
    assert files(out) == files(tmp_path / "anew")


def test_two_at_once_do_not_meet(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(config, out)
    before = files(out)
    with State(out).mine(shared=False) as held:
        assert held
        with pytest.raises(RunError, match="another moemerge is at work there"):
            regate(out, changed(config, ("random", "ridge")))
    assert files(out) == before


def test_the_command_says_what_came_of_it(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(config, out)
    new = changed(config, ("random", "ridge"))
    result = CliRunner().invoke(app, ["regate", str(out), str(new)])
    assert result.exit_code == 0, result.stderr
    assert f"{out}: new routers, gate_mode ridge" in result.stdout
    assert "routers: " in result.stdout and "chance 33%" in result.stdout
    quiet = CliRunner().invoke(app, ["regate", str(out), str(new), "--quiet"])
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_it_stays_the_class_that_it_is(tmp_path: Path, babies: dict[str, Path]) -> None:
    """Where the config names none, whatever a merge of it would choose by now."""
    base, first, second = babies.values()
    said = "gate_mode: random\narchitecture: granitemoe"
    out = tmp_path / "out"
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [first, second], said)), out, SMALL)
    text = simple_config(base, [first, second], "gate_mode: zeros  # for now")
    done = regate(out, write_config(tmp_path / "new.yaml", text))
    assert done.plan.architecture == done.plan.config["model_type"] == "granitemoe"
    assert output.read_manifest(out).config == text
    verify_checkpoint(out)
