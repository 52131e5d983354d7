"""Peak memory of a merge for two depths and two shard sizes: it must not grow with either.

Makes Mistral-shaped models in a temporary directory, merges them as processes of their own, and
prints the peak resident memory that the kernel reports for each (ru_maxrss).

python scripts/bench_memory.py [--layers 2 8] [--hidden 2048] [--inner 5632]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from smollm2 import model_dir

from moemerge.plan.plan import PlannedTensor, file_header
from moemerge.plan.recipe import Read


def make_model(directory: Path, layers: int, hidden: int, inner: int, seed: int) -> Path:
    """A random bf16 Llama with SmolLM2's tokenizer, one file."""
    directory.mkdir(parents=True)
    tokenizer = model_dir()
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        for name in "qkvo":
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    tensors = [PlannedTensor(n, shape, "BF16", Read("", n)) for n, shape in shapes.items()]
    random = np.random.default_rng(seed)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(file_header(tensors, {"format": "pt"}))
        for tensor in tensors:  # bf16 values from 2^-5 to 2^-3 of either sign
            bits = random.integers(0x3D00, 0x3E00, tensor.parameters, dtype=np.uint16)
            file.write((bits | (random.integers(0, 2, 1, dtype=np.uint16) << 15)).tobytes())
    heads = hidden // 64
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tokenizer / name).read_bytes())
    return directory


def peak_megabytes(*args: object) -> float:
    """Run `moemerge ARGS` and return its peak resident memory in MB."""
    process = subprocess.Popen([sys.executable, "-m", "moemerge", *map(str, args), "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"moemerge failed on {args}")
    return usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Print one row per gate mode, a column per depth and shard size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 8])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    options = parser.parse_args()
    few, many = options.layers
    cases = [(few, "5GB"), (many, "5GB"), (many, "200MB")]
    layer_mb = 2 * (4 * options.hidden + 3 * options.inner) * options.hidden / 1e6
    print(f"one decoder layer is {layer_mb:.0f} MB; peak memory in MB:\n")
    print("| gates | " + " | ".join(f"{n} layers, {size} shards" for n, size in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    with tempfile.TemporaryDirectory(prefix="moemerge-memory-") as name:
        root = Path(name)
        # In processes of their own: a child's peak counts what its parent held when it began.
        spawn = multiprocessing.get_context("spawn")
        for layers in (few, many):
            for seed in range(2):
                size = (layers, options.hidden, options.inner, seed)
                made = spawn.Process(target=make_model, args=(root / f"{layers}-{seed}", *size))
                made.start()
                made.join()
        for gates, flags in (
            ("random", []), ("cheap_embed", []), ("hidden", ["--lazy"]), ("hidden", [])
        ):  # fmt: skip
            cells = []
            for layers, shard_size in cases:
                config = root / "config.yaml"
                prompts = ("a function in C", "une phrase en français")
                experts = "".join(
                    f"  - source_model: {root}/{layers}-{seed}\n    positive_prompts: [{prompt}]\n"
                    for seed, prompt in enumerate(prompts)
                )
                head = f"base_model: {root}/{layers}-0\ngate_mode: {gates}\n"
                config.write_text(f"{head}experts:\n{experts}")
                out = [root / "out", "--overwrite", "--shard-size", shard_size]
                cells.append(f"{peak_megabytes(config, *out, *flags):.0f}")
            print(f"| `{' '.join([gates, *flags])}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
