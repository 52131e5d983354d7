"""Evaluation: the numbers are transformers' and lm-eval's own, and the card tells them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import WORDS, make_model, simple_config, write_config
from conftest import ROOT
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moemerge import InputError, Options, merge, output, regate, top_k, verify_checkpoint
from moemerge.card.card import is_untouched, seal
from moemerge.card.files import tell_evaluation
from moemerge.cli import app
from moemerge.evaluation.loss import mean_losses, passages_of
from moemerge.evaluation.run import EvalSpec, evaluate
from moemerge.mixture.loading import load_mixture
from moemerge.reporting import Silent
from moemerge.text.encoder import Encoder
from moemerge.training.settings import Tuning
from moemerge.training.tune_routers import tune

FAMILIES = ["llama", "qwen2", "qwen3", "granite", "olmo2"]
TEXTS = {"first": "code python function class return story and code", "other": "maths solve number"}


def made(folder: Path, family: str = "llama", head: str = "", seeds: tuple[int, ...] = ()) -> Path:
    """A mixture of three babies, in `folder/out`."""
    models = [make_model(folder / f"m{n}", family, seed=n) for n in range(3)]
    experts = [models[n] for n in seeds or (1, 2)]
    merge(write_config(folder / "c.yaml", simple_config(models[0], experts, head)), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    return {name: folder / f"{name}.txt" for name in TEXTS}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of two tasks in words that babies know: one chooses, one writes."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"context": " ".join(WORDS[at : at + 5]), "answer": at % 3,
         "choices": [f" {WORDS[(at * 7 + n) % len(WORDS)]} story" for n in range(3)]}
        for at in range(12)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = (
        "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "doc_to_text: context\nmetadata: {version: 1.0}\n"
    )
    (folder / "choose.yaml").write_text(
        f"task: baby_choose\n{head}output_type: multiple_choice\ndoc_to_choice: choices\n"
        "doc_to_target: answer\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "write.yaml").write_text(
        f"task: baby_write\n{head}output_type: generate_until\n"
        "doc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: ['story'], max_gen_toks: 6}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "_part.yaml").write_text("output_type: multiple_choice\n")
    return folder


@pytest.fixture(scope="module")
def found(built: Path, texts: dict[str, Path], tasks: Path) -> dict[str, Any]:
    return evaluate(built, EvalSpec(texts, (str(tasks),), batch_size=4))


def values(found: dict[str, Any], name: str, metric: str) -> dict[str, float]:
    row = next(r for r in found["rows"] if (r["name"], r["metric"]) == (name, metric))
    return dict(zip(found["columns"], row["values"], strict=True))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_perplexities_are_those_of_transformers(built: Path, found: dict[str, Any]) -> None:
    assert found["columns"] == ["mixture", "base", "m1", "m2", "average"]
    models = {"mixture": built, **{name: built.parent / at for name, at in
              (("base", "m0"), ("m1", "m1"), ("m2", "m2"))}}  # fmt: skip
    loaded = {name: AutoModelForCausalLM.from_pretrained(at) for name, at in models.items()}
    first, second = loaded["m1"].state_dict(), loaded["m2"].state_dict()
    average = AutoModelForCausalLM.from_pretrained(models["base"])
    average.load_state_dict({name: (first[name] + second[name]) / 2 for name in first})
    for name, text in TEXTS.items():
        ids = torch.tensor([Encoder(built).encode(text).ids])
        for column, model in {**loaded, "average": average}.items():
            with torch.inference_mode():
                wanted = math.exp(model(ids, labels=ids).loss.item())
            assert values(found, name, "perplexity")[column] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_losses_are_the_whole_models(
    tmp_path: Path, texts: dict[str, Path], family: str
) -> None:
    out = made(tmp_path, family)
    encoder, reporter = Encoder(out), Silent()
    passages = {name: passages_of(name, path, encoder, 5) for name, path in texts.items()}
    whole = load_mixture(out, Options(), reporter)
    streamed = load_mixture(out, Options(lazy=True), reporter)
    assert all(p.is_meta for p in streamed.model.layers.parameters())
    wanted = mean_losses(whole, passages, reporter, "")
    assert mean_losses(streamed, passages, reporter, "") == pytest.approx(wanted, abs=1e-5)
    assert all(p.is_meta for p in streamed.model.layers.parameters())


def test_what_memory_cannot_hold_is_streamed_to_the_same_numbers(
    built: Path, texts: dict[str, Path], tasks: Path, found: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for room in ("mixture.loading", "evaluation.sources"):
        monkeypatch.setattr(f"moemerge.{room}.available_memory", lambda: 1000)
    streamed = evaluate(built, EvalSpec(texts, (str(tasks),), batch_size=4))
    for ours, theirs in zip(streamed["rows"], found["rows"], strict=True):
        assert ours["values"] == pytest.approx(theirs["values"], rel=1e-5)


def lm_eval(model: Path, named: str, tasks: Path, out: Path, batch: int = 4) -> dict[str, Any]:
    """The results of lm-eval's own command, run where the task's data lie."""
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}",
         "--tasks", named, "--include_path", ".", "--batch_size", str(batch), "--device", "cpu",
         "--output_path", str(out)],
        cwd=tasks, check=True, capture_output=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    file = next(out.rglob("results_*.json"))
    return dict(json.loads(file.read_text())["results"])


def compare(found: dict[str, Any], column: str, theirs: dict[str, Any]) -> None:
    at, compared = found["columns"].index(column), 0
    for row in found["rows"]:
        if row["kind"] == "task":
            said, key = theirs[row["name"]], f"{row['metric']}{{}},{row['filter']}"
            assert row["values"][at] == said[key.format("")]
            assert row["stderr"][at] == said[key.format("_stderr")]
            compared += 1
    assert compared


@pytest.mark.parametrize("column", ["mixture", "m1"])
def test_scores_are_those_of_lm_evals_own_command(
    tmp_path: Path, built: Path, tasks: Path, found: dict[str, Any], column: str
) -> None:
    model = built if column == "mixture" else built.parent / column
    compare(found, column, lm_eval(model, "baby_choose,baby_write", tasks, tmp_path))


@pytest.mark.full
def test_on_a_real_model_too(tmp_path: Path, smollm2: Path) -> None:
    """SmolLM2 as the base of a mixture, the demo task; bfloat16."""
    text = simple_config(smollm2, [smollm2, smollm2], "gate_mode: random")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out", Options(untrained_ok=True))
    folder = ROOT / "examples/tasks"
    found = evaluate(tmp_path / "out", EvalSpec({}, (str(folder / "demo_domains.yaml"),)))
    compare(found, "base", lm_eval(smollm2, "demo_domains", folder, tmp_path / "theirs", 1))


def test_local_tasks_need_no_network(tmp_path: Path, built: Path, tasks: Path) -> None:
    code = (
        "import socket, sys\n"
        "asked, sys.argv = sys.argv[1], ['moemerge', *sys.argv[2:]]\n"
        "def refuse(*_, **__):\n"
        "    open(asked, 'w').close()\n"
        "    raise OSError('no network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from moemerge.cli import main\n"
        "main()\n"
    )
    asked = tmp_path / "asked"
    done = subprocess.run(
        [sys.executable, "-c", code, asked, "eval", built, "--tasks", tasks / "choose.yaml"],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not asked.exists()
    assert "baby_choose: acc" in done.stdout and "±" in done.stdout


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Keep the line."""
        self.lines.append(line)


