"""Peak memory of `tune lora` in bf16 and with `--qlora`: they differ by what the weights say.

Makes a Mixtral of random weights, trains an adapter of it twice as processes of their own, and
prints the peak resident memory of each (ru_maxrss) beside the weights' own size.

PYTHONPATH=. python scripts/bench_qlora.py [--layers 16] [--hidden 2048] [--inner 5632]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path

from bench_memory import make_model, peak_megabytes

ROOT = Path(__file__).resolve().parent.parent


def weights_megabytes(moe: str, four_bits: bool) -> float:
    """What its weights take in memory, in MB, by their headers."""
    from moemerge.errors import Findings
    from moemerge.mixture.open import open_moe
    from moemerge.mixture.unfused import memory_of

    return memory_of(open_moe(moe, None, Findings()), four_bits) / 1e6


def main() -> None:
    """Print one row for each way, and one for the difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    size = (options.layers, options.hidden, options.inner)
    print("| | weights, MB | peak, MB | the rest, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="moemerge-qlora-") as name:
        root = Path(name)
        # In a process of its own: a child's peak counts what its parent held when it began.
        spawn = multiprocessing.get_context("spawn")
        made = spawn.Process(target=make_model, args=(root / "dense", *size, 0))
        made.start()
        made.join()
        experts = f"  - source_model: {root}/dense\n" * options.experts
        head = f"base_model: {root}/dense\ngate_mode: random\nexperts:\n"
        (root / "config.yaml").write_text(head + experts)
        peak_megabytes(root / "config.yaml", root / "out", "--no-verify",
                       "--i-understand-this-is-not-useful-without-training")  # fmt: skip
        text = root / "text.txt"
        text.write_text((ROOT / "README.md").read_text()[:3000])
        told = ["--data", text, "--steps", options.steps, "--batch", 1, "--length", 128]
        found = list[tuple[float, float]]()
        for how in ("tune lora", "tune lora --qlora"):
            with spawn.Pool(1) as pool:
                weights = pool.apply(weights_megabytes, (str(root / "out"), "--qlora" in how))
            adapter = root / f"adapter{len(found)}"
            peak = peak_megabytes(*how.split(), root / "out", adapter, *told)
            found.append((weights, peak))
            print(f"| `{how}` | {weights:.0f} | {peak:.0f} | {peak - weights:.0f} |", flush=True)
    (one, high), (other, low) = found
    print(f"| difference | {one - other:.0f} | {high - low:.0f} | |")


if __name__ == "__main__":
    main()
