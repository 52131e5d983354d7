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
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from demo_corpus import DOMAINS, documents
from smollm2 import model_dir

from moemerge import load_config, merge
from moemerge.tune import tune
from moemerge.tuning import Tuning

ROOT = Path(__file__).resolve().parent.parent
EXCERPTS, CHARACTERS = 100, 1500


def main() -> None:
    """Merge, tune and read; print a line for each mixture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args()
    from heldout import Mixture, load_texts

    config = load_config(ROOT / "examples/configs/quickstart.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        data = tuple(str(_excerpts(domain, work)) for domain in DOMAINS)
        tuning = Tuning(data, options.steps, 8, 128, options.learning_rate, held_out=0.03)
        files = {domain: ROOT / f"examples/heldout/{domain}.jsonl" for domain in DOMAINS}
        texts = load_texts(files, model_dir())
        for mode in ("ridge", "random"):
            out = work / mode
            merge(replace(config, gate_mode=mode, text=""), out)
            for label in (mode, f"{mode}, tuned"):
                begun = time.monotonic()
                if label != mode:
                    tune(out, tuning)
                seconds = time.monotonic() - begun
                mixture = Mixture(out, texts)
                losses, _ = mixture.read(next(out.glob("model-00001-of-*")))
                mean = statistics.fmean(losses.values())
                print(f"{label}: loss {mean:.4f}, {seconds:.0f} s", flush=True)


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
