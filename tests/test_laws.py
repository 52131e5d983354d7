"""The laws, for every architecture and gate mode found in the folders, on baby models."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from babies import (
    LLAMA3_ROPE,
    SIZES,
    make_adapter,
    make_model,
    save_weights,
    simple_config,
    write_config,
)
from safetensors.torch import load_file, safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from moemerge import Options, make_plan, merge, verify_checkpoint
from moemerge.architectures import types
from moemerge.architectures.slots import Constant, FromBody, FromExpert, Joined, Made, Mixture, Slot
from moemerge.config.schema import parse_config
from moemerge.dense import Passage, router_inputs
from moemerge.families import ATTENTION, RECORDS, normalise
from moemerge.gates import modes as gates
from moemerge.merging import shard_loop
from moemerge.plan.plan import Plan
from moemerge.prepare import choose as hosts
from moemerge.reporting import Silent

IS_5 = transformers.__version__ >= "5"
"""Version 4 does not know some families, and reads an olmo3's rope in another way."""

BODIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama tied": {"family": "llama", "tie_word_embeddings": True},
    "llama llama3 rope": {"family": "llama", "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "llama linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama head_dim": {"family": "llama", "head_dim": 16},
    "llama window": {"family": "llama", "sliding_window": 7},
    "llama layer types": {"sliding_window": 7, "layer_types": ["sliding_attention"] * 2},
    "llama without kv groups": {"family": "llama", "num_key_value_heads": 4},
    "mistral": {"family": "mistral", "sliding_window": None},
    "mistral window": {"family": "mistral", "sliding_window": 7},
    "mistral head_dim": {"family": "mistral", "sliding_window": 5, "head_dim": 16},
}
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}  # fmt: skip
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
LONGROPE = {  # as a phi3's config.json has it, and version 4 demands it
    "type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 6.0, 9.0],
}  # fmt: skip
BODIES |= {
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2 window": {"family": "qwen2", **QWEN_WINDOW},
    "qwen3": {"family": "qwen3", "head_dim": 8},
    "qwen3 head_dim": {"family": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3 biases": {"family": "qwen3", "head_dim": 8, "attention_bias": True},
    "qwen3 window": {"family": "qwen3", "head_dim": 8, **QWEN_WINDOW},
    "phi3": {"family": "phi3", "pad_token_id": 0},
    "phi3 longrope": {
        "family": "phi3", "pad_token_id": 0, "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 16,
    },
    "phi3 partial": {"family": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.5},
    "phi3 partial longrope": {
        "family": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.5, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 3.0],
        }, "original_max_position_embeddings": 16,
    },
    "olmo2": {"family": "olmo2"},
    "helium": {"family": "helium", "head_dim": 8, "pad_token_id": 0},
    "olmo3": {"family": "olmo3", "sliding_window": 64, "rope_theta": 500000.0},
    "ministral3": {
        "family": "ministral3", "head_dim": 8, "pad_token_id": 0, "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "olmo2 biases": {"family": "olmo2", "attention_bias": True},
    "granite": {"family": "granite", **GRANITE},
    "granite biases": {"family": "granite", **GRANITE, "attention_bias": True},
    "glm": {"family": "glm", "head_dim": 8, "pad_token_id": 0, "attention_bias": True},
    "glm tied": {
        "family": "glm", "head_dim": 16, "pad_token_id": 0, "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "ernie4_5": {
        "family": "ernie4_5", "head_dim": 8, "pad_token_id": 0, "tie_word_embeddings": False,
    },
    "ernie4_5 tied": {
        "family": "ernie4_5", "head_dim": 16, "pad_token_id": 0, "tie_word_embeddings": True,
    },
    "seed_oss": {"family": "seed_oss", "head_dim": 8, "pad_token_id": 0},
    "seed_oss head_dim": {"family": "seed_oss", "head_dim": 16, "pad_token_id": 0},
}  # fmt: skip

BODIES = {
    name: body
    for name, body in BODIES.items()
    if body.get("family", "llama") in CONFIG_MAPPING and (IS_5 or body.get("family") != "olmo3")
}


