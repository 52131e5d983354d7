"""Vocabularies: two tokenizers compared and joined, and whose rows embedding and head have then."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import WORDS, make_model, simple_config, write_config
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file
from test_cli import run
from test_readers import read
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from moemerge import (
    Expert,
    InputError,
    MergeConfig,
    Options,
    make_plan,
    merge,
    parse_config,
    regate,
    routing_report,
)
from moemerge import verify_checkpoint as verify
from moemerge.card.sharing import shareable
from moemerge.output.manifest import read_manifest
from moemerge.plan import recipe
from moemerge.tokenizer.tokens import (
    Tokens,
    compare_tokens,
    cut_by,
    missing,
    open_tokenizer,
    parse_tokens,
    read_tokens,
    unreadable,
)

ROOT = Path(__file__).parents[1]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWN = 4 + len(WORDS)
"""The tokens of a baby's tokenizer."""


def baby(directory: Path, *more: str, seed: int = 0, rows: int = 0, **changes: Any) -> Path:
    """A baby whose tokenizer has more tokens, those in <> special, and just as many rows."""
    size = rows or OWN + len(more)
    made = make_model(directory, seed=seed, vocab_size=size, **changes)
    edit(made / "tokenizer.json", lambda data: add(data, more))
    return made


def add(data: dict[str, Any], more: tuple[str, ...]) -> None:
    listed = data["added_tokens"]
    size = len(data["model"]["vocab"])
    for text in more:
        number = max(size, *(token["id"] + 1 for token in listed))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        special = text.startswith("<")
        listed.append({"id": number, "content": text, **flags, "special": special})


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(base: Path, experts: list[Path], head: str) -> str:
    return simple_config(base, list(experts), f"architecture: mixtral\n{head}")


def merged(root: Path, base: Path, experts: list[Path], head: str) -> Path:
    text = config_of(base, experts, f"gate_mode: random\n{head}")
    name = f"out{len(list(root.glob('out*')))}"
    merge(write_config(root / "c.yaml", text), root / name)
    verify(root / name)
    return root / name


def reads_every_token(out: Path, tokens: Tokens) -> None:
    """Each token of another tokenizer is one token here, and comes back as its text."""
    ours = Tokenizer.from_file(str(out / "tokenizer.json"))
    theirs = open_tokenizer(tokens)
    for token, number in tokens.ordered:
        text = tokens.text_of(token)
        if text and theirs.encode(text, add_special_tokens=False).ids == [number]:
            ids = ours.encode(text, add_special_tokens=False).ids
            assert len(ids) == 1, token
            assert ours.decode(ids, skip_special_tokens=False) == text, token