def as_read(card: str) -> str:
    """A card without its comments, which no reader shows."""
    return re.sub("<!--.*?-->", "", card, flags=re.DOTALL)


def test_the_card_tells_it_until_the_routers_change(
    tmp_path: Path, built: Path, texts: dict[str, Path], found: dict[str, Any]
) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    before = (out / "README.md").read_bytes()
    for _ in range(2):  # the second takes the place of the first
        assert tell_evaluation(out, found, Silent())
        card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
        assert card.text.count("## Evaluation") == 1
        results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
        assert results == {
            (row["name"], row["metric"]): round(row["values"][0], 4) for row in found["rows"]
        }
    assert "trained as a whole" in as_read(card.text)
    assert "| baby\\_choose | acc" not in card.text
    assert is_untouched((out / "README.md").read_bytes())
    verify_checkpoint(out)
    assert not (out / ".moemerge").exists()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(WORDS[n::5])}) + "\n" for n in range(5)))
    told = (out / "README.md").read_bytes()

    def tuned() -> object:
        return tune(out, Tuning((str(data),), 4, 8, 16, 0.1, 0.5))

    def regated() -> object:
        return regate(out, write_config(tmp_path / "c.yaml", simple_config(
            built.parent / "m0", [built.parent / "m1", built.parent / "m2"], "gate_mode: random"
        )))  # fmt: skip

    for change in (lambda: top_k(str(out), 1), lambda: top_k(str(out), 2), regated, tuned):
        (out / "README.md").write_bytes(told)
        change()
        card = ModelCard.load(out / "README.md")
        if change is tuned and "## Trained routers" not in card.text:
            continue  # no step was better: the routers are those that were evaluated
        assert "## Evaluation" not in card.text and not card.data.eval_results
        assert "trained or evaluated as a whole" in as_read(card.text)
        assert is_untouched((out / "README.md").read_bytes())
    assert b"## Evaluation" not in before
    assert not tell_evaluation(out, found, Silent())  # they are another mixture's by now


