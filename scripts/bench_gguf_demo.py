"""The demo experts as GGUF files: loss and routing of their mixtures, in 16 bits and quantised.

    python scripts/bench_gguf_demo.py [--kinds q8_0 q4_k_m] [--passages 6]

Each adapter is merged into SmolLM2-135M and written as a file of each kind. The mixture of these
files is made by copying, with routers fitted to what is in them. llama.cpp reads the held-out
passages with each file. The right expert is counted in a directory made of the same files, which
has the same routers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from smollm2 import model_dir
from tokenizers import Tokenizer

from moemerge import merge
from moemerge.checkpoint.gguf.header import read_header
from moemerge.evaluation import router_logits

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = ("c", "french", "legal", "sql")
TOKENS = 128


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kinds", nargs="+", default=["f16", "q8_0", "q4_k_m"])
    parser.add_argument("--passages", type=int, default=6, help="of each domain")
    options = parser.parse_args()
    script = ROOT / "scripts/libllama"
    os.environ["LIBLLAMA"] = subprocess.run(
        [script], check=True, capture_output=True, text=True
    ).stdout.strip()
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    texts = {
        name: [
            tokenizer.encode(json.loads(line)["text"]).ids[:TOKENS]
            for line in (ROOT / f"examples/heldout/{name}.jsonl").read_text().splitlines()
        ][: options.passages]
        for name in EXPERTS
    }
    print("| kind | specialists | mixture | right expert first | FFN bytes copied |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for kind in options.kinds:
            print(row(kind, Path(directory) / kind, texts), flush=True)


def row(kind: str, work: Path, texts: dict[str, list[list[int]]]) -> str:
    """A row of the table: mean losses in nats a token, and routing."""
    work.mkdir()
    files = {name: specialist(name, kind, work) for name in EXPERTS}
    base = dense(work / "base", kind, str(model_dir()))
    config = yaml.safe_load((ROOT / "examples/configs/quickstart.yaml").read_text())
    config["base_model"] = str(base)
    for expert, name in zip(config["experts"], EXPERTS, strict=True):
        expert["source_model"], expert["name"] = str(files[name]), name
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    merge(path, work / "mixture.gguf")
    merge(path, work / "directory")
    own = np.mean([loss(files[name], texts[name], work) for name in EXPERTS])
    mixed = np.mean([loss(work / "mixture.gguf", texts[name], work) for name in EXPERTS])
    right = found(work / "directory", texts)
    same = copied(files["c"], work / "mixture.gguf")
    return f"| {kind} | {own:.4f} | {mixed:.4f} | {right:.0%} | {'yes' if same else 'no'} |"


def specialist(name: str, kind: str, work: Path) -> Path:
    """An expert's file."""
    return dense(work / name, kind, f"{model_dir()}+{ROOT}/examples/experts/{name}")


def dense(out: Path, kind: str, source: str) -> Path:
    """A model, with an adapter or not, as a GGUF file: converted and quantised by llama.cpp."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, _, adapter = source.partition("+")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.half().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    sys.path.insert(0, str(ROOT / "tests"))
    tools = importlib.import_module("gguf_files")
    file = out.with_suffix(".f16.gguf")
    tools.convert([(out, file)])
    if kind == "f16":
        return file
    quantised = out.with_suffix(f".{kind}.gguf")
    tools.quantise(file, quantised, kind)
    return quantised


def loss(file: Path, texts: list[list[int]], work: Path) -> float:
    """The mean loss of the texts' tokens in llama.cpp, in nats."""
    request, response = work / "request.json", work / "response.json"
    request.write_text(json.dumps({"token_ids": texts, "new_tokens": 0, "logits": True}))
    reader = ROOT / "tests/readers/read_gguf.py"
    subprocess.run(
        [sys.executable, reader, file, request, response], check=True, capture_output=True
    )
    [answer] = json.loads(response.read_text())
    arrays = np.load(answer["logits_npy"])
    total = count = 0.0
    for number, ids in enumerate(texts):
        logits = arrays[f"arr_{number}"][:-1].astype(np.float64)
        top = logits.max(1, keepdims=True)
        chances = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        total -= chances[np.arange(len(ids) - 1), ids[1:]].sum()
        count += len(ids) - 1
    folder = Path(answer["logits_npy"]).parent
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    return total / count


def found(directory: Path, texts: dict[str, list[list[int]]]) -> float:
    """The share of layers and tokens whose first expert is the text's own."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    right = total = 0
    for expert, name in enumerate(EXPERTS):
        for ids in texts[name]:
            seen: list[Any] = []
            with torch.inference_mode(), router_logits(model, seen):
                model(input_ids=torch.tensor([ids]))
            first = torch.stack(seen).argmax(-1)
            right += int((first == expert).sum())
            total += first.numel()
    return right / total


def copied(file: Path, mixture: Path) -> bool:
    """Whether the first expert's blocks in the mixture are the file's."""
    was, now = read_header(file), read_header(mixture)
    one = was.tensors["blk.3.ffn_gate.weight"]
    many = now.tensors["blk.3.ffn_gate_exps.weight"]
    with file.open("rb") as first, mixture.open("rb") as second:
        first.seek(one.offset)
        second.seek(many.offset)
        return first.read(one.nbytes) == second.read(one.nbytes)


if __name__ == "__main__":
    main()
