"""The passes of a fitted body: time beside ridge's own pass, and the peak of memory.

    python scripts/bench_fit.py [--layers 8] [--hidden 4096] [--inner 14336] [--experts 4]
                                [--prompts 20] [--runs 1]

The models are stand-ins of true width with random weights. Each line is a process of its own that
runs only the passes, `--lazy`; writing the output is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_memory import make_model

PASSES = """
import json, sys, time
from pathlib import Path
from moemerge.merging.fitting import make_fit
from moemerge.merging.routers import make_routers
from moemerge.checkpoint import read_header
from moemerge.options import Options
from moemerge.output import State
from moemerge.plan import ROUTERS
from moemerge.prepare import fetch, make_plan
from moemerge.reporting import Silent
import torch, transformers
options = Options(lazy=True)
ready = make_plan(sys.argv[1], options)
sources = fetch(ready, options, Silent())
state = State(Path(sys.argv[2]))
state.directory.mkdir(parents=True)
begun = time.monotonic()
if ready.fit:
    make_fit(ready, sources, options, Silent(), state)
    sources[ROUTERS] = read_header(state.fitted)
fitted = time.monotonic() - begun
make_routers(ready, sources, options, Silent(), state.routers)
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([fitted, time.monotonic() - begun - fitted, peak]))
"""
WORDS = "merge expert router layer prompt token body weight model text head norm".split()
CASES = {
    "average": "body: average",
    "regmean": "body: regmean",
    "regmean, align: auto": "body: regmean\nalign: auto",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, number in (
        ("layers", 8), ("hidden", 4096), ("inner", 14336), ("experts", 4), ("prompts", 20),
        ("runs", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moemerge-fit-") as folder:
        work = Path(folder)
        models = [
            make_model(work / f"m{n}", options.layers, options.hidden, options.inner, n)
            for n in range(options.experts)
        ]
        found: dict[str, list[list[float]]] = {case: [] for case in CASES}
        for run in range(options.runs):
            for number, (case, head) in enumerate(CASES.items()):
                config = work / "config.yaml"
                config.write_text(text(head, models, options.prompts), encoding="utf-8")
                command = [sys.executable, "-c", PASSES, config, work / f"{run}-{number}"]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found[case].append(json.loads(done.stdout.splitlines()[-1]))
    print("| body | fit, s | ridge's pass, s | fit / ridge's pass | peak memory, MB |")
    print("|---|---|---|---|---|")
    ridge = statistics.median(of_one[1] for of_one in found["average"])
    for case, runs in found.items():
        fitted, routers, peak = (statistics.median(run[at] for run in runs) for at in range(3))
        cells = f"{fitted:.1f} | {routers:.1f} | {fitted / ridge:.2f} | {peak / 1e6:.0f}"
        print(f"| {case} | {cells} |")


def text(head: str, models: list[Path], prompts: int) -> str:
    """A config with prompts of about a dozen tokens."""
    lines = [f"base_model: {models[0]}", head, "experts:"]
    for number, model in enumerate(models):
        lines += [f"  - source_model: {model}", "    positive_prompts:"]
        for prompt in range(prompts):
            words = [WORDS[(number * 5 + prompt * 3 + at * at) % len(WORDS)] for at in range(12)]
            lines.append(f"      - {' '.join(words)} {number} {prompt}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