def test_two_tokenizers_token_by_token(tmp_path: Path) -> None:
    ours, theirs = baby(tmp_path / "a", "<|x|>", "one"), baby(tmp_path / "b", "<|y|>", "one")

    def change(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["code"], vocabulary["python"] = vocabulary["python"], vocabulary["code"]
        data["added_tokens"][-1]["lstrip"] = True

    edit(theirs / "tokenizer.json", change)
    found = compare_tokens(read_tokens(ours), read_tokens(theirs))
    assert (found.moved, found.more, found.fewer) == (("python", "code"), ("<|y|>",), ("<|x|>",))
    assert (found.marked, found.alike) == (("one",), OWN - 2)
    assert not compare_tokens(read_tokens(ours), read_tokens(ours))
    notes = make_plan(parse_config(config_of(ours, [ours, theirs], "gate_mode: random"))).notes
    [line] = [note for note in notes if "<|y|>" in note]
    assert line.startswith(
        "b: 2 tokens have other ids than in the base model ('python', 'code'), 1"
    )
    assert f"{OWN - 2} are alike" in line and "tokenizer: union would add" in line


@pytest.mark.parametrize("tied", [False, True])
def test_a_union_has_the_rows_of_whoever_has_the_token(tmp_path: Path, tied: bool) -> None:
    base = baby(tmp_path / "base", tie_word_embeddings=tied)
    chat = baby(tmp_path / "chat", "<|a|>", "bee", seed=1, tie_word_embeddings=tied)
    maths = baby(tmp_path / "maths", "zeta", "bee", "<|c|>", seed=2)
    out = merged(tmp_path, base, [chat, maths], "tokenizer: union")
    made, donors = tensors(out), [tensors(path) for path in (base, chat, maths)]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == OWN + 4
    for name in (EMBEDDING, HEAD):
        old, first, second = (donor[EMBEDDING if tied else name] for donor in donors)
        rows = [old, first[OWN:], second[OWN : OWN + 1], second[OWN + 2 :]]
        assert torch.equal(made[name], torch.cat(rows))
    tokens = read_tokens(out)
    assert [token for token, _ in tokens.ordered][OWN:] == ["<|a|>", "bee", "zeta", "<|c|>"]
    assert [token for token in tokens.added if tokens.added[token].special][4:] == [
        "<|a|>",
        "<|c|>",
    ]
    for model in (base, chat, maths):
        reads_every_token(out, read_tokens(model))


def test_a_config_made_in_python_says_the_same(tmp_path: Path) -> None:
    for said, held in ((["eta"], ("eta",)), (tmp_path / "x.txt", f"{tmp_path}/x.txt")):
        experts = (Expert("chat"),)
        made = MergeConfig("base", experts, tokenizer="union", extra_tokens=said)
        assert made.extra_tokens == held and parse_config(made.as_yaml()) == made


def test_what_is_pushed_tells_no_path(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "extra.txt").write_text("eta\n")
    head = f"tokenizer: {chat}\nextra_tokens: {tmp_path / 'mine' / 'extra.txt'}"
    out = merged(tmp_path, base, [chat], head)
    told = json.dumps(shareable(read_manifest(out)).to_json())
    assert str(tmp_path) not in told and "tokenizer: ./chat" in told and "./extra.txt" in told


def test_new_routers_leave_the_vocabulary(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>", seed=1)
    out = merged(tmp_path, base, [base, chat], "tokenizer: union\nextra_tokens: [code python]")
    before = {path.name: path.read_bytes() for path in out.glob("token*")}
    rows = tensors(out)[EMBEDDING]
    head = "gate_mode: cheap_embed\ntokenizer: union\nextra_tokens: [code python]"
    regate(out, parse_config(config_of(base, [base, chat], head)))
    verify(out)
    assert before == {path.name: path.read_bytes() for path in out.glob("token*")}
    assert torch.equal(rows, tensors(out)[EMBEDDING])
    with pytest.raises(InputError, match="the config asks for other weights"):
        regate(out, parse_config(config_of(base, [base, chat], "gate_mode: cheap_embed")))


def test_the_plan_and_the_card_say_whose_rows_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>", seed=1)
    head = "gate_mode: random\ntokenizer: union\nextra_tokens: [code python]\npad_vocabulary: 8"
    config = write_config(tmp_path / "c.yaml", config_of(base, [chat], head))
    assert run("plan", config) == 0
    rows = f"40 rows: {OWN} of base, 1 of chat, 6 that are means"
    said = capsys.readouterr()
    assert f"vocabulary: {rows}" in said.out and "'<|a|>'" in said.err
    merge(config, tmp_path / "out")
    assert f"| Vocabulary | {rows} |" in (tmp_path / "out" / "README.md").read_text()


def test_rows_that_nobody_changes_are_copied(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>", seed=1)
    ready = make_plan(parse_config(config_of(base, [chat], "tokenizer: union\ngate_mode: random")))
    sources = {text: opened.tensors for text, opened in ready.checkpoints.items()}
    assert all(
        recipe.is_copy(tensor.recipe, tensor.dtype, sources)
        for tensor in ready.plan.tensors
        if tensor.name in (EMBEDDING, HEAD)
    )


def test_new_tokens_come_before_rows_that_had_none(tmp_path: Path) -> None:
    """As the tokenizers library counts them: many models have more rows than tokens."""
    base = baby(tmp_path / "base", rows=64)
    chat = baby(tmp_path / "chat", "<|a|>", seed=1, rows=80)
    out = merged(tmp_path, base, [chat], "tokenizer: union")
    made, old, new = (tensors(path)[EMBEDDING] for path in (out, base, chat))
    assert torch.equal(made, torch.cat([old[:OWN], new[OWN : OWN + 1], old[OWN + 1 :]]))


@pytest.mark.parametrize("body", ["base", "average"])
@pytest.mark.parametrize("head", ["tokenizer: union", "extra_tokens: [zeta, eta]"])
def test_old_tokens_have_their_logits(tmp_path: Path, body: str, head: str) -> None:
    base = baby(tmp_path / "base")
    chat = baby(tmp_path / "chat", "<|a|>", "bee", seed=1)
    outs = [
        merged(tmp_path, base, [base, chat], f"body: {body}\n{more}")
        for more in ("tokenizer: base", head)
    ]
    ids = torch.tensor([[1, *range(4, OWN)]])
    with torch.inference_mode():
        plain, joined = (AutoModelForCausalLM.from_pretrained(o).eval()(ids).logits for o in outs)
    assert joined.shape[-1] == OWN + 2
    assert torch.equal(joined[..., :OWN], plain)


def test_a_models_own_tokenizer(tmp_path: Path) -> None:
    """Its files as they are, its ids; the rows of tokens that the base has are the base's."""
    base = baby(tmp_path / "base", "only")
    chat = baby(tmp_path / "chat", "<|a|>", seed=1, bos_token_id=2, eos_token_id=OWN)

    def change(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["code"], vocabulary["python"] = vocabulary["python"], vocabulary["code"]

    edit(chat / "tokenizer.json", change)
    (chat / "chat_template.jinja").write_text("{{ messages }}<|a|>")
    (chat / "generation_config.json").write_text('{"eos_token_id": [2, 33]}')
    out = merged(tmp_path, base, [base, chat], "tokenizer: chat")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (chat / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, OWN)
    made, old, new = (tensors(path)[EMBEDDING] for path in (out, base, chat))
    assert made.shape == new.shape
    wanted = old[:OWN].clone()
    wanted[[4, 5]] = old[[5, 4]]
    assert torch.equal(made, torch.cat([wanted, new[OWN:]]))


def as_list(root: Path, tokens: list[str]) -> str:
    return json.dumps(tokens)


def as_text(root: Path, tokens: list[str]) -> str:
    (root / "extra.txt").write_text("\n".join(tokens) + "\n")
    return str(root / "extra.txt")


def as_tokenizer(root: Path, tokens: list[str]) -> str:
    vocabulary = {token: number for number, token in enumerate(["<unk>", *tokens, "code"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.save(str(root / "extra.json"))
    return str(root / "extra.json")


@pytest.mark.parametrize("said", [as_list, as_text, as_tokenizer])
def test_extra_tokens_begin_as_the_mean_of_their_pieces(
    tmp_path: Path, said: Callable[[Path, list[str]], str]
) -> None:
    base = baby(tmp_path / "base")
    extra = said(tmp_path, ["code python", "tell me story", "maths"])
    out = merged(tmp_path, base, [base], f"extra_tokens: {extra}")
    made, old = tensors(out), tensors(base)
    place = {word: 4 + number for number, word in enumerate(WORDS)}
    for name in (EMBEDDING, HEAD):
        assert torch.equal(made[name][:OWN], old[name])
        for row, words in ((0, ["code", "python"]), (1, ["tell", "me", "story"])):
            wanted = old[name][[place[word] for word in words]].double().mean(0)
            torch.testing.assert_close(made[name][OWN + row].double(), wanted, atol=1e-7, rtol=1e-6)
        assert len(made[name]) == OWN + 2
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("code python maths", add_special_tokens=False).input_ids == [
        OWN,
        place["maths"],
    ]


def test_an_extra_token_that_an_expert_has_is_its(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>", "bee", seed=1)
    out = merged(tmp_path, base, [chat], "extra_tokens: [bee]")
    made, new = tensors(out)[EMBEDDING], tensors(chat)[EMBEDDING]
    assert torch.equal(made[OWN:], new[OWN + 1 :])


def test_padding_is_never_likely(tmp_path: Path) -> None:
    """A mean's probability is at most the mean of theirs that it is made of."""
    base = baby(tmp_path / "base")
    out = merged(tmp_path, base, [base], "pad_vocabulary: 16")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 48
    assert torch.equal(tensors(out)[EMBEDDING][:OWN], tensors(base)[EMBEDDING])
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(out)(
            torch.tensor([[1, *range(4, 30)]])
        ).logits
    chances = logits.double().softmax(-1)[0]
    assert (chances[:, OWN:].max(1).values <= chances[:, :OWN].max(1).values).all()
    assert (chances[:, OWN:].max(1).values <= 1 / 16).all()


def test_prompts_are_read_by_the_mixtures_tokenizer(tmp_path: Path) -> None:
    """A prompt that is a new token is that token's row in a router of embeddings."""
    base = baby(tmp_path / "base")
    chat = baby(tmp_path / "chat", "<|a|>", "<|b|>", seed=1)
    text = f"""
base_model: {base}
architecture: mixtral
gate_mode: cheap_embed
tokenizer: union
experts:
- source_model: {base}
  positive_prompts: ["<|a|>"]
- source_model: {chat}
  positive_prompts: ["<|b|>"]
"""
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    router = tensors(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"]
    rows = tensors(chat)[EMBEDDING][OWN:]
    torch.testing.assert_close(router, rows / rows.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["hidden", "ridge"])
def test_a_pass_of_the_body_reads_new_tokens(tmp_path: Path, mode: str) -> None:
    base = baby(tmp_path / "base")
    chat = baby(tmp_path / "chat", "<|a|>", seed=1)
    text = config_of(base, [base, chat], f"gate_mode: {mode}\ntokenizer: union")
    merge(
        write_config(tmp_path / "c.yaml", text.replace("story scene", "<|a|> story")),
        tmp_path / "out",
    )
    verify(tmp_path / "out")


def test_sources_are_compared_where_they_read_the_same_text(tmp_path: Path) -> None:
    """The base model with its tokens' rows where the mixture has them; no expert of other ids."""
    base, chat, maths = (baby(tmp_path / name, seed=n) for n, name in enumerate("bcm"))

    def change(data: dict[str, Any]) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["code"], vocabulary["python"] = vocabulary["python"], vocabulary["code"]

    edit(chat / "tokenizer.json", change)
    (tmp_path / "t.txt").write_text("code python story code maths")
    found = []
    for which in ("base", "c"):
        out = merged(tmp_path, base, [chat, maths], f"tokenizer: {which}")
        [text] = routing_report(out, {"t": tmp_path / "t.txt"})["texts"]
        found.append(text["perplexity"])
    assert found[0]["base"] == pytest.approx(found[1]["base"], rel=1e-5)
    assert [list(said["experts"]) for said in found] == [["m"], ["c"]]


def test_an_expert_may_write_text_where_its_tokens_have_the_mixtures_ids(tmp_path: Path) -> None:
    base = baby(tmp_path / "base")
    chat, maths = (baby(tmp_path / name, f"<|{name}|>", seed=1) for name in ("chat", "maths"))
    head = "gate: {mode: self, samples: 2, tokens: 4}\ntokenizer: union"
    make_plan(parse_config(config_of(base, [base, chat], head)))
    with pytest.raises(InputError, match="1 tokens have other ids than in the mixture") as no:
        make_plan(parse_config(config_of(base, [chat, maths], head)))
    assert ["experts[1]" in problem.where for problem in no.value.problems] == [True]


def test_any_number_of_jobs_and_shards_give_the_same_bytes(tmp_path: Path) -> None:
    base = baby(tmp_path / "base")
    chat = baby(tmp_path / "chat", "<|a|>", "bee", seed=1)
    head = "gate_mode: random\ntokenizer: union\nextra_tokens: [code python]\npad_vocabulary: 8"
    config = write_config(tmp_path / "c.yaml", config_of(base, [base, chat], head))
    found = []
    for jobs in (1, 8):
        out = tmp_path / str(jobs)
        merge(config, out, Options(jobs=jobs, shard_size="16KB"))
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1]


def test_the_small_files_tell_of_new_tokens(tmp_path: Path) -> None:
    base = baby(tmp_path / "base")
    chat = baby(tmp_path / "chat", "<|a|>", "bee", seed=1)
    decoder = {"0": {"content": "<unk>", "special": True}}
    edit(base / "tokenizer_config.json", lambda data: data.update(added_tokens_decoder=decoder))
    known = {"bos_token": "<s>", "additional_special_tokens": ["<|user|>"]}
    (base / "special_tokens_map.json").write_text(json.dumps(known))
    (base / "added_tokens.json").write_text('{"<|user|>": 3}')
    out = merged(tmp_path, base, [chat], "tokenizer: union")
    read_json = {path.name: json.loads(path.read_text()) for path in out.glob("*token*.json")}
    told = read_json["tokenizer_config.json"]
    assert told["added_tokens_decoder"][str(OWN)]["special"] is True
    assert told["added_tokens_decoder"][str(OWN + 1)]["content"] == "bee"
    assert told["additional_special_tokens"] == ["<|a|>"]
    assert read_json["special_tokens_map.json"]["additional_special_tokens"] == [
        "<|user|>",
        "<|a|>",
    ]
    assert read_json["added_tokens.json"] == {"<|user|>": 3, "<|a|>": OWN, "bee": OWN + 1}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("<|a|>bee", add_special_tokens=False).input_ids == [OWN, OWN + 1]
    assert "<|a|>" in tokenizer.all_special_tokens and len(tokenizer) == OWN + 2


def test_a_chat_template_is_taken_only_where_the_base_has_none(tmp_path: Path) -> None:
    base = baby(tmp_path / "base")
    chat = baby(tmp_path / "chat", "<|end|>", seed=1, eos_token_id=OWN)
    (chat / "chat_template.jinja").write_text("{{ messages }}<|end|>")
    (chat / "generation_config.json").unlink()
    kept = merged(tmp_path, base, [chat], "tokenizer: union")
    name = "chat_template.jinja"
    assert (kept / name).read_text() == (base / name).read_text()
    (base / name).unlink()
    text = config_of(base, [chat], "gate_mode: random\ntokenizer: union")
    notes = merge(parse_config(text), tmp_path / "taken").notes
    assert "the chat template is chat's: the base model has none" in notes
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "taken").chat_template == "{{ messages }}<|end|>"
    )
    ends = json.loads((tmp_path / "taken" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, OWN]


TEXTS = [
    "the cat sat on the mat, and the café was naïve",
    "日本語のテキスト ということ",
    "def f(x): return x",
]


def byte_level(texts: list[str], size: int) -> Tokens:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|e|>"]
    )
    made.train_from_iterator(texts * 4, trainer)
    return parse_tokens(made.to_str().encode())


def sentencepiece(texts: list[str], size: int) -> Tokens:
    """As Llama 2's: a space is U+2581, one is put before every text, and bytes have pieces."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trim = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), trim]
    made.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        texts * 4, trainers.BpeTrainer(vocab_size=size, special_tokens=special)
    )
    data = json.loads(made.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    return parse_tokens(json.dumps(data).encode())


SPELLINGS = {"bytes": byte_level, "sentencepiece": sentencepiece}


@pytest.mark.parametrize("theirs", SPELLINGS)
@pytest.mark.parametrize("ours", SPELLINGS)
def test_tokens_are_what_they_are_in_a_text_however_spelled(ours: str, theirs: str) -> None:
    """The same text is the same token; what is no text, or cuts a token, cannot be added."""
    left, right = SPELLINGS[ours](TEXTS[:1], 330), SPELLINGS[theirs](TEXTS, 420)
    assert (left.spelling, right.spelling) == (ours, theirs)
    found, unfit = missing(left, right)
    texts = [token.text for token in found]
    assert "日本" in "".join(texts) and len(set(texts)) == len(texts)
    assert not {left.text_of(token) for token in left.ids} & set(texts)
    for token in right.ids:
        there = left.find(right, token)
        if there is not None:
            spelled = next(name for name, its in left.ids.items() if its == there)
            assert left.bytes_of(spelled) == right.bytes_of(token)
        elif right.text_of(token) not in texts:
            assert right.bytes_of(token) in unfit
    if (ours, theirs) == ("sentencepiece", "bytes"):  # parts of Japanese characters
        assert len(unfit) > 0


@pytest.mark.parametrize("ours", SPELLINGS)
@pytest.mark.parametrize("theirs", SPELLINGS)
def test_a_union_of_two_kinds_of_tokenizer(tmp_path: Path, ours: str, theirs: str) -> None:
    left, right = SPELLINGS[ours](TEXTS[:1], 330), SPELLINGS[theirs](TEXTS, 420)
    base, other = tmp_path / "base", tmp_path / "other"
    for number, (path, tokens) in enumerate(((base, left), (other, right))):
        make_model(path, seed=number, vocab_size=tokens.size)
        (path / "tokenizer.json").write_text(json.dumps(tokens.data))
    out = merged(tmp_path, base, [other], "tokenizer: union")
    made = read_tokens(out)
    added = [token for token, number in made.ordered if number >= left.size]
    assert any("本" in token for token in added)
    assert ("<|e|>" in made.ids) is ("bytes" in (ours, theirs))
    tokens = [made.added[token] for token in added]
    assert unreadable(made, tokens) == [] and cut_by(left, made) == {}
    old, new, rows = (tensors(path)[EMBEDDING] for path in (base, other, out))
    assert torch.equal(rows[: left.size], old)
    for at, token in enumerate(added):
        place = right.find(made, token)
        assert place is not None and torch.equal(rows[left.size + at], new[place])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tokens_that_hide_a_tokenizer_from_llama_cpp_are_said(
    tmp_path: Path, spelling: str
) -> None:
    """Its converter knows a byte-level one by how it reads a test text; the other kind as it is."""
    base, tokens = tmp_path / "base", SPELLINGS[spelling](TEXTS, 420)
    make_model(base, vocab_size=tokens.size)
    (base / "tokenizer.json").write_text(json.dumps(tokens.data))

    def notes(extra: str) -> bool:
        text = config_of(base, [base], f"gate_mode: random\nextra_tokens: {extra}")
        return any("llama.cpp's converter" in note for note in make_plan(parse_config(text)).notes)

    assert notes("[工作1314]") is (spelling == "bytes")
    assert not notes("[工作工作]")


def test_a_token_that_would_not_be_shown_as_its_text_is_refused(tmp_path: Path) -> None:
    """Where bytes are spelled as letters, the letter alone is shown as that byte."""
    base, tokens = tmp_path / "base", byte_level(TEXTS[1:2], 330)
    make_model(base, vocab_size=tokens.size)
    (base / "tokenizer.json").write_text(json.dumps(tokens.data))
    text = config_of(base, [base], "gate_mode: random\nextra_tokens: [ÿþ, ÿ, zeta]")
    [problem] = refused(text, tmp_path)
    assert "extra_tokens: 2 cannot be tokens of this tokenizer ('ÿ', 'ÿþ'); remove" in problem


def test_ids_that_the_library_would_not_give_are_refused(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base", rows=64), baby(tmp_path / "chat", "<|a|>")
    edit(base / "tokenizer.json", lambda data: data["model"]["vocab"].update(far=60))
    with pytest.raises(InputError, match=r"its tokens cannot be used: its .* ids up to 60"):
        make_plan(parse_config(config_of(base, [chat], "tokenizer: union")))


@pytest.mark.parametrize("which", ["union", "lab/third"])
def test_a_tokenizer_that_an_earlier_model_had_is_read_from_the_hub(
    tmp_path: Path, which: str
) -> None:
    """Fine-tunes of one base have its tokenizer, which is downloaded once, until it is wanted."""
    more = {"base": (), "chat": ("<|a|>",), "third": ("<|a|>",)}
    for number, (name, tokens) in enumerate(more.items()):
        baby(tmp_path / name, *tokens, seed=number)
    (tmp_path / "third" / "generation_config.json").write_text('{"eos_token_id": 3}')
    text = config_of(Path("lab/base"), [Path("lab/chat"), Path("lab/third")], "gate_mode: random")
    config = write_config(tmp_path / "c.yaml", f"{text}tokenizer: {which}\n")
    with FakeHub() as hub:
        for name in more:
            hub.publish(f"lab/{name}", tmp_path / name)
        done = subprocess.run(
            [sys.executable, "-m", "moemerge", str(config), str(tmp_path / "out")],
            env={**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_tokens(tmp_path / "out").ids == read_tokens(tmp_path / "third").ids
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == (3 if which == "lab/third" else 2)


def test_an_id_beyond_all_reason_is_refused(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>")
    edit(chat / "tokenizer.json", lambda data: data["model"]["vocab"].update(far=10**12))
    with pytest.raises(InputError, match="its tokens cannot be used: one has the id 1000000000000"):
        make_plan(parse_config(config_of(base, [chat], "tokenizer: chat")))


def refused(text: str, folder: Path) -> list[str]:
    with pytest.raises(InputError) as found:
        merge(write_config(folder / "c.yaml", text), folder / "out")
    assert not (folder / "out").exists() and found.value.exit_code == 2
    return [str(problem) for problem in found.value.problems]


BAD: dict[str, tuple[str, str]] = {
    # what is wrong: (what the config says, words of the problem)
    "an unknown tokenizer": ("tokenizer: chatt", "tokenizer: 'chatt' is no expert .* 'chat'"),
    "a tokenizer that is a list": ("tokenizer: [a]", "tokenizer: is a list; write text"),
    "a missing file": ("extra_tokens: no.txt", "extra_tokens: no.txt is no file; name a"),
    "a file that is no text": ("extra_tokens: bytes.txt", "bytes.txt is not UTF-8 text; save"),
    "a file that is no tokenizer": (
        "extra_tokens: bad.json",
        "bad.json: its tokenizer.json cannot",
    ),
    "an empty file": ("extra_tokens: empty.txt", "extra_tokens: names no token; add some"),
    "an empty line": ("extra_tokens: gap.txt", "extra_tokens: line 2 is empty"),
    "a token twice": ("extra_tokens: [eta, eta]", "item 2, 'eta', is item 1 too; keep one"),
    "an empty token": ("extra_tokens: [eta, '']", "extra_tokens: item 2 is empty"),
    "a token that is a list": ("extra_tokens: [[a]]", r"extra_tokens\[0\]: is a list; write text"),
    "a mapping": ("extra_tokens: {a: b}", "extra_tokens: is a mapping"),
    "a size of nothing": ("pad_vocabulary: 0", "pad_vocabulary: is 0; write what"),
    "a size of text": ("pad_vocabulary: many", "pad_vocabulary: is 'many'; write a whole number"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_vocabulary_is_refused_for(tmp_path: Path, kind: str) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gap.txt").write_text("eta\n\nzeta\n")
    said, words = BAD[kind]
    [problem] = refused(config_of(base, [chat], f"gate_mode: random\n{said}"), tmp_path)
    assert problem.startswith("c.yaml:4: ") and re.search(words, problem), problem


@pytest.mark.parametrize("who", ["base", "chat"])
@pytest.mark.parametrize("head", ["tokenizer: union", "tokenizer: chat"])
def test_a_model_without_its_tokens_is_refused(tmp_path: Path, head: str, who: str) -> None:
    models = {"base": baby(tmp_path / "base"), "chat": baby(tmp_path / "chat", "<|a|>")}
    (models[who] / "tokenizer.json").unlink()
    text = config_of(models["base"], [models["chat"]], f"gate_mode: random\n{head}")
    [problem] = refused(text, tmp_path)
    assert "its tokens cannot be used: there is no tokenizer.json; add" in problem
    assert ("base_model" if who == "base" else "experts[0]") in problem


def test_a_file_that_must_tell_of_new_tokens_and_is_broken_is_refused(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>")
    (base / "special_tokens_map.json").write_text("[1]")
    text = config_of(base, [chat], "gate_mode: random\ntokenizer: union")
    [problem] = refused(text, tmp_path)
    assert "special_tokens_map.json is not a JSON object" in problem


def test_rows_of_an_expert_that_are_not_there_are_refused(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base"), baby(tmp_path / "chat", "<|a|>")
    state = tensors(chat)
    state[EMBEDDING] = state[EMBEDDING][:-1].clone()
    save_file(state, chat / "model.safetensors", metadata={"format": "pt"})
    text = config_of(base, [chat], "gate_mode: random\ntokenizer: union")
    [problem] = refused(text, tmp_path)
    assert "experts[0]" in problem and f"{EMBEDDING} is [{OWN}, 32], config.json says" in problem


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    base, chat = baby(tmp_path / "base", rows=64), baby(tmp_path / "chat", rows=64)

    def notes(head: str) -> str:
        text = config_of(base, [chat], f"gate_mode: random\n{head}")
        return "\n".join(make_plan(parse_config(text)).notes)

    assert "union adds nothing" in notes("tokenizer: union")
    assert "1 are in the tokenizer already ('code')" in notes("extra_tokens: [code, eta]")
    assert "pad_vocabulary has no effect: 64 is a multiple of 32" in notes("pad_vocabulary: 32")


@pytest.fixture(scope="module")
def relative(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with 50 more tokens, 20 of them special, and another chat template."""
    made = tmp_path_factory.mktemp("relative") / "relative"
    shutil.copytree(smollm2, made)
    more = [f"<|new {n}|>" if n < 20 else f"[new {n}]" for n in range(50)]
    edit(made / "tokenizer.json", lambda data: add(data, tuple(more)))
    edit(made / "config.json", lambda data: data.update(vocab_size=data["vocab_size"] + 50))
    edit(made / "tokenizer_config.json", lambda data: data.update(chat_template="<|new 0|>"))
    state = load_file(made / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, state[EMBEDDING].shape[1], generator=generator) * 0.1
    state[EMBEDDING] = torch.cat([state[EMBEDDING], rows.to(state[EMBEDDING].dtype)])
    (made / "model.safetensors").unlink()
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    return made


def test_a_union_of_real_models(smollm2: Path, relative: Path, tmp_path: Path) -> None:
    """Every token of both round-trips, old tokens have their logits, and readers know new ones."""
    plain, joined = (
        merged(tmp_path, smollm2, [smollm2, relative], f"tokenizer: {which}")
        for which in ("base", "union")
    )
    for model in (smollm2, relative):
        reads_every_token(joined, read_tokens(model))
    rows = tensors(joined)[EMBEDDING]
    assert torch.equal(rows, tensors(relative)[EMBEDDING])
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (smollm2, joined)]
    assert len({tokenizer.chat_template for tokenizer in tokenizers}) == 1
    ids = tokenizers[0]("The capital of France is Paris.", return_tensors="pt").input_ids
    logits = []
    for path in (plain, joined):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits.append(model(ids).logits)
    assert torch.equal(logits[1][..., : logits[0].shape[-1]], logits[0])
    prompts = ["The capital of France<|new 3|> is", "def f[new 33](n):"]
    found = [
        read(reader, joined, tmp_path / reader, prompts=prompts, new_tokens=8)
        for reader in ("transformers 5", "transformers 4.57", "llama.cpp")
    ]
    for other in found[1:]:
        assert other["prompt_lengths"] == found[0]["prompt_lengths"]
        assert other["generated"] == found[0]["generated"]
