"""Gate modes: their options, what they read, what they promise of the routers they make."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import WORDS, make_adapter, make_model, simple_config, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moemerge import InputError, Options, RunError, make_plan, merge, parse_config
from moemerge.dense import Passage, router_inputs
from moemerge.dense.generate import write_texts
from moemerge.gates import modes as gates
from moemerge.merging.routers import run_gate
from moemerge.prepare.sources import fetch
from moemerge.reporting import Silent
from moemerge.text.encoder import Prompt

SPECIAL = [0, 1, 2, 3]


def ready_of(text: str, options: Options | None = None) -> tuple[Any, Any]:
    """A config made ready, and its sources."""
    options = options or Options()
    ready = make_plan(parse_config(text), options)
    return ready, fetch(ready, options, Silent())


def made_by(text: str, options: Options | None = None) -> Any:
    """What the config's gate mode makes."""
    ready, sources = ready_of(text, options)
    return run_gate(ready, sources, options or Options(), Silent())


def with_gate(base: Path, experts: list[Any], gate: str, per_expert: str = "") -> str:
    return simple_config(base, experts, f"gate: {{ {gate} }}", per_expert)


def without_prompts(base: Path, experts: list[Any], gate: str) -> str:
    listed = "".join(f"  - source_model: {expert}\n" for expert in experts)
    return f"base_model: {base}\ngate: {{ {gate} }}\nexperts:\n{listed}"


def dense(model: Path, mlps: Path | None = None) -> Any:
    """A dense model in transformers, with another's MLPs if given."""
    made = AutoModelForCausalLM.from_pretrained(model)
    if mlps:
        theirs = AutoModelForCausalLM.from_pretrained(mlps).state_dict()
        made.load_state_dict({n: t for n, t in theirs.items() if ".mlp." in n}, strict=False)
    return made.float().eval()


