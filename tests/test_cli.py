"""The command line: its spellings, its exit codes, what it prints where."""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from babies import simple_config, write_config
from transformers import AutoModelForCausalLM

from moemerge import Options, make_plan, verify_checkpoint
from moemerge.cli import app
from moemerge.cli.options import NO_MEANING, NO_MEANING_WITH_VALUE, with_ray_address
from moemerge.cli.terminal import Terminal
from moemerge.merging import pipeline

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path: Path, babies: dict[str, Path]) -> Path:
    base, first, _ = babies.values()
    return write_config(tmp_path / "c.yaml", simple_config(base, [base, first]))


def run(*args: object) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as stopped:
        app([str(arg) for arg in args])
    return int(stopped.value.code or 0)


def command(
    *args: object, env: dict[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    line = [sys.executable, "-m", "moemerge", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(line, capture_output=True, text=True, env=env, **more)


def test_merge_is_the_default_command(config: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "a") == 0
    assert run("merge", config, tmp_path / "b") == 0
    assert run("--lazy", "--shard-size", "20KB", config, tmp_path / "c") == 0
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    same = [(tmp_path / name / "model-00002-of-00002.safetensors").read_bytes() for name in "ab"]
    assert same[0] == same[1]


def test_result_on_stdout_notes_on_stderr(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "gate_mode: random\n")
    assert run(config, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "28.96K parameters" in said.out
    assert "verified" in said.out
    assert "note: prompts have no effect with gate_mode: random" in said.err
    assert run(config, tmp_path / "quiet", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run(config, tmp_path / "verbose", "--verbose", "--no-verify") == 0
    said = capsys.readouterr()
    assert "model-00001-of-00002.safetensors: " in said.err
    assert "not verified" in said.out


def test_plan_writes_nothing_and_its_json_is_whole(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run("plan", config, "--json", "--shard-size", "20K") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parameters"] == sum(
        int.__mul__(*[*t["shape"], 1][:2]) for s in data["shards"] for t in s["tensors"]
    )
    assert run("plan", config) == 0
    assert "28.96K parameters in all" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_verify_exits_1_when_a_byte_changed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path / "out") == 0
    assert run("verify", tmp_path / "out") == 0
    assert "27 of 29 tensors" in capsys.readouterr().out
    shard = tmp_path / "out/model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run("verify", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert shard.name in said
    assert "merge again" in said
    assert run("verify", tmp_path) == 2


@pytest.mark.parametrize("flag", [*NO_MEANING, *NO_MEANING_WITH_VALUE])
def test_mergekits_flags_without_meaning_say_so(
    flag: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = ["7"] if flag in NO_MEANING_WITH_VALUE else []
    assert run("plan", flag, *value, config) == 0
    assert f"note: {flag} means nothing here: " in capsys.readouterr().err


def test_mergekits_other_spellings_work(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    code = run(
        config, tmp_path / "out", "--out-shard-size", "20K", "--lazy-unpickle", "--random-seed",
        "7", "--copy-tokenizer", "--transformers-cache", cache, "--trust-remote-code",
        "--i-understand-this-is-not-useful-without-training", "--allow-crimes", "-v",
        "--num-threads=4", "--write-threads=4", "--no-lazy-unpickle",
    )  # fmt: skip
    assert code == 0
    said = capsys.readouterr().err
    assert "--write-threads means nothing here" in said
    assert "--seed has no effect" in said
    assert "--cache-dir has no effect" in said
    assert "--allow-crimes has no effect" in said
    assert json.loads((tmp_path / "out/moemerge.json").read_text())["seed"] == 7


@pytest.mark.parametrize(
    "flag",
    ["--lazy", "--load-in-4bit", "--load-in-8bit", "--device=cpu", "--device=cuda:1", "--cuda",
     "--no-cuda"],
)  # fmt: skip
def test_a_flag_without_effect_is_said(
    flag: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "gate_mode: cheap_embed\n")
    assert run("plan", config, flag) == 0
    name = "--device" if "cuda" in flag else flag.partition("=")[0]
    said = capsys.readouterr().err
    assert f"note: {name} has no effect: gate_mode: cheap_embed runs no model" in said


@pytest.mark.parametrize(
    "flag",
    ["--overwrite", "--verify", "--no-verify", "--no-copy-tokenizer", "--jobs=3", "-j4",
     "--no-direct", "--no-checksum", "--shards=0/2", "--verbose"],
)  # fmt: skip
def test_a_flag_without_effect_on_a_plan_is_said(
    flag: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", config, flag) == 0
    name = flag.partition("=")[0].replace("-j4", "--jobs")
    assert f"note: {name} has no effect: plan writes nothing\n" in capsys.readouterr().err


def test_an_option_without_effect_is_noted_in_python_too(config: Path) -> None:
    config.write_text(config.read_text() + "gate_mode: cheap_embed\n")
    notes = make_plan(config, Options(lazy=True)).notes
    assert "lazy=True has no effect: gate_mode: cheap_embed runs no model" in notes


def test_quiet_prints_errors_only(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", config, "-q", "--lazy-unpickle", "--overwrite") == 0
    assert capsys.readouterr() == ("", "")
    assert run("plan", config, "-q", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["parameters"] and not said.err


@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantised_gates_are_quiet_too(bits: str, config: Path, tmp_path: Path) -> None:
    done = command(config, tmp_path / "out", f"--load-in-{bits}bit", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_path_that_the_terminal_cannot_show_is_escaped(config: Path, tmp_path: Path) -> None:
    named = tmp_path / "größe.yaml"
    model = (tmp_path / "bär").absolute()
    base = config.read_text().split()[1]
    model.symlink_to(base)
    named.write_text(config.read_text().replace(base, str(model)), encoding="utf-8")
    done = command("plan", named, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "b\\xe4r" in done.stdout


def test_an_import_that_ctrl_c_cuts_off_ends_with_one_line(config: Path, tmp_path: Path) -> None:
    """A real SIGINT, in the middle of an import that makes its own error of it."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise ImportError('broken') from None\n"
    )
    (tmp_path / "run.py").write_text("from moemerge.cli import main\nmain()\n")
    config.write_text(config.read_text() + "gate_mode: random\n")
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", config, tmp_path / "out", "--quiet"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "interrupted; run the same command again to go on\n"


def test_equal_experts_are_remarked_unless_asked_not_to(
    tmp_path: Path, babies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = babies["base"]
    path = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
    assert run("plan", path) == 0
    assert "all experts are the same model" in capsys.readouterr().err
    assert run("plan", path, "--i-understand-this-is-not-useful-without-training") == 0
    assert "all experts are the same model" not in capsys.readouterr().err


def test_a_file_that_cannot_grow_exits_1_and_the_next_run_ends_well(
    config: Path, tmp_path: Path
) -> None:
    """A real failure of the file system, in the middle of the large shard."""
    config.write_text(config.read_text() + "gate_mode: cheap_embed\n")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(config, whole) == 0
    limit = (60_000, resource.RLIM_INFINITY)
    failed = command(
        config, out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert failed.returncode == 1
    assert "cannot be written" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (out / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(out)
    assert run(config, out) == 0
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert not (out / ".moemerge").exists()


def test_stopped_anywhere_it_is_no_model_and_the_next_run_ends_well(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write and rename is a place to die; nothing of the dead run is in the way."""
    out = tmp_path / "out"
    assert run(config, tmp_path / "whole", "--shard-size", "40KB") == 0
    for step in itertools.count():
        dead = _die_at(step, monkeypatch, config, out)
        if not dead:
            break
        if (out / "config.json").exists():
            break  # dead while clearing up: it is a finished model
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(out)
    assert step > 10
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    verify_checkpoint(out)


def _die_at(step: int, monkeypatch: pytest.MonkeyPatch, config: Path, out: Path) -> bool:
    """Merge with death at the `step`-th rename or removal; whether it came to that."""
    count = itertools.count()

    class Death(BaseException):
        pass

    def mortal(original: Any) -> Any:
        def wrapped(*args: Any, **more: Any) -> Any:
            if next(count) == step:
                raise Death
            return original(*args, **more)

        return wrapped

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink", "mkdir"):
            patched.setattr(Path, name, mortal(getattr(Path, name)))
        try:
            pipeline.merge(config, out, Options(shard_size="40KB"))
        except Death:
            return True
    return False


def test_overwrite_removes_only_what_moemerge_wrote(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(config, out, "--shard-size", "20KB") == 0
    (out / "notes.txt").write_text("mine")
    assert run(config, out) == 2
    assert run(config, out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.glob("*.safetensors"))) == 2
    verify_checkpoint(out)


def test_progress_is_a_bar_with_bytes_a_second_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock = itertools.count(step=2)
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
    for quiet, terminal, shown in ((False, True, True), (True, True, False), (False, False, False)):
        screen = Screen() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", screen)
        with Terminal(quiet, False).progress("writing", 10_000_000, "B") as advance:
            for _ in range(10):
                advance(1_000_000)
        assert ("B/s" in screen.getvalue()) == shown


@pytest.mark.parametrize("args", [["--help"], ["plan", "CONFIG"], ["merge", "CONFIG", "OUT"]])
def test_nothing_imports_torch_that_does_not_compute(
    args: list[str], config: Path, tmp_path: Path
) -> None:
    """Help and plan, and a merge that copies bytes with random routers, never load torch."""
    config.write_text(config.read_text() + "gate_mode: random\n")
    named = {"CONFIG": str(config), "OUT": str(tmp_path / "out")}
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print([m for m in ('torch', 'transformers', 'bitsandbytes')"
        " if m in sys.modules]))\n"
        f"from moemerge.cli import app\napp({[named.get(arg, arg) for arg in args]!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_groups(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flag) == 0
    assert "[OPTIONS] COMMAND [ARGS]" in capsys.readouterr().out


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "moemerge")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--ray", "c.yaml", "out"], ["--ray", "local", "c.yaml", "out"]),
        (["c.yaml", "out", "--ray"], ["c.yaml", "out", "--ray", "local"]),
        (["--ray", "auto", "c.yaml"], ["--ray", "auto", "c.yaml"]),
        (["--ray", "10.0.0.1:6379", "c.yaml"], ["--ray", "10.0.0.1:6379", "c.yaml"]),
        (["--ray", "ray://head:10001", "c.yaml"], ["--ray", "ray://head:10001", "c.yaml"]),
    ],
)
def test_ray_needs_no_address(given: list[str], meant: list[str]) -> None:
    assert list(with_ray_address(given)) == meant


def test_shares_say_what_is_still_to_come(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [config, tmp_path / "out", "--shard-size", "20KB", "--shards"]
    assert run(*line, "1/2") == 0
    assert "are still to come from the other shares" in capsys.readouterr().out
    assert run(*line, "0/2") == 0
    assert "verified" in capsys.readouterr().out
    assert run(*line, "2/2") == 2
    assert "'2/2' is no share" in capsys.readouterr().err
    assert run(*line, "0/2", "--overwrite") == 2


ENDS = {
    "ridge": (
        "routers: ",
        "of the prompts' tokens find their expert first when their prompt is held",
    ),
    "random": ("routers: random, so they choose nothing yet: train them",),
    "uniform_random": ("routers: random, so they choose nothing yet: train them",),
    "cheap_embed": ("routers: not measured; `moemerge routing",),
}


@pytest.mark.parametrize("mode", ENDS)
def test_a_merge_ends_with_what_its_routers_are_worth(
    mode: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + f"gate_mode: {mode}\n")
    assert run(config, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ENDS[mode]), said
    if mode == "ridge":
        routing = json.loads((tmp_path / "out/moemerge.json").read_text())["routing"]
        assert f"routers: {routing['t1']:.0%} of the prompts'" in said and "(chance 50%)" in said


def test_poor_routers_are_told_what_would_help(
    tmp_path: Path, babies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two experts of one vocabulary, so that no prompt tells whose another one is."""
    base = babies["base"]
    text = f"base_model: {base}\nexperts:\n" + "".join(
        f"  - {{ source_model: {base}, name: {name}, positive_prompts: [{prompts}] }}\n"
        for name, prompts in (
            ("one", "code story, story code chat"),
            ("two", "story code, chat code"),
        )
    )
    assert run(write_config(tmp_path / "c.yaml", text), tmp_path / "out") == 0
    said = capsys.readouterr().out
    routing = json.loads((tmp_path / "out/moemerge.json").read_text())["routing"]
    assert routing["t1"] < 0.75
    assert "what would help: whole sentences" in said
    for pair in routing["collisions"]:
        one, other = (("one", "two")[e] for e in pair["experts"])
        assert f"{one} and {other} collide: {pair['share']:.0%} of {one}'s tokens" in said
        assert all(repr(text) in said for text in pair["texts"]) and pair["texts"]
    assert routing["collisions"]


@pytest.mark.parametrize("command", ["regate", "routing"])
def test_the_other_commands_show_their_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    said = capsys.readouterr().out
    assert "--lazy" in said and "--device" in said
    assert ("--text NAME=FILE" in said) == (command == "routing")
    assert "--overwrite" not in said and "--shard-size" not in said
