"""Adapters held against PEFT: each field of its config, and each kind of tensor that it writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_model, simple_config, write_config
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import VeloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moemerge import InputError, make_plan, merge, verify_checkpoint
from moemerge.checkpoint import lora_config
from moemerge.config.schema import load_config

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(4, 24)[None]
MLPS = ["gate_proj", "up_proj", "down_proj"]
TIED = {"tie_word_embeddings": True}
QWEN2 = {"family": "qwen2"}
ENDS = ["embed_tokens", "lm_head"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is handled as PEFT does: the `fields` of an adapter, and the `model` that it is on.

    `after` are fields of adapter_config.json to change once it is saved; None removes one.
    """

    fields: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    after: dict[str, Any] = dataclasses.field(default_factory=dict)


def on(*modules: str, **fields: Any) -> Row:
    return Row({"target_modules": list(modules), **fields})


def tied(*modules: str, **fields: Any) -> Row:
    return Row({"target_modules": list(modules), **fields}, TIED)


HANDLED = {
    "r": Row({"r": 3}),
    "r absent": Row({"r": 8}, after={"r": None}),
    "lora_alpha": Row({"lora_alpha": 5}),
    "lora_alpha absent": Row({}, after={"lora_alpha": None}),
    "use_rslora": Row({"use_rslora": True}),
    "rank_pattern": Row({"rank_pattern": {"^model.layers.1.mlp.up_proj": 2, "down.proj": 3}}),
    "alpha_pattern": Row({"alpha_pattern": {r"layers\.\d+\.mlp\.gate_proj": 3, "^q_proj": 1}}),
    "target_modules": Row({"target_modules": r".*\.1\..*(q|up)_proj"}),
    "target_modules, fewer than were saved": Row({}, after={"target_modules": ["up_proj"]}),
    "exclude_modules": on(*MLPS, exclude_modules=["layers.0.mlp.up_proj", "q_proj"]),
    "exclude_modules, set later": Row({}, after={"exclude_modules": r".*\.0\..*"}),
    "layers_to_transform": on(*MLPS, layers_to_transform=1, layers_pattern="layers"),
    "layers_to_transform, set later": Row(
        {"target_modules": MLPS}, after={"layers_to_transform": [1]}
    ),
    "layers_pattern, set later": Row(
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"]},
        after={"layers_to_transform": 0, "layers_pattern": "h"},
    ),
    "target_parameters": on("q_proj", target_parameters=["mlp.up_proj.weight"]),
    "target_parameters, patterns of the module": on(
        "q_proj",
        target_parameters=["mlp.up_proj.weight"],
        alpha_pattern={"up_proj": 1},
        rank_pattern={"mlp.up_proj": 2},
    ),
    "target_parameters, patterns of the parameter": on(
        "q_proj",
        target_parameters=["mlp.up_proj.weight"],
        alpha_pattern={"up_proj.weight": 1},
        rank_pattern={"up_proj.weight": 2},
    ),
    "modules_to_save": on("q_proj", modules_to_save=["lm_head", "norm", "mlp"]),
    "modules_to_save of a target": on(*MLPS, modules_to_save=["layers.1.mlp"]),
    "bias: all": Row({"bias": "all"}, QWEN2),
    "bias: lora_only": Row({"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}, QWEN2),
    "fan_in_fan_out": on("embed_tokens", *MLPS, fan_in_fan_out=True),
    "lora_dropout": Row({"lora_dropout": 0.3}),
    "init_lora_weights: gaussian": Row({"init_lora_weights": "gaussian"}),
    "init_lora_weights: mica": Row({"init_lora_weights": "mica"}),
    "init_lora_weights: eva": Row({}, after={"init_lora_weights": "eva", "eva_config": {}}),
    "velora_config": Row({"velora_config": VeloraConfig(num_groups=4)}),
    "trained on fused tensors": Row({}, {"family": "phi3", "pad_token_id": 0}),
    "a field of tomorrow": Row({}, after={"use_nora": True}),
    "lm_head": on("q_proj", *MLPS, "lm_head"),
    "embed_tokens": on("embed_tokens", *MLPS, alpha_pattern={"embed_tokens": 2}),
    "both": on(*ENDS),
    "tied, nothing of it": tied(*MLPS),
    "tied, embed_tokens saved": tied("q_proj", modules_to_save=["embed_tokens"]),
    "tied, lm_head saved": tied("q_proj", modules_to_save=["lm_head"]),
    "tied, both saved": tied("q_proj", modules_to_save=ENDS),
    "tied, LoRA on embed_tokens": tied("embed_tokens", *MLPS),
    "tied, LoRA on lm_head": tied("lm_head", *MLPS),
    "tied, LoRA on both": tied(*ENDS),
    "tied and kept so, saved": tied("q_proj", modules_to_save=ENDS[:1], ensure_weight_tying=True),
    "tied and kept so, LoRA": tied("embed_tokens", "q_proj", ensure_weight_tying=True),
}  # fmt: skip

REFUSED: dict[str, object] = {
    "peft_type": "ADALORA",
    "layer_replication": [[0, 1], [0, 2]],
    "use_dora": True,
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "monteclora_config": {"num_samples": 2},
    "kasa_config": {"beta": 1e-4},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "megatron_config": {"tensor_model_parallel_size": 1},
    "init_lora_weights": "pissa_niter_4",
    "init_lora_weights ": "olora",
    "init_lora_weights  ": "corda",
    "init_lora_weights   ": "loftq",
    "init_lora_weights    ": "lora_ga",
    "target_modules": None,
}  # fmt: skip
"""By field, a value that PEFT makes something else of than W + scale * B A."""

OTHERWISE = {
    "trainable_token_indices": "test_an_expert_needs_only_its_mlps",
    "lora_bias": "test_an_expert_needs_only_its_mlps",
}
"""Fields that are taken or refused by whose tensors they are about."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model for each way in which the rows want one, by its settings."""
    root = tmp_path_factory.mktemp("models")
    kinds = [*{repr(row.model): row.model for row in HANDLED.values()}.items()]
    return {kind: make_model(root / str(n), **what) for n, (kind, what) in enumerate(kinds)}


def adapter(folder: Path, model: Path, fields: dict[str, Any]) -> Path:
    """A trained adapter as PEFT saves it."""
    torch.manual_seed(9)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    base = AutoModelForCausalLM.from_pretrained(model)
    made = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def config(folder: Path, base: Path | str, *experts: Path | str) -> Path:
    text = simple_config(base, list(experts), head="gate_mode: zeros")
    return write_config(folder / "c.yaml", text)


def test_every_field_that_peft_knows_is_in_the_table() -> None:
    covered = {name.partition(":")[0].partition(" ")[0].strip(",") for name in HANDLED}
    covered |= {field.strip() for field in REFUSED} | OTHERWISE.keys()
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = {*lora_config.REFUSED, *lora_config.READ, *lora_config.NO_EFFECT}
    assert known == fields
    assert set(lora_config.REFUSED) | lora_config.READ <= covered | {"ensure_weight_tying"}
    idle = {field.name for field in dataclasses.fields(PeftConfig)} - {"peft_type"}
    of_starts = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    elsewhere = {"megatron_core", "qalora_group_size", "runtime_config"}
    assert lora_config.NO_EFFECT - covered == idle | of_starts | elsewhere


@pytest.mark.parametrize("name", HANDLED)
def test_it_is_merged_as_peft_merges_it(tmp_path: Path, models: dict[str, Path], name: str) -> None:
    row = HANDLED[name]
    model = models[repr(row.model)]
    lora = adapter(tmp_path / "a", model, row.fields)
    edit(lora, **row.after)
    peft = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), lora))
    both = f"{model}+{lora}"
    done = merge(config(tmp_path, both, both, both), tmp_path / "out")
    made = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (made - peft).abs().max() < 1e-4 * max(1, float(peft.abs().max()))
    plain = logits(AutoModelForCausalLM.from_pretrained(model))
    assert (made - plain).abs().max() > 1e-2
    verify_checkpoint(tmp_path / "out")
    noted = any("left out" in note or "not known here" in note for note in done.notes)
    assert noted == (", fewer" in name or "set later" in name or "tomorrow" in name)


