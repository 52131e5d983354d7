"""An adapter of a large mixture trained on one GPU: its peak memory and a step's time.

The mixture has the shape of a 4x7B and no weights: its files are holes, which take no room on the
disk and are read, quantised and multiplied as any others. `--limit` makes the GPU as small as a
card that one would like to use.

PYTHONPATH=. python scripts/bench_gpu.py [--ways qlora] [--limit 24] [--length 2048]
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from smollm2 import model_dir

from moemerge import Lora, Options, Tuning, finetune, make_plan
from moemerge.errors import Findings
from moemerge.mixture.open import open_moe
from moemerge.mixture.unfused import memory_of
from moemerge.plan.plan import PlannedTensor, file_header
from moemerge.plan.recipe import Read
from moemerge.plan.shards import weight_index
from moemerge.reporting import Silent

ROOT = Path(__file__).resolve().parent.parent


def make_dense(directory: Path, tokenizer: Path, layers: int, hidden: int, inner: int) -> None:
    """A Mistral-shaped model of which only the headers are there."""
    directory.mkdir(parents=True)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    groups = max(hidden // 512, 1) * 128  # heads of 128, four for each of keys and values
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", groups), ("v", groups), ("o", hidden)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("gate", "up"):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    tensors = [PlannedTensor(n, shape, "BF16", Read("", n)) for n, shape in shapes.items()]
    with (directory / "model.safetensors").open("wb") as file:
        header = file_header(tensors, {"format": "pt"})
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
    config = {
        "model_type": "mistral", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "head_dim": 128,
        "num_key_value_heads": groups // 128, "vocab_size": vocabulary, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 32768,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory)


def make_mixture(root: Path, out: Path, experts: int) -> None:
    """The mixture that a merge of these models makes, its files as long, and empty."""
    config = root / "config.yaml"
    donors = f"  - source_model: {root}/dense\n" * experts
    config.write_text(f"base_model: {root}/dense\ngate_mode: random\nexperts:\n{donors}")
    plan = make_plan(config).plan
    out.mkdir()
    for shard in plan.shards:
        with (out / shard.file).open("wb") as file:
            file.write(shard.header())
            file.truncate(shard.nbytes)
    (out / "config.json").write_text(json.dumps(plan.config))
    (out / "model.safetensors.index.json").write_text(json.dumps(weight_index(plan)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "dense" / name, out)


def main() -> None:
    """Print one row for each way of training."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=24, help="of the GPU's memory, in GB")
    parser.add_argument("--ways", nargs="+", default=["qlora"], choices=["lora", "qlora"])
    parser.add_argument("--tokenizer", type=Path, help="a model's directory; default: SmolLM2's")
    options = parser.parse_args()
    import torch

    card = torch.cuda.get_device_properties(0)
    torch.cuda.set_per_process_memory_fraction(min(options.limit * 1e9 / card.total_memory, 1.0))
    print(f"{card.name}, at most {options.limit:g} GB of it\n")
    print("| | weights, GB | allocated, GB | reserved, GB | s a step | s in all |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory(prefix="moemerge-gpu-") as name:
        root = Path(name)
        tokenizer = options.tokenizer or model_dir()
        make_dense(root / "dense", tokenizer, options.layers, options.hidden, options.inner)
        make_mixture(root, root / "out", options.experts)
        (root / "text.txt").write_text((ROOT / "README.md").read_text() * 80)
        moe = open_moe(str(root / "out"), None, Findings())
        for way in options.ways:
            gc.collect()  # the Trainer before holds its model in a circle
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            tuning = Tuning((str(root / "text.txt"),), steps=options.steps, batch=1,
                            length=options.length, learning_rate=2e-4)  # fmt: skip
            four = way == "qlora"
            begun, ticks = time.monotonic(), Ticks()
            run = Options(device="cuda", load_in_4bit=four)
            finetune(str(root / "out"), root / way, tuning, Lora(), run, ticks)
            whole = time.monotonic() - begun
            peaks = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
            gaps = sorted(b - a for a, b in zip(ticks.at, ticks.at[1:], strict=False))
            step = gaps[len(gaps) // 2] if gaps else float("nan")
            print(
                f"| `--{way}` | {memory_of(moe, four) / 1e9:.2f} | {peaks[0]:.2f} | "
                f"{peaks[1]:.2f} | {step:.2f} | {whole:.0f} |",
                flush=True,
            )


class Ticks(Silent):
    """A listener that notes when each step of a training ends."""

    def __init__(self) -> None:
        self.at: list[float] = []

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Note the times of a training's steps."""
        yield lambda step: self.at.append(time.monotonic()) if what == "training" else None


if __name__ == "__main__":
    main()
