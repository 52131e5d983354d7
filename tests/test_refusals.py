"""Bad configs, models, options and outputs: refused with where, what, fix; nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model, save_weights
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moemerge.cli import app
from moemerge.gates import modes as gates

GOOD = """\
base_model: {base}
gate_mode: cheap_embed
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: {first}
    positive_prompts:
      - code python
    negative_prompts:
      - story
    noise_scale: 0.5
    name: coder
  - source_model: {second}
    positive_prompts: [story scene]
    name: teller
"""
BASE, FIRST, SECOND = (
    "config.yaml:1: base_model",
    "config.yaml:6: experts[0].source_model",
    "config.yaml:13: experts[1].source_model",
)


def tree(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write(folder: Path, text: str | bytes, babies: dict[str, Path]) -> Path:
    path = folder / "config.yaml"
    if isinstance(text, bytes):
        path.write_bytes(text)
    else:
        for name, directory in babies.items():
            text = text.replace(f"{{{name}}}", str(directory))
        path.write_text(text)
    return path


def invoke(*argv: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in argv])


def refused(*argv: object) -> list[str]:
    """Run a command that must be refused; return its problems, one a line."""
    result = invoke(*argv)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert not result.stdout
    head, *problems = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    count = len(problems)
    assert head == f"error: {count} problem{'s' * (count > 1)}, nothing written"
    for problem in problems:
        where_what, _, fix = problem.rpartition("; ")
        assert problem.startswith("  ") and ": " in where_what and fix, problem
    return problems


def refused_config(text: str | bytes, babies: dict[str, Path], folder: Path) -> list[str]:
    """A merge of the config must be refused, and so must be a plan, with the same words."""
    config, out = write(folder, text, babies), folder / "out"
    problems = refused(config, out)
    assert not out.exists()
    assert refused("plan", config) == problems
    return problems


def test_the_good_config_is_accepted(babies: dict[str, Path], tmp_path: Path) -> None:
    result = invoke("plan", write(tmp_path, GOOD, babies))
    assert result.exit_code == 0, result.stderr


EDITS = {
    # what is wrong: (this in GOOD, becomes this; where, and words of what and the fix)
    "tab": ("    name: coder", "\tname: coder", "config.yaml:12", "not YAML", "indentation"),
    "unknown key": ("noise_scale", "noise_scael", "config.yaml:11: experts[0].noise_scael",
                    "not a key", "did you mean 'noise_scale'?"),
    "unknown root key": ("gate_mode", "gatemode", "config.yaml:2: gatemode", "'gate_mode'?"),
    "duplicate key": ("dtype: bfloat16", "gate_mode: random", "config.yaml:3: gate_mode",
                      "twice", "line 2", "keep one"),
    "key that is a list": ("dtype: bfloat16", "? [a]\n: b", "config.yaml:3", "a key that is a list",
                           "write `key: value`"),
    "base_model is a list": ("base_model: {base}", "base_model: [a]", "config.yaml:1: base_model",
                             "is a list", "write text"),
    "dtype is a mapping": ("bfloat16", "{ a: b }", "config.yaml:3: dtype", "is a mapping", "text"),
    "gate_mode is a list": ("cheap_embed", "[a]", "config.yaml:2: gate_mode", "is a list", "text"),
    "experts is a mapping": ("experts:\n", "experts: { a: b }\nmore:\n", "config.yaml:5: experts",
                             "is a mapping", "write a list"),
    "an expert is text": ("experts:\n", "experts:\n  - hello\n", "config.yaml:6: experts[0]",
                          "is 'hello'", "key: value"),
    "prompts are text": ("[story scene]", "story", "config.yaml:14: experts[1].positive_prompts",
                         "is 'story'", "write a list"),
    "a prompt is a mapping": ("- code python", "- code: python",
                              "config.yaml:8: experts[0].positive_prompts[0]", "a mapping",
                              "quotes"),
    "noise is text": ("0.5", "loud", "config.yaml:11: experts[0].noise_scale", "is 'loud'",
                      "write a number"),
    "noise is nan": ("0.5", ".nan", "config.yaml:11: experts[0].noise_scale", "is '.nan'",
                     "write a number"),
    "noise is infinite": ("0.5", "1e999", "config.yaml:11: experts[0].noise_scale", "1e999",
                          "write a number"),
    "noise is absurd": ("0.5", "1e31", "config.yaml:11: experts[0].noise_scale", "is 1e+31",
                        "between -1e30 and 1e30"),
    "residual is absurd": ("noise_scale: 0.5", "residual_scale: -1e300",
                           "config.yaml:11: experts[0].residual_scale", "is -1e+300", "1e30"),
    "noise is negative": ("0.5", "-0.5", "config.yaml:11: experts[0].noise_scale", "is -0.5",
                          "0 or more"),
    "gate_mode misspelled": ("cheap_embed", "hiden_avg", "config.yaml:2: gate_mode",
                             "'hiden_avg'", "did you mean 'hidden_avg'?"),
    "gate a list": ("gate_mode: cheap_embed", "gate: [ridge]", "config.yaml:2: gate", "is a list",
                    "write `key: value`"),
    "gate a word": ("gate_mode: cheap_embed", "gate: ridge", "config.yaml:2: gate", "is 'ridge'",
                    "write `key: value`"),
    "gate mode misspelled": ("gate_mode: cheap_embed", "gate:\n  mode: rigde",
                             "config.yaml:3: gate.mode", "'rigde' is no gate mode", "'ridge'?"),
    "gate modes disagree": ("gate_mode: cheap_embed", "gate: { mode: ridge }\ngate_mode: hidden",
                            "config.yaml:2: gate.mode", "is 'ridge', gate_mode is 'hidden'",
                            "keep one"),
    "gate option misspelled": ("gate_mode: cheap_embed", "gate:\n  mode: ridge\n  lambada: 1",
                               "config.yaml:4: gate.lambada", "is no option of gate mode ridge",
                               "did you mean 'lambda'?"),
    "gate option of another mode": ("gate_mode: cheap_embed", "gate: { mode: hidden, lambda: 1 }",
                                    "config.yaml:2: gate.lambda", "no option of gate mode hidden",
                                    "one of: kappa"),
    "gate option of the default": ("gate_mode: cheap_embed", "gate: { samples: 3 }",
                                   "config.yaml:2: gate.samples", "no option of gate mode ridge",
                                   "one of: kappa, lambda, on_policy"),
    "gate option of a mode without": ("gate_mode: cheap_embed", "gate: { mode: random, kappa: 3 }",
                                      "config.yaml:2: gate.kappa", "no option of gate mode random",
                                      "remove it: it has none"),
    "gate option twice": ("gate_mode: cheap_embed", "gate:\n  kappa: 1\n  kappa: 2",
                          "config.yaml:4: gate.kappa", "stands twice", "keep one"),
    "gate option a list": ("gate_mode: cheap_embed", "gate: { kappa: [1] }",
                           "config.yaml:2: gate.kappa", "is a list", "write one value"),
    "kappa of text": ("gate_mode: cheap_embed", "gate: { kappa: much }",
                      "config.yaml:2: gate.kappa", "is 'much'", "write a number"),
    "kappa in quotes": ("gate_mode: cheap_embed", "gate: { kappa: '3' }",
                        "config.yaml:2: gate.kappa", "is '3'", "write a number"),
    "kappa true": ("gate_mode: cheap_embed", "gate: { kappa: true }",
                   "config.yaml:2: gate.kappa", "is True", "write a number"),
    "kappa 0": ("gate_mode: cheap_embed", "gate: { kappa: 0 }", "config.yaml:2: gate.kappa",
                "is 0", "write a number above 0"),
    "kappa NaN": ("gate_mode: cheap_embed", "gate: { kappa: .nan }", "config.yaml:2: gate.kappa",
                  "is nan", "write a number above 0"),
    "kappa infinite": ("gate_mode: cheap_embed", "gate: { kappa: .inf }",
                       "config.yaml:2: gate.kappa", "is inf", "write a smaller number"),
    "lambda negative": ("gate_mode: cheap_embed", "gate: { lambda: -1e-3 }",
                        "config.yaml:2: gate.lambda", "is -0.001", "write a number above 0"),
    "on_policy a number": ("gate_mode: cheap_embed", "gate: { on_policy: 1 }",
                           "config.yaml:2: gate.on_policy", "is 1", "write true or false"),
    "samples fractional": ("gate_mode: cheap_embed", "gate: { mode: self, samples: 1.5 }",
                           "config.yaml:2: gate.samples", "is 1.5", "write a whole number"),
    "samples 0": ("gate_mode: cheap_embed", "gate: { mode: self, samples: 0 }",
                  "config.yaml:2: gate.samples", "is 0", "write a number above 0"),
    "samples astronomical": ("gate_mode: cheap_embed",
                             f"gate: {{ mode: self, samples: {10**400} }}",
                             "config.yaml:2: gate.samples", "is 1000", "write a smaller number"),
    "own text longer than the model takes": (
        "gate_mode: cheap_embed", "gate: { mode: self, tokens: 127 }", "config.yaml:2: gate.tokens",
        "is 127, after prompts of up to 3; the models take 128", "write at most 125"),
    "top_p above 1": ("gate_mode: cheap_embed", "gate: { mode: self, top_p: 1.1 }",
                      "config.yaml:2: gate.top_p", "is 1.1", "at most 1"),
    "temperature 0": ("gate_mode: cheap_embed", "gate: { mode: self, temperature: 0 }",
                      "config.yaml:2: gate.temperature", "is 0", "write a number above 0"),
    "calibration missing": ("name: coder", "calibration: ./none.txt",
                            "config.yaml:12: experts[0].calibration", "there is no ./none.txt",
                            "name a UTF-8 text or jsonl file"),
    "calibration of a name too long": ("name: coder", f"calibration: {'x' * 300}.txt",
                                       "config.yaml:12: experts[0].calibration",
                                       "cannot be read (File name too long)", "name a UTF-8"),
    "dtype misspelled": ("bfloat16", "bfloat61", "config.yaml:3: dtype", "'bfloat61'",
                         "did you mean 'bfloat16'?"),
    "base_model missing": ("base_model: {base}\n", "", "config.yaml:1", "base_model is missing",
                           "add `base_model"),
    "base_model null": ("{base}", "", "config.yaml:1", "base_model is missing", "add"),
    "base_model blank": ("{base}", "'  '", BASE, "no directory ''", "write user/name"),
    "source_model missing": ("source_model: {second}\n    positive_prompts", "positive_prompts",
                             "config.yaml:13: experts[1]", "source_model is missing", "add"),
    "count 0": ("token: 2", "token: 0", "config.yaml:4: experts_per_token", "is 0 with 2", "1 to"),
    "count negative": ("token: 2", "token: -1", "config.yaml:4: experts_per_token", "is -1", "2"),
    "count beyond": ("token: 2", "token: 3", "config.yaml:4: experts_per_token", "is 3", "1 to 2"),
    "count is text": ("token: 2", "token: two", "config.yaml:4: experts_per_token", "is 'two'",
                      "whole number"),
    "count is a bool": ("token: 2", "token: true", "config.yaml:4: experts_per_token",
                        "is 'true'", "whole number"),
    "count is fractional": ("token: 2", "token: 1.5", "config.yaml:4: experts_per_token",
                            "is '1.5'", "whole number"),
    "count is astronomical": ("token: 2", f"token: {10**400}", "config.yaml:4: experts_per_token",
                              "with 2 experts", "1 to 2"),
    "prompt empty": ("- code python", "- ''", "config.yaml:8: experts[0].positive_prompts[0]",
                     "is empty", "write a prompt"),
    "prompt that is no text": ("- code python", '- "\\ud800"',
                               "config.yaml:8: experts[0].positive_prompts[0]", "surrogate",
                               "write"),
    "prompt without letters": ("- code python", '- "\\n"',
                               "config.yaml:8: experts[0].positive_prompts[0]", "is empty",
                               "write a prompt"),
    "no prompts": ("\n    positive_prompts: [story scene]", "", "config.yaml:13: experts[1]",
                   "has no positive_prompts", "gate_mode: random"),
    "equal prompts": ("[story scene]", "[code python]\n    negative_prompts: [story]",
                      "config.yaml:13: experts[1]", "the same prompts as experts[0]",
                      "give each expert its own"),
    "positive is negative": ("- story\n", "- code python\n", "config.yaml:6: experts[0]",
                             "positive and negative prompts are the same", "change one"),
    "prompt too long": ("code python", "code " * 200, "config.yaml:8",
                        "201 tokens long, the base model takes 128", "shorten it"),
    "duplicate names": ("teller", "coder", "config.yaml:15: experts[1].name", "'coder'",
                        "experts[0]", "give each expert its own"),
    "shared experts": ("dtype: bfloat16",
                       "architecture: mixtral\nshared_experts: [{ source_model: {first} }]",
                       "base_model", "no shared experts", "remove them"),
    "architecture": ("dtype: bfloat16", "architecture: mixtrel", "config.yaml:3: architecture",
                     "'mixtrel' is no architecture", "mixtral"),
    "merge key": ("dtype: bfloat16", "<<: 3", "config.yaml:1", "bad `<<`", "merge mappings"),
    "source is missing": ("{first}", "./nowhere", FIRST, "no directory './nowhere'", "check"),
    "source is missing above": ("{first}", "../nowhere", FIRST, "no directory", "check"),
    "absolute source is missing": ("{first}", "/nowhere/at/all", FIRST, "no directory", "check"),
    "home source is missing": ("{first}", "~/nowhere-at-all", FIRST, "no directory", "check"),
    "nobody's home": ("{first}", "~nosuchuser/a", FIRST, "no directory '~nosuchuser/a'", "check"),
    "calibration is in nobody's home": ("name: teller", "calibration: ~nosuchuser/a",
                                        "experts[1].calibration", "no ~nosuchuser/a", "name a"),
    "source is no Hub id": ("{first}", "'a model'", FIRST, "neither a directory nor a Hub id",
                            "check"),
    "Hub id mistyped": ("{first}", "nobody/nothing", FIRST, "nobody/nothing",
                        "neither a directory nor in the Hub's cache", "check the name"),
    "revision of a directory": ("{first}", "{first}@main", FIRST, "no revision 'main'", "check"),
    "adapter is missing": ("{first}", "{first}+./nowhere", FIRST, "no directory './nowhere'", ""),
    "adapter is a model": ("{first}", "{first}+{second}", FIRST, "is no adapter",
                           "base+adapter"),
    "source mapping unknown key": ("{first}", "{ model: a, revison: b }",
                                   "experts[0].source_model.revison", "not known", "'revision'?"),
}  # fmt: skip


@pytest.mark.parametrize("kind", EDITS)
def test_a_config_is_refused_for(kind: str, babies: dict[str, Path], tmp_path: Path) -> None:
    old, new, *words = EDITS[kind]
    assert GOOD.count(old) >= 1
    problems = refused_config(GOOD.replace(old, new, 1), babies, tmp_path)
    assert any(all(word in problem for word in words) for problem in problems), problems


WHOLE = {
    "empty": ("", "config.yaml", "is empty", "base_model and experts"),
    "only comments": ("# nothing\n", "config.yaml", "is empty", "base_model and experts"),
    "a list": ("- a\n- b\n", "config.yaml:1", "is a list", "key: value"),
    "a word": ("hello\n", "config.yaml:1", "is 'hello'", "key: value"),
    "not UTF-8": (b"base_model: caf\xe9\n", "config.yaml", "not UTF-8", "save it as UTF-8"),
    "a binary": (b"\x00\x01\x02", "config.yaml", "not YAML", "text"),
    "deeply nested": ("[" * 5000, "config.yaml", "not YAML", "text"),
    "two documents": ("a: 1\n---\nb: 2\n", "config.yaml:2", "not YAML", "check"),
    "an unclosed quote": ("base_model: 'a\n", "config.yaml:2", "not YAML", "quotes"),
    "experts missing": ("base_model: a\n", "config.yaml: experts", "is missing", "at least one"),
    "experts empty": ("base_model: a\nexperts: []\n", "config.yaml:2: experts", "is empty",
                      "at least one"),
    "a tag": ("base_model: !!python/object/apply:os.system [exit]\nexperts: []\n",
              "config.yaml:1: base_model", "is a list", "write text"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_file_is_refused_that_is(
    kind: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    text, *words = WHOLE[kind]
    problems = refused_config(text, babies, tmp_path)
    assert all(word in problems[0] for word in words), problems


def test_no_experts_is_told_whatever_the_gate_mode(babies: dict[str, Path], tmp_path: Path) -> None:
    for mode in gates.for_merges():
        text = f"base_model: {babies['base']}\ngate_mode: {mode}\nexperts: []\n"
        [problem] = refused_config(text, babies, tmp_path)
        assert "config.yaml:3: experts: is empty; list at least one expert" in problem


def test_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    [problem] = refused(tmp_path / "none.yaml", tmp_path / "out")
    assert "none.yaml: there is no such config file; name a YAML file" in problem


@pytest.mark.parametrize("name", ["config.yaml/below.yaml", "x" * 300])
def test_a_config_at_no_readable_place_is_refused(
    name: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    write(tmp_path, GOOD, babies)
    [problem] = refused("plan", tmp_path / name)
    assert "cannot be read (" in problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anywhere")
def test_a_config_in_a_locked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    [problem] = refused("plan", tmp_path / "locked" / "config.yaml")
    assert "cannot be read (Permission denied)" in problem


def test_a_config_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    [problem] = refused(tmp_path, tmp_path / "out")
    assert f"{tmp_path}: cannot be read" in problem


@pytest.mark.parametrize(
    "typed, meant", [("verfy", "verify"), ("paln", "plan"), ("mrege", "merge")]
)
def test_a_mistyped_command_gets_a_suggestion(
    typed: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        f"{typed}: there is no such config file; did you mean {meant!r}?"
        in refused(typed, "out")[0]
    )
    assert not any(tmp_path.iterdir())


def test_all_problems_of_a_config_are_told_at_once(babies: dict[str, Path], tmp_path: Path) -> None:
    """Keys, types, values, models and the output directory: one list."""
    text = GOOD
    for old, new in [("bfloat16", "bfloat61"), ("{base}", "./no-base"),
                     ("{first}", "./no-first"), ("0.5", "-1"), ("token: 2", "token: 9"),
                     ("cheap_embed", "hiden")]:  # fmt: skip
        text = text.replace(old, new)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    problems = refused(write(tmp_path, text, babies), out)
    wheres = ("base_model", "gate_mode", "dtype", "experts_per_token", "experts[0].source_model",
              "experts[0].noise_scale", str(out))  # fmt: skip
    for where in wheres:
        assert any(f"{where}: " in problem for problem in problems), (where, problems)
    assert len(problems) == len(wheres)


def test_all_problems_of_the_text_are_told_at_once(babies: dict[str, Path], tmp_path: Path) -> None:
    text = GOOD
    for old, new in [("gate_mode", "gatemode"), ("0.5", "loud"), ("token: 2", "token: two"),
                     ("[story scene]", "story")]:  # fmt: skip
        text = text.replace(old, new)
    problems = refused_config(text, babies, tmp_path)
    assert [problem.split(": ")[1] for problem in problems] == [
        "gatemode", "experts_per_token", "experts[0].noise_scale", "experts[1].positive_prompts",
    ]  # fmt: skip


def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(
    babies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*args: object) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("moemerge.hub.download.open_snapshot", ask)
    for path in ("./nowhere", "../nowhere", "/nowhere", "~/nowhere", ".hidden", "a/b/c"):
        [problem] = refused_config(GOOD.replace("{first}", path), babies, tmp_path)
        assert path in problem


def edit_json(path: Path, **changes: Any) -> None:
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "GONE"}))


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", **changes)


def index_with(file: str | None = None, **changes: Any) -> Callable[[Path], None]:
    """Cut the model in two with an index; then point one tensor to `file`, or add `changes`."""

    def damage(model: Path) -> None:
        state = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        save_weights(model, state, shards=2)
        path = model / "model.safetensors.index.json"
        weight_map = json.loads(path.read_text())["weight_map"]
        if file is not None:
            weight_map["lm_head.weight"] = file
        edit_json(path, weight_map={**weight_map, **changes})

    return damage


def weights_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        state = load_file(model / "model.safetensors")
        change(state)
        save_weights(model, state)

    return damage


def only(*names: str) -> Callable[[Path], None]:
    """Leave nothing but empty files of these names."""

    def damage(model: Path) -> None:
        for path in model.iterdir():
            path.unlink()
        for name in names:
            (model / name).write_bytes(b"")

    return damage


def text_in(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda model: void((model / name).write_bytes(
        text.encode() if isinstance(text, str) else text
    ))  # fmt: skip


def index_of_text(text: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        index_with()(model)
        (model / "model.safetensors.index.json").write_text(text)

    return damage


def void(_: object) -> None:
    """Do no damage; drop a value."""


def quantised(said: object) -> Callable[[Path], None]:
    """Whole numbers in the place of a matrix, and a config that says how they were made."""

    def damage(model: Path) -> None:
        config_with(quantization_config=said)(model)
        weights_with(lambda s: s.update({GATE: s[GATE].to(torch.int8)}))(model)

    return damage


def truncate(model: Path) -> None:
    os.truncate(model / "model.safetensors", 3000)


def old_torch_file(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)


GATE = "model.layers.1.mlp.gate_proj.weight"
MODELS: dict[str, Any] = {
    # what is wrong: (how to damage a good model, words of what and the fix)
    "no files": (only(), "no config.json", "name a model directory"),
    "GGUF files": (only("model.Q4_K.gguf"), "GGUF", "original weights"),
    "GGUF weights": (only("model.gguf", "config.json"), "config.json is not JSON", "again"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "holds none of", "download"),
    "config not JSON": (text_in("config.json", "{'a': 1}"), "config.json is not JSON", "again"),
    "config a list": (text_in("config.json", "[1]"), "not a JSON object", "again"),
    "config not text": (text_in("config.json", b"\xff\xfe\x00"), "is not JSON", "again"),
    "config nested": (text_in("config.json", "[" * 100000), "is not JSON", "again"),
    "config number": (text_in("config.json", '{"a": %s}' % ("9" * 5000)), "is not JSON", "again"),
    "index leaves upwards": (index_with("../model.safetensors"), "'../model.safetensors'",
                             "leaves its directory", "do not use"),
    "index leaves to the root": (index_with("/etc/passwd"), "leaves its directory", "do not use"),
    "index leaves to a drive": (index_with("C:\\x.safetensors"), "leaves its directory", "do not"),
    "index leaves by NUL": (index_with("a\0b.safetensors"), "leaves its directory", "do not"),
    "index names a number": (index_with(**{"lm_head.weight": 7}), "leaves", "do not use"),
    "index missing shard": (index_with("model-9.safetensors"), "model-9.safetensors",
                            "which is not there", "again"),
    "index names two lines": (index_with("a\nb\x1b[2J"), "no file of weights", "again"),
    "index wrong shard": (index_with("model-00002-of-00002.safetensors"), "'lm_head.weight'",
                          "which is not there", "again"),
    "index extra tensor": (index_with(extra="model-00001-of-00002.safetensors"), "'extra'",
                           "which is not there", "again"),
    "index empty": (index_of_text("{}"), "no weight_map", "again"),
    "index not JSON": (index_of_text("{"), "not JSON", "again"),
    "truncated": (truncate, "truncated", "again"),
    "weights not safetensors": (text_in("model.safetensors", "hello"), "header", "again"),
    "GPTQ": (quantised({"quant_method": "gptq"}), "quantised (gptq)", "original weights"),
    "quantised in words": (quantised("awq"), "quantised (awq)", "original"),
    "integer weights": (weights_with(lambda s: s.update({GATE: s[GATE].to(torch.int8)})),
                        GATE, "I8", "quantised", "original weights"),
    "missing tensor": (weights_with(lambda s: s.pop(GATE)), GATE, "is missing", "again"),
    "wrong shape": (weights_with(lambda s: s.update({GATE: s[GATE][:40].clone()})), GATE,
                    "is [40, 32], config.json says [48, 32]", "one and the same"),
    "wrong rank": (weights_with(lambda s: s.update({GATE: s[GATE].flatten()})), GATE, "[1536]",
                   "one and the same"),
    "bias of an MLP": (weights_with(lambda s: s.update({GATE[:-6] + "bias": torch.zeros(48)})),
                       GATE, "has a bias", "without biases"),
    "hidden_size of text": (config_with(hidden_size="big"), "hidden_size is 'big'", "repair"),
    "no heads": (config_with(num_attention_heads=0), "num_attention_heads is 0", "repair"),
    "heads of width 0": (config_with(num_attention_heads=64), "head_dim is 0", "repair"),
    "rope of text": (config_with(rope_scaling="yarn"), "rope_scaling is 'yarn'", "repair"),
    "theta negative": (config_with(rope_theta=-1), "rope_theta is -1", "repair"),
    "theta NaN": (config_with(rope_theta=float("nan")), "rope_theta is nan", "repair"),
    "eps of text": (config_with(rms_norm_eps="x"), "rms_norm_eps is 'x'", "repair"),
    "eps negative": (config_with(rms_norm_eps=-1), "rms_norm_eps is -1", "repair"),
    "range of text": (config_with(initializer_range="x"), "initializer_range is 'x'", "repair"),
    "context of text": (config_with(max_position_embeddings="x"), "max_position_embeddings",
                        "repair"),
    "window of text": (config_with(sliding_window="x"), "sliding_window is 'x'", "repair"),
    "flag of text": (config_with(tie_word_embeddings="no"), "tie_word_embeddings", "repair"),
    "activation a number": (config_with(hidden_act=7), "hidden_act is 7", "repair"),
    "heads in odd groups": (config_with(num_key_value_heads=3), "no multiple of its 3", "repair"),
    "odd head_dim": (config_with(head_dim=7), "head_dim is 7", "repair"),
    "rope unknown": (config_with(rope_scaling={"rope_type": "wobble"}), "'wobble'", "repair"),
    "rope a list": (config_with(rope_scaling={"rope_type": ["yarn"]}), "['yarn']", "repair"),
    "rope incomplete": (config_with(rope_scaling={"rope_type": "linear"}), "factor is None",
                        "repair"),
    "rope factor of text": (config_with(rope_scaling={"type": "linear", "factor": "x"}),
                            "factor is 'x'", "repair"),
    "model_type a list": (config_with(model_type=["llama"]), "model_type", "['llama']", ""),
    "endless layers": (config_with(num_hidden_layers=10**12), "num_hidden_layers",
                       "1000000000000", ""),
}  # fmt: skip


def damaged(babies: dict[str, Path], folder: Path, damage: Callable[[Path], object]) -> Path:
    model = folder / "damaged"
    shutil.copytree(babies["first"], model)
    damage(model)
    return model


@pytest.mark.parametrize("role", ["base", "first"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_refused_for(
    kind: str, role: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    damage, *words = MODELS[kind]
    model = damaged(babies, tmp_path, damage)
    before = tree(model)
    text = GOOD.replace("cheap_embed", "hidden").replace(f"{{{role}}}", str(model))
    problems = refused_config(text, babies, tmp_path)
    where = {"base": BASE, "first": FIRST}[role]
    assert any(all(word in line for word in (where, *words)) for line in problems), problems
    assert tree(model) == before


BASES = {
    "no attention biases": (config_with(attention_bias=True), "q_proj.bias is missing", "again"),
    "MLP biases": (config_with(mlp_bias=True), "MLP biases", "without them"),
    "mixed attention": (
        config_with(layer_types=["full_attention", "sliding_attention"]), "layer_types", "one kind"
    ),
    "odd layer types": (config_with(layer_types=[["a"], 3]), "layer_types", "repair"),
    "layer types a number": (config_with(layer_types=3), "layer_types", "repair"),
    "a layer type too few": (config_with(layer_types=["full_attention"]), "layer_types", "repair"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer.json", "random"),
    "broken tokenizer": (text_in("tokenizer.json", "{}"), "prompts cannot be read", "random"),
    "broken tokenizer config": (text_in("tokenizer_config.json", "{"), "not JSON", "random"),
    "nested tokenizer config": (text_in("tokenizer_config.json", "[" * 100000), "not JSON",
                                "random"),
    "few embeddings": (config_with(vocab_size=4), "the base model embeds 4", "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BASES)
def test_a_base_model_is_refused_for(kind: str, babies: dict[str, Path], tmp_path: Path) -> None:
    damage, *words = BASES[kind]
    model = damaged(babies, tmp_path, damage)
    problems = refused_config(GOOD.replace("{base}", str(model)), babies, tmp_path)
    assert any(all(word in line for word in words) for line in problems), problems


def test_a_base_model_without_a_tokenizer_is_named(babies: dict[str, Path], tmp_path: Path) -> None:
    model = damaged(babies, tmp_path, lambda m: (m / "tokenizer.json").unlink())
    text = GOOD.replace("cheap_embed", "hidden").replace("{base}", str(model))
    [problem] = refused_config(text, babies, tmp_path)
    assert BASE in problem and "no tokenizer.json" in problem


@pytest.mark.parametrize(("family", "why"), [("gpt2", "no gate"), ("gemma2", "softcaps")])
def test_a_base_model_of_a_family_without_a_host_is_refused(
    family: str, why: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    model = damaged(babies, tmp_path, config_with(model_type=family))
    problems = refused_config(GOOD.replace("{base}", str(model)), babies, tmp_path)
    assert f"{BASE}: is a {family!r} model: " in problems[0]
    assert why in problems[0]
    assert "mistral" in problems[0]


SHAPES = {
    "depth": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the base model's is 2"),
    "hidden size": ({"hidden_size": 64}, "hidden_size is 64, the base model's is 32"),
    "MLP size": ({"intermediate_size": 40}, "intermediate_size is 40, the base model's is 48"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is gelu, the base model's is silu"),
    "MLP biases": ({"mlp_bias": True}, "has a bias, and the output has no place for it"),
    "family": ({"family": "mistral", "sliding_window": None}, "model_type is 'mistral'"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_an_expert_of_another_shape_is_refused(
    what: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    changes, words = SHAPES[what]
    model = make_model(tmp_path / "other", **changes)
    problems = refused_config(GOOD.replace("{second}", str(model)), babies, tmp_path)
    assert any(line.startswith(f"  {SECOND}: ") and words in line for line in problems), problems


def test_an_expert_of_another_family_is_taken_with_allow_crimes(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "other", "mistral", sliding_window=None)
    config = write(tmp_path, GOOD.replace("{second}", str(model)), babies)
    [problem] = refused("plan", config)
    assert "--allow-crimes" in problem
    assert invoke("plan", config, "--allow-crimes").exit_code == 0


def test_a_base_model_saved_for_another_attention_kernel_runs(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    """What a config.json says of kernels and dtype is a wish of the program that saved it."""
    model = damaged(
        babies, tmp_path, config_with(_attn_implementation="flash_attention_9", torch_dtype="odd")
    )
    text = GOOD.replace("cheap_embed", "hidden").replace("{base}", str(model))
    result = invoke(write(tmp_path, text, babies), tmp_path / "out")
    assert result.exit_code == 0, result.stderr


def test_an_experts_attention_biases_stay_behind(babies: dict[str, Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / "other", attention_bias=True)
    config = write(tmp_path, GOOD.replace("{second}", str(model)), babies)
    assert invoke("plan", config).exit_code == 0


@pytest.fixture(scope="session")
def adapter(babies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "lora", babies["first"])


def adapter_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def adapter_weights(
    change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]], **changes: Any
) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_json(folder / "adapter_config.json", **changes)
        path = folder / "adapter_model.safetensors"
        state = dict(change(name, tensor) for name, tensor in load_file(path).items())
        save_file(state, path)

    return damage


ADAPTERS = {
    "DoRA": (adapter_with(use_dora=True), "DoRA", "merge_and_unload"),
    "not LoRA": (adapter_with(peft_type="IA3"), "IA3 adapter, not LoRA", "merge_and_unload"),
    "no kind": (adapter_with(peft_type="GONE"), "no adapter", "base+adapter"),
    "PiSSA": (adapter_with(init_lora_weights="pissa"), "pissa", "merge_and_unload"),
    "rank": (adapter_with(r=16), "says rank 16, the weights are of rank 4", "save"),
    "alpha of text": (adapter_with(lora_alpha="x"), "lora_alpha is 'x'", "repair"),
    "alpha NaN": (adapter_with(lora_alpha=float("nan")), "lora_alpha is nan", "repair"),
    "alpha huge": (adapter_with(lora_alpha=10**400), "lora_alpha is 1000", "repair"),
    "pattern": (adapter_with(rank_pattern={"(": 1}), "no regular expression", "repair"),
    "rank 0": (adapter_weights(lambda n, t: (n, (t[:0] if "_A" in n else t[:, :0]).clone()), r=0),
               "says rank 0", "save"),
    "half": (adapter_weights(lambda n, t: (n.replace("lora_B", "lora_C"), t)), "lora_B", "save"),
    "of another model": (adapter_weights(lambda n, t: (n.replace("layers.1", "layers.7"), t)),
                         "layers.7", "does not have", "trained on"),
    "of another width": (adapter_weights(lambda n, t: (n, torch.cat([t, t]) if "_B" in n else t)),
                         "its matrices are", "trained on"),
    "no LoRA weights": (adapter_weights(lambda n, t: (n.replace("lora_", "ia3_"), t)), "replaces",
                        "trained on"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "holds none", "download"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_refused_for(
    kind: str, babies: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    damage, *words = ADAPTERS[kind]
    shutil.copytree(adapter, tmp_path / "bad")
    damage(tmp_path / "bad")
    text = GOOD.replace("{first}", f"{babies['first']}+{tmp_path / 'bad'}")
    [problem] = refused_config(text, babies, tmp_path)
    assert all(word in problem for word in (FIRST, *words)), problem


def test_an_adapter_without_its_base_is_refused(
    babies: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    [problem] = refused_config(GOOD.replace("{first}", str(adapter)), babies, tmp_path)
    assert FIRST in problem and "is a LoRA adapter; write `base+adapter`" in problem


def test_a_bin_of_the_time_before_zip_is_refused_with_how_to_convert_it(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    model = damaged(babies, tmp_path, old_torch_file)
    [problem] = refused_config(GOOD.replace("{first}", str(model)), babies, tmp_path)
    assert FIRST in problem and "weights_only=True" in problem and "save_file" in problem


class Attack:
    """Pickles as a call of os.system, which makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_that_would_run_a_program_is_refused_unrun(
    zipped: bool, babies: dict[str, Path], tmp_path: Path
) -> None:
    model = damaged(babies, tmp_path, lambda m: (m / "model.safetensors").unlink())
    marker = tmp_path / "ran"
    torch.save(
        {"model.norm.weight": Attack(marker)},
        model / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    [problem] = refused_config(GOOD.replace("{first}", str(model)), babies, tmp_path)
    assert FIRST in problem and "pytorch_model.bin" in problem
    assert not zipped or "posix.system" in problem
    assert not marker.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the attack was a real one


OPTIONS = {
    "bare shard size": (["--shard-size", "5000000000"], "--shard-size: '5000000000'", "5GB"),
    "shard size 0": (["--shard-size", "0GB"], "--shard-size: '0GB'", "write 1B"),
    "shard size of many digits": (["--shard-size", "9" * 400 + "GB"], "--shard-size: '999", "5GB"),
    "shard size unit": (["--shard-size", "5XB"], "--shard-size: '5XB'", "write 1B"),
    "shard size negative": (["--shard-size", "-5GB"], "--shard-size: '-5GB'", "write 1B"),
    "device": (["--device", "tpu"], "--device: 'tpu'", "auto, cpu, cuda, cuda:1 or mps"),
    "device number": (["--device", "cuda:x"], "--device: 'cuda:x'", "cuda:1"),
    "two quantisations": (["--load-in-4bit", "--load-in-8bit"], "--load-in-8bit", "keep one"),
    "quiet and verbose": (["--quiet", "--verbose"], "--quiet: and --verbose", "keep one"),
    "two devices": (["--cuda", "--device", "cpu"], "--cuda: and --device cpu", "keep one"),
    "no cuda and cuda": (["--no-cuda", "--device", "cuda:1"], "--no-cuda: and", "keep one"),
    "seed": (["--seed", "-1"], "--seed: is -1", "2^63"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_options_are_refused_for(kind: str, babies: dict[str, Path], tmp_path: Path) -> None:
    argv, *words = OPTIONS[kind]
    [problem] = refused(write(tmp_path, GOOD, babies), tmp_path / "out", *argv)
    assert all(word in problem for word in words), problem
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("argv", [["--device", "cuda"], ["--device", "cuda:1"], ["--cuda"]])
def test_a_device_that_is_not_there_is_refused(
    argv: list[str], babies: dict[str, Path], tmp_path: Path
) -> None:
    config = write(tmp_path, GOOD.replace("cheap_embed", "hidden"), babies)
    [problem] = refused(config, tmp_path / "out", *argv)
    assert f"--device: there is no {argv[-1].strip('-')} device here; use --device cpu" in problem


Bad = namedtuple("Bad", "make words argv", defaults=[()])
OUTPUTS = {
    "not empty": Bad(lambda out: write_file(out / "mine.txt"), "is not empty (mine.txt)"),
    "a file": Bad(lambda out: write_file(out), "is a file; name a directory"),
    "below a file": Bad(lambda out: write_file(out.parent), "is a file; name"),
    "a stranger's model": Bad(
        lambda out: write_file(out / "model.safetensors"), "model.safetensors", ["--overwrite"]
    ),
    "a stranger's files": Bad(
        lambda out: write_file(out / "mine.txt"), "moemerge.json", ["--overwrite"]
    ),
}


def write_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_directory_is_refused_that_is(
    kind: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    bad = OUTPUTS[kind]
    place = tmp_path / "place"
    out = place / "deep" / "out"
    bad.make(out)
    before = tree(place)
    [problem] = refused(write(tmp_path, GOOD, babies), out, *bad.argv)
    assert str(out) in problem and bad.words in problem
    assert tree(place) == before


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000])
def test_an_output_whose_name_no_disk_takes_is_refused(
    name: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    [problem] = refused(write(tmp_path, GOOD, babies), tmp_path / name)
    assert "name" in problem


def test_an_output_that_is_a_link_in_a_circle_is_refused(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    [problem] = refused(write(tmp_path, GOOD, babies), tmp_path / "out")
    assert str(tmp_path / "out") in problem


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_an_output_that_is_a_source_is_refused(
    flag: list[str], babies: dict[str, Path], tmp_path: Path
) -> None:
    model = damaged(babies, tmp_path, void)
    before = tree(model)
    [problem] = refused(write(tmp_path, GOOD.replace("{first}", str(model)), babies), model, *flag)
    assert f"{model}: is one of the sources; name another directory" in problem
    assert tree(model) == before


def test_a_finished_model_is_replaced_only_when_told(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    config, out = write(tmp_path, GOOD, babies), tmp_path / "out"
    assert invoke(config, out).exit_code == 0
    before = tree(out)
    config.write_text(config.read_text().replace("0.5", "0.25"))
    [problem] = refused(config, out)
    assert f"{out}: holds a finished model; pass --overwrite" in problem
    assert tree(out) == before
    assert invoke(config, out, "--overwrite").exit_code == 0
    assert tree(out) != before


def test_a_disk_that_is_too_small_is_refused(
    babies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = namedtuple("full", "total used free")(10**12, 10**12, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    [problem] = refused(write(tmp_path, GOOD, babies), tmp_path / "out")
    assert "KB, its disk has 5 B free; free" in problem
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_refused(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    [problem] = refused(write(tmp_path, GOOD, babies), tmp_path / "locked" / "out")
    assert "cannot be written; name a directory of your own" in problem


@pytest.mark.parametrize("kind", ["unknown key", "source is missing", "equal prompts"])
def test_the_real_command_refuses_without_a_traceback(
    kind: str, babies: dict[str, Path], tmp_path: Path
) -> None:
    old, new, *words = EDITS[kind]
    config, out = write(tmp_path, GOOD.replace(old, new, 1), babies), tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, "-m", "moemerge", config, out],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr and not ran.stdout
    assert all(word in ran.stderr for word in words), ran.stderr
    assert not out.exists()
