"""What a fixed set of merges, splits and edits writes, as digests: to compare two versions.

    python scripts/digests.py DIGESTS.json                 keep what this version writes
    python scripts/digests.py DIGESTS.json --check         compare; exit with 1 where it differs

Every command runs as a process of its own, in a new directory, on small random models. What a
file says of that directory, of seconds and of versions is replaced before its digest is taken. The
digests hold for one processor and one torch: where routers are computed, another may round
otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CALLS: dict[str, str] = {
    "random": "merge random.yaml random",
    "ridge": "merge ridge.yaml ridge --shard-size 100K",
    "hidden": "merge hidden.yaml hidden --lazy",
    "self": "merge self.yaml self",
    "cheap_embed": "merge cheap_embed.yaml cheap_embed --no-checksum",
    "uniform_random": "merge uniform_random.yaml uniform_random --seed 7",
    "zeros": "merge zeros.yaml zeros",
    "qwen2": "merge qwen2.yaml qwen2",
    "qwen3": "merge qwen3.yaml qwen3",
    "granite": "merge granite.yaml granite",
    "adapter": "merge adapter.yaml adapter",
    "average": "merge average.yaml average",
    "union": "merge union.yaml union",
    "split": "split split.yaml split",
    "regate": "regate ridge hidden.yaml",
    "add": "add random llama2 added",
    "drop": "drop random dropped --expert 0",
    "top-k": "top-k ridge 1",
    "extract": "extract random extracted --expert 1",
    "repair": "repair hidden repaired",
    "tune": "tune routers self --data text.jsonl --steps 4 --batch 2 --length 16",
    "routing": "routing random --text words=text.txt --json",
}
ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoehybrid", "dots1")


def main() -> None:
    """Run every call; keep the digests, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("digests", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = run_all(Path(directory).resolve())
    if not options.check:
        options.digests.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} calls, {sum(map(len, found.values()))} files")
        return
    before = json.loads(options.digests.read_text(encoding="utf-8"))
    differ = [
        f"{call}: {file}"
        for call in {**before, **found}
        for file in sorted({**before.get(call, {}), **found.get(call, {})})
        if before.get(call, {}).get(file) != found.get(call, {}).get(file)
    ]
    for line in differ:
        print(line)
    files = sum(map(len, found.values()))
    print(f"{len(found)} calls, {files} files: {len(differ)} differ")
    sys.exit(bool(differ))


def run_all(work: Path) -> dict[str, dict[str, str]]:
    """Each call's files by their names, with their digests."""
    make_sources(work)
    calls = dict(CALLS)
    for name in ARCHITECTURES:
        calls[name] = f"merge {name}.yaml {name}"
    found: dict[str, dict[str, str]] = {}
    for name, call in calls.items():
        done = subprocess.run(
            [sys.executable, "-m", "moemerge", *call.split(), "--quiet"],
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip()}")
        found[name] = {"(printed)": digest(done.stdout, work)}
        for said in call.split()[1:]:
            out = work / said
            if out.is_dir():
                for path in sorted(p for p in out.rglob("*") if p.is_file()):
                    found[name][path.relative_to(work).as_posix()] = of_file(path, work)
    return found


def of_file(path: Path, work: Path) -> str:
    """The digest of a file; of text, of what does not change from run to run."""
    content = path.read_bytes()
    if path.suffix in (".json", ".md", ".jsonl", ".jinja"):
        return digest(content.decode(), work)
    return hashlib.sha256(content).hexdigest()[:16]


def digest(text: str, work: Path) -> str:
    """The digest of a text without what depends on place, time or version."""
    text = text.replace(str(work), "WORK")
    text = re.sub(r'"(modified|seconds)": [0-9.]+', r'"\1": 0', text)
    text = re.sub(r"[0-9.]+ (seconds|s|min|h)\b", "TIME", text)
    text = re.sub(r'("moemerge": |moemerge )"?[0-9]+\.[0-9]+[^" ]*"?', "VERSION", text)
    text = re.sub(r'"(fingerprint|plan_digest|bytes|xxh3|digest)": [^,}\n]+', r'"\1": 0', text)
    text = re.sub(r"<!-- moemerge [^>]*-->", "SEAL", text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_sources(work: Path) -> None:
    """Small models, an adapter, texts, and the configs that name them, by relative paths."""
    from babies import make_adapter, make_model, simple_config  # type: ignore[import-not-found]

    for number in range(3):
        make_model(work / f"llama{number}", seed=number)
    for family, changes in (
        ("qwen2", {"use_sliding_window": False}), ("qwen3", {"head_dim": 16}),
        ("granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                     "attention_multiplier": 0.25, "logits_scaling": 4.0}),
    ):  # fmt: skip
        for number in range(2):
            make_model(work / f"{family}{number}", family, seed=number, **changes)
    os.chdir(work)
    make_adapter(work / "lora", work / "llama0")
    _without_chance(work / "lora")
    names = ["llama0", "llama1", "llama2"]
    texts = {
        mode: simple_config(names[0], list(names), f"gate_mode: {mode}")
        for mode in ("random", "ridge", "hidden", "self", "cheap_embed", "uniform_random", "zeros")
    }
    texts["self"] += "gate:\n  samples: 4\n  tokens: 8\n"
    for family in ("qwen2", "qwen3", "granite"):
        texts[family] = simple_config(f"{family}0", [f"{family}0", f"{family}1"])
    texts["adapter"] = simple_config("llama0", ["llama0", "llama0+lora"])
    texts["average"] = simple_config("llama0", list(names), "body: average\ngate_mode: random")
    texts["union"] = simple_config("llama0", list(names), "tokenizer: union\ngate_mode: random")
    for name in ARCHITECTURES:
        family = "qwen3" if name in ("qwen3_moe", "dots1") else "llama"
        head = f"architecture: {name}\ngate_mode: random"
        texts[name] = simple_config(f"{family}0", [f"{family}0", f"{family}1"], head)
    texts["split"] = "base_model: llama0\ngate_mode: random\nsplit:\n  slices: 4\n"
    for name, text in texts.items():
        (work / f"{name}.yaml").write_text(text)
    lines = [f"number {n} of the sum is {n * n} in a castle" for n in range(60)]
    (work / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in lines))
    (work / "text.txt").write_text("\n".join(lines))
    shutil.rmtree(work / "__pycache__", ignore_errors=True)


def _without_chance(adapter: Path) -> None:
    """Give an adapter the same bytes every time: PEFT's order of modules is that of a set."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {
        "base_model_name_or_path": "llama0",
        "target_modules": sorted(config["target_modules"]),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    tensors = sorted(load_file(adapter / "adapter_model.safetensors").items())
    made = {name: torch.randn(tensor.shape) * 0.3 for name, tensor in tensors}
    save_file(made, adapter / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
