"""What may be added is one file: each kind is added to a copy of the package, and used there.

Nothing but the new file tells the package of it. Programs run in processes of their own, with the
copy before the installed package on their path.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from babies import make_adapter, make_model, simple_config, write_config
from fake_hub import FakeHub
from safetensors.numpy import load_file, save_file
from test_laws import BODIES, all_tensors, logits, same_bytes
from transformers import CONFIG_MAPPING

from moemerge.families import NO_HOST, RECORDS

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = """
import contextlib, io, json, sys
from moemerge.cli import app

ends = []
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            app(line)
        except SystemExit as end:
            ends.append([end.code or 0, said])
print(json.dumps([[code, said.getvalue()] for code, said in ends]))
"""


def package_with(tmp_path: Path, files: Mapping[str, str]) -> Path:
    """A folder with a copy of the package, to which `files`, texts by relative path, are added."""
    copy = tmp_path / "package"
    shutil.copytree(ROOT / "moemerge", copy / "moemerge", ignore=shutil.ignore_patterns("*.pyc"))
    for name, text in files.items():
        (copy / "moemerge" / name).write_text(text, encoding="utf-8")
    return copy


def run_program(package: Path, program: str, *arguments: str, **environment: str) -> str:
    """What a program prints in a process of its own, which imports moemerge from `package`."""
    env = {**os.environ, **environment, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, env=env, cwd=package,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_commands(package: Path, *lines: list[object], **environment: str) -> list[tuple[int, str]]:
    """The exit code of each command, one after another in one process, and what it said."""
    given = json.dumps([[*map(str, line)] for line in lines])
    said = run_program(package, COMMANDS, given, **environment)
    return [(code, text) for code, text in json.loads(said.splitlines()[-1])]


def example(heading: str) -> str:
    """The first Python under a heading of docs/contributing.md."""
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    under = text.partition(f"## {heading}\n")[2]
    return under.partition("```python\n")[2].partition("```")[0]


def test_a_gate_mode_is_one_file(tmp_path: Path, babies: dict[str, Path]) -> None:
    """The one of the walkthrough, which runs the base model, has an option and holds texts out."""
    base, first, second = babies.values()
    package = package_with(tmp_path, {"gates/modes/mine.py": example("A gate mode is one file")})

    def config(name: str, head: str) -> Path:
        return write_config(tmp_path / name, simple_config(base, [first, second], head))

    good, plain = config("good.yaml", "gate: { mode: mine, kappa: 2 }"), config("plain.yaml", "")
    wrong = config("wrong.yaml", "gate_mode: mine\ngate:\n  kapa: 1\n")
    bad = config("bad.yaml", "gate_mode: mine\ngate:\n  kappa: 0\n")
    bare = config("bare.yaml", "gate_mode: mine")
    lines = bare.read_text().splitlines()
    kept = [line for line in lines if "prompts" not in line and line[:8] != "      - "]
    bare.write_text("\n".join(kept))
    out, other, page = tmp_path / "out", tmp_path / "other", tmp_path / "page.html"
    ends = run_commands(
        package,
        ["plan", good], ["plan", "--seed", "3", good], ["plan", "--json", plain],
        ["plan", "--json", good], ["plan", wrong], ["plan", bad], ["plan", bare],
        ["merge", good, out], ["verify", out], ["routing", out, "--html", page],
        ["merge", plain, other], ["regate", other, good], ["verify", other],
    )  # fmt: skip
    plan, seeded, ridge, ours, typo, zero, unprompted, *built = ends
    assert plan[0] == 0 and "gate_mode mine" in plan[1]
    assert "--seed has no effect: gate_mode: mine" in seeded[1]
    memory = [json.loads(end[1])["expected_peak_bytes"] for end in (ridge, ours)]
    assert memory[0] == memory[1], "the base model runs in both"
    assert typo == (2, typo[1]) and "wrong.yaml:4: gate.kapa" in typo[1]
    assert "did you mean 'kappa'?" in typo[1]
    assert zero[0] == 2 and "bad.yaml:4: gate.kappa: is 0" in zero[1]
    assert unprompted[0] == 2 and "gate_mode: mine needs them" in unprompted[1]
    assert [code for code, _ in built] == [0] * len(built), built
    assert "of the prompts' tokens find their expert first" in built[0][1]
    assert "first expert" in built[2][1] and page.is_file()
    for folder in (out, other):
        card = (folder / "README.md").read_text()
        assert "`mine`: the largest value of each feature" in card and "(kappa 2)" in card
    first_shards = [folder / "model-00001-of-00002.safetensors" for folder in (out, other)]
    assert first_shards[0].read_bytes() == first_shards[1].read_bytes()


OTHER_MODES = {
    "writes": """
