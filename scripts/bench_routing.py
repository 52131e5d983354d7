"""Routers beside each other: held-out loss and first choices, of each gate mode and of mergekit's.

    PYTHONPATH=. "$(scripts/environment test)/bin/python" scripts/bench_routing.py \\
        [--modes hidden ridge:on_policy=true] [--bodies average regmean:align=auto]
        [--json FILE] [--no-peer]

Every mode of the installed moemerge is merged as a process of its own, from sentences and from
keywords, into the base model's body and into the average of the experts', and so are mergekit's
modes. Each mixture then reads every domain's held-out passages in transformers, in float32. Beside
them stand dense models: each expert alone, their average, and the oracle, which in a given body
always takes the domain's own expert. Another config needs models in directories or in the Hub's
cache, `--heldout DIR` with a NAME.jsonl for each expert, and other.jsonl: text of no expert.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import signal
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from bench_engine import MOEMERGE, ROOT, in_child, measure, peer_programs, surroundings
from bench_engine import report as report_target
from smollm2 import model_dir

from moemerge import MergeConfig, MoemergeError, load_config, make_plan
from moemerge.checkpoint.reference import parse_source
from moemerge.gates import Needs, Prompts
from moemerge.gates import modes as gates

# torch is imported only in functions, and not before all merges are done: the peak that the kernel
# reports for a child counts what its parent held when it began.

CONFIGS = ROOT / "examples/configs"
OTHER = "other"
UNIFORM = "uniform average of all experts"
BODIES = ("base", "average")
ALIKE = ("base", "average")
"""The bodies that are the same whatever the prompts; a fitted one is kept of every merge."""
PEER_MODES = {"random": False, "cheap_embed": True, "hidden": True}  # whether prompts matter
VARIANTS = {"ridge": ("ridge:on_policy=true",)}  # of a mode, measured beside it
NOTES = """
loss: nats a token, the mean over the domains, each read for itself. first: the share of tokens
whose domain's expert comes first, over layers and domains; chance is one over the experts.
closed: the share closed of the gap between mergekit's hidden, from sentences, and the oracle in the
base's body. other: the loss on text of no expert, beside that of all experts in equal parts in the
same body. Seconds and memory are the whole merge's, the fastest of {runs}.
"""


@dataclass(frozen=True)
class Variant:
    """One way to make routers. `prompts` are sentences, keywords or none."""

    label: str
    mode: str
    settings: dict[str, Any]
    body: str
    prompts: str
    peer: bool = False

    @property
    def whole(self) -> str:
        """The name of the directory with a whole mixture of this body."""
        if self.body in ALIKE:
            return self.body
        return re.sub(r"\W+", "-", f"{self.body} {self.label} {self.prompts}")


@dataclass(frozen=True)
class Merged:
    """A merge that was run: where its routers lie, and what it took."""

    variant: Variant
    routers: Path
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Row:
    """A line of the table. `chosen` is how often each expert comes first, by kind of text."""

    label: str
    body: str
    prompts: str
    losses: dict[str, float]
    chosen: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = math.nan
    megabytes: float = math.nan

    @property
    def loss(self) -> float:
        """The mean over domains."""
        return statistics.fmean(loss for kind, loss in self.losses.items() if kind != OTHER)

    @property
    def first(self) -> float:
        """How often the domain's own expert comes first: the mean over domains."""
        domains = [kind for kind in self.losses if kind != OTHER]
        if not self.chosen:
            return math.nan
        return statistics.fmean(self.chosen[kind][own] for own, kind in enumerate(domains))


