"""How long a person waits before anything happens: `--help`, and the plan of the 4x7B example.

    python scripts/bench_startup.py [--runs 11] [--against PYTHON]

The models are the tests' stand-ins (true sizes, empty weights), so it needs no network. Each number
is the median of whole processes, taken in turns, next to a Python that does nothing. With
--against PYTHON, the moemerge that it imports has its turns too, and the ratios are printed.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "configs" / "beyonder-4x7b.yaml"
TARGETS = {"python -c pass": None, "moemerge --help": 0.15, "moemerge plan beyonder-4x7b": 0.4}
"""Seconds that each may take, where there is a target."""
MOST, OTHER = 1.1, ", the other"
"""Of the other's time, and how the other is named."""


def main() -> None:
    """Measure and print; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=11, help="runs of each command (default: 11)")
    parser.add_argument("--against", metavar="PYTHON", help="a Python with another moemerge")
    options = parser.parse_args()
    runs: int = options.runs
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        make = [sys.executable, str(ROOT / "tests" / "stand_ins.py"), str(cache)]
        subprocess.run(make, check=True)
        lines = commands(cache, sys.executable)
        if options.against:
            others = commands(cache, options.against).items()
            lines |= {f"{name}{OTHER}": line for name, line in others}
        medians = measure(lines, runs)
    print(f"median of {runs} runs, Python {platform.python_version()}, {os.cpu_count()} cores")
    for name, seconds in medians.items():
        target = TARGETS.get(name)
        verdict = "" if target is None else f"target {target:.2f} s: {_verdict(seconds, target)}"
        print(f"{name:40} {seconds:5.2f} s  {verdict}".rstrip())
    ratios = {name: medians[name] / medians.get(f"{name}{OTHER}", math.inf) for name in TARGETS}
    for name, ratio in ratios.items() if options.against else ():
        print(f"{name}: {ratio:.2f} of the other's, at most {MOST}: {_verdict(ratio, MOST)}")
    slow = any(target and medians[name] > target for name, target in TARGETS.items())
    if slow or max(ratios.values()) > MOST:
        sys.exit(1)


def commands(cache: Path, python: str) -> dict[str, list[str]]:
    """The command of each line, by its name in `TARGETS`."""
    run = [python, "-m", "moemerge"]
    plan = [*run, "plan", str(CONFIG), "--cache-dir", str(cache)]
    return dict(zip(TARGETS, [[python, "-c", "pass"], [*run, "--help"], plan], strict=True))


def measure(lines: dict[str, list[str]], runs: int) -> dict[str, float]:
    """The median seconds of each command after one run to warm up."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for number in range(runs + 1):
        for name, command in lines.items():
            begun = time.perf_counter()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _verdict(seconds: float, target: float) -> str:
    return "met" if seconds <= target else "MISSED"


if __name__ == "__main__":
    main()
