"""How a mixture routes: the report's numbers are those that transformers' own forward gives."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import make_adapter, make_model, simple_config, write_config
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moemerge import InputError, Options, RunError, make_plan, merge
from moemerge.cli import app
from moemerge.evaluation.routing import report
from moemerge.gates.statistics import Routed, summary
from moemerge.reporting import Silent
from moemerge.text.documents import texts_of
from moemerge.text.encoder import Encoder

TEXTS = {
    "first": "code python function class return story and code",
    "second": "dragon castle please tell me a story of the dragon",
    "other": "maths solve",
}


def load(directory: Path, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **changes).float().eval()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, babies: dict[str, Path]) -> Path:
    """A mixture of three, whose config stands beside it."""
    base, first, second = babies.values()
    folder = tmp_path_factory.mktemp("built")
    text = simple_config(base, [first, second, base])
    merge(write_config(folder / "c.yaml", text), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain text, jsonl of two documents, and text for no expert."""
    folder = tmp_path_factory.mktemp("texts")
    paths = {name: folder / f"{name}.txt" for name in TEXTS}
    for name, path in paths.items():
        path.write_text(TEXTS[name])
    paths["second"] = folder / "second.jsonl"
    halves = TEXTS["second"].split(" please ")
    paths["second"].write_text("".join(json.dumps({"text": half}) + "\n" for half in halves))
    return paths


@pytest.fixture(scope="module")
def found(built: Path, texts: dict[str, Path]) -> dict[str, Any]:
    return report(built, texts)


def pieces(built: Path, name: str) -> list[tuple[int, ...]]:
    """A text's passages as token ids, `<s>` before each."""
    encoder = Encoder(built)
    return [encoder.encode(part).ids for part in TEXTS[name].split(" please ")]


def router_logits(model: Any, ids: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """(L, T, E) of the text's own tokens: what each router is given, times its rows."""
    seen: list[torch.Tensor] = []
    blocks = [getattr(layer, "mlp", None) or layer.block_sparse_moe for layer in model.model.layers]
    hooks = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        for block in blocks
    ]
    with torch.inference_mode():
        model(torch.tensor([ids]))
        logits = [states @ block.gate.weight.T for states, block in zip(seen, blocks, strict=True)]
    for hook in hooks:
        hook.remove()
    return torch.stack(logits)[:, 1:].numpy()


def perplexity(model: Any, passages: list[tuple[int, ...]]) -> float:
    """Over all own tokens, by transformers' own loss."""
    total = tokens = 0.0
    for ids in passages:
        row = torch.tensor([ids])
        with torch.inference_mode():
            loss = model(row, labels=row).loss.item()
        total += loss * (len(ids) - 1)
        tokens += len(ids) - 1
    return math.exp(total / tokens)


def test_the_shares_are_those_of_the_routers(built: Path, found: dict[str, Any]) -> None:
    model = load(built)
    assert [text["name"] for text in found["texts"]] == list(TEXTS)
    for text in found["texts"]:
        logits = np.concatenate(
            [router_logits(model, ids) for ids in pieces(built, text["name"])], axis=1
        )
        order = np.argsort(-logits, axis=2)
        best = np.eye(3)[order[:, :, 0]]
        chosen = np.eye(3)[order[:, :, :2]].sum(axis=2)
        powers = np.exp(logits) * chosen
        assert text["tokens"] == logits.shape[1]
        close = {"atol": 1e-4}
        np.testing.assert_allclose(text["first"], best.mean(axis=1), **close)
        np.testing.assert_allclose(text["load"], chosen.mean(axis=1) / 2, **close)
        shares = powers / powers.sum(axis=2, keepdims=True)
        np.testing.assert_allclose(text["weight"], shares.mean(axis=1), **close)
        own = {"first": 0, "second": 1}.get(text["name"])
        assert text["expert"] == own
        if own is None:
            assert text["t1"] is text["t2"] is None
        else:
            assert text["t1"] == pytest.approx(best[:, :, own].mean())
            assert text["t2"] == pytest.approx(chosen[:, :, own].mean())


