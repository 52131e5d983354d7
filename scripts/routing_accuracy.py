"""How often the right expert comes first: held-out text of each demo domain through the mixture.

For each gate mode the demo experts are merged, and each domain's held-out passages are read by the
finished mixture in transformers. Printed is the share of tokens whose first expert is their
domain's, averaged over layers, with chance at one over the number of experts.

python scripts/routing_accuracy.py [--modes hidden cheap_embed random]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moemerge import Options, load_config, merge

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples/configs/quickstart.yaml"
HELD_OUT = ROOT / "examples/heldout"


def first_expert_share(model_dir: Path, domains: list[str]) -> dict[str, float]:
    """The share of each domain's tokens whose first expert has the domain's index, over layers."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    shares = {}
    for index, domain in enumerate(domains):
        right = total = 0
        for line in (HELD_OUT / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            ids = tokenizer(f"<|endoftext|>{text}", return_tensors="pt").input_ids
            with torch.inference_mode():
                routed = model(ids, output_router_logits=True).router_logits
            first = torch.stack(routed).argmax(-1)[:, 1:]  # (L, T) without the separator
            right += int((first == index).sum())
            total += first.numel()
        shares[domain] = right / total
    return shares


def main() -> None:
    """Merge once per gate mode and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=["hidden", "cheap_embed", "random"])
    parser.add_argument("--config", type=Path, default=CONFIG)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = load_config(options.config)
    domains = [expert.name for expert in config.experts]
    print(f"| gate mode | all | {' | '.join(domains)} |")
    print("|---" * (len(domains) + 2) + "|")
    for mode in options.modes:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out"
            merge(replace(config, gate_mode=mode), out, Options(verify=False))
            shares = first_expert_share(out, domains)
        mean = sum(shares.values()) / len(shares)
        cells = " | ".join(f"{share:.2f}" for share in shares.values())
        print(f"| `{mode}` | {mean:.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