def mlp_inputs(model: Any, prompt: Prompt) -> list[torch.Tensor]:
    """What each layer's MLP is given at the prompt's own tokens, by transformers' own forward."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(torch.tensor([prompt.ids]))
    for hook in hooks:
        hook.remove()
    return [states[prompt.own :] for states in seen]


def test_on_policy_each_prompt_passes_its_own_experts_mlps(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    ready, sources = ready_of(simple_config(base, [first, second]))
    prompts = [expert.positive[1] for expert in ready.prompts]
    passages = [Passage(prompt, donor) for prompt in prompts for donor in (None, *ready.donors)]
    models = [dense(base), dense(base, first), dense(base, second)]
    wanted = [mlp_inputs(model, prompt) for prompt in prompts for model in models]
    found = list(router_inputs(ready.body, sources, passages, Options(), Silent()))
    for layer, matrices in enumerate(found):
        for ours, theirs in zip(matrices, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs[layer], atol=1e-5, rtol=1e-5)
    assert np.abs(found[1][0] - found[1][1]).max() > 0.1  # whose MLPs they are matters


def test_on_policy_changes_every_router_above_the_first(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    on, off = (
        made_by(with_gate(base, [first, second], f"mode: ridge, on_policy: {said}")).matrices
        for said in ("true", "false")
    )
    np.testing.assert_allclose(on[0], off[0], atol=1e-4)
    assert np.abs(on[1] - off[1]).max() > 1e-2


@pytest.mark.parametrize("mode", ["ridge, on_policy: false", "hidden", "self"])
def test_kappa_is_the_spread_of_the_logits(babies: dict[str, Path], mode: str) -> None:
    base, first, second = babies.values()
    config = with_gate(base, [first, second], f"mode: {mode}, kappa: 3")
    text = (
        config.replace("kappa: 3", "samples: 4, tokens: 8, kappa: 3") if mode == "self" else config
    )
    twice = text.replace("kappa: 3", "kappa: 6")
    once, again = made_by(text).matrices, made_by(twice).matrices
    for small, large in zip(once, again, strict=True):
        np.testing.assert_allclose(2 * small, large, rtol=1e-5)
    if mode == "self":
        return
    ready, _ = ready_of(text)
    model = dense(base)
    for layer, rows in enumerate(once):
        spreads = []
        for expert in ready.prompts:
            seen = torch.cat([mlp_inputs(model, prompt)[layer] for prompt in expert.positive])
            spreads.append((seen.numpy() @ rows.T).var(axis=1).mean())
        assert np.sqrt(np.mean(spreads)) == pytest.approx(3, rel=1e-4)


def test_lambda_is_read_as_a_number_and_matters(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    texts = [with_gate(base, [first, second], f"mode: ridge{more}")
             for more in (", lambda: 1e-3", ", lambda: 0.001", ", lambda: 10", "")]  # fmt: skip
    short, plain, large, default = (made_by(text).matrices[1] for text in texts)
    assert (short == plain).all()
    assert not np.allclose(plain, large, atol=1e-2)
    assert not np.allclose(plain, default, atol=1e-2)
    digests = {make_plan(parse_config(text)).plan.digest for text in texts}
    assert len(digests) == 3


def test_the_default_is_ridge(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    plan = make_plan(parse_config(simple_config(base, [first, second]))).plan
    named = make_plan(parse_config(simple_config(base, [first, second], "gate_mode: ridge"))).plan
    assert plan.gate_mode == "ridge" and plan == named


@pytest.mark.parametrize("mode", ["hidden_avg", "hidden_last"])
def test_held_out_is_made_anew_without_the_prompt(babies: dict[str, Path], mode: str) -> None:
    base, first, second = babies.values()
    text = simple_config(base, [first, second], f"gate_mode: {mode}")
    text = text.replace(
        "      - code python\n", "      - code python\n      - explain and return\n"
    )
    config = parse_config(text)
    whole = made_by(text)
    assert [example.expert for example in whole.texts] == [0, 0, 0, 1, 1]
    model, number = dense(base), 0
    for e, expert in enumerate(config.experts):
        for prompt in expert.positive_prompts:
            rest = tuple(other for other in expert.positive_prompts if other != prompt)
            experts = list(config.experts)
            experts[e] = replace(expert, positive_prompts=rest)
            rows = made_by(replace(config, experts=tuple(experts)).as_yaml()).matrices
            for layer, seen in enumerate(mlp_inputs(model, whole.texts[number].prompt)):
                wanted = seen.numpy() @ rows[layer].T
                ours = whole.held_out[layer][number]
                np.testing.assert_allclose(ours, wanted, atol=1e-4, rtol=1e-4)
            number += 1


def test_a_prompt_that_is_alone_is_not_held_out(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    text = simple_config(base, [first, second]).replace("      - function class\n", "")
    assert [example.expert for example in made_by(text).texts] == [1, 1]


# self: the experts' own text


def self_settings(**changes: Any) -> Any:
    return gates.find("self").Settings(**{"samples": 5, "tokens": 12, **changes})  # type: ignore[attr-defined]


def own_texts(
    text: str,
    index: int = 0,
    beginnings: list[Prompt] | None = None,
    options: Options | None = None,
    name: str = "x",
    **settings: Any,
) -> list[Prompt]:
    """What expert `index` of a config writes."""
    options = options or Options()
    ready, sources = ready_of(text, options)
    begun = beginnings or list(ready.prompts[index].positive)
    return write_texts(
        ready.donors[index], name, begun, self_settings(**settings), SPECIAL, sources, options,
        Silent(),
    )  # fmt: skip


def test_own_texts_go_on_from_their_beginnings_and_hold_no_special_token(
    babies: dict[str, Path],
) -> None:
    base, first, second = babies.values()
    text = with_gate(base, [first, second], "mode: self")
    begun = ready_of(text)[0].prompts[0].positive
    texts = own_texts(text, samples=40, tokens=30)
    assert len(texts) == 40
    for number, one in enumerate(texts):
        start = begun[number % 2]
        assert (one.ids[: len(start.ids)], one.own) == (start.ids, start.own)
        assert len(one.ids) == len(start.ids) + 30
        assert not set(one.ids[len(start.ids) :]) & set(SPECIAL)
    assert len({one.ids for one in texts}) == 40


WRITERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "window": {"family": "mistral", "sliding_window": 7},
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_cold_own_text_is_the_greedy_continuation_of_transformers(
    tmp_path: Path, kind: str, lazy: bool
) -> None:
    """Of beginnings of several lengths in one batch, so that padding is seen to change nothing."""
    model = make_model(tmp_path / "model", **WRITERS[kind])
    other = make_model(tmp_path / "other", seed=1, **WRITERS[kind])
    text = with_gate(model, [other, model], "mode: self")
    begun = [Prompt((1, *range(5, 5 + n)), 1) for n in (0, 1, 4, 9, 2)]
    ours = own_texts(text, 1, begun, Options(lazy=lazy), temperature=1e-6)
    wanted = [greedy(dense(model), prompt, 12) for prompt in begun]
    assert [one.ids for one in ours] == wanted


def greedy(model: Any, prompt: Prompt, tokens: int) -> tuple[int, ...]:
    """The continuation by transformers' own generate, without special tokens."""
    ids = torch.tensor([prompt.ids])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
        suppress_tokens=SPECIAL, pad_token_id=0,
    )  # fmt: skip
    return tuple(made[0].tolist())