@pytest.mark.parametrize("field", REFUSED)
def test_it_is_refused_by_its_name(tmp_path: Path, models: dict[str, Path], field: str) -> None:
    model = models["{}"]
    lora = adapter(tmp_path / "a", model, {})
    edit(lora, **{field.strip(): REFUSED[field]})
    with pytest.raises(InputError) as refused:
        make_plan(load_config(config(tmp_path, model, model, f"{model}+{lora}")))
    [problem] = refused.value.problems
    value = REFUSED[field]
    word = value if isinstance(value, str) else field
    assert "experts[1].source_model" in str(problem) and str(word) in str(problem)


def grown(folder: Path) -> None:
    """Two tokens more, as where the vocabulary was resized before the training."""
    path = folder / "adapter_model.safetensors"
    ends = ("embed_tokens", "lm_head")
    state = {
        name: torch.cat([tensor, tensor[:2]]) if any(end in name for end in ends) else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(state, path)


ENDS_ONLY: dict[str, tuple[dict[str, Any], bool, str]] = {
    "a resized vocabulary": ({"modules_to_save": ENDS}, True, "embed_tokens"),
    "single tokens": ({"trainable_token_indices": [3, 4]}, False, "trainable_token_indices"),
    "biases of attention": ({"target_modules": ["q_proj"], "lora_bias": True}, False, "lora_bias"),
    "LoRA on both ends": ({"target_modules": [*MLPS, *ENDS]}, False, ""),
    "LoRA on a larger head": ({"target_modules": [*MLPS, "lm_head"]}, True, "lm_head"),
}


@pytest.mark.parametrize("name", ENDS_ONLY)
@pytest.mark.parametrize("way", [{}, TIED])
def test_an_expert_needs_only_its_mlps(
    tmp_path: Path, models: dict[str, Path], name: str, way: dict[str, Any]
) -> None:
    fields, resized, word = ENDS_ONLY[name]
    model = models[repr(way)]
    lora = adapter(tmp_path / "a", model, fields)
    if resized:
        grown(lora)
    both = f"{model}+{lora}"
    done = merge(config(tmp_path, model, model, both), tmp_path / "out")
    assert any("changes are not used (attention" in note for note in done.notes)
    made = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    delta, whole = (
        load_file(lora / "adapter_model.safetensors"),
        load_file(model / "model.safetensors"),
    )
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.gate_proj"
        want = whole[f"{prefix}.weight"]
        if f"base_model.model.{prefix}.lora_A.weight" in delta:
            a, b = (delta[f"base_model.model.{prefix}.lora_{half}.weight"] for half in "AB")
            want = want + 2 * b @ a
        have = made[f"model.layers.{layer}.block_sparse_moe.experts.1.w1.weight"]
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)
    if word:
        with pytest.raises(InputError) as refused:
            make_plan(load_config(config(tmp_path, both, model, model)))
        said = [str(problem) for problem in refused.value.problems]
        assert all("base_model" in one for one in said) and any(word in one for one in said)


