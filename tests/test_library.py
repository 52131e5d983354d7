"""The library: what its functions take, give and raise, as a Python program meets them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from babies import simple_config, write_config
from test_cli import run
from typer.main import get_command

import moemerge
from moemerge import (
    EvalSpec,
    InputError,
    Lora,
    MoemergeError,
    Options,
    ReadError,
    Silent,
    Tuning,
    make_plan,
    merge,
    parse_config,
    verify_checkpoint,
)
from moemerge.checkpoint.location import Stamp
from moemerge.cli import app
from moemerge.errors import ARGUMENTS, SWITCHES, Line, Problem
from moemerge.output import estimate
from moemerge.output.finished import available_sources, open_manifest
from moemerge.output.shard_file import ShardFile, read_chunk, same_bytes
from moemerge.prepare.stages import Prepared

FUNCTIONS = {
    name: getattr(moemerge, name)
    for name in moemerge.__all__
    if inspect.isfunction(getattr(moemerge, name))
}
PATHS = {"out", "old", "moe", "adapter", "config", "source", "cache_dir", "path"}
"""Parameters that are paths, or names of models that may be paths."""

TOLD_BY_THEMSELVES = {"PlannedTensor.recipe"}
"""Fields whose types are no matter for a caller: `to_json` gives them as plain data."""


@pytest.fixture
def config(tmp_path: Path, babies: dict[str, Path]) -> Path:
    text = simple_config(babies["base"], babies.values()) + "gate_mode: random\n"
    return write_config(tmp_path / "c.yaml", text)


def classes(hint: Any) -> Iterator[type]:
    """The classes of this package in a type hint."""
    if isinstance(hint, type) and hint.__module__.startswith("moemerge"):
        yield hint
    for inner in typing.get_args(hint):
        yield from classes(inner)


def test_what_functions_give_is_exported_to_the_last_field() -> None:
    seen: dict[type, str] = {}

    def walk(kind: type, where: str) -> None:
        if kind in seen or issubclass(kind, str):
            return
        seen[kind] = where
        if dataclasses.is_dataclass(kind) and kind is not Prepared:  # whose fields are rooms
            for name, hint in typing.get_type_hints(kind).items():
                if f"{kind.__name__}.{name}" not in TOLD_BY_THEMSELVES:
                    for inner in classes(hint):
                        walk(inner, f"{kind.__name__}.{name}")

    for name, function in FUNCTIONS.items():
        for what, hint in typing.get_type_hints(function).items():
            for kind in classes(hint):
                walk(kind, f"{name}: {what}")
    assert not {
        kind: where for kind, where in seen.items() if kind.__name__ not in moemerge.__all__
    }
    assert len(seen) > 15


def test_a_path_may_be_a_str_or_a_path_wherever_one_is_taken() -> None:
    taken = {**FUNCTIONS, "Options": Options, "Tuning": Tuning, "EvalSpec": EvalSpec, "Lora": Lora}
    found = 0
    for name, function in taken.items():
        for what, hint in typing.get_type_hints(function).items():
            said = str(hint)
            if what != "return" and (what in PATHS or "Path" in said):
                assert "Path" in said and re.search(r"\bstr\b|'str'", said), (name, what, said)
                found += 1
    assert found > 20


def test_paths_as_str_and_as_path_do_the_same(config: Path, tmp_path: Path) -> None:
    made = []
    for kind, name in ((str, "a"), (Path, "b")):
        out = kind(tmp_path / name)
        merge(kind(config), out, Options(cache_dir=kind(tmp_path)))
        verify_checkpoint(out, cache_dir=kind(tmp_path))
        built = moemerge.drop(out, 1, kind(tmp_path / f"{name}1"))
        moemerge.add(kind(tmp_path / f"{name}1"), kind(parse_config(config.read_text()).base_model),
                     kind(tmp_path / f"{name}2"))  # fmt: skip
        with pytest.raises(InputError, match="length: is 999, the model reads 128 tokens at once"):
            moemerge.tune(out, Tuning((kind(config),), length=999))
        with pytest.raises(InputError, match="length: is 999, the model reads 128 tokens at once"):
            moemerge.finetune(out, kind(tmp_path / "x"), Tuning((kind(config),), length=999))
        files = sorted(Path(built.out).glob("*.safetensors"))
        made.append([path.read_bytes().partition(b"}}")[2] for path in files])
    assert made[0] == made[1] and made[0]


def test_who_hears_has_a_progress_and_only_one_hears(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hearing = [f for f in FUNCTIONS.values() if "reporter" in inspect.signature(f).parameters]
    assert len(hearing) >= 15
    for function in hearing:
        assert inspect.signature(function).parameters["progress"].default is False, function
    with pytest.raises(InputError, match="progress: and reporter cannot both be"):
        merge(config, tmp_path / "out", reporter=Silent(), progress=True)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    merge(config, tmp_path / "out")
    assert capsys.readouterr() == ("", "")
    merge(config, tmp_path / "out", Options(overwrite=True, lazy=True), progress=True)
    said = capsys.readouterr()
    assert not said.out
    assert "note: lazy=True has no effect: gate_mode: random runs no model" in said.err


WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "size": (lambda c, o: Options(shard_size="5"), "shard_size: '5' is not a size"),
    "two": (lambda c, o: Options(load_in_4bit=True, load_in_8bit=True),
            "load_in_4bit: and load_in_8bit=True cannot both be"),
    "push": (lambda c, o: Options(push_as_you_go=True),
             "push_as_you_go: says nothing without push"),
    "steps": (lambda c, o: Tuning(("a",), steps=0), "steps: is 0"),
    "data": (lambda c, o: Tuning(()), "data: names no text"),
    "rank": (lambda c, o: moemerge.finetune(c, o, Tuning(("a",)), Lora(rank=0)), "rank: is 0"),
    "there": (lambda c, o: merge(c, merge(c, o).out), "pass overwrite=True to replace it"),
    "texts": (lambda c, o: moemerge.evaluate(merge(c, o).out, EvalSpec()),
              "name texts (texts={NAME: FILE}) or tasks (tasks NAME)"),
    "expert": (lambda c, o: moemerge.drop(merge(c, o).out, 7, f"{o}2"), "expert: '7' is none of"),
    "source": (lambda c, o: moemerge.add(merge(c, o).out, c.parent / "none", f"{o}2"), "source: "),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_errors_speak_of_arguments_and_on_the_command_line_of_flags(
    what: str, config: Path, tmp_path: Path
) -> None:
    call, said = WRONG[what]
    with pytest.raises(MoemergeError) as caught:
        call(config, tmp_path / "out")
    told = str(caught.value)
    assert said in told
    typed = caught.value.typed
    assert not re.search(r"(?<!\w)--[a-z]", told) and told != typed
    assert re.search(r"--[a-z]|SOURCE", typed)
    assert isinstance(caught.value, InputError)
    for problem in caught.value.problems:
        assert not re.match("--", problem.where), problem


def test_every_flag_in_a_message_is_an_argument() -> None:
    """Of every text in the package, and every flag of every command."""
    known = {name for f in FUNCTIONS.values() for name in inspect.signature(f).parameters}
    for kind in (Options, Tuning, Lora, EvalSpec):
        known |= {one.name for one in dataclasses.fields(kind)}
    assert known >= set(ARGUMENTS.values()) | SWITCHES
    alone = {"version", "quiet", "verbose", "json", "html", "cuda", "only", "lora", "undo", "help"}
    alone |= {"probe", "prompt", "tokens", "temperature", "top_k", "layer"}
    renamed = {"name", "expert", "card", "max_examples"}
    group = get_command(app)
    for command in group.commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            for flag in parameter.opts:
                if flag.startswith("--") and not parameter.hidden and len(parameter.opts) == 1:
                    argument = str(Line(flag))
                    assert argument in known | alone | renamed, (command.name, flag)
    package = Path(moemerge.__file__).parent
    for path in package.rglob("*.py"):
        if "cli" in path.relative_to(package).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                outside = "".join(str(Line(node.value)).split("`")[::2])
                assert not re.search(r"(?<![\w-])--[a-z]+(?![\w-]*_)", outside), (path, node.value)


def test_a_line_is_what_it_was_typed_as() -> None:
    typed = (
        "pass --no-verify or --lazy; `moemerge push OUT --private`; --text NAME=FILE --device cpu"
    )
    line = Line(typed)
    assert line == (
        "pass verify=False or lazy=True; `moemerge push OUT --private`; "
        "texts={NAME: FILE} device='cpu'"
    )
    assert line.typed == Line(line).typed == typed
    problem = Problem("--shard-size", "is wrong in a--b", "write --seed")
    assert str(problem) == "shard_size: is wrong in a--b; write seed"
    assert InputError([problem]).typed == "--shard-size: is wrong in a--b; write --seed"


class Replacing(Silent):
    """Replaces a source once the first bytes are to be written, as an upload script would."""

    def __init__(self, source: Path, how: str):
        self.source, self.how = source, how

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        if what == "writing" and self.how:
            stat, content = self.source.stat(), bytearray(self.source.read_bytes())
            content[-9:] = b"\1" * 9
            new = self.source.with_name("new")
            (new if self.how == "renamed" else self.source).write_bytes(content)
            os.utime(new if self.how == "renamed" else self.source,
                     ns=(stat.st_atime_ns, stat.st_mtime_ns + (self.how == "written")))  # fmt: skip
            if self.how == "renamed":
                new.replace(self.source)
        yield lambda step: None


@pytest.mark.parametrize("how", ["renamed", "written"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_source_replaced_after_the_plan_is_noticed(
    how: str, checked: bool, config: Path, tmp_path: Path, babies: dict[str, Path]
) -> None:
    """Though its size and time are the same, and no byte passes by; of a mixture's edit, too."""
    copy = tmp_path / "first"
    copy.mkdir()
    for file in babies["first"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config.write_text(config.read_text().replace(str(babies["first"]), str(copy)))
    options = Options(checksums=checked, verify=checked)
    weights = copy / "model.safetensors"
    with pytest.raises(ReadError, match="changed since the merge began"):
        merge(config, tmp_path / "out", options, Replacing(weights, how))
    assert not (tmp_path / "out/config.json").exists()
    merge(config, tmp_path / "again", options, Replacing(weights, ""))
    shard = max((tmp_path / "again").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    hears = Replacing(shard, how)
    with pytest.raises(ReadError, match="changed since the merge began"):
        moemerge.top_k(tmp_path / "again", 1, tmp_path / "edited", options, hears)
    assert not (tmp_path / "edited/config.json").exists()


def test_a_stamp_tells_another_file_from_one_that_was_only_linked(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("a")
    stamp = Stamp.of(file.stat())
    (tmp_path / "b").hardlink_to(file)
    file.chmod(0o600)
    assert stamp.is_of(file.stat())
    other = tmp_path / "c"
    other.write_text("b")
    os.utime(other, ns=(0, stamp.modified))
    other.replace(file)
    assert not stamp.is_of(file.stat())


COUNTED = {
    "plain": ("", "3 experts, 2 a token, "),
    "segments": ("segments: 4\n", "12 experts, 8 a token (4 segments of each of 3), "),
    "segments and shared": (
        "segments: 2\narchitecture: granitemoeshared\nshared_experts: [{{source_model: {base}}}]\n",
        "6 experts, 4 a token (2 segments of each of 3), 2 shared experts always on, ",
    ),
    "one shared": (
        "architecture: qwen2_moe\nshared_experts: [{{source_model: {base}}}]\n",
        "3 experts, 2 a token, 1 shared expert always on, ",
    ),
}


@pytest.mark.parametrize("what", COUNTED)
def test_a_plan_counts_experts_as_its_config_json_does(
    what: str, tmp_path: Path, babies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    head, said = COUNTED[what]
    base, text = babies["base"], simple_config(babies["base"], babies.values())
    path = write_config(tmp_path / "c.yaml", text + head.format(base=base) + "gate_mode: random\n")
    assert run("plan", path) == 0
    shown = capsys.readouterr().out
    assert said in shown
    plan = make_plan(path).plan
    assert (plan.routed, plan.routed_per_token) == (
        plan.config["num_local_experts"], plan.config["num_experts_per_tok"],
    )  # fmt: skip
    idle = sum(t.parameters for t in plan.tensors if t.expert is not None)
    idle = idle * (plan.routed - plan.routed_per_token) // plan.routed
    assert plan.active_parameters == plan.parameters - idle
    assert ("shared    base: always on" in shown) == ("shared" in what)


def test_the_time_to_compare_is_that_of_each_kind_of_work(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock by which a chunk that is read takes 2 s, and one that is made anew 3 s more."""
    merge(config, tmp_path / "out", Options(shard_size="20KB"))
    plan = open_manifest(tmp_path / "out").plan
    assert len(plan.shards) > 4
    sources, _ = available_sources(plan, Silent(), None)
    now = [0.0]
    read, fill = read_chunk, ShardFile.fill

    def reads(*args: Any) -> memoryview:
        now[0] += 2
        return read(*args)

    def fills(file: ShardFile, *args: Any, **more: Any) -> None:
        now[0] += 3 * any(tensor and tensor.name in compared for tensor in file.tensors)
        fill(file, *args, **more)

    monkeypatch.setattr(estimate, "read_chunk", reads)
    monkeypatch.setattr(ShardFile, "fill", fills)
    for only in (None, *plan.shards):
        chosen = [shard for shard in plan.shards[1:] if only in (None, shard)]
        compared = {tensor.name for shard in chosen for tensor in shard.tensors}
        found = estimate.seconds_to_compare(
            plan, tmp_path / "out", sources, compared, 1, lambda: now[0]
        )
        assert found == 2 * len(plan.shards) + 3 * len(chosen)


def test_same_bytes_are_the_same_to_the_last() -> None:
    for length in (0, 1, 7, 8, 9, 4097):
        one = bytearray(range(256)) * 17
        other = bytearray(one)
        assert same_bytes(memoryview(one)[:length], memoryview(other)[:length])
        assert same_bytes(memoryview(b"x" + one)[1:], memoryview(other))
        for at in {0, length // 2, length - 1} if length else ():
            other[at] ^= 1
            assert not same_bytes(memoryview(one)[:length], memoryview(other)[:length])
            other[at] ^= 1
        assert not same_bytes(memoryview(one)[: length + 1], memoryview(other)[:length])
