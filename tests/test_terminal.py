"""The terminal: Ctrl-C whenever it comes, streams that are closed, words that are nearly right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from babies import simple_config, write_config
from fake_hub import FakeHub
from test_cli import ROOT, run

import moemerge
from moemerge import Console, verify_checkpoint
from moemerge.cli.terminal import Terminal
from moemerge.reporting import EVERY, Work

LINE = "interrupted; run the same command again to go on\n"

MOMENTS = {
    "typer is imported": ("import", "typer", 1),
    "the package is imported": ("import", "moemerge.merging", 2),
    "torch is imported": ("import", "torch.nn", 2),
    "a lock is waited for": ("fcntl.flock", "", 1),
    "a thread writes a shard": ("open", ".part", 2),
    "the merge is not decided yet": ("os.rename", "committed", 1),
    "the end is near": ("os.rename", "config.json", 2),
}
"""When Ctrl-C comes: Python's audit event, what its arguments hold, and how many times it comes."""

DRIVER = """
import json, os, signal, sys
from moemerge.cli import main
moments, command, folder = json.loads(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
found = {}
for name, (event, held, presses) in moments.items():
    if event != "import":
        import torch, moemerge.public  # once for all that is left
    child = os.fork()
    if not child:
        for number in (1, 2):
            file = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        pressed = []
        def press(now, args):
            if now == event and held in str(args) and not pressed:
                pressed.append(now)
                for _ in range(presses):
                    os.kill(os.getpid(), signal.SIGINT)
        sys.addaudithook(press)
        sys.argv = ["moemerge", *command]
        main()
        os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[name] = [code, *(open(f"{folder}/{number}").read() for number in (1, 2))]
print(json.dumps(found))
"""


@pytest.fixture
def config(tmp_path: Path, babies: dict[str, Path]) -> Path:
    base, first, _ = babies.values()
    return write_config(tmp_path / "c.yaml", simple_config(base, [base, first]))


