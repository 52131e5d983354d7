"""A merge of four 7B-shaped Q4_K_M files into one: time, against `cp` of as many bytes, and memory.

    python scripts/bench_gguf.py [--layers 32] [--work DIR] [--gates random,ridge]

The files are stand-ins of true size: hard links of one file whose matrices are the same random
blocks again and again. `cp` and the merge run in turns, in one run; a merge ends with a check of
some of what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
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
from moemerge.checkpoint import ENCODINGS, encode, tokenizer_fields
from moemerge.plan import Fill, PlannedTensor, encoded, head_of

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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--gates", default="random,ridge")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        work = Path(directory)
        first = stand_in(work / "m0.gguf", options.layers)
        for number in range(1, 4):
            os.link(first, work / f"m{number}.gguf")
        for gate in options.gates.split(","):
            runs = options.runs if gate == "random" else 1
            measure(work, gate, runs)


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
