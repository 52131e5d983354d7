"""How long a person waits before anything happens: `--help`, and the plan of the 4x7B example.

    python scripts/bench_startup.py [--runs 11]

The models are the tests' stand-ins (true sizes, empty weights), so it needs no network. Each number
is the median of whole processes, taken in turns, next to a Python that does nothing.
"""

from __future__ import annotations

import argparse
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
TARGETS = {"python -c pass": None, "moemerge --help": 0.25, "moemerge plan beyonder-4x7b": 0.6}
"""Seconds that each may take, where there is a target."""


def main() -> None:
    """Measure and print; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=11, help="runs of each command (default: 11)")
    runs: int = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        make = [sys.executable, str(ROOT / "tests" / "stand_ins.py"), str(cache)]
        subprocess.run(make, check=True)
        medians = measure(commands(cache), runs)
    print(f"median of {runs} runs, Python {platform.python_version()}, {os.cpu_count()} cores")
    for name, seconds in medians.items():
        target = TARGETS[name]
        verdict = "" if target is None else f"target {target:.2f} s: {_verdict(seconds, target)}"
        print(f"{name:28} {seconds:5.2f} s  {verdict}".rstrip())
    if any(target and medians[name] > target for name, target in TARGETS.items()):
        sys.exit(1)


def commands(cache: Path) -> dict[str, list[str]]:
    """The command of each line, by its name in `TARGETS`."""
    run = [sys.executable, "-m", "moemerge"]
    plan = [*run, "plan", str(CONFIG), "--cache-dir", str(cache)]
    return dict(zip(TARGETS, [[sys.executable, "-c", "pass"], [*run, "--help"], plan], strict=True))


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