def holds(architecture: str, body: str) -> bool:
    """Whether the architecture takes a dense model of that body."""
    family, *settings = {"family": "llama", **BODIES[body]}.items()
    config = normalise({"model_type": family[1], **SIZES, **dict(settings)})
    mixture = Mixture(3, 2, SIZES["intermediate_size"])
    return not list(hosts.refusals(types.find(architecture), architecture, config, mixture))


USUAL = [name for name in types.names() if ATTENTION in types.find(name).HOLDS.layers]
"""The classes that hold bodies with attention in all layers; `test_kinds` has the others."""

HOSTED = [(name, body) for name in types.names() for body in BODIES if holds(name, body)]
DIALECTS = [4, 5] if transformers.__version__ >= "5" else [4]  # 4 misreads a dense model of 5
PROMPT = torch.tensor([[1, *range(3, 40)]])  # longer than every window above


def load(directory: Path) -> Any:
    """The model in transformers, after checking that nothing was missing or made up."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.float().eval()


def logits(directory: Path, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        return load(directory)(ids).logits


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bytes(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit for bit: `torch.equal` takes -0.0 for 0.0."""
    return one.keys() == two.keys() and all(
        (tensor.dtype, tensor.shape, raw(tensor)) == (two[n].dtype, two[n].shape, raw(two[n]))
        for n, tensor in one.items()
    )


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("architecture", "body"), HOSTED)
def test_identity(tmp_path: Path, architecture: str, body: str, dialect: int) -> None:
    """Experts that are all the base model give the dense model's logits, whatever the routers."""
    base = make_model(tmp_path / "base", dialect=dialect, **BODIES[body])
    text = simple_config(base, [base, base, base], f"architecture: {architecture}")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    dense, mixture = logits(base), logits(tmp_path / "out")
    assert dense.std() > 0.1
    assert (dense - mixture).abs().max() <= 1e-5


def test_every_family_of_every_architecture_has_a_body() -> None:
    tried = {(name, BODIES[body].get("family", "llama")) for name, body in HOSTED}
    tried = {(name, RECORDS[family].body or family) for name, family in tried}
    usual = {name for name, record in RECORDS.items() if record.layers == ATTENTION}
    held = {(n, f) for n in types.names() for f in types.find(n).HOLDS.families}
    assert tried == {(name, family) for name, family in held if family in usual}


def test_the_dialect_of_a_config_changes_nothing(tmp_path: Path) -> None:
    """A base model saved by transformers 5 gives the mixture that one saved by 4 gives."""
    for dialect in (4, 5):
        base = make_model(tmp_path / str(dialect), dialect=dialect, **BODIES["llama llama3 rope"])
        config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
        merge(config, tmp_path / f"out{dialect}")
    four, five = (all_tensors(tmp_path / f"out{dialect}") for dialect in (4, 5))
    assert same_bytes(four, five)
    configs = [(tmp_path / f"out{dialect}/config.json").read_bytes() for dialect in (4, 5)]
    assert configs[0] == configs[1]


def test_a_window_shorter_than_the_prompt_matters(tmp_path: Path) -> None:
    """The identity law would fail if the sliding window were dropped."""
    narrow = make_model(tmp_path / "a", family="mistral", sliding_window=7)
    wide = make_model(tmp_path / "b", family="mistral", sliding_window=None)
    assert (logits(narrow) - logits(wide)).abs().max() > 1e-2