def test_the_routers_logits_are_transformers_own(built: Path) -> None:
    """`router_logits` above against what the model returns, where it returns logits."""
    model = load(built)
    ids = pieces(built, "first")[0]
    with torch.inference_mode():
        theirs = model(torch.tensor([ids]), output_router_logits=True).router_logits
    theirs = torch.stack(theirs)[:, 1:].numpy()
    ours = router_logits(model, ids)
    if (theirs >= 0).all():  # some versions return them after the softmax
        powers = np.exp(ours - ours.max(axis=2, keepdims=True))
        ours = powers / powers.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_summary_is_that_of_the_texts(found: dict[str, Any]) -> None:
    summary, by_name = found["summary"], {text["name"]: text for text in found["texts"]}
    load = np.mean([np.mean(text["load"], axis=0) for text in found["texts"]], axis=0)
    np.testing.assert_allclose(summary["load"], load, atol=1e-3)
    assert sum(summary["load"]) == pytest.approx(1, abs=1e-3)
    owned = [by_name["first"], by_name["second"]]
    assert summary["t1"] == pytest.approx(np.mean([text["t1"] for text in owned]), abs=1e-3)
    assert summary["t2"] == pytest.approx(np.mean([text["t2"] for text in owned]), abs=1e-3)
    firsts = [np.mean(text["first"], axis=0) for text in owned]
    np.testing.assert_allclose(summary["confusion"][:2], firsts, atol=1e-3)
    assert set(summary["by_expert"]) == {"first", "second"}


def test_perplexities_are_those_of_the_models(
    built: Path, babies: dict[str, Path], found: dict[str, Any]
) -> None:
    models = {name: load(path) for name, path in babies.items()}
    average = load(babies["base"])
    states = [models[name].state_dict() for name in ("first", "second", "base")]
    average.load_state_dict({n: sum(s[n] for s in states) / 3 for n in states[0]})
    mixture = load(built)
    assert found["experts"] == ["first", "second", "base"]
    for text in found["texts"]:
        passages, said = pieces(built, text["name"]), text["perplexity"]
        close = {"rel": 1e-4}
        assert said["moe"] == pytest.approx(perplexity(mixture, passages), **close)
        assert said["base"] == pytest.approx(perplexity(models["base"], passages), **close)
        assert said["average"] == pytest.approx(perplexity(average, passages), **close)
        for name in ("first", "second"):
            wanted = perplexity(models[name], passages)
            assert said["experts"][name] == pytest.approx(wanted, **close)


def test_an_expert_may_be_named_as_a_source_is(
    tmp_path: Path, babies: dict[str, Path], texts: dict[str, Path]
) -> None:
    """`base` and `average` are words of the report; an expert of that name keeps its numbers."""
    base, first, second = babies.values()
    text = simple_config(base, [first, second])
    for source, name in ((first, "base"), (second, "average")):
        text = text.replace(f"  - source_model: {source}\n", f"  - source_model: {source}\n"
                            f"    name: {name}\n")  # fmt: skip
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    [found] = report(tmp_path / "out", {"base": texts["first"]})["texts"]
    passages = pieces(tmp_path / "out", "first")
    said = found["perplexity"]
    assert said["base"] == pytest.approx(perplexity(load(base), passages), rel=1e-4)
    assert said["experts"]["base"] == pytest.approx(perplexity(load(first), passages), rel=1e-4)
    assert said["experts"]["average"] == pytest.approx(perplexity(load(second), passages), rel=1e-4)


def test_an_expert_with_an_adapter_reads_with_it(
    tmp_path: Path, babies: dict[str, Path], texts: dict[str, Path]
) -> None:
    from peft import PeftModel

    base, first, _ = babies.values()
    adapter = make_adapter(tmp_path / "lora", first)
    text = simple_config(base, [f"{first}+{adapter}", base])
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    [found] = report(tmp_path / "out", {"other": texts["other"]})["texts"]
    merged = PeftModel.from_pretrained(load(first), adapter).merge_and_unload().eval()
    wanted = perplexity(merged, pieces(tmp_path / "out", "other"))
    assert found["perplexity"]["experts"]["lora"] == pytest.approx(wanted, rel=1e-4)


