"""Routers trained: one small file changes, the best step is kept, and there is a way back."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import WORDS, make_model, simple_config, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from moemerge import InputError, Options, RunError, merge, output, regate, top_k, verify_checkpoint
from moemerge.card.card import is_untouched
from moemerge.cli import app
from moemerge.cli.old_tune import as_today, is_old
from moemerge.errors import Findings
from moemerge.mixture.open import open_moe
from moemerge.mixture.unfused import load, memory_of, name_in_files
from moemerge.reporting import Silent
from moemerge.training.data import divide, passages_of
from moemerge.training.router_loop import mean_loss
from moemerge.training.settings import Tuning
from moemerge.training.setup import begin
from moemerge.training.tune_routers import tune, undo

FAMILIES = ["llama", "qwen2", "qwen3", "granite", "olmo2"]


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


def made(
    folder: Path, family: str = "llama", head: str = "gate_mode: random", **changes: Any
) -> Path:
    models = [make_model(folder / f"m{n}", family, seed=n, **changes) for n in range(3)]
    config = write_config(folder / "c.yaml", simple_config(models[0], models, head))
    merge(config, folder / "out", Options(shard_size="16KB"))
    return folder / "out"


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    texts = [" ".join(WORDS[at % 7 :: 1 + at % 5]) for at in range(40)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def tuning(data: str, **changes: object) -> Tuning:
    return Tuning(
        (data,),
        **{"steps": 20, "batch": 8, "length": 16, "held_out": 0.5, "patience": 99, **changes},
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_apart_are_the_same_model(tmp_path: Path, family: str) -> None:
    moe = open_moe(str(made(tmp_path, family)), None, Findings())
    ours = load(moe, Options(device="cpu"), Silent(), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(moe.text, dtype=torch.float32)
    ids = torch.randint(4, 20, (2, 12))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5
    names = {name_in_files(name, moe) for name in ours.state_dict()}
    assert {
        part.name for part in moe.parts if part.expert is not None and not moe.tensors.stacked
    } <= names


def test_the_configs_balancing_loss_is_part_of_the_loss(tmp_path: Path) -> None:
    training = "training: {router_aux_loss_coef: 0.5, output_router_logits: true}"
    moe = open_moe(str(made(tmp_path, head=f"gate_mode: random\n{training}")), None, Findings())
    model = load(moe, Options(device="cpu"), Silent(), torch.float32)
    ids = torch.arange(4, 20)[None]
    both = model(ids, labels=ids)
    model.config.output_router_logits = False
    alone = model(ids, labels=ids).loss
    assert both.loss == pytest.approx(float(alone + 0.5 * both.aux_loss))
    assert both.aux_loss > 1


def test_four_bits_take_the_memory_that_they_should(tmp_path: Path) -> None:
    moe = open_moe(str(made(tmp_path)), None, Findings())

    def held(four_bits: bool) -> int:
        model = load(moe, Options(load_in_4bit=four_bits), Silent(), torch.float32)
        return sum(p.numel() * p.element_size() for p in model.parameters())

    assert held(False) == memory_of(moe, False)
    assert held(True) == pytest.approx(memory_of(moe, True), rel=0.05)
    assert held(True) < held(False) / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_and_touches_one_shard(tmp_path: Path, data: str, family: str) -> None:
    out = made(tmp_path, family)
    before = files(out)
    done = tune(out, tuning(data))
    assert done.trained.after < done.trained.before
    first = output.read_manifest(out).plan.shards[0]
    changed = {name for name, content in files(out).items() if before.get(name) != content}
    assert changed == {first.file, "README.md", "moemerge.json"}
    verify_checkpoint(out)
    assert AutoModelForCausalLM.from_pretrained(out)
    assert b"## Trained routers" in (out / "README.md").read_bytes()
    assert not (out / ".moemerge").exists()
    undo(out)
    assert files(out) == before
    assert not (out / output.BEFORE_TUNING).exists()
    verify_checkpoint(out)


def test_the_card_tells_the_last_training(tmp_path: Path, data: str) -> None:
    out = made(tmp_path, head="gate_mode: ridge")
    card = out / "README.md"
    before = card.read_text()
    assert "## Routing" in before and "The routing numbers come from" in before
    for steps in (20, 10):
        trained = tune(out, tuning(data, steps=steps)).trained
        assert trained.best, "nothing to tell"
        text = card.read_text()
        assert text.count("## Trained routers") == 1 and is_untouched(card.read_bytes())
        assert f"({trained.before:.4f} before, {trained.after:.4f} after" in text
        assert "## Routing" not in text and "The routing numbers come from" not in text
    limits = before.partition("## Limits")[2].splitlines()
    assert [
        line for line in limits if "routing numbers" not in line and "moemerge:" not in line
    ] == [line for line in text.partition("## Limits")[2].splitlines() if "moemerge:" not in line]


def test_what_is_written_has_the_loss_that_was_told(tmp_path: Path, data: str) -> None:
    from moemerge.text.encoder import Encoder

    out = made(tmp_path)
    done = tune(out, tuning(data))
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    encoder = Encoder(out)
    held = divide([passages_of(text, encoder, 16, None) for text in texts], 0.5, 0)[1]
    moe = open_moe(str(out), None, Findings())
    model = load(moe, Options(), Silent(), torch.float32)
    assert mean_loss(model, held, 4) == pytest.approx(done.trained.after, abs=1e-4)


def test_it_is_the_same_again_and_never_worse(tmp_path: Path, data: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tune(made(tmp_path / name), tuning(data))
    first = "model-00001-of-*.safetensors"
    one, two = (load_file(next((tmp_path / n / "out").glob(first))) for n in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    before = files(tmp_path / "a/out")
    worse = tune(tmp_path / "a/out", tuning(data, learning_rate=9.0, steps=4))
    assert worse.trained.after <= worse.trained.before
    if not worse.trained.best:
        assert files(tmp_path / "a/out") == before


def test_a_mixture_of_another_tool_is_told_the_way(tmp_path: Path, data: str) -> None:
    """Without a manifest `top-k`, the fix that is named, makes one that can be tuned."""
    out, other = made(tmp_path), tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(other)
    (other / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match=r"top-k.* K as it is"):
        tune(other, tuning(data))
    top_k(str(other), 2, tmp_path / "new")
    done = tune(tmp_path / "new", tuning(data))
    assert done.trained.after < done.trained.before
    verify_checkpoint(tmp_path / "new")


def test_with_a_teacher_balance_and_four_bits(tmp_path: Path, data: str) -> None:
    out = made(tmp_path)
    options = Options(load_in_4bit=True)
    done = tune(out, tuning(data, distil=0.5, balance=0.01, steps=4), options)
    assert len(done.trained.curve) > 1


def test_a_second_tuning_is_refused_before_it_reads_what_the_first_replaces(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(tmp_path)
    first = output.read_manifest(out).plan.shards[0].file
    changing: list[object] = [
        lambda: tune(out, tuning(data)),
        lambda: undo(out),
        lambda: top_k(str(out), 1),
        lambda: regate(out, tmp_path / "c.yaml"),
    ]
    read, refused = begin, []

    def meanwhile(*args: Any) -> Any:
        for change in changing:
            with pytest.raises(RunError, match="another moemerge is at work there"):
                change()  # type: ignore[operator]
            refused.append(change)
        return read(*args)

    before = (out / first).read_bytes()
    monkeypatch.setattr("moemerge.training.tune_routers.begin", meanwhile)
    tune(out, tuning(data))
    assert refused == changing
    assert (out / first).read_bytes() != before
    verify_checkpoint(out)


def test_undo_leaves_what_else_was_changed(tmp_path: Path, data: str) -> None:
    out = made(tmp_path)
    before = files(out)
    tune(out, tuning(data))
    top_k(str(out), 1)
    undo(out)
    verify_checkpoint(out)
    assert json.loads((out / "config.json").read_text())["num_experts_per_tok"] == 1
    top_k(str(out), 2)
    weights = {name for name in before if name.endswith(".safetensors")}
    assert {name: files(out)[name] for name in weights} == {name: before[name] for name in weights}
    tune(out, tuning(data))
    regate(out, tmp_path / "c.yaml")
    assert not (out / output.BEFORE_TUNING).exists()  # of routers that are no more
    verify_checkpoint(out)


def test_bad_input_is_told_and_nothing_written(tmp_path: Path, data: str) -> None:
    out = made(tmp_path)
    before = files(out)
    for arguments, said in (
        (["routers", str(out), "--data", str(tmp_path / "none.txt")], "there is no"),
        (["routers", str(out)], "--data"),
        (["routers", str(out), "--data", data, "--steps", "0"], "--steps"),
        (["routers", str(out), "--data", data, "--learning-rate", "0"], "--learning-rate: is 0"),
        (["undo", str(out)], "nothing to undo"),
    ):
        done = CliRunner().invoke(app, ["tune", *arguments])
        assert done.exit_code == 2, arguments
        assert said in done.output
    assert files(out) == before
    with pytest.raises(InputError, match="holds no"):
        tune(tmp_path, tuning(data))


def test_a_command_has_its_own_options_alone() -> None:
    program: Any = get_command(app)
    options = {
        name: {flag for parameter in command.params for flag in parameter.opts}
        for name, command in program.commands["tune"].commands.items()
    }
    assert set(options) == {"routers", "lora", "undo"}
    assert {"--balance", "--distil"} <= options["routers"] - options["lora"]
    assert {"--rank", "--qlora", "--resume"} <= options["lora"] - options["routers"]
    assert options["undo"] == {"out", "--quiet", "-q", "--verbose", "-v"}


OLD = {
    "OUT --only routers --data D": "routers OUT --data D",
    "--only=routers --data D OUT": "routers --data D OUT",
    "OUT ADAPTER --lora --data D": "lora OUT ADAPTER --data D",
    "OUT ADAPTER --data D --qlora --rank 4": "lora OUT ADAPTER --data D --qlora --rank 4",
    "--undo OUT": "undo OUT",
    "OUT --only routers -- --lora": "routers OUT -- --lora",
    "routers --only routers --data D": "routers routers --data D",
    "routers ADAPTER --qlora": "lora routers ADAPTER --qlora",
    "lora ADAPTER --lora": "lora lora ADAPTER",
    "undo --undo": "undo undo",
}
"""Arguments after `tune` as they were written once, and today."""

WRONG = {
    "OUT --data D": "write `moemerge tune routers`",
    "router OUT --data D": "write `moemerge tune routers`",
    "OUT --only router": "'router' is nothing that can be trained alone; did you mean 'routers'?",
    "OUT --only": "nothing that can be trained alone",
    "OUT ADAPTER --lora --qlora": "needs one thing to do",
    "OUT ADAPTER --lora --only routers": "needs one thing to do",
    "OUT --undo --lora": "needs one thing to do",
    "OUT --only routers --rank 4": "--rank",
    "OUT ADAPTER --only routers": "ADAPTER",
    "OUT ADAPTER --lora --distil 0.5": "--distil",
    "OUT --undo --steps 100": "--steps",
    "lora ADAPTER --qlora --data D": "ADAPTER",
}
"""The same, refused, and what is said."""


@pytest.mark.parametrize("old", OLD)
def test_an_old_spelling_is_todays(old: str) -> None:
    assert is_old(old.split())
    today = as_today(old.split())
    assert today == OLD[old].split()
    assert not is_old(today)


@pytest.mark.parametrize("old", WRONG)
def test_an_old_spelling_that_was_wrong_is_so_still(old: str) -> None:
    done = CliRunner().invoke(app, ["tune", *old.split()])
    assert done.exit_code == 2
    assert WRONG[old] in done.stderr


def test_an_old_spelling_works_and_the_new_one_is_told(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(tmp_path).rename(tmp_path / "routers")
    monkeypatch.chdir(tmp_path)
    before = files(out)
    told = ["--data", data, "--steps", "4", "--length", "16", "--held-out", "0.5"]
    for old, new in (
        (["routers", "--only", "routers", *told], ["routers", "routers", *told]),
        (["routers", "--undo"], ["undo", "routers"]),
    ):
        done = CliRunner().invoke(app, ["tune", *old])
        assert done.exit_code == 0, done.stderr
        assert f"note: the usual way: `{shlex.join(['moemerge', 'tune', *new])}`" in done.stderr
        assert (files(out) == before) == (old[-1] == "--undo")
    done = CliRunner().invoke(app, ["tune", "routers", "--only", "routers", *told, "--quiet"])
    assert done.exit_code == 0 and not done.output