def test_names_as_other_programs_write_them(tmp_path: Path, models: dict[str, Path]) -> None:
    model = models["{}"]
    lora, plans = adapter(tmp_path / "a", model, {}), []
    path = lora / "adapter_model.safetensors"
    state = load_file(path)
    prefix = "base_model.model."
    for rename in (
        lambda name: name,
        lambda name: name.removeprefix(prefix),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace(".weight", ".my-own adapter.weight"),
    ):
        save_file({rename(name): tensor for name, tensor in state.items()}, path)
        merge(config(tmp_path, model, f"{model}+{lora}", model), tmp_path / f"{len(plans)}")
        made = [load_file(f) for f in sorted((tmp_path / f"{len(plans)}").glob("*.safetensors"))]
        plans.append({name: tensor for part in made for name, tensor in part.items()})
    assert all(torch.equal(plans[0][n], other[n]) for other in plans[1:] for n in plans[0])

    several = {
        name.replace(".weight", f".{n}.weight"): t.clone()
        for n in "xy"
        for name, t in state.items()
    }
    half = {name: tensor for name, tensor in state.items() if "0.mlp.up_proj.lora_A" not in name}
    for wrong, word in ((several, "several adapters (x, y)"), (half, "lora_A")):
        save_file(wrong, path)
        with pytest.raises(InputError, match=word.replace("(", r"\(").replace(")", r"\)")):
            make_plan(load_config(config(tmp_path, model, f"{model}+{lora}", model)))


def test_an_adapter_of_mlx_is_told_what_it_is(tmp_path: Path, models: dict[str, Path]) -> None:
    model, lora = models["{}"], tmp_path / "mlx"
    lora.mkdir()
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    a = torch.zeros(32, 4)
    save_file({"model.layers.0.self_attn.q_proj.lora_a": a}, lora / "adapters.safetensors")
    with pytest.raises(InputError, match=r"mlx-lm \(lora\).*mlx_lm\.fuse"):
        make_plan(load_config(config(tmp_path, model, f"{model}+{lora}", model)))
    shutil.rmtree(lora)