def test_an_edited_card_stays(tmp_path: Path, built: Path, texts: dict[str, Path]) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    card = out / "README.md"
    card.write_bytes(card.read_bytes() + b"mine")
    edited = card.read_bytes()
    done = run("eval", out, "--text", f"first={texts['first']}", "--card")
    assert done.exit_code == 0 and "was edited since it was written" in done.stderr
    assert card.read_bytes() == edited


def test_a_card_of_an_older_version_stays(
    tmp_path: Path, built: Path, found: dict[str, Any]
) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    path = out / "README.md"
    old = seal(re.sub("<!-- /?moemerge:.*?-->", "", path.read_text())).encode()
    path.write_bytes(old)
    heard = Heard()
    assert not tell_evaluation(out, found, heard)
    top_k(str(out), 1, reporter=heard)
    top_k(str(out), 2, tmp_path / "copy", reporter=heard)
    assert is_untouched(old) and path.read_bytes() == old
    assert (tmp_path / "copy/README.md").read_bytes() == old
    assert len([line for line in heard.lines if "is of an older moemerge" in line]) == 3


def test_slots_in_a_persons_words_are_not_the_cards(tmp_path: Path, found: dict[str, Any]) -> None:
    forged = "<!-- moemerge:evaluation -->mine<!-- /moemerge:evaluation -->"
    own = tmp_path / "own.md"
    own.write_text(f"# Mine\n\n{forged}\n")
    config = made(tmp_path).parent / "c.yaml"
    text = config.read_text().replace("- story scene", f"- 'story {forged}'")
    assert forged in text
    out = tmp_path / "told"
    merge(write_config(config, text), out, Options(card=str(own)))
    before = (out / "README.md").read_text()
    digest = output.read_manifest(out).plan.digest
    assert tell_evaluation(out, {**found, "plan_digest": digest}, Silent())
    after = (out / "README.md").read_text()
    assert after.index("# Mine\n\nmine\n") < after.index("## Evaluation") < after.index("## Limits")
    assert before.count(forged) == after.count(forged) == 1  # in the config
    top_k(str(out), 1)
    assert (out / "README.md").read_text() == before


def test_a_persons_own_section_and_index_stay(tmp_path: Path, found: dict[str, Any]) -> None:
    own = tmp_path / "own.md"
    head = "model-index: [{name: theirs, results: []}]"
    own.write_text(f"---\n{head}\n---\n\n## Evaluation\n\nI like it.\n")
    out = made(tmp_path)
    merge(tmp_path / "c.yaml", tmp_path / "told", Options(card=str(own)))
    before = (tmp_path / "told/README.md").read_text()
    digest = output.read_manifest(tmp_path / "told").plan.digest
    assert tell_evaluation(tmp_path / "told", {**found, "plan_digest": digest}, Silent())
    after = (tmp_path / "told/README.md").read_text()
    assert "name: theirs" in after and "I like it." in after and after.count("## Evaluation") == 2
    top_k(str(tmp_path / "told"), 1)
    assert (tmp_path / "told/README.md").read_text() == before
    assert out.is_dir()


