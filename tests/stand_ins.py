"""Stand-ins for the models of the 4x7B example: a Hub's cache of true sizes and empty weights.

    python tests/stand_ins.py CACHE_DIR
    HF_HUB_OFFLINE=1 HF_HUB_CACHE=CACHE_DIR moemerge plan examples/configs/beyonder-4x7b.yaml

Configs, names, shapes and sizes are the real ones'; each weight file is a header and a hole, which
takes no room on most file systems. The tokenizer has a real one's size, not its tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

MODELS = {
    "mlabonne/AlphaMonarch-7B": 32000,
    "beowolx/CodeNinja-1.0-OpenChat-7B": 32002,
    "SanjiWatsuki/Kunoichi-DPO-v2-7B": 32000,
    "mlabonne/NeuralDaredevil-7B": 32000,
}
"""Each repository's vocabulary."""

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SHARDS = 3
MERGES = 58980
"""As many as Mistral's tokenizer.json has."""


def make_cache(cache: Path) -> Path:
    """Fill a directory laid out as huggingface_hub's cache; return it."""
    for repo, vocabulary in MODELS.items():
        commit = hashlib.sha1(repo.encode()).hexdigest()
        folder = cache / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        make_model(folder / "snapshots" / commit, vocabulary)
    return cache


def make_model(directory: Path, vocabulary: int) -> None:
    """A Mistral 7B's files: config, tokenizer, index, and three shards of headers alone."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**MISTRAL_7B, "vocab_size": vocabulary}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer(vocabulary), indent=2))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    )
    _write_shards(directory, list(_tensors(vocabulary)), SHARDS)


def _write_shards(directory: Path, tensors: list[tuple[str, tuple[int, ...]]], count: int) -> None:
    size = math.ceil(len(tensors) / count)
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(tensors[number * size : (number + 1) * size])
        _write_hollow(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = 2 * sum(math.prod(shape) for _, shape in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


QWEN3_5_27B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "image_token_id": 248056,
    "tie_word_embeddings": False,
    "video_token_id": 248057,
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
    "vision_config": {
        "deepstack_visual_indexes": [], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304, "model_type": "qwen3_5",
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 5120,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    },
    "text_config": {
        "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 248044,
        "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 17408, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_value_head_dim": 128,
        "max_position_embeddings": 262144, "model_type": "qwen3_5_text", "num_attention_heads": 24,
        "num_hidden_layers": 64, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default",
        },
        "tie_word_embeddings": False, "vocab_size": 248320,
    },
}  # fmt: skip
"""The shapes of a Qwen 3.5 27B, with its vision tower."""


def make_qwen3_5_27b(directory: Path) -> None:
    """Its config, index and shards of headers alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(QWEN3_5_27B, indent=2))
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer(32000), indent=2))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    _write_shards(directory, list(_shapes_of_qwen3_5_27b().items()), 11)


@cache
def _shapes_of_qwen3_5_27b() -> dict[str, tuple[int, ...]]:
    """Names and shapes of its class in transformers; no weights are made."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        config = AutoConfig.for_model(**QWEN3_5_27B)
        model = AutoModelForImageTextToText.from_config(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _tensors(vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, keys = 4096, 14336, 1024
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(32):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _write_hollow(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 tensors whose data is a hole."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _tokenizer(vocabulary: int) -> dict[str, object]:
    """A BPE tokenizer in the form of Mistral's: bytes, letters, and made-up pieces of letters."""
    special = ["<unk>", "<s>", "</s>"]
    added = ["<|end_of_turn|>", "<|pad_0|>"][: vocabulary - 32000]
    letters = ["▁", *map(chr, range(33, 127))]
    known = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    pieces = [letter for letter in letters if letter.isalpha() or letter == "▁"]
    for left in pieces:  # it grows meanwhile
        for right in filter(str.isalpha, letters):
            if len(known) < 32000 and left + right not in known:
                known[left + right] = None
                pieces.append(left + right)
    splits = ((piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece)))
    merges = [f"{left} {right}" for left, right in splits if left in known and right in known]
    content = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    numbers = {token: number for number, token in enumerate(known)}
    listed = {**{token: numbers[token] for token in special},
              **{token: 32000 + number for number, token in enumerate(added)}}  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **content, "special": True}
            for token, number in listed.items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": numbers,
            "merges": merges[:MERGES],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", metavar="CACHE_DIR", type=Path)
    make_cache(parser.parse_args().cache)
