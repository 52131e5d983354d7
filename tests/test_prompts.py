"""Prompts as the base model reads them: what stands before one, and what counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from babies import make_tokenizer

from moemerge.prompts import Encoder


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