def main() -> None:
    """Merge, read, print; exit with 1 if a merge failed or a target is missed."""
    options = parsed()
    configs = {"sentences": absolute(load_config(options.config))}
    if options.keywords:
        configs["keywords"] = absolute(load_config(options.keywords))
    configs["none"] = without_prompts(configs["sentences"])
    in_child(model_dir)  # the demo's base model, fetched on the first call
    domains = list(make_plan(configs["sentences"]).plan.experts)
    texts = {kind: options.heldout / f"{kind}.jsonl" for kind in (*domains, OTHER)}
    for file in texts.values():
        if not file.is_file():
            raise SystemExit(f"{file} is missing: a passage a line, as {{'text': ...}}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up then, too
    work = Path(tempfile.mkdtemp(prefix="moemerge-routing-", dir=options.work))
    try:
        peer = None if options.no_peer else peer_programs()
        about = list(surroundings(work, peer))
        print("\n".join(about), flush=True)
        in_child(write_dense, configs["sentences"], domains, work / "dense")
        merges, failed = run_merges(options, configs, domains, work, peer)
        rows = []
        for row in evaluate(work, merges, domains, texts, options.passages):
            rows.append(row)
            name = ", ".join(filter(None, (row.label, row.body, row.prompts)))
            print(f"read: {name}: {row.loss:.4f}", flush=True)
    finally:
        shutil.rmtree(work)
    print(NOTES.format(runs=options.runs))
    columns = ["router", "body", "prompts", "loss", *domains, "first", "closed", OTHER, "s", "MB"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    print(*(line(row, rows) for row in rows), sep="\n", end="\n\n")
    found = list(targets(rows))
    met = [report_target(*target) for target in found]
    if options.json:
        saved = {
            "about": about,
            "rows": [{**dataclasses.asdict(row), "loss": row.loss, "first": row.first,
                      "closed": closed(row, rows), OTHER: beside_uniform(row, rows)}
                     for row in rows],
            "targets": [(*target, ok) for target, ok in zip(found, met, strict=True)],
            "failed": failed,
        }  # fmt: skip
        options.json.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(failed) or not all(met))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="the experts, with sentences for prompts "
        "(default: the quickstart's)")  # fmt: skip
    add("--keywords", type=Path, metavar="FILE", help="the same experts with keywords (default: "
        "keywords.yaml beside the quickstart's config, if that is used)")  # fmt: skip
    add("--heldout", type=Path, default=ROOT / "examples/heldout", metavar="DIR",
        help="NAME.jsonl for each expert, and other.jsonl (default: examples/heldout)")  # fmt: skip
    modes = [spec for mode in gates.for_merges() for spec in (mode, *VARIANTS.get(mode, ()))]
    add("--modes", nargs="*", default=modes, metavar="MODE[:KEY=VALUE,...]",
        help="gate modes, with the fields of a config's gate (default: %(default)s)")  # fmt: skip
    add("--bodies", nargs="*", default=BODIES, metavar="BODY[:KEY=VALUE]",
        help="bodies, with further keys of the config (default: %(default)s)")  # fmt: skip
    add("--passages", type=int, metavar="N", help="only N of each file, for a quick look")
    add("--runs", type=int, default=2, help="of each merge; the fastest counts (default: 2)")
    add("--no-peer", action="store_true", help="leave mergekit out, and with it what is closed")
    add("--json", type=Path, metavar="FILE", help="also write all of it there")
    add("--work", type=Path, metavar="DIR", help="work in a new directory in DIR (default: "
        "the system's temporary directory); 5 GB for the demo")  # fmt: skip
    options = parser.parse_args()
    if options.config is None:
        options.config = CONFIGS / "quickstart.yaml"
        options.keywords = options.keywords or CONFIGS / "keywords.yaml"
    if options.runs < 1:
        parser.error("--runs is at least 1")
    return options


def absolute(config: MergeConfig) -> MergeConfig:
    """The config with its local sources as absolute paths, so that it works from anywhere."""

    def found(source: str) -> str:
        parts = filter(None, parse_source(source, config.folder))
        return "+".join(str(part.directory or part.text) for part in parts)

    experts = [replace(e, source_model=found(e.source_model)) for e in config.experts]
    return replace(config, base_model=found(config.base_model), experts=tuple(experts))


def without_prompts(config: MergeConfig) -> MergeConfig:
    """The config with no prompts."""
    bare = [replace(e, positive_prompts=(), negative_prompts=()) for e in config.experts]
    return replace(config, experts=tuple(bare))