def test_an_expert_that_does_not_know_a_token_is_not_compared(
    tmp_path: Path, babies: dict[str, Path], texts: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    small = make_model(tmp_path / "small", vocab_size=20)
    text = simple_config(base, [first, small])
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    result = routing(tmp_path / "out", "--text", f"first={texts['second']}", "--json")
    assert result.exit_code == 0, result.stderr
    assert "note: small is not compared: it does not know token 29" in result.stderr
    [found] = json.loads(result.stdout)["texts"]
    assert set(found["perplexity"]) == {"moe", "base", "average", "experts"}
    assert set(found["perplexity"]["experts"]) == {"first"}


def test_every_number_of_experts_is_that_model(built: Path, found: dict[str, Any]) -> None:
    assert set(found["by_experts_per_token"]) == {"1", "2", "3"}
    for k, overall in found["by_experts_per_token"].items():
        model = load(built, num_experts_per_tok=int(k))
        losses = [math.log(perplexity(model, pieces(built, name))) for name in TEXTS]
        assert overall == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert len(set(found["by_experts_per_token"].values())) == 3


def test_texts_in_batches_read_as_each_alone(
    built: Path, texts: dict[str, Path], found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moemerge.text.batching.BATCH_TOKENS", 1)
    alone = report(built, texts)
    for one, other in zip(alone["texts"], found["texts"], strict=True):
        np.testing.assert_allclose(one["weight"], other["weight"], atol=2e-4)
        assert one["perplexity"]["moe"] == pytest.approx(other["perplexity"]["moe"], rel=1e-5)


def test_texts_are_found_by_number_and_name(
    built: Path, texts: dict[str, Path], found: dict[str, Any]
) -> None:
    numbered = report(built, {"0": texts["first"], "1": texts["second"]})
    assert [text["expert"] for text in numbered["texts"]] == [0, 1]
    assert numbered["texts"][0]["first"] == found["texts"][0]["first"]


def test_a_mixture_that_moemerge_did_not_make_needs_texts(
    tmp_path: Path, built: Path, texts: dict[str, Path], found: dict[str, Any]
) -> None:
    other = shutil.copytree(built, tmp_path / "other")
    (other / "moemerge.json").unlink()
    read = report(other, {"0": texts["first"], "second": texts["second"]})
    assert read["experts"] == ["expert 0", "expert 1", "expert 2"]
    assert [text["expert"] for text in read["texts"]] == [0, None]
    assert read["texts"][0]["first"] == found["texts"][0]["first"]
    assert set(read["texts"][0]["perplexity"]) == {"moe"}
    assert read["by_experts_per_token"].keys() == found["by_experts_per_token"].keys()
    with pytest.raises(InputError, match=r"holds no moemerge\.json.*name texts: texts"):
        report(other)


def test_sources_that_are_gone_are_said_and_the_rest_is_told(
    tmp_path: Path, babies: dict[str, Path], texts: dict[str, Path]
) -> None:
    base = babies["base"]
    gone = shutil.copytree(babies["first"], tmp_path / "gone")
    text = simple_config(base, [gone, base])
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    shutil.rmtree(gone)
    line = ["routing", str(tmp_path / "out"), "--text", f"gone={texts['first']}", "--json"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.stderr
    assert "note: the sources are not compared: " in result.stderr
    [told] = json.loads(result.stdout)["texts"]
    assert set(told["perplexity"]) == {"moe"} and told["expert"] == 0


def test_without_texts_the_prompts_are_held_out_as_at_the_end_of_the_merge(built: Path) -> None:
    held_out = report(built)
    assert held_out["held_out"] is True
    manifest = json.loads((built / "moemerge.json").read_text())
    for key in ("tokens", "load", "t1", "t2", "layer_t1", "confusion", "by_expert"):
        assert held_out["summary"][key] == manifest["routing"][key], key
    assert held_out["by_experts_per_token"] is None
    assert [text["perplexity"] for text in held_out["texts"]] == [None] * 3
    assert [text["name"] for text in held_out["texts"]] == held_out["experts"]


HELD_OUT: dict[str, tuple[str, Options]] = {
    "seeded own text": ("gate: { mode: self, samples: 3, tokens: 6 }", Options(seed=5)),
    "an average": ("gate_mode: hidden_avg\nbody: average", Options()),
    "another family": ("gate_mode: ridge", Options(allow_crimes=True)),
}


@pytest.mark.parametrize("kind", HELD_OUT)
def test_every_merge_can_be_held_out_again(
    tmp_path: Path, babies: dict[str, Path], kind: str
) -> None:
    head, options = HELD_OUT[kind]
    base, first, second = babies.values()
    if kind == "another family":
        second = make_model(tmp_path / "second", "mistral", seed=4, sliding_window=None)
    text = simple_config(base, [first, second], head)
    merged = merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out", options)
    assert report(tmp_path / "out")["summary"]["t1"] == merged.routing["t1"]


def test_relative_sources_are_found_from_anywhere(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "first"):
        shutil.copytree(babies[name], tmp_path / "there" / name)
    config = write_config(tmp_path / "there/c.yaml", simple_config("./base", ["./first", "./base"]))
    monkeypatch.chdir(tmp_path)
    merged = merge(config, tmp_path / "out")
    assert report("out")["summary"]["t1"] == merged.routing["t1"]


@pytest.mark.parametrize("mode", ["random", "cheap_embed"])
def test_a_mode_that_holds_nothing_out_needs_texts(
    tmp_path: Path, babies: dict[str, Path], mode: str
) -> None:
    base, first, _ = babies.values()
    text = simple_config(base, [base, first], f"gate_mode: {mode}")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    with pytest.raises(InputError, match=f"gate_mode: {mode} leaves no prompt to hold out"):
        report(tmp_path / "out")


def test_the_page_has_a_text_of_each_in_bytes(built: Path, found: dict[str, Any]) -> None:
    import base64

    names = [found["texts"][passage["text"]]["name"] for passage in found["passages"]]
    assert names == ["first", "second", "second", "other"]
    passage = found["passages"][0]
    assert " ".join(passage["tokens"]).split() == TEXTS["first"].split()
    raw = np.frombuffer(base64.b64decode(passage["weights"]), np.uint8)
    logits = router_logits(load(built), pieces(built, "first")[0])
    powers = np.exp(logits - logits.max(axis=2, keepdims=True))
    wanted = 255 * powers / powers.sum(axis=2, keepdims=True)
    assert np.abs(raw.reshape(wanted.shape) - wanted).max() <= 1


# the command


def routing(*args: object) -> Any:
    return CliRunner().invoke(app, ["routing", *map(str, args)])


def given(texts: dict[str, Path]) -> list[str]:
    return [part for name, path in texts.items() for part in ("--text", f"{name}={path}")]


KEYS = {
    "model", "experts", "experts_per_token", "layers", "held_out", "verdicts", "texts", "summary",
    "by_experts_per_token", "passages",
}  # fmt: skip


def test_its_json_is_the_report(built: Path, texts: dict[str, Path], found: dict[str, Any]) -> None:
    result = routing(built, *given(texts), "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed.keys() == KEYS
    assert printed == json.loads(json.dumps(found))


def test_it_prints_who_comes_first_and_what_it_is_worth(
    built: Path, texts: dict[str, Path], found: dict[str, Any]
) -> None:
    result = routing(built, *given(texts))
    assert result.exit_code == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["first", "expert", "first", "second", "base"]
    for text, line in zip(found["texts"], lines, strict=False):
        shares = np.mean(text["first"], axis=0)
        assert line.split() == [text["name"], *(f"{share:.0%}" for share in shares)]
    summary, out = found["summary"], result.stdout
    assert f"own expert first {summary['t1']:.0%}, among the first two {summary['t2']:.0%}" in out
    moe = found["texts"][0]["perplexity"]["moe"]
    assert f"perplexity on first: moe {moe:.2f}, " in out
    assert all(verdict in out for verdict in found["verdicts"])
    assert routing(built, *given(texts), "--quiet").stdout == ""
    held_out = routing(built)
    assert held_out.exit_code == 0 and "when their prompt is held out" in held_out.stdout


def test_it_writes_the_page(tmp_path: Path, built: Path, texts: dict[str, Path]) -> None:
    page = tmp_path / "page.html"
    assert routing(built, *given(texts), "--html", page).exit_code == 0
    assert built.name in page.read_text(encoding="utf-8")


def test_it_changes_nothing(built: Path, texts: dict[str, Path]) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in built.iterdir()}
    routing(built, *given(texts))
    routing(built)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in built.iterdir()}
    assert after == before


REFUSED: dict[str, tuple[list[str], str]] = {
    "no =": (["--text", "first"], "--text: 'first' is no NAME=FILE; write NAME=FILE"),
    "no name": (["--text", "=a.txt"], "--text: '=a.txt' is no NAME=FILE; write NAME=FILE"),
    "no file": (["--text", "first="], "--text: 'first=' is no NAME=FILE; write NAME=FILE"),
    "twice": (["--text", "first={a}", "--text", "first={a}"], "first stands twice; keep one"),
    "missing file": (["--text", "first={tmp}/none.txt"], "cannot be read (No such file"),
    "a directory": (["--text", "first={tmp}"], "cannot be read (Is a directory)"),
    "binary": (["--text", "first={binary}"], "is not UTF-8 text"),
    "empty": (["--text", "first={empty}"], "holds no text; name one that does"),
    "page nowhere": (["--html", "{tmp}/none/a.html"], "its directory does not exist; name a file"),
    "picture nowhere": (["--png", "{tmp}/none/a.png"], "its directory does not exist; name a file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_the_command_is_refused_for(tmp_path: Path, built: Path, kind: str) -> None:
    argv, words = REFUSED[kind]
    for name, content in (("a", b"code python"), ("binary", b"\xff\xfe"), ("empty", b" \n")):
        (tmp_path / name).write_bytes(content)
    places = {name: str(tmp_path / name) for name in ("a", "binary", "empty")}
    line = [argument.format(tmp=tmp_path, **places) for argument in argv]
    result = routing(built, *line)
    assert result.exit_code == 2, result.stdout
    head, problem = result.stderr.splitlines()
    assert head.startswith("error: 1 problem") and words in problem
    assert not result.stdout


@pytest.mark.parametrize("what", ["a dense model", "missing", "empty", "a file", "broken"])
def test_what_is_no_mixture_is_refused(
    tmp_path: Path, babies: dict[str, Path], texts: dict[str, Path], what: str
) -> None:
    out = babies["base"] if what == "a dense model" else tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    elif what in ("empty", "broken"):
        out.mkdir()
    if what == "broken":
        (out / "config.json").write_text("[1]")
    for line in ([], given(texts)):
        result = routing(out, *line)
        assert result.exit_code == 2
        _, problem = result.stderr.splitlines()
        assert f"{out}: has no config.json of a mixture; name a directory that holds" in problem


def test_a_mixture_that_does_not_fit_into_memory_is_read_by_layers(
    built: Path, texts: dict[str, Path], found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("mixture.loading", "evaluation.sources"):
        monkeypatch.setattr(f"moemerge.{room}.available_memory", lambda: 1000)
    said: list[str] = []
    listener = Silent()
    listener.say = said.append  # type: ignore[method-assign]
    streamed = report(built, texts, reporter=listener)
    assert sum("read layer by layer" in line for line in said) == 6
    for ours, theirs in zip(streamed["texts"], found["texts"], strict=True):
        np.testing.assert_allclose(ours["load"], theirs["load"], atol=1e-5)
        assert ours["perplexity"].pop("experts") == pytest.approx(theirs["perplexity"]["experts"])
        assert ours["perplexity"] == pytest.approx(
            {name: value for name, value in theirs["perplexity"].items() if name != "experts"}
        )
    assert streamed["by_experts_per_token"] == pytest.approx(found["by_experts_per_token"])


def test_a_broken_manifest_is_told(tmp_path: Path, built: Path) -> None:
    other = shutil.copytree(built, tmp_path / "other")
    (other / "moemerge.json").write_text("{}")
    with pytest.raises(RunError, match=r"moemerge\.json: it lacks"):
        report(other)


def test_the_plan_of_a_mixture_is_not_needed_twice(built: Path) -> None:
    """What is held out comes from the manifest's own config, not from a file that may change."""
    config = built.parent / "c.yaml"
    text = config.read_text()
    config.write_text("broken: [")
    try:
        assert report(built)["summary"]["t1"] is not None
    finally:
        config.write_text(text)
    assert make_plan(config).plan.gate_mode == "ridge"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_local_experts": "many"}, "no config.json of a mixture"),
        ({"model_type": "mixtrol"}, "transformers cannot load it"),
        ({"num_local_experts": 4}, "experts.down_proj, .* in another shape than config.json says"),
    ],
)
def test_what_transformers_cannot_load_is_refused(
    built: Path, texts: dict[str, Path], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=said):
        report(out, texts)


def test_a_cut_shard_is_refused(built: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    for shard in out.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="transformers cannot load it"):
        report(out, texts)


def test_tokens_and_devices_that_are_not_there_are_refused(
    built: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["maths"] = 5000
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="texts other: has token 5000, the model embeds 64"):
        report(out, texts)
    with pytest.raises(InputError, match="no cuda:99 device here"):
        report(built, texts, Options(device="cuda:99"))


def test_a_mixture_of_no_numbers_ends_in_one_line(
    built: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(built, tmp_path / "out"))
    shard = next(out.glob("model-00001-of-*.safetensors"))
    save_file({k: v * math.nan for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    with pytest.raises(RunError, match="the loss came out as nan"):
        report(out, texts)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("flag", ["--html", "--png"])
def test_a_file_that_cannot_be_written_is_told(built: Path, tmp_path: Path, flag: str) -> None:
    ran = CliRunner().invoke(app, ["routing", str(built), flag, str(tmp_path)])
    assert ran.exit_code == 2 and "is a directory; name a file" in ran.stderr
    if Path("/dev/full").exists():
        ran = CliRunner().invoke(app, ["routing", str(built), flag, "/dev/full"])
        assert ran.exit_code == 1 and "/dev/full: no space left" in ran.stderr


def test_a_jsonl_text_may_hold_a_line_separator(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "code\u2028python"}\n{"text": "story\x85"}\r\n', encoding="utf-8")
    assert texts_of(path) == ["code\u2028python", "story\x85"]


def test_a_full_standard_output_ends_in_one_line(built: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "moemerge", "routing", str(built)],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: standard output: cannot be written")
    assert len(ran.stderr.splitlines()) == 1


def test_an_expert_without_text_is_not_said_to_idle() -> None:
    def idle(name: str, favoured: int) -> list[int]:
        logits = np.zeros((2, 5, 3))
        logits[..., favoured] = 1
        owner = {"first": 0}.get(name)
        found: list[int] = summary([Routed(name, owner, logits)], ["a", "b", "c"], 1)["idle"]
        return found

    assert idle("first", 0) == []
    assert idle("first", 1) == [0]
    assert idle("other", 1) == [0, 2]


@pytest.mark.parametrize("whose", ["moemerge", "another"])
def test_segments_are_looked_at_as_the_experts_that_they_are(
    whose: str, tmp_path: Path, built: Path, texts: dict[str, Path], found: dict[str, Any]
) -> None:
    text = (built.parent / "c.yaml").read_text()
    out = tmp_path / "out"
    merge(write_config(tmp_path / "c.yaml", f"segments: 2\n{text}"), out)
    if whose == "another":
        (out / "moemerge.json").unlink()
    read = report(out, texts)
    assert (len(read["experts"]), read["experts_per_token"]) == (3, 2)
    assert read["summary"]["load"] == pytest.approx(found["summary"]["load"], abs=1e-3)
    assert read["by_experts_per_token"] == pytest.approx(found["by_experts_per_token"], rel=1e-4)


def test_a_split_is_looked_at_with_the_slices_that_its_factor_is_for(
    tmp_path: Path, babies: dict[str, Path], texts: dict[str, Path]
) -> None:
    text = f"base_model: {babies['base']}\ngate_mode: random\nexperts_per_token: 3\n"
    out = tmp_path / "out"
    merge(write_config(tmp_path / "c.yaml", text + "split: {slices: 4, assign: kmeans}\n"), out)
    assert set(report(out, texts)["by_experts_per_token"]) == {"3"}
