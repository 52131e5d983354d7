"""Baby models: real transformers classes of a few thousand parameters, saved as models are."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

WORDS = (
    "code python javascript function class return story scene write character dragon castle "
    "maths solve number sum integral count chat hello tell me explain the a of and to please"
).split()
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_tokenizer(directory: Path, post_processor: bool = True) -> None:
    """A word-level tokenizer with `<s>`, `</s>` and chat markup, in the files of a real model."""
    special = ["<unk>", "<s>", "</s>", "<|user|>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (directory / "chat_template.jinja").write_text("{{ '<|user|>' }}{{ messages }}")


def make_model(
    directory: Path,
    family: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    dialect: int = 4,
    shards: int = 1,
    bins: bool = False,
    post_processor: bool = True,
    **changes: Any,
) -> Path:
    """Save a random dense model; `dialect` is the transformers whose config.json it has."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, **changes}
    rope = settings.pop("rope_scaling", None)
    theta = settings.pop("rope_theta", 10000.0)
    spoken: dict[str, Any] = {"rope_theta": theta, "rope_scaling": rope}
    both = {
        **spoken,
        "rope_parameters": {"rope_theta": theta, **(rope or {"rope_type": "default"})},
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **settings, **deepcopy(both))  # which it fills in
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():  # large weights, so that a wrong tensor shows
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if settings.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    save_weights(directory, state, shards, bins)
    if dialect == 5:
        spoken = {"rope_parameters": both["rope_parameters"]}
    name = str(dtype).removeprefix("torch.")
    written = {
        "model_type": family,
        "architectures": [type(model).__name__],
        "torch_dtype" if dialect == 4 else "dtype": name,
        **settings,
        **spoken,
    }
    (directory / "config.json").write_text(json.dumps(written, indent=2))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    make_tokenizer(directory, post_processor)
    return directory


def save_weights(
    directory: Path, state: dict[str, torch.Tensor], shards: int = 1, bins: bool = False
) -> None:
    """Save tensors as `shards` files with an index, or as one without."""
    stem, suffix = ("pytorch_model", ".bin") if bins else ("model", ".safetensors")

    def save(part: dict[str, torch.Tensor], path: Path) -> None:
        torch.save(part, path) if bins else save_file(part, path, metadata={"format": "pt"})

    if shards == 1:
        save(state, directory / f"{stem}{suffix}")
        return
    names = sorted(state)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}"
        part = names[number::shards]
        save({name: state[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make_adapter(
    directory: Path, model: Path, seed: int = 9, rank: int = 4, **changes: Any
) -> Path:
    """A LoRA adapter as PEFT saves it, with weights that matter."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model)
    settings = {"r": rank, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    torch.manual_seed(seed)
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.3)
    peft.save_pretrained(directory)
    return directory


def write_config(path: Path, text: str) -> Path:
    """Write a YAML config and return its path."""
    path.write_text(text)
    return path


def simple_config(
    base: Path | str, experts: list[Path | str], head: str = "", per_expert: str = ""
) -> str:
    """A config with other prompts for each expert."""
    prompts = [("code python", "function class"), ("story scene", "dragon castle"),
               ("maths solve", "number sum"), ("chat hello", "tell me")]  # fmt: skip
    lines = [f"base_model: {base}", *head.splitlines(), "experts:"]
    for index, expert in enumerate(experts):
        lines.append(f"  - source_model: {expert}")
        lines.append("    positive_prompts:")
        lines += [f"      - {prompt}" for prompt in prompts[index % len(prompts)]]
        lines += [f"    {line}" for line in per_expert.splitlines()]
    return "\n".join(lines) + "\n"