def write_dense(config: MergeConfig, domains: list[str], out: Path) -> None:
    """Write `base` and every expert, adapters merged, as ordinary models below `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of what PEFT calls
    sources = {"base": config.base_model}
    sources |= {name: e.source_model for name, e in zip(domains, config.experts, strict=True)}
    for name, source in sources.items():
        model, adapter = parse_source(source)
        place = {"pretrained_model_name_or_path": model.directory or model.repo,
                 "revision": model.revision or "main"}  # fmt: skip
        dense = AutoModelForCausalLM.from_pretrained(**place, dtype="auto")
        kept = dense.dtype
        if adapter:
            from peft import PeftModel

            where = adapter.directory or adapter.repo
            dense = PeftModel.from_pretrained(dense.float(), where).merge_and_unload().to(kept)
        dense.save_pretrained(out / name)
        AutoTokenizer.from_pretrained(**place).save_pretrained(out / name)


def run_merges(
    options: argparse.Namespace,
    configs: dict[str, MergeConfig],
    domains: list[str],
    work: Path,
    peer: Path | None,
) -> tuple[list[Merged], list[str]]:
    """Run every merge; keep its routers, and whole the first output of each body.

    Also returned are the labels of those that failed; what this moemerge does not know is said.
    """
    done: list[Merged] = []
    failed: list[str] = []
    out = work / "outputs" / "out"
    for variant in variants(options, configs, peer is not None):
        name = f"{variant.label}, {variant.body} body, {variant.prompts}"
        config = work / "config.yaml"
        try:
            if variant.peer:
                text = peer_config(variant, configs[variant.prompts], domains, work / "dense")
            else:
                text = with_gate(configs[variant.prompts], variant).as_yaml()
        except (LookupError, MoemergeError) as error:
            print(f"left out: {name}: {error}", flush=True)
            continue
        config.write_text(text, encoding="utf-8")
        command: list[Any] = [*MOEMERGE, config, out]
        if variant.peer and peer:
            command = [peer / "mergekit-moe", config, out, "--quiet"]
        samples = []
        try:
            for _ in range(options.runs):
                shutil.rmtree(out.parent, ignore_errors=True)
                out.parent.mkdir()
                samples.append(measure(command, work / "dense", "warm", out))
        except SystemExit as error:
            failed.append(name)
            print(f"failed: {name}:\n{error}", flush=True)
            continue
        routers = work / f"routers-{len(done)}.safetensors"
        in_child(save_routers, out, routers)
        if not variant.peer and not (work / variant.whole).exists():
            out.rename(work / variant.whole)
        seconds = min(sample.wall for sample in samples)
        done.append(Merged(variant, routers, seconds, max(sample.peak for sample in samples)))
        print(f"merged: {name}: {seconds:.1f} s", flush=True)
    return done, failed


def variants(
    options: argparse.Namespace, configs: dict[str, MergeConfig], peer: bool
) -> Iterator[Variant]:
    """What is measured, in the table's order."""
    prompted = [kind for kind in configs if kind != "none"]
    for mode, uses_prompts in PEER_MODES.items() if peer else ():
        for prompts in prompted if uses_prompts else ["none"]:
            yield Variant(f"mergekit {mode}", mode, {}, "base", prompts, peer=True)
    for body in options.bodies:
        for spec in options.modes:
            mode, _, rest = spec.partition(":")
            settings = yaml.safe_load(f"{{{rest.replace('=', ': ')}}}")
            needs = gates.find(mode).NEEDS if mode in gates.names() else Needs()
            wanted = {
                Prompts.NONE: ["none"],
                Prompts.OPTIONAL: [*configs],
                Prompts.REQUIRED: prompted,
            }
            for prompts in wanted[needs.prompts]:
                yield Variant(spec.replace(":", " "), mode, settings, body, prompts)


def with_gate(config: MergeConfig, variant: Variant) -> MergeConfig:
    """The config with the variant's gate and body.

    Raises:
        LookupError: this moemerge does not know the mode or the field.
    """
    if variant.mode not in gates.names():
        raise LookupError(f"this moemerge has no gate mode {variant.mode!r}")
    known = {f.name for f in dataclasses.fields(config)}
    body, _, more = variant.body.partition(":")
    changes: dict[str, Any] = {
        "gate_mode": variant.mode,
        "gate": variant.settings,
        "body": body,
        **dict(pair.split("=") for pair in filter(None, more.split(","))),
    }
    for name in changes.keys() - known:
        if changes.pop(name) not in ({}, "base"):
            raise LookupError(f"this moemerge's config has no {name!r}")
    return replace(config, **changes)


def peer_config(variant: Variant, config: MergeConfig, domains: list[str], dense: Path) -> str:
    """The same merge for mergekit, which needs adapters merged."""
    experts = [
        {"source_model": str(dense / name), "positive_prompts": list(expert.positive_prompts),
         "negative_prompts": list(expert.negative_prompts)}
        for name, expert in zip(domains, config.experts, strict=True)
    ]  # fmt: skip
    head = {"base_model": str(dense / "base"), "gate_mode": variant.mode,
            "dtype": config.dtype or "bfloat16"}  # fmt: skip
    return json.dumps({**head, "experts": experts})  # JSON is YAML