from dataclasses import dataclass

from moemerge.gates.modes.random import routers
from moemerge.gates.needs import GateSettings, Needs, Passes, Prompts

NEEDS = Needs(prompts=Prompts.OPTIONAL, expert_models=True, seed=True)


@dataclass(frozen=True)
class Settings(GateSettings):
    count: int = 2

    def passes(self):
        return Passes(texts=self.count, tokens=3)
""",
    "even": """
from moemerge.gates.modes.zeros import routers
from moemerge.gates.needs import Needs

NEEDS = Needs()
""",
    "equal": """
from moemerge.gates.modes.zeros import routers
from moemerge.gates.needs import Needs, Prompts

NEEDS = Needs(prompts=Prompts.REQUIRED)
""",
    "misspelt": """
from moemerge.gates.modes.zeros import routers
from moemerge.gates.needs import Needs

NEEDS = Needs(promts=True)
""",
}
"""Gate modes that need something else each."""


def test_what_a_gate_mode_needs_is_what_it_says(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    files = {f"gates/modes/{name}.py": text for name, text in OTHER_MODES.items()}
    package = package_with(tmp_path, files)
    configs = {
        name: write_config(
            tmp_path / f"{name}.yaml",
            simple_config(base, [first, second], f"gate_mode: {name}\nexperts_per_token: 1"),
        )
        for name in (*OTHER_MODES, "random")
    }
    writes, plain, even, verified, equal, again = run_commands(
        package,
        ["plan", "--json", configs["writes"]], ["plan", "--json", configs["random"]],
        ["merge", configs["even"], tmp_path / "even"], ["verify", tmp_path / "even"],
        ["merge", configs["equal"], tmp_path / "equal"], ["plan", configs["writes"]],
    )  # fmt: skip
    peaks = [json.loads(said[1])["expected_peak_bytes"] for said in (writes, plain)]
    assert peaks[0] > peaks[1], "the experts' own models run"
    assert "each of 2 experts writes 2 texts of 3 tokens" in again[1]
    assert even[0] == verified[0] == 0
    assert "routers: the same for every expert, so they choose nothing yet" in even[1]
    assert equal[0] == 1 and "all rows are equal, so it cannot route" in equal[1]
    assert not list((tmp_path / "equal").glob("*.safetensors"))
    with pytest.raises(AssertionError, match=r"TypeError.*promts"):
        run_commands(package, ["plan", configs["misspelt"]])


def same(one: Path, two: Path) -> bool:
    """Whether two models of random weights give the same logits in transformers."""
    expected = logits(one)
    assert expected.std() > 0.1
    return bool((expected - logits(two)).abs().max() <= 1e-5)


@pytest.mark.skipif("solar_open" not in CONFIG_MAPPING, reason="needs transformers 5")
@pytest.mark.parametrize("body", ["llama llama3 rope", "qwen2 tied"])
def test_an_output_class_is_one_file(tmp_path: Path, body: str) -> None:
    """Merged, split, listed, taken apart: the class of the walkthrough is as good as any."""
    source = example("An output class is one file")
    package = package_with(tmp_path, {"architectures/types/solar_open.py": source})
    base, other = (make_model(tmp_path / str(seed), seed=seed, **BODIES[body]) for seed in (0, 1))
    head = "architecture: solar"
    alike = write_config(tmp_path / "a.yaml", simple_config(base, [base] * 3, head))
    mixed = write_config(tmp_path / "m.yaml", simple_config(base, [base, other, base], head))
    shares = f"base_model: {base}\n{head}\ngate_mode: zeros\nexperts_per_token: 3\n"
    split = write_config(tmp_path / "s.yaml", shares + "split: { slices: 4, shared: 1 }\n")
    window = make_model(tmp_path / "window", family="mistral", sliding_window=7)
    wrong = write_config(tmp_path / "w.yaml", simple_config(window, [window] * 2, head))
    same_out, out, sliced, dense, fewer, more, two, three = (
        tmp_path / name for name in "same out sliced dense fewer more two three".split()
    )
    listed, planned, refused, *ends = run_commands(
        package,
        ["architectures"], ["plan", mixed], ["plan", wrong],
        ["merge", alike, same_out], ["merge", mixed, out], ["split", split, sliced],
        ["verify", out], ["drop", out, fewer, "--expert", 0], ["add", fewer, other, more],
        ["extract", more, dense, "--expert", 2], ["verify", more],
        ["top-k", sliced, 2, two], ["top-k", two, 3, three],
    )  # fmt: skip
    assert [code for code, _ in ends] == [0] * len(ends), ends
    assert "solar_open, solar" in listed[1] and "transformers 5" in listed[1]
    assert planned[0] == 0 and "solar_open" in planned[1]
    assert refused[0] == 2 and "which a solar_open does not know" in refused[1]
    assert json.loads((more / "config.json").read_text())["n_routed_experts"] == 3
    assert same(base, same_out) and not same(base, out)
    assert same(base, sliced) and same(base, three) and not same(base, two)
    assert json.loads((dense / "config.json").read_text())["model_type"] == body.split()[0]
    tensors, *sources = (all_tensors(model) for model in (dense, base, other))
    for name in sources[0]:
        assert tensors[name].equal(sources[".mlp." in name][name]), name


def test_a_dense_family_is_one_file(tmp_path: Path) -> None:
    """The family of the walkthrough is a Llama of another name, and models of it make a mixture."""
    record = example("A dense family is one file")
    assert record
    package = package_with(tmp_path, {"families/types/iquestcoder.py": record})
    name = "iquestcoder" if "iquestcoder" in CONFIG_MAPPING else "llama"  # transformers 5 has it
    base, other = (
        make_model(tmp_path / str(seed), name, seed=seed, head_dim=16) for seed in (0, 1)
    )
    for model in (base, other):
        path = model / "config.json"
        path.write_text(path.read_text().replace('"llama"', '"iquestcoder"'))
    alike = write_config(tmp_path / "a.yaml", simple_config(base, [base] * 2))
    mixed = write_config(tmp_path / "m.yaml", simple_config(base, [base, other]))
    same_out, out, dense = tmp_path / "same", tmp_path / "out", tmp_path / "dense"
    _, unknown = run_commands(ROOT, ["architectures"], ["plan", mixed])
    assert unknown[0] == 2 and "is a 'iquestcoder' model" in unknown[1]
    listed, planned, *ends = run_commands(
        package,
        ["architectures"], ["plan", mixed], ["merge", alike, same_out], ["merge", mixed, out],
        ["verify", out], ["extract", out, dense, "--expert", 0],
    )  # fmt: skip
    assert listed[1].count("iquestcoder") == listed[1].count("llama,") > 1
    assert planned[0] == 0 and [code for code, _ in ends] == [0] * len(ends), ends
    if name == "iquestcoder":
        assert same(base, same_out) and same(base, dense) and not same(base, out)


def test_no_family_with_a_record_is_refused_by_name() -> None:
    assert not RECORDS.keys() & NO_HOST.keys()


def quantise(model: Path, quantised: Path, decoded: Path) -> None:
    """A model's weights in the walkthrough's format, and as the numbers that those stand for."""
    for copy in (quantised, decoded):
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    shapes, blocks, numbers = {}, [], {}
    for name, values in load_file(model / "model.safetensors").items():
        padded = np.zeros((-(-values.size // 32), 32), np.float32)
        padded.reshape(-1)[: values.size] = values.reshape(-1)
        scale = (np.abs(padded).max(1) / 127).astype(np.float16)
        block = np.zeros(len(padded), [("scale", "<f2"), ("numbers", "i1", 32)])
        block["scale"] = scale
        block["numbers"] = np.rint(padded / np.maximum(scale, 1e-7)[:, None])
        whole = scale.astype(np.float32)[:, None] * block["numbers"]
        shapes[name], numbers[name] = values.shape, whole.reshape(-1)[: values.size]
        numbers[name] = np.ascontiguousarray(numbers[name].reshape(values.shape))
        blocks.append(block.tobytes())
    header = json.dumps(shapes).encode()
    content = len(header).to_bytes(8, "little") + header + b"".join(blocks)
    (quantised / "model.q8").write_bytes(content)
    save_file(numbers, decoded / "model.safetensors")


def test_a_source_format_is_one_file(tmp_path: Path) -> None:
    """Blocks with scales, in which rows may begin: as good as the numbers that they stand for.

    Converted, cut into rows and columns, added to, run in transformers, and read from afar.
    """
    source = example("A source format is one file")
    package = package_with(tmp_path, {"checkpoint/formats/q8.py": source})
    q8, numbers, adapter = tmp_path / "q8", tmp_path / "numbers", tmp_path / "adapter"
    for seed, name in enumerate(("base", "other")):
        plain = make_model(tmp_path / name, seed=seed, hidden_size=40)
        quantise(plain, q8 / name, numbers / name)
    make_adapter(adapter, numbers / "base")

    def merges(kind: str, base: str, other: str) -> list[list[object]]:
        sources = [base, other, f"{base}+{adapter}"]
        cut = "gate_mode: random\nsplit: {slices: 16, assign: order}\ndtype: float32\n"
        configs = {
            "hidden": simple_config(base, sources, "gate_mode: hidden\ndtype: float32"),
            "halves": simple_config(base, sources, "gate_mode: cheap_embed\ndtype: bfloat16"),
            "alike": simple_config(base, [base] * 2, "gate_mode: random\ndtype: float32"),
            "cut": f"base_model: {base}\n{cut}",
        }
        (tmp_path / kind).mkdir()
        return [
            ["merge", write_config(tmp_path / kind / f"{name}.yaml", text), tmp_path / kind / name]
            for name, text in configs.items()
        ]

    damaged = q8 / "damaged"
    shutil.copytree(q8 / "base", damaged)
    (damaged / "model.q8").write_bytes((q8 / "base" / "model.q8").read_bytes()[:-1])
    wrong = write_config(tmp_path / "wrong.yaml", simple_config(damaged, [damaged] * 2))
    refused, *ends = run_commands(
        package,
        ["plan", wrong],
        *merges("of q8", f"{q8}/base", f"{q8}/other"),
        *merges("of numbers", f"{numbers}/base", f"{numbers}/other"),
        ["verify", tmp_path / "of q8" / "hidden"],
    )
    assert refused[0] == 2 and "model.q8: its tensors end at byte" in refused[1]
    assert "save the model again" in refused[1]
    with FakeHub() as hub:
        for name in ("base", "other"):
            hub.publish(f"lab/{name}", q8 / name)
        hidden = [*merges("streamed", "lab/base", "lab/other")[0], "--stream"]
        environment = hub.environment(tmp_path / "home")
        ends += run_commands(package, hidden, **environment)
    assert not list((tmp_path / "home").rglob("*.q8"))
    assert [code for code, _ in ends] == [0] * len(ends), ends
    made = [*(tmp_path / "of q8").glob("*/"), tmp_path / "streamed" / "hidden"]
    for out in filter(Path.is_dir, made):
        same = tmp_path / "of numbers" / out.name
        assert same_bytes(all_tensors(out), all_tensors(same)), out
        assert (out / "config.json").read_text() == (same / "config.json").read_text()
    expected = logits(numbers / "base")
    assert (expected - logits(tmp_path / "of q8" / "alike")).abs().max() <= 1e-5


def test_a_command_is_one_file(tmp_path: Path, babies: dict[str, Path]) -> None:
    """The one of the walkthrough is listed, shows its options, runs, and refuses."""
    package = package_with(tmp_path, {"cli/commands/shapes.py": example("A command is one file")})
    base, first, _ = babies.values()
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, first]))
    listed, helped, ran, refused, mistyped = run_commands(
        package, ["--help"], ["shapes", "--help"], ["shapes", config],
        ["shapes", tmp_path / "none.yaml"], ["shape", tmp_path / "out"],
    )  # fmt: skip
    assert "shapes" in listed[1] and "the shape of every tensor" in listed[1]
    assert helped[0] == 0 and "--cache-dir" in helped[1] and "--overwrite" not in helped[1]
    assert ran[0] == 0 and "model.embed_tokens.weight [64, 32]" in ran[1].splitlines()
    assert refused[0] == 2 and "there is no such config file" in refused[1]
    assert mistyped[0] == 2 and "did you mean 'shapes'? (a command)" in mistyped[1]
