"""A body that is the experts' average: what is averaged, by which weights, and what cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moemerge import InputError, Options, VerifyError, make_plan, merge, parse_config
from moemerge import verify_checkpoint as verify
from moemerge.output.shard_file import file_checksum

HEAD = "gate_mode: random\nbody: average"
VOCABULARY = {"model.embed_tokens.weight", "lm_head.weight"}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def body_of(directory: Path) -> dict[str, torch.Tensor]:
    """A mixture's tensors but for MLPs and routers; a dense model's but for MLPs."""
    mlps = (".mlp.", ".block_sparse_moe.")
    return {n: t for n, t in tensors(directory).items() if not any(m in n for m in mlps)}


def weighted(base: Path, experts: list[Any], weights: list[Any]) -> str:
    head, *listed = simple_config(base, experts, HEAD).split("  - ")
    parts = zip(listed[::3], listed[1::3], listed[2::3], weights, strict=True)
    return head + "".join(
        f"  - {source}  - {one}  - {other}    body_weight: {weight}\n"
        for source, one, other, weight in parts
    )


def check_mean(
    made: dict[str, torch.Tensor], parts: list[dict[str, torch.Tensor]], weights: list[float]
) -> None:
    """Every tensor is the weighted mean, up to its dtype's rounding."""
    assert made
    for name, tensor in made.items():
        wanted = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True))
        wanted = wanted / sum(weights)
        tolerance = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), wanted, atol=tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 2, 0.5], [0, 3, 1]])
def test_the_body_is_the_weighted_mean_of_the_experts(
    tmp_path: Path, babies: dict[str, Path], weights: list[float]
) -> None:
    experts = list(babies.values())
    text = weighted(babies["base"], experts, weights)
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    check_mean(body_of(tmp_path / "out"), [body_of(e) for e in experts], weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    experts = [make_model(tmp_path / str(n), seed=n, dtype=dtype) for n in range(3)]
    text = weighted(experts[0], experts, [1, 2, 3])
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    made = body_of(tmp_path / "out")
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    check_mean(made, [body_of(expert) for expert in experts], [1, 2, 3])


def test_the_experts_stay_what_they_are(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    for body in ("base", "average"):
        head = f"gate_mode: random\nbody: {body}"
        text = simple_config(base, [first, second], head)
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / body)
    ours, theirs = (tensors(tmp_path / body) for body in ("average", "base"))
    experts = [name for name in ours if ".experts." in name]
    assert len(experts) == 12
    assert all(torch.equal(ours[name], theirs[name]) for name in experts)


@pytest.mark.parametrize("weights", [[1, 1], [1, 0], [0.3, 7]])
def test_the_average_of_one_model_is_a_copy_of_it(
    tmp_path: Path, babies: dict[str, Path], weights: list[float]
) -> None:
    base, first, second = babies.values()
    experts = [first, second if 0 in weights else first]
    text = weighted(base, experts, weights)
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    made, wanted = body_of(tmp_path / "out"), body_of(first)
    assert made.keys() == wanted.keys()
    for name, tensor in made.items():
        assert tensor.numpy().tobytes() == wanted[name].numpy().tobytes(), name


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_identity(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Experts that are all the base model give its logits, whoever's the body is."""
    base = make_model(tmp_path / "base", **changes)
    text = simple_config(base, [base, base, base], "body: average")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    ids = torch.tensor([[1, *range(4, 34)]])
    with torch.inference_mode():
        dense, mixture = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
            for path in (base, tmp_path / "out")
        )
    assert (dense - mixture).abs().max() <= 1e-5


def test_routers_see_the_average(tmp_path: Path, babies: dict[str, Path]) -> None:
    """The rows are made of what the averaged body shows them, not the base's."""
    base, first, second = babies.values()
    routers = []
    for body in ("base", "average"):
        head = f"gate_mode: hidden_avg\nbody: {body}"
        text = simple_config(base, [first, second], head)
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / body)
        routers.append(tensors(tmp_path / body)["model.layers.0.block_sparse_moe.gate.weight"])
    assert (routers[0] - routers[1]).abs().max() > 1e-2
    ready = make_plan(tmp_path / "c.yaml")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "average").eval()
    layer = model.model.layers[0]
    block = getattr(layer, "mlp", None) or layer.block_sparse_moe
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for row, expert in zip(routers[1], ready.prompts, strict=True):
        means = []
        for prompt in expert.positive:
            with torch.inference_mode():
                model(torch.tensor([prompt.ids]))
            means.append(seen.pop()[prompt.own :].mean(0))
        wanted = torch.stack(means).mean(0)
        torch.testing.assert_close(row, wanted / wanted.norm(), atol=1e-5, rtol=1e-5)


