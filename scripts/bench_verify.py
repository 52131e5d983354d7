"""What `verify` says it will take, beside what it takes: copies and computed tensors, two caches.

    python scripts/bench_verify.py [--work DIR] [--runs 3]

Merges models of random weights (`bench_engine.py` makes them) in four ways, checks each mixture as
a process of its own, and prints both times. Cold is with the page cache dropped, which takes Linux
and root; without, those rows are left out. The default size needs 7 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_engine import DROP_CACHES, in_child, make_models, read_through, surroundings

WAYS: dict[str, dict[str, Any]] = {
    "copied": {"dtype": "bfloat16"},
    "converted": {"dtype": "float16"},
    "scaled": {"dtype": "bfloat16", "residual_scale": 0.7},
    "noise": {"dtype": "bfloat16", "noise_scale": 0.01},
}
"""What each way's tensors are: the config's dtype, and what is said of the experts."""

MOST = 2.0


def merged(models: str, way: str, out: str) -> None:
    """Merge the models in one of the ways."""
    from moemerge import merge, parse_config

    said = dict(WAYS[way])
    dtype = said.pop("dtype")
    experts = [{"source_model": str(path), **said} for path in sorted(Path(models).iterdir())]
    base = experts[0]["source_model"]
    config = {"base_model": base, "gate_mode": "random", "dtype": dtype, "experts": experts}
    merge(parse_config(json.dumps(config)), out)


def checked(out: str) -> tuple[float, float]:
    """The seconds that `verify` says, and those that it takes from then on."""
    from moemerge import Silent, verify_checkpoint

    class Heard(Silent):
        seconds, at = 0.0, 0.0

        def say(self, line: str) -> None:
            """Note what is said of time, and when."""
            if found := re.search(r"about (\d+) s", line):
                self.seconds, self.at = float(found[1]), time.monotonic()

    heard = Heard()
    verify_checkpoint(out, heard)
    return heard.seconds, time.monotonic() - heard.at


def main() -> None:
    """Measure and print; exit with 1 if an estimate is off by more than a factor of two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, metavar="DIR", help="work in a new directory in DIR")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of each model (default: 12)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="moemerge-verify-", dir=options.work)).absolute()
    caches = ["warm", *["cold"] * os.access(DROP_CACHES, os.W_OK)]
    worst = 1.0
    try:
        models, out = work / "models", work / "out"
        in_child(make_models, models, 2, "bfloat16", options.layers, 2048, 8192, int(1e9))
        print("\n".join(surroundings(work, None)))
        print("\n| tensors | cache | said s | took s | said / took |\n|---|---|---|---|---|")
        for way in WAYS:
            shutil.rmtree(out, ignore_errors=True)
            in_child(merged, str(models), way, str(out))
            for cache in caches:
                runs = []
                for _ in range(options.runs):
                    os.sync()
                    if cache == "cold":
                        DROP_CACHES.write_text("3")
                    else:
                        read_through(models)
                        read_through(out)
                    runs.append(in_child(checked, str(out)))
                said, took = (statistics.median(column) for column in zip(*runs, strict=True))
                worst = max(worst, said / took, took / said)
                print(f"| {way} | {cache} | {said:.0f} | {took:.1f} | {said / took:.2f} |",
                      flush=True)  # fmt: skip
    finally:
        shutil.rmtree(work)
    print(f"worst: {worst:.2f}, at most {MOST:g}: {'met' if worst <= MOST else 'MISSED'}")
    sys.exit(worst > MOST)


if __name__ == "__main__":
    main()
