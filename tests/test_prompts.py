"""Prompts as the base model reads them: what stands before one, and what counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from babies import make_tokenizer, write_config

from moemerge import InputError, RunError, make_plan, merge
from moemerge.config.schema import parse_config
from moemerge.text.encoder import Encoder, Prompt


def test_what_the_post_processor_adds_stands_before_and_does_not_count(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    prompt = Encoder(tmp_path).encode("code python")
    assert (prompt.ids, prompt.own) == ((1, 4, 5), 1)


def test_without_a_post_processor_bos_stands_before(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, post_processor=False)
    prompt = Encoder(tmp_path).encode("code python")
    assert (prompt.ids, prompt.own) == ((1, 4, 5), 1)


def test_without_anything_to_add_all_tokens_count(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, post_processor=False)
    (tmp_path / "tokenizer_config.json").unlink()
    prompt = Encoder(tmp_path).encode("code python")
    assert (prompt.ids, prompt.own) == ((4, 5), 0)


def test_special_tokens_in_a_prompt_are_parsed(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    prompt = Encoder(tmp_path).encode("<|user|>code<s>")
    assert (prompt.ids, prompt.own) == ((1, 3, 4, 1), 1)


@pytest.mark.parametrize("post_processor", [True, False])
def test_a_bos_that_the_prompt_itself_has_is_neither_doubled_nor_counted(
    tmp_path: Path, post_processor: bool
) -> None:
    make_tokenizer(tmp_path, post_processor)
    encoder = Encoder(tmp_path)
    assert encoder.encode("<s>code python") == encoder.encode("code python")
    only = encoder.encode("<s>")
    assert (only.ids, only.own) == ((1,), 1)


def test_a_sentencepiece_model_alone_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"a")
    with pytest.raises(ValueError, match=r"only a tokenizer\.model .*save_pretrained"):
        Encoder(tmp_path)


def two_experts(model: Path, first: str, second: str, mode: str = "hidden") -> str:
    """A config with the prompts of two experts in YAML's flow style."""
    lines = [f"base_model: {model}", f"gate_mode: {mode}", "experts:"]
    for prompts in (first, second):
        lines.append(f"  - {{ source_model: {model}, {prompts} }}")
    return "\n".join(lines) + "\n"


SAME = {
    "unknown words": ("positive_prompts: [foo]", "positive_prompts: [bar]"),
    "other spaces": ("positive_prompts: [code  python]", "positive_prompts: [code python]"),
    "another order": ("positive_prompts: [code, story]", "positive_prompts: [story, code]"),
    "of negative": (
        "positive_prompts: [a], negative_prompts: [foo]",
        "positive_prompts: [a], negative_prompts: [bar]",
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_experts_whose_prompts_read_the_same_are_refused(
    babies: dict[str, Path], what: str
) -> None:
    with pytest.raises(InputError, match=r"the same prompts as experts\[0\]") as caught:
        make_plan(parse_config(two_experts(babies["base"], *SAME[what])))
    assert len(caught.value.problems) == 1
    assert "experts[1]" in caught.value.problems[0].where


def test_an_expert_whose_negative_prompts_read_as_its_positive_ones_is_refused(
    babies: dict[str, Path],
) -> None:
    prompts = "positive_prompts: [foo], negative_prompts: [bar]"
    config = two_experts(babies["base"], prompts, "positive_prompts: [code]")
    with pytest.raises(InputError, match="positive and negative prompts are the same") as caught:
        make_plan(parse_config(config))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_how_often_a_prompt_is_written_counts(
    tmp_path: Path, babies: dict[str, Path], mode: str
) -> None:
    often = "positive_prompts: [code, story], negative_prompts: [story, code, code]"
    text = two_experts(babies["base"], often, "positive_prompts: [dragon]", mode)
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")


BLIND = {
    "order": ("cheap_embed", "[code python a]", "[a python code]", "same router in every layer"),
    "twice": ("hidden", "[code, code]", "[code]", "same router in layer 0"),
    "zeros": ("hidden_last", "[code, code], negative_prompts: [code]", "[a]", "zeros in layer 0"),
    "zero": ("cheap_embed", "[a]", "[code, code], negative_prompts: [code]", "zeros in every"),
}


@pytest.mark.parametrize("what", BLIND)
def test_routers_that_cannot_choose_stop_the_run(
    tmp_path: Path, babies: dict[str, Path], what: str
) -> None:
    mode, first, second, words = BLIND[what]
    text = two_experts(
        babies["base"], f"positive_prompts: {first}", f"positive_prompts: {second}", mode
    )
    with pytest.raises(RunError, match=words) as caught:
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    named = "experts[1]" if what == "zero" else "experts[0]"
    assert str(caught.value).startswith(named)
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("name", ["truncation", "padding"])
def test_a_tokenizer_that_truncates_or_pads_does_neither(tmp_path: Path, name: str) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    data["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    data["padding" if name == "truncation" else "truncation"] = None
    path.write_text(json.dumps(data))
    assert Encoder(tmp_path).encode("code python code python").ids == (1, 4, 5, 4, 5)


def test_the_real_model_reads_its_document_separator_first(smollm2: Path) -> None:
    """SmolLM2-Instruct names chat markup as its bos_token; it was not trained to see that first."""
    encoder = Encoder(smollm2)
    assert encoder.encode("Hello").ids[0] == encoder.tokenizer.token_to_id("<|endoftext|>")


def test_the_start_of_every_text_is_what_stands_before_one(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert Encoder(tmp_path).start() == Prompt((1,), 1)
    assert Encoder(tmp_path).special() == [0, 1, 2, 3]
    make_tokenizer(tmp_path, post_processor=False)
    assert Encoder(tmp_path).start() == Prompt((1,), 1)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Encoder(tmp_path).start() == Prompt((), 0)


def test_tokens_are_spelled_so_that_together_they_are_the_text(smollm2: Path) -> None:
    encoder = Encoder(smollm2)
    for text in ("Hello, world\n", "naïve 東京 🙂🙃 end", "🙂"):
        ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        spelled = encoder.spelled(ids)
        assert (len(spelled), "".join(spelled)) == (len(ids), text)
    cut = encoder.tokenizer.encode("a🙂", add_special_tokens=False).ids[:-1]
    assert len(encoder.spelled(cut)) == len(cut)


def test_own_text_may_begin_with_the_same_prompts(babies: dict[str, Path]) -> None:
    """Each expert goes on from them in its own way."""
    base, first, _ = babies.values()
    text = (
        f"base_model: {base}\ngate_mode: self\nexperts:\n"
        f"  - {{ source_model: {base}, positive_prompts: [tell me] }}\n"
        f"  - {{ source_model: {first}, positive_prompts: [tell me] }}\n"
    )
    assert make_plan(parse_config(text)).plan.gate_mode == "self"