def test_a_base_of_rope_null_is_one_that_says_nothing(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", rope_theta=10000.0)
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": None}))
    plan = make_plan(parse_config(simple_config(base, [base, base]))).plan
    assert plan.config["rope_theta"] == plan.config["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize(("kind", "window"), [("full_attention", None), ("sliding_attention", 7)])
def test_layer_types_say_whether_a_mistral_has_a_window(kind: str, window: int | None) -> None:
    raw = {"model_type": "mistral", "sliding_window": 7, "layer_types": [kind] * 32}
    config = normalise(raw)
    assert (config["sliding_window"], "layer_types" in config) == (window, False)


@pytest.mark.parametrize("mode", gates.for_merges())
def test_identity_for_every_gate_mode(tmp_path: Path, babies: dict[str, Path], mode: str) -> None:
    base = babies["base"]
    text = simple_config(base, [base, base], head=f"gate_mode: {mode}")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert (logits(base) - logits(tmp_path / "out")).abs().max() <= 1e-5


def test_untransformed_tensors_are_byte_identical(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, second = (shutil.copytree(model, tmp_path / n) for n, model in babies.items())
    for model in (base, first, second):  # a zero with a sign must keep it
        state = all_tensors(model)
        for tensor in state.values():
            tensor.view(-1)[1::2] = -0.0
        save_weights(model, state)
    config = write_config(tmp_path / "c.yaml", simple_config(base, [first, second]))
    merge(config, tmp_path / "out")
    out, body = all_tensors(tmp_path / "out"), all_tensors(base)
    experts = [all_tensors(first), all_tensors(second)]
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, tensor in out.items():
        if ".experts." in name:
            head, _, tail = name.partition("block_sparse_moe.experts.")
            index, w, _ = tail.split(".")
            source = experts[int(index)][f"{head}mlp.{names[w]}.weight"]
        elif ".gate." in name:
            continue
        else:
            source = body[name]
        assert same_bytes({name: tensor}, {name: source}), name


FIRST_BODY = dict(reversed(HOSTED))


def bytes_of(slot: Slot, body: dict[str, Any], experts: list[dict[str, Any]]) -> bytes | None:
    """What a slot that is not made, and only copied, must hold."""
    of = slot.of
    if isinstance(of, FromBody):
        return raw(body[of.tensor])
    if isinstance(of, FromExpert):
        return raw(experts[of.expert][of.tensor])
    if isinstance(of, Constant):
        return raw(torch.full(slot.shape, of.value))
    if isinstance(of, Joined) and of.axis == 0:
        return b"".join(bytes_of(part, body, experts) or b"" for part in of.parts)
    return None


@pytest.mark.parametrize("architecture", FIRST_BODY)
def test_every_architecture_holds_its_sources_bytes(tmp_path: Path, architecture: str) -> None:
    """Each tensor is its sources', whoever writes it; the same again, and verify agrees."""
    settings = BODIES[FIRST_BODY[architecture]]
    base, *models = (make_model(tmp_path / str(n), seed=n, **settings) for n in range(3))
    head = f"architecture: {architecture}\ngate_mode: random"
    config = write_config(tmp_path / "c.yaml", simple_config(base, models, head))
    made = merge(config, tmp_path / "out", Options(shard_size="20K"))
    out, body, experts = (
        all_tensors(tmp_path / "out"),
        all_tensors(base),
        list(map(all_tensors, models)),
    )
    mixture = Mixture(2, 2, SIZES["intermediate_size"])
    dense_config = normalise(json.loads((base / "config.json").read_text()))
    if settings.get("family") != "phi3":
        for slot in types.find(architecture).slots(dense_config, mixture):
            expected = bytes_of(slot, body, experts)
            assert isinstance(slot.of, Made) or expected == raw(out[slot.name]), slot.name
    routers = sum(bool(tensor.made) for tensor in made.plan.tensors)
    assert verify_checkpoint(tmp_path / "out").compared == len(out) - routers
    merge(config, tmp_path / "again", Options(shard_size="20K", jobs=8))
    assert files(tmp_path / "again") == files(tmp_path / "out")


@pytest.mark.parametrize("mode", gates.for_merges())
def test_same_config_and_seed_same_bytes(
    tmp_path: Path, babies: dict[str, Path], mode: str
) -> None:
    base, first, second = babies.values()
    head, noise = f"gate_mode: {mode}", "noise_scale: 1e-2"
    config = write_config(
        tmp_path / "c.yaml", simple_config(base, [first, second], head, per_expert=noise)
    )
    outs = [tmp_path / name for name in ("a", "b", "lazy")]
    for out in outs:
        merge(
            config, out, Options(seed=3, lazy=out.name == "lazy", jobs=8 if out.name == "b" else 1)
        )
    assert files(outs[0]) == files(outs[1]) == files(outs[2])
    merge(config, tmp_path / "other", Options(seed=4))
    assert files(tmp_path / "other") != files(outs[0])
    name = "model-00001-of-00002.safetensors"
    routers = [load_file(out / name) for out in (outs[0], tmp_path / "other")]
    assert same_bytes(*routers) == (not gates.find(mode).NEEDS.seed)


def test_shards_in_any_order_give_the_same_bytes(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first, second = babies.values()
    text = simple_config(base, [first, second], per_expert="noise_scale: 0.01")
    config = write_config(tmp_path / "c.yaml", text)
    options = Options(shard_size="8K")
    merge(config, tmp_path / "straight", options)
    written = []
    original = shard_loop.write_shard

    def shuffled(shard: Any, sources: Any, out: Path, *more: Any) -> Any:
        if not written:  # the first call writes all, in another order
            plan = make_plan(config, options).plan
            for other in random.Random(1).sample(plan.shards, len(plan.shards)):
                written.append(other.file)
                original(other, sources, out, *more)
        return original(shard, sources, out, *more)

    monkeypatch.setattr(shard_loop, "write_shard", shuffled)
    merge(config, tmp_path / "shuffled", options)
    assert len(written) > 4
    assert files(tmp_path / "straight") == files(tmp_path / "shuffled")


def test_shard_size_changes_no_tensor(tmp_path: Path, babies: dict[str, Path]) -> None:
    """Noise and casts are keyed by tensor and block, not by where a tensor is written."""
    base, first, second = babies.values()
    text = simple_config(base, [first, second], "dtype: bfloat16", "noise_scale: 0.01")
    config = write_config(tmp_path / "c.yaml", text)
    found = []
    for size in ("5GB", "4K", "20KB"):
        merge(config, tmp_path / size, Options(shard_size=size))
        found.append(all_tensors(tmp_path / size))
    for other in found[1:]:
        assert same_bytes(found[0], other)


def test_a_tensor_of_many_blocks_is_the_tensor_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming in blocks computes what whole-tensor arithmetic computes."""
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    text = simple_config(base, [f"{base}+{adapter}", base], per_expert="residual_scale: 0.5")
    config = write_config(tmp_path / "c.yaml", text)
    merge(config, tmp_path / "whole")
    monkeypatch.setattr("moemerge.plan.blocks.BLOCK_VALUES", 100)
    merge(config, tmp_path / "blocks")
    whole, blocks = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "blocks")
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, blocks[name], atol=1e-6, rtol=1e-6)


def test_routers_alone_in_the_first_shard(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, first]))
    plan = merge(config, tmp_path / "out").plan
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    first_shard = [name for name, file in index["weight_map"].items() if "00001-of" in file]
    assert first_shard == [tensor.name for tensor in plan.shards[0].tensors]
    assert all(".block_sparse_moe.gate." in name for name in first_shard)
    assert len(first_shard) == plan.config["num_hidden_layers"]


def test_a_plan_survives_json(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    adapter = make_adapter(tmp_path / "adapter", first)
    text = simple_config(base, [f"{first}+{adapter}", base], per_expert="noise_scale: 0.1")
    plan = make_plan(parse_config(text)).plan
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest


def test_dtype_is_converted_as_torch_converts(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    for dtype in ("bfloat16", "float16"):
        text = simple_config(base, [base, first], head=f"dtype: {dtype}")
        out = tmp_path / dtype
        merge(write_config(tmp_path / "c.yaml", text), out)
        body, made = all_tensors(base), all_tensors(out)
        wanted = getattr(torch, dtype)
        assert {tensor.dtype for tensor in made.values()} == {wanted}
        for name in body.keys() & made.keys():
            assert same_bytes({name: made[name]}, {name: body[name].to(wanted)}), name
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("scaling", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2},
                                     "alpha_pattern": {"layers.1.mlp.up_proj": 3}}])  # fmt: skip
def test_an_adapter_is_merged_as_peft_merges_it(
    tmp_path: Path, babies: dict[str, Path], scaling: dict[str, Any]
) -> None:
    from peft import PeftModel

    base = babies["base"]
    adapter = make_adapter(tmp_path / "adapter", base, **scaling)
    config = write_config(tmp_path / "c.yaml", simple_config(base, [f"{base}+{adapter}"]))
    noted = merge(config, tmp_path / "out").notes
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged = peft.merge_and_unload().state_dict()
    made = all_tensors(tmp_path / "out")
    for layer in range(2):
        for name, w in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            expert = made[f"model.layers.{layer}.block_sparse_moe.experts.0.{w}.weight"]
            torch.testing.assert_close(
                expert, merged[f"model.layers.{layer}.mlp.{name}.weight"], atol=1e-5, rtol=1e-5
            )
    assert any("not used (attention" in note for note in noted)


def test_an_adapter_on_the_base_changes_its_attention_and_saved_modules(tmp_path: Path) -> None:
    from peft import PeftModel

    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    both = f"{base}+{adapter}"
    merge(write_config(tmp_path / "c.yaml", simple_config(both, [both, both])), tmp_path / "out")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.inference_mode():
        dense = peft.merge_and_unload().eval()(PROMPT).logits
    assert (dense - logits(tmp_path / "out")).abs().max() <= 1e-4
    assert (dense - logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize("saved", [{"shards": 3}, {"bins": True}, {"bins": True, "shards": 2}])
def test_every_way_of_saving_gives_the_same_mixture(
    tmp_path: Path, babies: dict[str, Path], saved: dict[str, Any]
) -> None:
    base, first, _ = babies.values()
    other = shutil.copytree(first, tmp_path / "other")
    (other / "model.safetensors").unlink()
    save_weights(other, all_tensors(first), **saved)
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [first, base])), tmp_path / "a")
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [other, base])), tmp_path / "b")
    assert same_bytes(all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b"))


def test_noise_and_residual_scale(tmp_path: Path, babies: dict[str, Path]) -> None:
    base = babies["base"]
    text = simple_config(base, [base, base], per_expert="noise_scale: 0.5\nresidual_scale: 2.0")
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    made, body = all_tensors(tmp_path / "out"), all_tensors(base)
    experts = "model.layers.0.block_sparse_moe.experts"
    up = made[f"{experts}.0.w3.weight"] - body["model.layers.0.mlp.up_proj.weight"]
    down = made[f"{experts}.0.w2.weight"] / 2 - body["model.layers.0.mlp.down_proj.weight"]
    for noise in (up, down):
        assert abs(noise.std() - 0.5) < 0.05
        assert abs(noise.mean()) < 0.05
    assert not torch.equal(made[f"{experts}.0.w3.weight"], made[f"{experts}.1.w3.weight"])


@pytest.mark.parametrize("body", ["llama", "phi3 partial longrope"])
def test_hidden_gates_see_what_the_routers_of_the_mixture_see(tmp_path: Path, body: str) -> None:
    """What the pass collects is the input of the finished model's routers, token for token."""
    base = make_model(tmp_path / "base", **BODIES[body])
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
    ready = make_plan(config)
    merge(config, tmp_path / "out")
    model = load(tmp_path / "out")
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    sources = {text: opened.tensors for text, opened in ready.checkpoints.items()}
    prompts = [prompt for expert in ready.prompts for prompt in expert.positive]
    passages = list(map(Passage, prompts))
    collected = list(router_inputs(ready.body, sources, passages, Options(), Silent()))
    for number, prompt in enumerate(prompts):
        seen.clear()
        with torch.inference_mode():
            model(torch.tensor([prompt.ids]))
        for layer, states in enumerate(seen):
            ours = torch.from_numpy(collected[layer][number])
            torch.testing.assert_close(ours, states[prompt.own :], atol=1e-5, rtol=1e-5)


def test_prefix_counts_in_the_pass_and_not_in_the_average(babies: dict[str, Path]) -> None:
    ready = make_plan(parse_config(simple_config(babies["base"], [babies["base"]] * 2)))
    prompt = ready.prompts[0].positive[0]
    assert prompt.own == 1
    assert prompt.ids[0] == 1


def test_every_router_row_is_the_unit_mean_of_its_prompts(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    text = simple_config(base, [base, first], "gate_mode: hidden_avg").replace(
        "    positive_prompts:\n      - code python\n      - function class\n",
        "    positive_prompts: [code python, function class function class function]\n"
        "    negative_prompts: [dragon]\n",
    )
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    ready = make_plan(parse_config(text))
    model = load(base)

    def mean(prompt: Any, layer: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda module, args: seen.append(args[0][0])
        )
        with torch.inference_mode():
            model(torch.tensor([prompt.ids]))
        hook.remove()
        return seen[0][prompt.own :].mean(0)

    for layer in range(2):
        router = all_tensors(tmp_path / "out")[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        for row, expert in zip(router, ready.prompts, strict=True):
            wanted = sum(mean(p, layer) for p in expert.positive) / len(expert.positive)
            wanted = wanted - sum(mean(p, layer) for p in expert.negative) / max(
                len(expert.negative), 1
            )
            torch.testing.assert_close(row, wanted / wanted.norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_quantised_passes_give_nearly_the_same_routers(tmp_path: Path, option: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    base = make_model(tmp_path / "base", dtype=torch.bfloat16, **sizes)
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, base]))
    merge(config, tmp_path / "full")
    merge(config, tmp_path / "small", Options(**{option: True}))
    full, small = all_tensors(tmp_path / "full"), all_tensors(tmp_path / "small")
    name = "model.layers.1.block_sparse_moe.gate.weight"
    cosine = torch.nn.functional.cosine_similarity(full[name].float(), small[name].float())
    assert (cosine > 0.9).all()
    assert not torch.equal(full[name], small[name])


def test_carried_files_are_the_bases_byte_for_byte(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, first]))
    out = tmp_path / "out"
    merge(config, out)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    ours, theirs = (json.loads((d / "tokenizer_config.json").read_text()) for d in (out, base))
    assert theirs.pop("tokenizer_class") == "TokenizersBackend"
    assert ours.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    assert ours.pop("model_input_names") == ["input_ids", "attention_mask"]
    assert ours == theirs
    inputs = AutoTokenizer.from_pretrained(out)("code python", return_tensors="pt")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert load(out).generate(**inputs, max_new_tokens=3).shape[1] > inputs.input_ids.shape[1]
    merge(config, tmp_path / "bare", Options(copy_tokenizer=False))
    assert not (tmp_path / "bare/tokenizer.json").exists()


def test_a_finished_directory_verifies_and_a_changed_byte_does_not(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    from moemerge import VerifyError

    base, first, _ = babies.values()
    out = tmp_path / "out"
    merge(write_config(tmp_path / "c.yaml", simple_config(base, [base, first])), out)
    plan = make_plan(tmp_path / "c.yaml").plan
    checked = verify_checkpoint(out)
    assert checked.compared == checked.tensors - len(plan.shards[0].tensors)
    for path in sorted(out.iterdir()):
        if path.name == "README.md":
            continue
        content = path.read_bytes()
        for at in {0, len(content) // 2, len(content) - 2}:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(VerifyError):
                verify_checkpoint(out)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(VerifyError):
            verify_checkpoint(out)
        path.write_bytes(content)
    verify_checkpoint(out)


def test_verify_says_which_sources_it_could_not_compare(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    gone = shutil.copytree(babies["first"], tmp_path / "gone")
    out = tmp_path / "out"
    merge(write_config(tmp_path / "c.yaml", simple_config(babies["base"], [gone, gone])), out)
    shutil.rmtree(gone)
    checked = verify_checkpoint(out)
    with safe_open(out / "model-00002-of-00002.safetensors", "pt") as file:
        others = [name for name in file.keys() if ".experts." not in name]  # noqa: SIM118
    assert checked.compared == len(others)
