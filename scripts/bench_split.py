"""Half of a dense model's MLPs: what is lost by each way to cut them into slices, on held-out text.

    PYTHONPATH=. "$(scripts/environment test)/bin/python" scripts/bench_split.py [--json FILE]

Every second passage of `examples/heldout` is the text that neurons and routers are fitted to, the
others are read. Each split is a real one, written by moemerge, loaded in transformers in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_engine import ROOT, report, surroundings
from heldout import Texts, load, load_texts, read
from smollm2 import model_dir

from moemerge import MergeConfig, Options, merge

KINDS = ("c", "french", "legal", "sql", "other")
SPLITS = (
    ("coactivation", 0, "activation"),
    ("kmeans", 0, "activation"),
    ("random", 0, "activation"),
    ("order", 0, "activation"),
    ("coactivation", 1, "activation"),
    ("kmeans", 1, "activation"),
    ("coactivation", 0, "random"),
)
"""How neurons are assigned, how many slices are shared, and how routers are made."""

DOWN = ("experts.down_proj", "output_linear.weight")
NOTES = """
loss: nats a token, the mean over kinds of text; over: beyond the dense model's. Half of {slices}
slices are on for every token, "shared" of them always; "scaled by all": what the chosen add is
multiplied by the number of all slices, not of those that are on. seconds: the whole split.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    assign: str
    shared: int
    router: str
    losses: dict[str, float]
    seconds: float = math.nan

    @property
    def loss(self) -> float:
        """The mean over kinds."""
        return statistics.fmean(self.losses.values())


def main() -> None:
    """Split, read, print; exit with 1 if co-activation is not best."""
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="moemerge-split-", dir=options.work) as directory:
        work = Path(directory)
        about = list(surroundings(work, None))
        print("\n".join(about), flush=True)
        rows = []
        for row in measured(options, work):
            rows.append(row)
            print(f"{row.assign}, {row.shared} shared, {row.router}: {row.loss:.4f}", flush=True)
    print(NOTES.format(slices=options.slices))
    columns = ["neurons", "shared", "routers", "loss", "over", "perplexity", "seconds"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        over, perplexity = row.loss - rows[0].loss, math.exp(row.loss)
        cells = f"{row.loss:.3f} | {over:+.3f} | {perplexity:.1f} | {row.seconds:.0f}"
        print(f"| {row.assign} | {row.shared} | {row.router} | {cells} |")
    fitted = {row.assign: row.loss for row in rows if (row.shared, row.router) == (0, "activation")}
    margin = min(loss for name, loss in fitted.items() if name != "coactivation")
    met = report("co-activation over the next", fitted["coactivation"] - margin, "at most", 0)
    if options.json:
        saved = {"about": about, "rows": [{**asdict(row), "loss": row.loss} for row in rows]}
        options.json.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not met)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="the dense model; default: SmolLM2-135M")
    add("--slices", type=int, default=8, help="of each MLP (default: 8)")
    add("--passages", type=int, default=6, help="read of each kind of text (default: 6)")
    add("--fit", type=int, default=12, help="fitted to of each kind of text (default: 12)")
    add("--work", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="for splits")
    add("--json", type=Path, metavar="FILE", help="write the numbers here too")
    options = parser.parse_args()
    options.model = options.model or model_dir()
    return options


def measured(options: argparse.Namespace, work: Path) -> Iterator[Row]:
    """The dense model, then every split."""
    texts = halves(options, work)
    yield Row("dense", 0, "", read(load(options.model), texts)[0])
    for assign, shared, router in SPLITS:
        split = {
            "slices": options.slices, "shared": shared, "assign": assign,
            "text": str(work / "fit.jsonl"),
        }  # fmt: skip
        config = MergeConfig(str(options.model), split=split, gate_mode=router)
        begun = time.monotonic()
        merge(config, work / "out", Options(overwrite=True))
        seconds = time.monotonic() - begun
        model = load(work / "out")
        yield Row(assign, shared, router, read(model, texts)[0], seconds)
        if (assign, shared, router) == SPLITS[0]:
            louder(model, 2.0)
            yield Row(assign, shared, f"{router}, scaled by all", read(model, texts)[0], seconds)


def halves(options: argparse.Namespace, work: Path) -> Texts:
    """The passages to read; those to fit are written to `fit.jsonl`."""
    fit, files = [], {}
    for kind in KINDS:
        lines = (ROOT / f"examples/heldout/{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        fit += lines[::2][: options.fit]
        files[kind] = work / f"{kind}.jsonl"
        files[kind].write_text("\n".join(lines[1::2]) + "\n", encoding="utf-8")
    (work / "fit.jsonl").write_text("\n".join(fit) + "\n", encoding="utf-8")
    return load_texts(files, options.model, options.passages)


@torch.no_grad()
def louder(model: Any, factor: float) -> None:
    """Multiply what every routed slice adds."""
    for name, parameter in model.named_parameters():
        if name.endswith(DOWN) and "shared" not in name:
            parameter.mul_(factor)


if __name__ == "__main__":
    main()