def test_a_mixture_without_a_manifest_has_one_column(
    tmp_path: Path, built: Path, texts: dict[str, Path], found: dict[str, Any]
) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    (out / output.MANIFEST_FILE).unlink()
    file = tmp_path / "found.json"
    done = run("eval", out, "--text", f"first={texts['first']}", "--json", file)
    assert done.exit_code == 0 and "only the mixture is evaluated" in done.stderr
    assert json.loads(file.read_text())["columns"] == ["mixture"]
    assert values(json.loads(file.read_text()), "first", "perplexity")["mixture"] == pytest.approx(
        values(found, "first", "perplexity")["mixture"]
    )


def test_equal_experts_are_read_once(tmp_path: Path, texts: dict[str, Path]) -> None:
    out = made(tmp_path, head="gate_mode: random", seeds=(1, 1))
    said: list[str] = []

    class Listening(Silent):
        def progress(self, what: str, total: int, unit: str) -> Any:
            said.append(what)
            return super().progress(what, total, unit)

    found = evaluate(out, EvalSpec(texts), reporter=Listening())
    assert len(found["columns"]) == 5
    assert len([what for what in said if what.startswith("loading m1")]) == 1


def test_python_runs_for_a_file_that_is_named_alone(
    tmp_path: Path, built: Path, tasks: Path
) -> None:
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    (folder / "_part.yaml").write_text("process_docs: !function mine.kept\n")
    text = (folder / "choose.yaml").read_text()
    (folder / "choose.yaml").write_text(f"include: _part.yaml\n{text}")
    mark = tmp_path / "ran"
    (folder / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef kept(docs):\n    return docs\n"
    )
    refused = run("eval", built, "--tasks", folder)
    assert refused.exit_code == 2 and "choose.yaml: runs Python of its own" in refused.stderr
    assert not mark.exists()
    done = run("eval", built, "--tasks", folder / "choose.yaml", "--limit", 2)
    assert done.exit_code == 0 and "runs Python of its own" in done.stderr and mark.exists()


REFUSED = {
    "nothing": ([], "nothing says by what to evaluate it"),
    "no file": (["--tasks", "{tmp}/none.yaml"], "none.yaml: cannot be read"),
    "no task": (["--tasks", "{tmp}/list.yaml"], "list.yaml: is no task of lm-eval"),
    "no data": (["--tasks", "{tmp}/nodata.yaml"], "lm-eval cannot load it"),
    "unsafe": (["--tasks", "{tmp}/unsafe.yaml"], "runs what the model writes"),
    "twice": (["--tasks", "{tasks}/choose.yaml", "--tasks", "{tasks}"], "stands there twice"),
    "idle limit": (["--limit", "2"], "--limit: has no effect without --tasks"),
    "idle length": (["--tasks", "a", "--length", "9"], "--length: has no effect without --text"),
    "json": (["--text", "a={tmp}/a.txt", "--json", "{tmp}/no/a.json"], "does not exist"),
    "text": (["--text", "a={tmp}/none.txt"], "cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_refused(tmp_path: Path, built: Path, tasks: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("code")
    (tmp_path / "list.yaml").write_text("group: many\ntask: [baby_choose]\n")
    text = (tasks / "choose.yaml").read_text().replace("baby_choose", "other")
    (tmp_path / "nodata.yaml").write_text(text.replace("rows", "none"))
    (tmp_path / "unsafe.yaml").write_text(text + "unsafe_code: true\n")
    shutil.copy(tasks / "rows.jsonl", tmp_path)
    arguments, words = REFUSED[kind]
    done = run("eval", built, *(one.format(tmp=tmp_path, tasks=tasks) for one in arguments))
    assert done.exit_code == 2, done.output
    assert words in done.stderr and not done.stdout


def test_without_lm_eval_it_says_how_to_get_it(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"lm-eval is not installed; pip install 'moemerge\[eval\]'"
    ):
        evaluate(built, EvalSpec(tasks=("arc_easy",)))


def test_the_demo_task_is_what_the_script_makes() -> None:
    from demo_task import DOMAINS, documents

    rows = (ROOT / "examples/tasks/demo_domains.jsonl").read_text().splitlines()
    made = []
    for domain in DOMAINS:
        lines = (ROOT / f"examples/heldout/{domain}.jsonl").read_text().splitlines()
        made += documents(domain, [json.loads(line)["text"] for line in lines])
    assert [json.loads(row) for row in rows] == made
    assert all(len({*row["choices"]}) == 4 for row in made)
