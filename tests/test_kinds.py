"""The laws for models whose layers are not all attention, in every class that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from babies import simple_config, write_config
from kinds import KINDS, make_kind
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moemerge import (
    InputError,
    Options,
    add,
    drop,
    extract,
    make_plan,
    merge,
    top_k,
    verify_checkpoint,
)
from moemerge.architectures import dense_shapes, types
from moemerge.errors import Findings
from moemerge.families import ATTENTION, RECORDS, normalise, record_of
from moemerge.mixture import open_moe
from moemerge.plan import Read

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="5 has these classes")

PAIRS = [
    (name, kind)
    for name in types.names()
    for kind, settings in KINDS.items()
    if settings["model_type"] in types.find(name).HOLDS.families
]
APART = [(name, kind) for name, kind in PAIRS if not types.find(name).READING.names.closed]
"""Those that can be taken apart again."""

PROMPT = torch.tensor([[1, *range(3, 40)]])  # longer than every window


def load(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.float().eval()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_every_such_family_is_tried_in_every_class() -> None:
    tried = {(name, KINDS[kind]["model_type"]) for name, kind in PAIRS}
    """Those that are only a part of a model that sees are tried in `test_seeing`."""
    own = {name: record for name, record in RECORDS.items() if record.layers != ATTENTION}
    known = {name for name, record in own.items() if record.causal}
    held = {(n, f) for n in types.names() for f in types.find(n).HOLDS.families if f in known}
    assert tried == held
    assert {family for _, family in held} == known


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("architecture", "kind"), PAIRS)
def test_identity(tmp_path: Path, architecture: str, kind: str, tied: bool) -> None:
    """Equal experts give the dense model's logits, and with a cache its greedy text."""
    base = make_kind(tmp_path / "base", kind, tied)
    text = simple_config(base, [base] * 4, f"architecture: {architecture}")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    dense, mixture = load(base), load(tmp_path / "out")
    with torch.inference_mode():
        wanted, found = dense(PROMPT).logits, mixture(PROMPT).logits
        largest = wanted.abs().max()
        assert wanted.std() > 0.02
        # Gemma 4's class norms twice, which `plan` says.
        assert (wanted - found).abs().max() <= (1e-4 if "gemma4" in kind else 1e-5) * largest
        settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
        start = PROMPT[:, :9]
        assert torch.equal(dense.generate(start, **settings), mixture.generate(start, **settings))