def test_an_expert_with_an_adapter_writes_with_it(tmp_path: Path, babies: dict[str, Path]) -> None:
    from peft import PeftModel

    base, first, _ = babies.values()
    adapter = make_adapter(tmp_path / "adapter", first)
    text = with_gate(base, [f"{first}+{adapter}", first], "mode: self")
    begun = [Prompt((1, 4, 5), 1), Prompt((1, 9), 1)]
    ours = own_texts(text, 0, begun, samples=2, temperature=1e-6)
    merged = PeftModel.from_pretrained(dense(first), adapter).merge_and_unload().eval()
    assert [one.ids for one in ours] == [greedy(merged, prompt, 12) for prompt in begun]
    assert ours != own_texts(text, 1, begun, samples=2, temperature=1e-6)


def test_own_text_is_drawn_by_seed_and_name(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    text = with_gate(base, [first, second], "mode: self")
    once = own_texts(text)
    assert own_texts(text) == once
    assert own_texts(text, options=Options(lazy=True)) == once
    assert own_texts(text, options=Options(seed=1)) != once
    assert own_texts(text, name="y") != once
    assert own_texts(text, index=1, beginnings=list(ready_of(text)[0].prompts[0].positive)) != once


def test_batches_bound_what_is_written_at_once(
    babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold text is the same however it is cut into batches."""
    base, first, second = babies.values()
    text = with_gate(base, [first, second], "mode: self")
    begun = [Prompt((1, *range(5, 5 + n)), 1) for n in (1, 4, 2)]
    whole = own_texts(text, 0, begun, temperature=1e-6)
    monkeypatch.setattr("moemerge.dense.generate.BATCH_TOKENS", 40)
    assert own_texts(text, 0, begun, temperature=1e-6) == whole


@pytest.mark.parametrize("prompts", [True, False])
def test_self_needs_no_prompts_and_takes_them(
    tmp_path: Path, babies: dict[str, Path], prompts: bool
) -> None:
    base, first, second = babies.values()
    gate = "mode: self, samples: 6, tokens: 10"
    write = with_gate if prompts else without_prompts
    text = write(base, [first, second], gate)
    merged = merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert merged.plan.gate_mode == "self"
    begun = [len(p.ids) - p.own for p in ready_of(text)[0].prompts[0].positive]
    free = 10 - 10 // 4  # what is begun from nothing has to settle first
    own = [10 + begun[0], free, 10 + begun[1], free, 10 + begun[0], free] if prompts else 6 * [free]
    assert merged.routing["tokens"] == 2 * sum(own)
    assert merged.routing["t1"] > 0.5  # text of two models that have nothing in common


@pytest.mark.parametrize("samples", [1, 4])
def test_prompts_that_begin_no_text_count_as_they_are(
    babies: dict[str, Path], samples: int
) -> None:
    base, first, second = babies.values()
    text = with_gate(base, [first, second], f"mode: self, samples: {samples}, tokens: 8")
    prompts = ready_of(text)[0].prompts
    found = made_by(text).texts
    for index, expert in enumerate(prompts):
        own = [example.prompt for example in found if example.expert == index]
        as_it_is = {prompt for prompt in expert.positive if prompt in own}
        assert as_it_is == set(expert.positive[1:] if samples == 1 else ())
        assert len(own) == samples + len(as_it_is)


def test_self_and_calibration_count_together(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    (tmp_path / "a.txt").write_text("dragon castle " * 10)
    text = with_gate(base, [first, second], "mode: self, samples: 3, tokens: 8")
    given = text + f"    calibration: {tmp_path / 'a.txt'}\n"
    without, with_it = made_by(text), made_by(given)
    assert len(with_it.texts) == len(without.texts) + 1
    assert not np.allclose(without.matrices[1], with_it.matrices[1], atol=1e-3)


def test_a_lambda_too_small_ends_in_one_line(babies: dict[str, Path], tmp_path: Path) -> None:
    base, first, second = babies.values()
    text = with_gate(base, [first, second], "mode: ridge, lambda: 1e-300")
    text = text.replace("- code python", "- function class")  # the same twice
    with pytest.raises(RunError, match=r"gate\.lambda: .* in layer 0 .*; write a larger number"):
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")


def test_a_dataset_that_cannot_be_read_is_named(babies: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xd4\xff\xfe")
    base, first, second = babies.values()
    text = with_gate(base, [first, second], "mode: ridge")
    text += f"    calibration: {tmp_path / 'texts'}\n"
    with pytest.raises(InputError, match="texts cannot be loaded as a dataset"):
        make_plan(parse_config(text))


def test_self_with_nothing_to_begin_with_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", post_processor=False)
    (base / "tokenizer_config.json").unlink()
    text = without_prompts(base, [base, base], "mode: self")
    with pytest.raises(InputError, match="no token that texts begin with; add some prompts") as no:
        make_plan(parse_config(text))
    assert [problem.where for problem in no.value.problems] == [
        "config:4: experts[0]", "config:5: experts[1]",
    ]  # fmt: skip
    make_plan(parse_config(with_gate(base, [base, base], "mode: self")))


def test_self_says_what_it_costs_and_needs_room(
    babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first, second = babies.values()
    config = parse_config(with_gate(base, [first, second], "mode: self, samples: 3, tokens: 8"))
    [note] = [note for note in make_plan(config).notes if "gate_mode: self" in note]
    assert "each of 2 experts writes 3 texts of 8 tokens" in note and "with lazy=True" in note
    size = (first / "model.safetensors").stat().st_size
    monkeypatch.setattr("moemerge.gates.setup.available_memory", lambda: size // 2)
    with pytest.raises(InputError, match=r"needs .* of memory; .* are free; pass lazy=True") as no:
        make_plan(config)
    assert "experts[0].source_model" in no.value.problems[0].where
    make_plan(config, Options(lazy=True))
    make_plan(replace(config, gate={"mode": "ridge"}))
    monkeypatch.setattr("moemerge.gates.setup.available_memory", lambda: None)  # nobody knows
    make_plan(config)


def other_ids(model: Path) -> None:
    """Let the tokenizer give two words each other's ids."""
    path = model / "tokenizer.json"
    text = path.read_text()
    data = json.loads(text)
    vocabulary = data["model"]["vocab"]
    vocabulary["code"], vocabulary["python"] = vocabulary["python"], vocabulary["code"]
    path.write_text(json.dumps(data))


def test_an_expert_whose_tokens_have_other_ids_writes_nothing(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    other = shutil.copytree(first, tmp_path / "other")
    other_ids(other)
    with pytest.raises(InputError, match=r"2 tokens have other ids .* use gate_mode: ridge") as no:
        make_plan(parse_config(with_gate(base, [first, other], "mode: self")))
    assert ["experts[1].source_model" in problem.where for problem in no.value.problems] == [True]
    notes = make_plan(parse_config(simple_config(base, [first, other]))).notes
    assert any("2 tokens have other ids" in note for note in notes)


def renamed(model: Path, old: str, new: str) -> None:
    """Give a token's id to another token."""
    path = model / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)
    path.write_text(json.dumps(data))


def test_an_expert_writes_no_token_that_is_another_in_the_mixture(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    other = shutil.copytree(first, tmp_path / "other")
    for word in WORDS[:8]:
        renamed(other, word, f"<{word}>")
    gate = "mode: self, samples: 30, tokens: 20"
    text = without_prompts(base, [first, other], gate)
    seen: list[set[int]] = [set(), set()]
    for one in made_by(text).texts:
        seen[one.expert] |= {*one.prompt.ids}
    assert seen[0] >= {*range(4, 12)} and not seen[1] & {*range(4, 12)}
    with pytest.raises(InputError, match=r"tokens that are different in its .*'code'") as no:
        make_plan(parse_config(with_gate(base, [other, first], gate)))
    assert ["experts[0].source_model" in problem.where for problem in no.value.problems] == [True]


def test_tokens_that_cannot_be_compared_are_taken_for_the_mixtures_and_said(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    other = shutil.copytree(first, tmp_path / "other")
    (other / "tokenizer.json").unlink()
    ready = make_plan(parse_config(with_gate(base, [first, other], "mode: self")))
    line = "other: its token ids are taken to be the mixture's: there is no tokenizer.json"
    assert line in ready.notes


@pytest.mark.parametrize("size", [80, 40])
def test_an_expert_with_more_or_fewer_embeddings_writes_what_the_base_can_read(
    tmp_path: Path, babies: dict[str, Path], size: int
) -> None:
    base, first, _ = babies.values()
    other = make_model(tmp_path / "other", seed=5, vocab_size=size)
    text = with_gate(base, [first, other], "mode: self, samples: 30, tokens: 20")
    texts = made_by(text).texts
    assert len(texts) == 60
    assert max(max(x.prompt.ids) for x in texts if x.expert == 1) in range(min(size, 64))[-10:]


def test_an_expert_that_does_not_know_its_prompts_is_refused(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    other = make_model(tmp_path / "other", vocab_size=12)
    with pytest.raises(InputError, match="begin with token 15, and it embeds 12; use other") as no:
        make_plan(parse_config(with_gate(base, [first, other], "mode: self")))
    assert ["experts[1].source_model" in problem.where for problem in no.value.problems] == [True]
    make_plan(parse_config(simple_config(base, [first, other])))


# calibration: documents for an expert


def documents(folder: Path, babies: dict[str, Path], named: Path | str) -> str:
    """A config of two experts, with documents alone."""
    base, first, second = babies.values()
    (folder / "second.txt").write_text("maths solve number " * 4)
    return (
        f"base_model: {base}\nexperts:\n"
        f"  - source_model: {first}\n    calibration: {named}\n"
        f"  - source_model: {second}\n    calibration: {folder / 'second.txt'}\n"
    )


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TALK = [{"role": "user", "content": "code python"}, {"role": "assistant", "content": "return"}]
GOOD: dict[str, tuple[str, str]] = {
    "text": ("a.txt", "code python\n\nreturn"),
    "a byte order mark": ("a.txt", "\ufeffcode python\n\nreturn"),
    "text rows": ("a.jsonl", jsonl({"text": "code python return"})),
    "content rows": ("a.json", jsonl({"content": "code python return"})),
    "messages": ("a.jsonl", "\n" + jsonl({"messages": TALK}) + "\n"),
    "conversations": (
        "a.jsonl", jsonl({"conversations": [{"value": "code python"}, {"value": "return"}]})
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_documents_alone_make_routers(tmp_path: Path, babies: dict[str, Path], kind: str) -> None:
    name, content = GOOD[kind]
    (tmp_path / name).write_text(content, encoding="utf-8")
    text = documents(tmp_path, babies, tmp_path / name)
    [piece] = make_plan(parse_config(text)).prompts[0].calibration
    assert (piece.ids, piece.own) == ((1, 4, 5, 9), 1)
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")


def test_documents_are_cut_into_pieces_that_the_base_reads(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl({"text": "code " * 300}, {"text": "dragon"}))
    text = documents(tmp_path, babies, tmp_path / "a.jsonl")
    pieces = make_plan(parse_config(text)).prompts[0].calibration
    assert [len(piece.ids) for piece in pieces] == [128, 128, 47, 2]  # max_position_embeddings
    assert {piece.ids[0] for piece in pieces} == {1}
    monkeypatch.setattr("moemerge.text.encoder.CALIBRATION_TOKENS", 130)
    pieces = make_plan(parse_config(text)).prompts[0].calibration
    assert [len(piece.ids) for piece in pieces] == [128, 4]


def test_documents_change_the_routers_and_the_plan(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    text = simple_config(base, [first, second])
    (tmp_path / "a.txt").write_text("dragon castle")
    given = text + f"    calibration: {tmp_path / 'a.txt'}\n"
    plans, routers = [], []
    for one in (text, given, None):
        if one is None:
            (tmp_path / "a.txt").write_text("chat hello")
        plans.append(make_plan(parse_config(one or given)).plan.digest)
        routers.append(made_by(one or given).matrices[1].tobytes())
    assert len(set(plans)) == len(set(routers)) == 3


def test_documents_stand_beside_the_config(tmp_path: Path, babies: dict[str, Path]) -> None:
    (tmp_path / "code.txt").write_text("code python")
    path = write_config(tmp_path / "c.yaml", documents(tmp_path, babies, "code.txt"))
    assert make_plan(path).prompts[0].calibration[0].ids == (1, 4, 5)


def test_documents_without_effect_are_said(tmp_path: Path, babies: dict[str, Path]) -> None:
    text = "gate_mode: random\n" + documents(tmp_path, babies, "nowhere.txt")
    assert "calibration has no effect with gate_mode: random" in make_plan(parse_config(text)).notes


BAD: dict[str, tuple[str, str | bytes | None, str]] = {
    "missing": ("a.txt", None, "there is no "),
    "binary": ("a.txt", b"\xff\xfe\x00\x01", "is not UTF-8 text"),
    "empty": ("a.txt", "", "holds no text; name one that does"),
    "blank": ("a.txt", " \n\t\n", "holds no text; name one that does"),
    "empty rows": ("a.jsonl", jsonl({"text": ""}), "holds no text"),
    "no rows": ("a.jsonl", "\n", "holds no text"),
    "not json": ("a.jsonl", "code python\n", "is not jsonl, one JSON object a line"),
    "nested": ("a.jsonl", "[" * 100000, "is not jsonl"),
    "no text": ("a.jsonl", jsonl({"text": "a"}, {"id": 1}), "row 2 has none of text, content"),
    "a list": ("a.jsonl", jsonl(["a"]), "row 1 has none of text"),
    "a number": ("a.jsonl", jsonl({"text": 7}), "row 1: text is not text"),
    "turns without text": ("a.jsonl", jsonl({"messages": [{"role": "user"}]}), "is not text"),
    "half a character": ("a.jsonl", jsonl({"text": "\ud800"}), "row 1 holds half a character"),
    "null": ("a.jsonl", jsonl({"text": None}), "row 1: text is not text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_documents_are_refused_that_are(tmp_path: Path, babies: dict[str, Path], kind: str) -> None:
    name, content, words = BAD[kind]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = write_config(tmp_path / "c.yaml", documents(tmp_path, babies, tmp_path / name))
    with pytest.raises(InputError) as refused:
        merge(path, tmp_path / "out")
    [problem] = refused.value.problems
    assert problem.where == "c.yaml:4: experts[0].calibration"
    assert words in str(problem) and problem.fix.startswith("name ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["folder", "user/documents"])
def test_a_dataset_needs_an_extra_and_says_which(
    tmp_path: Path, babies: dict[str, Path], named: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(jsonl({"text": "code python"}, {"text": "return"}))
    text = documents(tmp_path, babies, folder if named == "folder" else named)
    if named == "folder" and importlib.util.find_spec("datasets"):
        pieces = make_plan(parse_config(text)).prompts[0].calibration
        assert [piece.ids for piece in pieces] == [(1, 4, 5), (1, 9)]
        return
    extra = r"pip install 'moemerge\[datasets\]'"
    words = "cannot be loaded as a dataset" if importlib.util.find_spec("datasets") else extra
    with pytest.raises(InputError, match=words) as refused:
        make_plan(parse_config(text))
    assert refused.value.problems[0].where == "config:4: experts[0].calibration"


# what is said at the end


def test_the_end_of_a_merge_tells_how_the_routers_do(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, second = babies.values()
    out = tmp_path / "out"
    merged = merge(write_config(tmp_path / "c.yaml", simple_config(base, [first, second])), out)
    found = merged.routing
    made = made_by((tmp_path / "c.yaml").read_text())
    assert found["tokens"] == sum(len(x.prompt.ids) - x.prompt.own for x in made.texts)
    firsts: dict[int, list[Any]] = {0: [], 1: []}
    for n, text in enumerate(made.texts):
        logits = np.stack([layer[n] for layer in made.held_out])  # (L, T, E)
        firsts[text.expert].append(logits.argmax(axis=2))
    confusion = [
        [(np.concatenate(firsts[e], axis=1) == other).mean() for other in (0, 1)] for e in (0, 1)
    ]
    np.testing.assert_allclose(found["confusion"], confusion, atol=1e-4)
    assert found["t1"] == pytest.approx(np.mean([confusion[0][0], confusion[1][1]]), abs=1e-4)
    assert found["by_expert"] == {"first": found["confusion"][0][0],
                                  "second": found["confusion"][1][1]}  # fmt: skip
    assert len(found["layer_t1"]) == 2 and found["t2"] == 1
    assert json.loads((out / "moemerge.json").read_text())["routing"] == found
    card = (out / "README.md").read_text()
    assert "## Routing" in card
    assert f"routers: {found['t1']:.0%} of the prompts' tokens find their expert first" in card
    assert f"| second | {confusion[1][0]:.0%} | {confusion[1][1]:.0%} |" in card


NOT_MEASURED: dict[str, Callable[[str], str]] = {
    "random": lambda text: "gate_mode: random\n" + text,
    "cheap_embed": lambda text: "gate_mode: cheap_embed\n" + text,
    "one prompt each": lambda text: text.replace("      - function class\n", "").replace(
        "      - dragon castle\n", ""
    ),
}


@pytest.mark.parametrize("kind", NOT_MEASURED)
def test_what_was_not_held_out_is_not_claimed(
    tmp_path: Path, babies: dict[str, Path], kind: str
) -> None:
    base, first, second = babies.values()
    text = NOT_MEASURED[kind](simple_config(base, [first, second]))
    merged = merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert merged.routing == {}
    assert "## Routing" not in (tmp_path / "out/README.md").read_text()


def test_a_single_expert_has_nothing_to_choose(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    merged = merge(write_config(tmp_path / "c.yaml", simple_config(base, [first])), tmp_path / "o")
    assert merged.routing["t1"] is None and merged.routing["load"] == [1.0]
    router = load_file(tmp_path / "o/model-00001-of-00002.safetensors")
    assert all(torch.isfinite(rows).all() for rows in router.values())