def test_an_adapters_changes_of_attention_are_in_the_average(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    from peft import PeftModel

    base, first, _ = babies.values()
    adapter = make_adapter(tmp_path / "adapter", base)
    text = simple_config(base, [f"{base}+{adapter}", first], HEAD)
    notes = merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out").notes
    assert not any("are not used" in note for note in notes), notes
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged, other = peft.merge_and_unload().state_dict(), tensors(first)
    for name, tensor in body_of(tmp_path / "out").items():
        wanted = (merged[name] + other[name]) / 2
        torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)
    assert verify(tmp_path / "out").compared == len(tensors(tmp_path / "out")) - 2


def spelled(data: dict[str, Any], old: str, new: str) -> None:
    """Give the id of a token to another one."""
    vocabulary = data["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)


def swapped(data: dict[str, Any]) -> None:
    vocabulary = data["model"]["vocab"]
    vocabulary["code"], vocabulary["python"] = vocabulary["python"], vocabulary["code"]


def with_added(data: dict[str, Any], number: int) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entry = {"id": number, "content": "<|im_start|>", "special": True, **flags}
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {text: n for text, n in vocabulary.items() if n != number}
    data["added_tokens"] = [one for one in data["added_tokens"] if one["id"] != number] + [entry]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


CODE, PYTHON, USER, LAST = 4, 5, 3, 32
"""Ids of a baby's tokens; 33 to 63 have none."""

Tokens = Callable[[Path], object]
APART: dict[str, tuple[Tokens, set[int], str]] = {
    # what the expert's tokenizer is: (how it came to be, the rows that are others', what is said)
    "one token renamed": (
        lambda m: edit(m / "tokenizer.json", lambda d: spelled(d, "code", "<|im_start|>")),
        {CODE}, "1 row of embeddings and head not in the body's mean: other tokens "
        "(id 4 is 'code' in the base, '<|im_start|>' in it)",
    ),
    "two tokens exchanged": (
        lambda m: edit(m / "tokenizer.json", swapped), {CODE, PYTHON}, "2 rows of embeddings"
    ),
    "a special token renamed": (
        lambda m: edit(m / "tokenizer.json", lambda d: with_added(d, USER)),
        {USER}, "(id 3 is '<|user|>' in the base, '<|im_start|>' in it)",
    ),
    "a token in a padding row": (
        lambda m: edit(m / "tokenizer.json", lambda d: with_added(d, 40)),
        {40}, "(id 40 is no token in the base, '<|im_start|>' in it)",
    ),
    "a token that it lacks": (
        lambda m: edit(m / "tokenizer.json", lambda d: d["model"]["vocab"].pop("please")),
        {LAST}, "(id 32 is 'please' in the base, no token in it)",
    ),
    "a token that its tokenizer_config.json adds": (
        lambda m: (m / "tokenizer_config.json").write_text(
            '{"added_tokens_decoder": {"41": {"content": "<|im_start|>"}}}'
        ),
        {41}, "(id 41 is no token in the base, '<|im_start|>' in it)",
    ),
    "a token that its added_tokens.json adds": (
        lambda m: (m / "added_tokens.json").write_text('{"<|im_start|>": 42}'),
        {42}, "(id 42 is no token in the base, '<|im_start|>' in it)",
    ),
    "no tokenizer.json": (
        lambda m: (m / "tokenizer.json").rename(m / "tokenizer.model"),
        {*range(64)}, "embeddings and head not in the body's mean: its tokens cannot be compared "
        "with the base's (there is no tokenizer.json)",
    ),
    "a tokenizer.json that cannot be read": (
        lambda m: (m / "tokenizer.json").write_text("{"), {*range(64)}, "(its tokenizer.json cannot"
    ),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("what", APART)
def test_rows_of_other_tokens_are_no_part_of_the_mean(
    tmp_path: Path, models: dict[str, Path], what: str, tied: bool
) -> None:
    """Each row is the mean of the experts that have the base's token there; else it is the
    base's. Everything else of the body is the mean of all."""
    change, apart, words = APART[what]
    names = ("base", "first", "second")
    base, first, second = (models[f"{name}{' tied' * tied}"] for name in names)
    other = shutil.copytree(second, tmp_path / "other")
    change(other)
    for experts, weights in (([first, other], [1, 2]), ([other, other], [1, 1])):
        out = tmp_path / str(weights[-1])
        config = write_config(tmp_path / "c.yaml", weighted(base, experts, weights))
        done = merge(config, out)
        said = [n for n in done.notes if n.startswith(("other: ", "other, other-2: "))]
        assert any(words in n for n in said), done.notes
        assert verify(out).compared == len(tensors(out)) - 2
        made, whose = body_of(out), [body_of(one) for one in (base, *experts)]
        for one in whose:  # a tied head is in what is written alone
            one.setdefault("lm_head.weight", one["model.embed_tokens.weight"])
        for name in VOCABULARY:
            rows = made.pop(name)
            for row in range(64):
                if row not in apart:
                    wanted = sum(w * t[name][row] for w, t in zip(weights, whose[1:], strict=True))
                    torch.testing.assert_close(rows[row], wanted / sum(weights))
                else:
                    stays = whose[0] if other in experts[:1] else whose[1]
                    assert torch.equal(rows[row], stays[name][row]), (name, row)
        check_mean(made, whose[1:], weights)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        f"{name}{' tied' * tied}": make_model(
            root / f"{name}{tied}", seed=seed, tie_word_embeddings=tied
        )
        for tied in (False, True)
        for seed, name in enumerate(("base", "first", "second"))
    }


@pytest.mark.parametrize("size", [50, 70])
def test_vocabularies_of_other_sizes_share_the_rows_that_both_have(
    tmp_path: Path, models: dict[str, Path], size: int
) -> None:
    base, first = models["base"], models["first"]
    other = make_model(tmp_path / "other", seed=5, vocab_size=size)
    text = weighted(base, [first, other], [1, 1])
    done = merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert any("14 rows of embeddings" in note for note in done.notes) == (size == 50), done.notes
    made, parts, both = body_of(tmp_path / "out"), [body_of(first), body_of(other)], min(size, 64)
    first_rows = [{n: t[n][:both] for n in VOCABULARY} for t in (made, *parts)]
    check_mean(first_rows[0], first_rows[1:], [1, 1])
    assert all(torch.equal(made.pop(n)[both:], parts[0][n][both:64]) for n in VOCABULARY)
    check_mean(made, parts, [1, 1])


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_another_kind_is_no_part_of_the_mean(
    tmp_path: Path, models: dict[str, Path], tied: bool
) -> None:
    base, other = models[f"base{' tied' * tied}"], models[f"second{' tied' * (not tied)}"]
    done = merge(write_config(tmp_path / "c.yaml", weighted(base, [other], [1])), tmp_path / "out")
    assert any("head of its own, and the base has" in note for note in done.notes), done.notes
    for name in VOCABULARY & tensors(base).keys():
        assert torch.equal(tensors(tmp_path / "out")[name], tensors(base)[name])


def test_an_adapters_own_tokenizer_tells_of_its_rows(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    base, first = models["base"], models["first"]
    changes = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}
    adapter = make_adapter(tmp_path / "adapter", first, **changes)
    shutil.copy(first / "tokenizer.json", adapter)
    edit(adapter / "tokenizer.json", lambda d: spelled(d, "code", "<|im_start|>"))
    text = weighted(base, [f"{first}+{adapter}"], [1])
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    made, saved = tensors(tmp_path / "out"), load_file(adapter / "adapter_model.safetensors")
    for name in VOCABULARY:
        wanted = saved[f"base_model.model.{name}"].clone()
        wanted[CODE] = tensors(base)[name][CODE]
        assert torch.equal(made[name], wanted)


def test_a_vocabulary_of_the_mixtures_own_has_the_rows_that_were_averaged(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    """What the base has is as without a union; what an expert renamed has a row of its own."""
    base, first = models["base"], models["first"]
    other = shutil.copytree(models["second"], tmp_path / "other")
    edit(other / "tokenizer.json", lambda d: spelled(d, "code", "<|im_start|>"))
    text = weighted(base, [first, other], [1, 1])
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "plain")
    union = text.replace("body: average", "body: average\ntokenizer: union\npad_vocabulary: 8")
    merge(write_config(tmp_path / "u.yaml", union), tmp_path / "union", Options(shard_size="4KB"))
    verify(tmp_path / "union")
    for name in VOCABULARY:
        plain, made = tensors(tmp_path / "plain")[name], tensors(tmp_path / "union")[name]
        assert torch.equal(made[:33], plain[:33])
        assert torch.equal(made[33], tensors(other)[name][CODE])


def test_what_agrees_here_and_there_alone_is_another_tokenizer(tmp_path: Path) -> None:
    """However many tokens differ, the plan stays small."""
    base, other = (make_model(tmp_path / name, vocab_size=5000) for name in ("base", "other"))
    for number, model in enumerate((base, other)):
        words = {f"{n}{'x' * (number * n % 2)}": n for n in range(33, 5000)}
        edit(model / "tokenizer.json", lambda d, words=words: d["model"]["vocab"].update(words))
    ready = make_plan(parse_config(weighted(base, [other], [1])))
    assert any("it has another tokenizer (id 33 is '33'" in note for note in ready.notes)
    assert len(json.dumps(ready.plan.to_json())) < 1 << 16


OTHER_ATTENTION: dict[str, dict[str, Any]] = {
    "rope_parameters": {"rope_theta": 500000.0},
    "num_attention_heads": {"num_attention_heads": 8, "head_dim": 8},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 16},
    "sliding_window": {"family": "mistral", "sliding_window": 7},
}


