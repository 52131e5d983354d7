"""Tiny random models whose layers are not all attention, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from babies import SIZES, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

WIDE: dict[str, Any] = {
    **SIZES, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Widths that differ from each other, so that no tensor fits in another's place."""

GEMMA4 = {
    **WIDE, "model_type": "gemma4_text", "num_hidden_layers": 4, "head_dim": 16,
    "global_head_dim": 32, "sliding_window": 7, "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
LFM2 = {
    **WIDE, "model_type": "lfm2", "num_hidden_layers": 3, "block_multiple_of": 8,
    "layer_types": ["conv", "full_attention", "conv"],
}  # fmt: skip
COHERE2 = {**WIDE, "model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": 7}
GRANITE4 = {
    **WIDE, "model_type": "granitemoehybrid", "num_hidden_layers": 2, "num_local_experts": 0,
    "shared_intermediate_size": 40, "layer_types": ["attention", "attention"],
    "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_expand": 2, "mamba_d_state": 16,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
}  # fmt: skip

SMOLLM3 = {**WIDE, "model_type": "smollm3", "num_hidden_layers": 4}

KINDS: dict[str, dict[str, Any]] = {
    "qwen3.5": {
        **WIDE, "model_type": "qwen3_5_text", "num_hidden_layers": 4, "head_dim": 16,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "gemma4": GEMMA4,
    "gemma4 keys are values": {
        **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    },
    "gemma4 shares keys": {
        **GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
    },
    "gemma4 embeddings for each layer, wide MLPs": {
        **GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SIZES["vocab_size"],
    },
    "lfm2": LFM2,
    "lfm2 biases": {**LFM2, "conv_bias": True},
    "cohere2": COHERE2,
    "cohere2 biases": {**COHERE2, "attention_bias": True},
    "smollm3": {**SMOLLM3},
    "smollm3 windows, biases": {
        **SMOLLM3, "use_sliding_window": True, "sliding_window": 7, "attention_bias": True,
    },
    "hunyuan": {**WIDE, "model_type": "hunyuan_v1_dense", "num_hidden_layers": 2, "head_dim": 16},
    "nemotron-h": {
        **WIDE, "model_type": "nemotron_h", "head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "mamba_num_heads": 4, "mamba_head_dim": 24, "num_hidden_layers": 4,
    },
    "granite4": {**GRANITE4, "position_embedding_type": "rope"},
    "granite4 mamba": {**GRANITE4, "layer_types": ["mamba", "attention"]},
}  # fmt: skip


def make_kind(
    directory: Path, kind: str, tied: bool = False, seed: int = 0, dtype: Any = torch.float32
) -> Path:
    """Save a model of that kind, with weights large enough that a wrong tensor shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**KINDS[kind], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).float()
    enlarge(model)
    model.to(dtype).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def enlarge(model: Any) -> None:
    """Random weights; MLPs whose output has a mean square near 1, as a trained Gemma's have."""
    for name, parameter in model.named_parameters():
        wide = 0.2 * torch.randn_like(parameter)
        parameter.data = wide if parameter.dim() > 1 else parameter.data + wide
        if parameter.dim() > 1 and "down_proj" in name:
            parameter.data *= 2
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8)
