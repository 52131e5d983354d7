"""Tiny random models that see, as transformers saves them, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from babies import make_tokenizer
from kinds import GEMMA4, KINDS, WIDE, enlarge
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE = 60
"""The token that stands for a part of a picture."""

_QWEN_EYES = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48,
    "num_position_embeddings": 16,
}  # fmt: skip
_QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}  # fmt: skip
_GEMMA_EYES = {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 64,
}  # fmt: skip
_GEMMA_IDS = {
    "image_token_id": IMAGE, "video_token_id": 61, "audio_token_id": 59, "boi_token_id": 62,
    "eoi_token_id": 63, "boa_token_id": 57, "eoa_token_index": 58, "audio_config": None,
}  # fmt: skip

SEEING: dict[str, dict[str, Any]] = {
    "qwen3.5": {
        "model_type": "qwen3_5", "vision_config": _QWEN_EYES, **_QWEN_IDS,
        "text_config": KINDS["qwen3.5"],
    },
    "qwen3 vl": {
        "model_type": "qwen3_vl", **_QWEN_IDS,
        "vision_config": {**_QWEN_EYES, "deepstack_visual_indexes": [0, 1]},
        "text_config": {
            **WIDE, "model_type": "qwen3_vl_text", "head_dim": 16, "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
    },
    "gemma4": {
        "model_type": "gemma4", "vision_config": _GEMMA_EYES, **_GEMMA_IDS,
        "text_config": {
            **GEMMA4, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": WIDE["vocab_size"],
        },
    },
}  # fmt: skip


def make_seeing(directory: Path, kind: str, tied: bool = False, seed: int = 0) -> Path:
    """Save a model of that kind."""
    torch.manual_seed(seed)
    settings = {**SEEING[kind], "tie_word_embeddings": tied}
    settings["text_config"] = {**settings["text_config"], "tie_word_embeddings": tied}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**settings)).float()
    enlarge(model)
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def picture(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with a picture of four tokens, as the model's forward takes it."""
    torch.manual_seed(seed)
    ids = torch.tensor([[1, 5, 62, IMAGE, IMAGE, IMAGE, IMAGE, 63, 7, 8, 9]])
    given = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()}
    if kind == "gemma4":
        places = torch.tensor([[[x, y] for y in range(4) for x in range(4)]])
        return given | {"pixel_values": torch.rand(1, 16, 48), "image_position_ids": places}
    shape = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    return given | {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4)} | shape