@pytest.mark.parametrize(("architecture", "kind"), PAIRS)
def test_the_body_and_the_experts_are_byte_copies(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    base, *experts = (make_kind(tmp_path / str(n), kind, seed=n) for n in range(3))
    text = simple_config(base, experts, f"architecture: {architecture}")
    plan = make_plan(write_config(tmp_path / "c.yaml", text)).plan
    merge(tmp_path / "c.yaml", tmp_path / "out", Options(shard_size="20K"))
    out = tensors(tmp_path / "out")
    had = {str(model): tensors(model) for model in (base, *experts)}
    named = RECORDS[KINDS[kind]["model_type"]].name_in_files
    copied = set[str]()
    for tensor in plan.tensors:
        read = tensor.recipe
        if isinstance(read, Read) and not tensor.made and named(read.tensor) in had[read.source]:
            copied.add(named(read.tensor))
            assert torch.equal(out[tensor.name], had[read.source][named(read.tensor)])
    assert {name for name in had[str(base)] if is_body(name)} <= copied
    assert verify_checkpoint(tmp_path / "out").compared


def is_body(name: str) -> bool:
    of_mlp = (".mlp.", ".feed_forward.", ".shared_mlp.", "mixer.up_proj", "mixer.down_proj")
    return not any(part in name for part in of_mlp)


@pytest.mark.parametrize(("architecture", "kind"), PAIRS)
def test_routers_are_fitted_to_what_they_see(
    tmp_path: Path, architecture: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs that a fit uses are those that the finished mixture's routers get."""
    base, *experts = (make_kind(tmp_path / str(n), kind, seed=n) for n in range(3))
    head = f"architecture: {architecture}\ngate_mode: hidden_last"
    config = write_config(tmp_path / "c.yaml", simple_config(base, experts, head))
    merge(config, tmp_path / "out")
    merge(config, tmp_path / "lazy", Options(lazy=True))
    for name, tensor in tensors(tmp_path / "out").items():
        assert torch.equal(tensor, tensors(tmp_path / "lazy")[name]), name
    merge(config, tmp_path / "same", Options())
    same = write_config(tmp_path / "s.yaml", simple_config(base, [base] * 2, head))
    merge(same, tmp_path / "equal")  # its states are the base's

    from moemerge.dense import Body, Passage, router_inputs
    from moemerge.reporting import Silent
    from moemerge.text import Prompt

    ready = make_plan(same)
    sources = {text: one.tensors for text, one in ready.checkpoints.items()}
    prompt = Prompt(tuple(PROMPT[0].tolist()), 0)
    assert isinstance(ready.body, Body)
    fitted = list(router_inputs(ready.body, sources, [Passage(prompt)], Options(), Silent()))
    model, seen = load(tmp_path / "equal"), list[torch.Tensor]()
    routing = types.find(architecture).READING.names.router.removesuffix(".weight")
    for name, module in model.named_modules():
        if name.endswith((routing, "block_sparse_moe.router")) or (
            name.endswith("block_sparse_moe.gate") and "granite" in architecture
        ):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.inference_mode():
        model(PROMPT)
    assert len(fitted) == len(seen)
    for (ours,), theirs in zip(fitted, seen, strict=True):
        wanted = theirs.reshape(ours.shape).float()
        difference = (torch.from_numpy(ours) - wanted).abs().max()
        assert difference <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("mode", ["ridge", "self", "hidden"])
@pytest.mark.parametrize("kind", ["qwen3.5", "gemma4 embeddings for each layer, wide MLPs",
                                  "lfm2", "granite4 mamba"])  # fmt: skip
def test_every_way_to_fit_routers_runs(tmp_path: Path, kind: str, mode: str) -> None:
    base, *experts = (make_kind(tmp_path / str(n), kind, seed=n) for n in range(3))
    head = f"gate: {{mode: {mode}" + ", samples: 2, tokens: 4" * (mode == "self") + "}"
    config = write_config(tmp_path / "c.yaml", simple_config(base, experts, head))
    made = merge(config, tmp_path / "out")
    names = {tensor.name for tensor in made.plan.tensors if tensor.made == "router"}
    with safe_open(tmp_path / "out" / made.plan.shards[0].file, "pt") as first:
        assert names <= set(first.keys())
        assert all(first.get_tensor(name).std() > 0 for name in names)


@pytest.mark.parametrize(("architecture", "kind"), APART)
def test_a_finished_mixture_is_opened_and_taken_apart(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    """Its experts are dense models again, with the logits that they had."""
    base, _first, second = (make_kind(tmp_path / str(n), kind, seed=n) for n in range(3))
    text = simple_config(base, [base, second], f"architecture: {architecture}")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    moe = open_moe(tmp_path / "out", None, Findings())
    assert (moe.experts, moe.per_token, moe.is_misnamed) == (2, 2, False)
    extract(tmp_path / "out", 0, tmp_path / "dense")
    with torch.inference_mode():
        wanted, found = load(base)(PROMPT).logits, load(tmp_path / "dense")(PROMPT).logits
    assert (wanted - found).abs().max() <= 1e-6 * wanted.abs().max()  # Granite 3's class, or 4's


@pytest.mark.parametrize(
    ("kind", "key", "value", "said"),
    [
        ("qwen3.5", "layer_types", ["mamba"] * 4, "layer_types is not one of"),
        ("qwen3.5", "linear_num_key_heads", "two", "linear_num_key_heads is 'two'"),
        ("lfm2", "intermediate_size", None, "intermediate_size is None"),
        ("gemma4", "per_layer_config", {"1": {"head_dim": 32}}, "per_layer_config is not the same"),
        ("granite4", "rope_parameters", 7, "rope_parameters is 7"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    tmp_path: Path, kind: str, key: str, value: object, said: str
) -> None:
    base = make_kind(tmp_path / "base", kind)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(Exception, match=said):
        make_plan(write_config(tmp_path / "c.yaml", simple_config(base, [base, base])))


@pytest.mark.parametrize(("architecture", "kind"), APART)
def test_experts_come_and_go(tmp_path: Path, architecture: str, kind: str) -> None:
    """Edited, it is the mixture that a merge of those experts would give."""
    base, *experts = (make_kind(tmp_path / str(n), kind, seed=n) for n in range(4))
    head = f"architecture: {architecture}\ngate_mode: zeros"

    def merged(name: str, models: list[Path], more: str = "") -> dict[str, torch.Tensor]:
        text = simple_config(base, models, head + more)
        merge(write_config(tmp_path / "c.yaml", text), tmp_path / name)
        return tensors(tmp_path / name)

    merged("three", experts)
    two, alone = merged("two", experts[:2]), "\nexperts_per_token: 1"
    dropped, added = tmp_path / "dropped", tmp_path / "added"
    drop(tmp_path / "three", 2, dropped)
    found = tensors(dropped)
    assert found.keys() == two.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in two.items())
    add(tmp_path / "two", str(experts[2]), added)
    top_k(added, 1)
    merged("one", experts, alone)
    assert (added / "config.json").read_text() == (tmp_path / "one/config.json").read_text()
    load(added)


@pytest.mark.parametrize("more", ["pad_vocabulary: 100", "extra_tokens: ['<new>']"])
def test_embeddings_for_each_layer_fix_the_vocabulary(tmp_path: Path, more: str) -> None:
    base = make_kind(tmp_path / "base", "gemma4 shares keys")
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base], more))
    with pytest.raises(InputError, match="embeddings for each layer too"):
        make_plan(config)
    plain = make_kind(tmp_path / "plain", "gemma4")
    make_plan(write_config(tmp_path / "c.yaml", simple_config(plain, [plain, plain], more)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_a_config_ends_in_a_traceback(tmp_path: Path, kind: str) -> None:
    """Every key with every wrong value: refused with words, or read, and then shapes are known."""
    raw = json.loads((make_kind(tmp_path / "base", kind) / "config.json").read_text())
    refused = 0
    for key in {**RECORDS[raw["model_type"]].defaults, **raw}:
        for value in ("x", -1, 0, 2.5, [], ["x"], {"x": 1}, None, True):
            try:
                config = normalise({**raw, key: value})
            except ValueError as error:
                assert str(error)
                refused += 1
                continue
            if record_of(config):
                assert dense_shapes(config)
    assert refused > 50