def test_ctrl_c_ends_with_one_line_whenever_it_comes(config: Path, tmp_path: Path) -> None:
    """Real signals, at moments that Python itself tells of; each run goes on after the last."""
    noise = config.read_text().replace("positive", "noise_scale: 0.1\n    positive", 1)
    config.write_text(noise + "gate_mode: cheap_embed\n")
    out = tmp_path / "out"
    said = json.dumps([MOMENTS, [str(config), str(out), "--quiet"], str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, said],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {name: [130, "", LINE] for name in MOMENTS}
    verify_checkpoint(out)  # the last came after all was decided, so this completes it


def shell(line: str, *args: object) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which `moemerge` is this one."""
    program = f"moemerge() {{ '{sys.executable}' -m moemerge \"$@\"; }}; set -o pipefail; {line}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", program, "bash", *map(str, args)], capture_output=True, env=environment
    )


def test_what_a_closed_stream_would_say_goes_nowhere_else(config: Path, tmp_path: Path) -> None:
    """Not to the other stream, and not into a file that has the number of the closed one."""
    config.write_text(config.read_text() + "gate_mode: random\n")  # which leaves a note
    out = tmp_path / "out"
    quiet = shell("moemerge $1 $2 2>&-", config, out)
    assert quiet.returncode == 0 and not quiet.stderr
    assert b"verified" in quiet.stdout and b"note" not in quiet.stdout
    verify_checkpoint(out)
    loud = shell(
        "moemerge $1 $2 --overwrite >&- 2>&1 || moemerge $1 $2 --overwrite >&-", config, out
    )
    assert loud.returncode == 0 and not loud.stdout and b"note: prompts" in loud.stderr
    verify_checkpoint(out)
    wrong = shell("moemerge plan $1 2>&-; echo $?", tmp_path / "none.yaml")
    assert (wrong.stdout, wrong.stderr) == (b"2\n", b"")
    full = shell("moemerge plan $1 2>/dev/full; echo $?", tmp_path / "none.yaml")
    assert (full.stdout, full.stderr) == (b"2\n", b"")
    for line in ("moemerge plan $1 2>&- | head -1", "moemerge plan $1 2>&1 | true"):
        assert not shell(line, config).stderr


NEARLY = {
    "mereg": (["mereg", "{config}", "{out}"],
              "mereg: there is no such config file; did you mean 'merge'? (a command)"),
    "verfy": (["verfy", "{out}"], "did you mean 'verify'?"),
    "help of what": (["help", "mereg"], "did you mean 'merge'?"),
    "what is tuned": (["tune", "{out}", "--only", "router"],
                      "'router' is nothing that can be trained alone; did you mean 'routers'?"),
    "option": (["merge", "{config}", "{out}", "--overwite"], "--overwrite"),
    "option of another command": (["verify", "{out}", "--quit"], "--quiet"),
    "device": (["plan", "{config}", "--device", "gpu"], "auto, cpu, cuda, cuda:1 or mps"),
    "no config": (["{out}.yaml", "{out}"], "there is no such config file; name a YAML file"),
}  # fmt: skip


@pytest.mark.parametrize("word", NEARLY)
def test_a_word_that_is_nearly_right_is_told_the_right_one(
    word: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, said = NEARLY[word]
    named = {"config": config, "out": tmp_path / "out"}
    assert run(*(arg.format(**named) for arg in args)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_and_version_are_understood_as_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, said, usual in (
        (["help"], "[OPTIONS] COMMAND [ARGS]", "moemerge --help"),
        (["help", "merge"], "Merge the models of CONFIG into OUT", "moemerge merge --help"),
        (["help", "tune", "routers"], "Train the routers of OUT", "moemerge tune routers --help"),
        (["version"], f"moemerge {moemerge.__version__}", "moemerge --version"),
    ):
        assert run(*args) == 0
        shown = capsys.readouterr()
        assert said in shown.out and f"`{usual}`" in shown.err
    monkeypatch.chdir(tmp_path)
    Path("help").write_text("base_model: x\n")  # a file is what it is called
    assert run("help", "out") == 2
    assert "Usage" not in capsys.readouterr().out


def test_a_pipe_that_nobody_reads_and_a_disk_that_is_full_end_quietly() -> None:
    full = shell("moemerge --help >/dev/full; moemerge architectures >/dev/full")
    line = b"error: standard output: cannot be written (No space left on device)\n"
    assert (full.returncode, full.stdout, full.stderr) == (1, b"", 2 * line)


class Clock:
    """A time that passes by so many seconds whenever it is looked at."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_work_that_lasts_is_told_every_fifteen_seconds_and_no_more() -> None:
    lines: list[str] = []
    clock = Clock(0)
    work = Work("writing", 100_000_000, "B", clock, lines.append)
    for _ in range(100):  # a second each
        clock.now += 1
        work.advance(1_000_000)
    assert len(lines) == 100 // EVERY
    assert lines[0] == "writing: 15.0 MB of 100.0 MB (15%), 15 s"
    work = Work("training", 10, "step", clock, lines.append)
    clock.now += 14.9
    work.tell_if_due()
    clock.now += 0.1
    work.tell_if_due()  # nothing was done meanwhile
    assert lines[6:] == ["training: 0 of 10 steps (0%), 15 s"]
    work = Work("loading", 1, "model", clock, lines.append)
    clock.now += 3600
    work.advance(1)
    assert lines[7:] == ["loading: 3600 s"]


def told(function: Callable[[Console], object], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """What a call tells of without a terminal, where each look at the clock takes 20 seconds."""
    capsys.readouterr()
    function(Console(clock=Clock(20)))
    said = capsys.readouterr()
    assert not said.out
    return {line.split(":")[0] for line in said.err.splitlines() if line.endswith(" s")}


def test_every_long_loop_tells_how_far_it_is(
    config: Path, tmp_path: Path, babies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    text = tmp_path / "a.txt"
    text.write_text("hello code story chat " * 60)
    config.write_text(config.read_text() + "gate_mode: hidden\n")
    tuning = moemerge.Tuning((text,), steps=2, batch=2, length=16)
    wanted = moemerge.EvalSpec({"a": text})
    calls: dict[str, Callable[[Console], Any]] = {
        "merge": lambda hears: moemerge.merge(config, out, reporter=hears),
        "verify": lambda hears: verify_checkpoint(out, hears),
        "regate": lambda hears: moemerge.regate(out, config, reporter=hears),
        "evaluate": lambda hears: moemerge.evaluate(out, wanted, reporter=hears),
        "routing": lambda hears: moemerge.routing_report(out, {"a": text}, reporter=hears),
        "drop": lambda hears: moemerge.top_k(out, 1, moved, reporter=hears),
        "tune": lambda hears: moemerge.tune(out, tuning, reporter=hears),
    }
    found = {name: told(call, capsys) for name, call in calls.items()}
    assert {"texts through the layers", "writing"} <= found["merge"]
    assert "verifying" in found["verify"]
    assert "texts through the layers" in found["regate"]
    assert "a" in found["evaluate"] & found["routing"]
    assert "writing" in found["drop"]
    assert "reading held-out text" in found["tune"]
    assert any(line.startswith("held out ") for line in found["tune"])


def test_what_goes_over_the_network_is_told_too(tmp_path: Path, babies: dict[str, Path]) -> None:
    code = (
        "import itertools, sys\n"
        "from moemerge import Console, merge, push\n"
        "hears = Console(clock=itertools.count(step=20).__next__)\n"
        "merge(sys.argv[1], sys.argv[2], reporter=hears)\n"
        "push(sys.argv[2], 'user/mix', reporter=hears)\n"
    )
    with FakeHub() as hub:
        hub.publish("lab/base", babies["base"])
        hub.account("hf_secret", "user")
        text = simple_config("lab/base", ["lab/base"]) + "gate_mode: random\n"
        config = write_config(tmp_path / "hub.yaml", text)
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_secret")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", code, config, tmp_path / "out"],
            env={**kept, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()
    for what in ("downloading lab/base: ", "checking the download of lab/base: ", "uploading: "):
        assert any(line.startswith(what) and line.endswith(" s") for line in lines), (what, lines)


def test_a_terminal_gets_a_bar_and_quiet_gets_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for listens in (Terminal(True, False), moemerge.Silent()):
        with listens.progress("writing", 10, "B") as advance:
            advance(1)
    assert capsys.readouterr() == ("", "")