def save_routers(model: Path, out: Path) -> None:
    """Write the routers of a finished mixture, as they stand in its shards, to one small file."""
    from heldout import layer_of
    from safetensors import safe_open
    from safetensors.torch import save_file

    found: dict[str, Any] = {}
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names = [name for name in tensors.keys() if layer_of(name) >= 0]  # noqa: SIM118
            found |= {name: tensors.get_tensor(name) for name in names}
    save_file(found, out)


def evaluate(
    work: Path,
    merges: list[Merged],
    domains: list[str],
    files: dict[str, Path],
    most: int | None,
) -> Iterator[Row]:
    """Read all text by the dense models, then by every mixture, body by body."""
    from heldout import Mixture, load_texts, read_dense

    texts = load_texts(files, work / "dense/base", most)
    for label, body, losses in read_dense(work / "dense", domains, texts):
        yield Row(label, body, "", losses)
    for whole in dict.fromkeys(m.variant.whole for m in merges if not m.variant.peer):
        mixture = Mixture(work / whole, texts)
        if whole in ALIKE:
            yield Row(UNIFORM, whole, "", mixture.read_uniform())
        for m in merges:
            if m.variant.whole == whole:
                losses, chosen = mixture.read(m.routers)
                name = (m.variant.label, m.variant.body, m.variant.prompts)
                yield Row(*name, losses, chosen, m.seconds, m.megabytes)


def find(rows: list[Row], label: str, body: str = "base", prompts: str = "sentences") -> Row | None:
    """The row of that name, if it was measured."""
    wanted = (label, body, prompts)
    return next((row for row in rows if (row.label, row.body, row.prompts) == wanted), None)


def closed(row: Row, rows: list[Row]) -> float:
    """The share of the gap from mergekit's hidden, from sentences, to the oracle; or NaN."""
    worst, best = find(rows, "mergekit hidden"), find(rows, "oracle", prompts="")
    if worst is None or best is None:
        return math.nan
    return (worst.loss - row.loss) / (worst.loss - best.loss)


def beside_uniform(row: Row, rows: list[Row]) -> float:
    """The loss on text of no expert, over that of all experts in equal parts; or NaN.

    Those stand in the same body or, beside a dense model, in the base's; beside a fitted body, in
    the average.
    """
    body = row.body if row.body in (*ALIKE, "") else "average"
    uniform = find(rows, UNIFORM, body or "base", "")
    return row.losses.get(OTHER, math.nan) / uniform.losses[OTHER] if uniform else math.nan


def line(row: Row, rows: list[Row]) -> str:
    """A line of the table."""
    losses = [f"{loss:.3f}" for kind, loss in row.losses.items() if kind != OTHER]
    cells = [row.label, row.body, row.prompts, f"{row.loss:.4f}", *losses, f"{row.first:.3f}",
             f"{closed(row, rows):.0%}", f"{beside_uniform(row, rows) - 1:+.1%}",
             f"{row.seconds:.1f}", f"{row.megabytes:.0f}"]  # fmt: skip
    return "| " + " | ".join("" if "nan" in cell else cell for cell in cells) + " |"


def targets(rows: list[Row]) -> Iterator[tuple[str, float, str, float]]:
    """What is promised of what was measured: text, value, relation, limit."""
    for label, body, prompts, least in (
        ("ridge", "base", "sentences", 0.75), ("self", "base", "keywords", 0.75),
        ("self", "base", "none", 0.75), ("ridge", "average", "sentences", 0.9),
    ):  # fmt: skip
        row = find(rows, label, body, prompts)
        if row and not math.isnan(closed(row, rows)):
            text = f"{label}, {body} body, {prompts}: share of the gap closed"
            yield text, closed(row, rows), "at least", least
    row, average = find(rows, "ridge", prompts="keywords"), find(rows, "weight average", "", "")
    if row and average:
        text = "ridge, keywords: loss / the weight average's"
        yield text, row.loss / average.loss, "at most", 1
    for row in rows:
        if (row.label, row.body, row.prompts) == ("ridge", "base", "sentences") or (
            (row.label, row.body) == ("self", "base")
        ):
            yield f"{row.label}, {row.prompts}: first", row.first, "at least", 0.93
    for row in rows:
        if row.label in ("ridge", "self"):
            text = f"{row.label}, {row.body} body, {row.prompts}: loss on other text / uniform's"
            yield text, beside_uniform(row, rows), "at most", 1.01
    row, hidden = find(rows, "ridge"), find(rows, "hidden")
    if row and hidden:
        yield "ridge: seconds / hidden's", row.seconds / hidden.seconds, "at most", 1.3


if __name__ == "__main__":
    main()
