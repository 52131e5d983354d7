"""`moemerge chat`: answers in a pipe and in a terminal, from a directory and from a GGUF file."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from babies import simple_config, write_config
from smollm2 import model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from moemerge import Options, export, merge
from moemerge.chat import Asked, open_speaker
from moemerge.options import RunOptions
from moemerge.reporting import Silent

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 is enough")
QUESTION = "Write one short sentence about the sea."


@pytest.fixture(scope="module")
def mixture(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2 as a mixture of itself, with names; and its GGUF file."""
    root = tmp_path_factory.mktemp("chat")
    text = simple_config(smollm2, [smollm2] * 2, "gate_mode: random\nexperts_per_token: 1")
    config = write_config(root / "c.yaml", text)
    merge(config, root / "out")
    export(root / "out", root / "out.gguf", Options(type="q8_0"))
    yield root
    shutil.rmtree(root)


def chat(*arguments: str | Path, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moemerge", "chat", *map(str, arguments)]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wanted(smollm2: Path) -> str:
    """The dense model's greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    made = model.generate(**ids, max_new_tokens=16, do_sample=False)
    found = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(found).strip()


def test_one_answer_is_the_dense_models(mixture: Path, wanted: str) -> None:
    done = chat(mixture / "out", "--prompt", QUESTION, "--temperature", "0", "--tokens", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wanted
    assert re.search(r"note: \S+ \d+%", done.stderr)
    assert "\x1b" not in done.stdout


def test_a_pipe_asks_line_by_line(mixture: Path) -> None:
    said = f"{QUESTION}\n\nWhat is its colour?\n"
    for moe in ("out", "out.gguf"):
        done = chat(mixture / moe, "--temperature", "0", "--tokens", "8", said=said)
        assert done.returncode == 0, done.stderr
        answers = done.stdout.splitlines()
        assert len([line for line in answers if line.strip()]) >= 2, done.stdout
        assert "llama" not in done.stderr and "slot" not in done.stderr


def test_the_seed_decides_what_is_drawn(mixture: Path) -> None:
    speaker = open_speaker(mixture / "out", RunOptions(), Silent())
    turns = [{"role": "user", "content": QUESTION}]

    def said(seed: int, **how: Any) -> str:
        asked = Asked(tokens=12, seed=seed, **{"temperature": 1.5, **how})
        return "".join(piece.text for piece in speaker.answer(turns, asked))

    assert said(1) == said(1) != said(2)
    assert said(1, top_k=1) == said(2, top_k=1) == said(3, temperature=0)


def test_tokens_are_coloured_in_a_terminal(mixture: Path, wanted: str) -> None:
    """A real terminal: every piece has its expert's colour, and the names have theirs."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "moemerge", "chat", str(mixture / "out")]
    command += ["--prompt", QUESTION, "--temperature", "0", "--tokens", "16", "--layer", "3"]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    running = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the terminal is closed
            break
        if not more:
            break
        shown += more
    os.close(ours)
    assert running.wait() == 0
    text = shown.decode()
    painted = re.findall(r"\x1b\[(\d+)m(.*?)\x1b\[0m", text, re.DOTALL)
    assert {colour for colour, _ in painted} <= {"36", "33"}
    plain = re.sub(r"\x1b\[\d+m", "", text).replace("\r\n", "\n")
    assert wanted.splitlines()[0] in plain
    assert re.search(r"\x1b\[3[36]m[^\x1b]+\x1b\[0m \d+%", text)


def test_what_cannot_answer_is_told(mixture: Path, tmp_path: Path) -> None:
    done = chat(tmp_path / "nothing")
    assert done.returncode == 2 and "is not there" in done.stderr
    (tmp_path / "x.gguf").write_text("GGUF")
    done = chat(tmp_path / "x.gguf", "--prompt", "a")
    assert done.returncode == 2 and "llama.cpp cannot load it" in done.stderr
    done = chat(mixture / "out", "--prompt", "a", "--layer", "99")
    assert done.returncode == 2 and "from 0 to 29" in done.stderr
    done = chat(model_dir(), "--prompt", "a")
    assert done.returncode == 2 and "of a mixture" in done.stderr
