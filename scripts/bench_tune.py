"""Routers trained, beside those that a gate mode made: held-out loss of mixtures of demo experts.

    PYTHONPATH=. "$(scripts/environment test)/bin/python" scripts/bench_tune.py [--steps N]

Each domain's training documents (`demo_corpus.py`) give 100 excerpts; loss is read on
examples/heldout, in float32, as in `bench_routing.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench_engine import report
from demo_corpus import DOMAINS, documents
from smollm2 import model_dir

from moemerge import load_config, merge
from moemerge.training.settings import Tuning
from moemerge.training.tune_routers import tune

ROOT = Path(__file__).resolve().parent.parent
EXCERPTS, CHARACTERS = 100, 1500
MODES = ("ridge", "random")


def main() -> None:
    """Merge, tune and read; print a line for each mixture; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--learning-rate", type=float, default=Tuning.learning_rate)
    options = parser.parse_args()
    from heldout import Mixture, load_texts

    config = load_config(ROOT / "examples/configs/quickstart.yaml")
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        data = tuple(str(_excerpts(domain, work)) for domain in DOMAINS)
        tuning = Tuning(data, options.steps, 4, 128, options.learning_rate, held_out=0.02)
        files = {domain: ROOT / f"examples/heldout/{domain}.jsonl" for domain in DOMAINS}
        texts = load_texts(files, model_dir())
        for mode in MODES:
            out = work / mode
            merge(replace(config, gate_mode=mode, text=""), out)
            for label in (mode, f"{mode}, tuned"):
                begun = time.monotonic()
                if label != mode:
                    tune(out, tuning)
                    found[f"{mode}, seconds"] = time.monotonic() - begun
                losses, _ = Mixture(out, texts).read(next(out.glob("model-00001-of-*")))
                found[label] = statistics.fmean(losses.values())
                each = ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())
                print(f"{label}: loss {found[label]:.4f} ({each})", flush=True)
    targets = (
        ("random, tuned: seconds", found["random, seconds"], 300),
        ("random, tuned: nats above ridge", found["random, tuned"] - found["ridge"], 0.02),
        ("ridge, tuned: nats above ridge", found["ridge, tuned"] - found["ridge"], 0),
    )
    met = [report(text, value, "at most", limit) for text, value, limit in targets]
    sys.exit(not all(met))


def _excerpts(domain: str, work: Path) -> Path:
    """A file with an excerpt of each of some documents that the experts were trained on."""
    draw, path = random.Random(0), work / f"{domain}.jsonl"
    whole = list(documents(domain, model_dir().parent / "demo-corpus")[0].values())
    lines = []
    for text in draw.sample(whole, min(EXCERPTS, len(whole))):
        at = draw.randrange(max(1, len(text) - CHARACTERS))
        lines.append(json.dumps({"text": text[at : at + CHARACTERS]}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