@pytest.mark.parametrize("key", OTHER_ATTENTION)
def test_attentions_that_have_no_average_are_refused(
    tmp_path: Path, babies: dict[str, Path], key: str
) -> None:
    changes, base = OTHER_ATTENTION[key], babies["base"]
    other = make_model(tmp_path / "other", **changes)
    if changes.get("family"):
        base = make_model(tmp_path / "base", **{**changes, "sliding_window": 9})
    text = simple_config(base, [base, other], HEAD)
    with pytest.raises(InputError) as refused:
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    lines = [str(problem) for problem in refused.value.problems]
    assert any(
        line.startswith(f"c.yaml:9: experts[1].source_model: {key} is ")
        and line.endswith("such attentions have no average: use body: base")
        for line in lines
    ), lines
    assert not (tmp_path / "out").exists()
    make_plan(parse_config(text.replace("body: average", "body: base")))


def test_a_weight_without_effect_is_said(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    text = weighted(base, [first, second], [1, 2]).replace("body: average", "body: base")
    notes = make_plan(parse_config(text)).notes
    assert "experts[1].body_weight has no effect: body is base" in notes
    assert not any("experts[0].body_weight" in note for note in notes)


BAD: dict[str, tuple[str, list[Any], str]] = {
    # what is wrong: (the body, its weights, words of the problem)
    "unknown body": ("avrage", [1, 2], "body: 'avrage' is no body; did you mean 'average'?"),
    "a body that is a list": ("[a]", [1, 2], "body: is a list; write text"),
    "all weights 0": ("average", [0, 0], "experts: have no body_weight above 0; give one"),
    "a negative weight": ("average", [3, -2], "is -2; a weight is 0 or more"),
    "a weight of text": ("average", [1, "much"], "is 'much'; write a number"),
    "a weight that is infinite": ("average", [1, ".inf"], "is '.inf'; write a number"),
    "a weight that is absurd": ("average", [1, "1e31"], "is 1e+31; a weight is 0 or more"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_body_is_refused_for(tmp_path: Path, babies: dict[str, Path], kind: str) -> None:
    base, first, second = babies.values()
    body, weights, words = BAD[kind]
    text = weighted(base, [first, second], weights).replace("average", body)
    with pytest.raises(InputError) as refused:
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    [problem] = refused.value.problems
    assert words in str(problem) and problem.where.startswith("c.yaml:"), problem
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["missing", "of another shape"])
def test_a_tensor_of_an_experts_attention_that_cannot_be_averaged_is_refused(
    tmp_path: Path, babies: dict[str, Path], what: str
) -> None:
    base, first, _ = babies.values()
    other = make_model(tmp_path / "other")
    name, state = "model.layers.1.self_attn.q_proj.weight", tensors(other)
    wrong = state.pop(name)[:16].clone()
    save_weights(other, state if what == "missing" else {**state, name: wrong})
    with pytest.raises(InputError) as refused:
        make_plan(parse_config(simple_config(base, [first, other], HEAD)))
    [problem] = refused.value.problems
    assert "experts[1].source_model" in problem.where and name in problem.what
    make_plan(parse_config(simple_config(base, [first, other], "gate_mode: random")))


def test_any_number_of_jobs_and_shards_give_the_same_bytes(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, second = babies.values()
    adapter = make_adapter(tmp_path / "adapter", base)
    text = weighted(base, [f"{base}+{adapter}", first, second], [1, 2, 3])
    config = write_config(tmp_path / "c.yaml", text)
    found = []
    for jobs in (1, 8):
        out = tmp_path / str(jobs)
        merge(config, out, Options(jobs=jobs, shard_size="16KB"))
        found.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert found[0] == found[1]
    merge(config, tmp_path / "whole")
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "1")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


def test_verify_compares_the_average(tmp_path: Path, babies: dict[str, Path]) -> None:
    """A changed byte is found though the manifest's checksum is made to fit."""
    base, first, second = babies.values()
    out = tmp_path / "out"
    text = simple_config(base, [first, second], HEAD)
    merge(write_config(tmp_path / "c.yaml", text), out)
    verify(out)
    shard, manifest = out / "model-00002-of-00002.safetensors", out / "moemerge.json"
    content = shard.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = "model.layers.1.self_attn.q_proj.weight"
    at = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0] + 5
    shard.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    data = json.loads(manifest.read_text())
    data["files"][shard.name]["xxh3"] = file_checksum(shard)
    manifest.write_text(json.dumps(data))
    with pytest.raises(VerifyError, match=f"{name} is not what its sources give"):
        verify(out)


def test_a_config_keeps_its_body(babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    config = parse_config(weighted(base, [first, second], [1, 2]))
    assert (config.body, config.experts[1].body_weight) == ("average", 2.0)
    again = parse_config(type(config)(**{**vars(config), "text": ""}).as_yaml())
    assert again == config
    plans = {
        make_plan(parse_config(text)).plan.digest
        for text in (
            weighted(base, [first, second], [1, 2]),
            weighted(base, [first, second], [1, 3]),
            simple_config(base, [first, second], "gate_mode: random"),
        )
    }
    assert len(plans) == 3
