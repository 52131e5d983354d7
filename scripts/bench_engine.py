"""The engine beside mergekit and `cp`: wall time, CPU time and peak memory, measured in one run.

    python scripts/bench_engine.py [--runs 3] [--cases random hidden] [--work DIR] [--no-peer]
                                   [--against PYTHON]

Makes Mistral-shaped models of random weights, then runs in turn, as processes of their own: a merge
by moemerge, `cp` of its output, and the same merge by mergekit. Before each run the old output is
deleted and the disk synced, for truncating a file costs seconds. The default size needs 43 GB of
disk, and mergekit's environment (`scripts/environment mergekit`) 1.6 GB in the cache.

With --against the same merge by another moemerge has its turn before each of this one's, and the
ratios of their medians are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from smollm2 import model_dir

# numpy and torch are imported only in spawned processes, and the parent stays small: the peak that
# the kernel reports for a child counts what its parent held when it began.

ROOT = Path(__file__).resolve().parent.parent
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MOEMERGE = (sys.executable, "-m", "moemerge", "--quiet")


@dataclass(frozen=True)
class Case:
    """One merge: its gates and their own options, the sources' dtype, each program's options."""

    gate_mode: str
    dtype: str = "bfloat16"
    options: tuple[str, ...] = ()
    peer_options: tuple[str, ...] = ()
    has_peer: bool = True
    gate: tuple[tuple[str, Any], ...] = ()


CASES = {
    "random": Case("random"),
    "cheap_embed": Case("cheap_embed"),
    "hidden": Case("hidden"),
    "hidden-lazy": Case(
        "hidden",
        options=("--lazy",),
        peer_options=("--lazy-unpickle", "--out-shard-size=1B"),
    ),
    "ridge-lazy": Case("ridge", options=("--lazy",), has_peer=False),
    "self": Case("self", has_peer=False, gate=(("samples", 8), ("tokens", 16))),
    # Half the layers, so that the models take no more room.
    "float32": Case("random", "float32"),
}  # fmt: skip
VERSIONS = """
from importlib.metadata import distributions
from platform import python_version
names = {"mergekit", "torch", "transformers"}
found = sorted(f"{d.name} {d.version}" for d in distributions() if d.name in names)
print(", ".join([*found, f"Python {python_version()}"]))
"""
NOTES = """
{experts} models, one also the base, of {layers} layers (float32: half) of {hidden} x {inner}.
Medians of {runs} runs. warm: the input was read just before; cold: the page cache was dropped.
flushed: until the output is on the disk, for which cp and mergekit do not wait.
peak: at least what this script holds, some 33 MB.
torch: the same bytes to bf16 in memory, into a buffer; torch .to(): into new memory each time.
mergekit, in hidden-lazy: with --lazy-unpickle --out-shard-size=1B, the nearest it offers.
"""
EXAMPLE = """
Exits with 1 if a target is missed; the targets are for the default size.

The PYTHON of --against may be that of an environment which has another moemerge installed, or
a script that runs this environment's Python with another checkout on its path. For a commit:

    git worktree add /tmp/older COMMIT
    printf '#!/bin/sh\\nPYTHONPATH=/tmp/older exec {python} "$@"\\n' > /tmp/older/python
    chmod +x /tmp/older/python
    python scripts/bench_engine.py --cases random hidden-lazy --no-peer --against /tmp/older/python
"""
TOPICS = ("programs", "law", "cooking", "music", "history", "medicine", "travel", "mathematics")
PROMPTS = ("Explain {}.", "A book about {}", "What is new in {}?", "My notes on {}:", "I like {}")


@dataclass(frozen=True)
class Sample:
    """One run of a program, or the medians of several."""

    wall: float  # s
    flushed: float  # s, until its output is on the disk
    cpu: float  # s, user and system
    peak: float  # MB resident
    cached: float  # share of its input in the page cache when it began; NaN: not known


Medians = dict[tuple[str, str, str], Sample]  # by case, cache ("warm" or "cold"), program


def main() -> None:
    """Measure and print; exit with 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLE.replace("{python}", sys.executable),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--work", type=Path, metavar="DIR", help="work in a new directory in DIR (default: "
        "the system's temporary directory)")  # fmt: skip
    add("--keep", action="store_true", help="leave the last models and outputs there")
    add("--runs", type=int, default=3, help="runs of each program (default: %(default)s)")
    add("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="CASE",
        help=f"of {', '.join(CASES)} (default: all; may be empty)")  # fmt: skip
    add("--flat", action="store_true", help="also compare the peak memory of 1 layer and of all, "
        "in shards of 500 MB and of 50 GB")  # fmt: skip
    add("--cold", action="store_true", help="also with the page cache dropped (Linux, as root)")
    add("--no-peer", action="store_true", help="leave mergekit out")
    add(
        "--against",
        type=program,
        metavar="PYTHON",
        help="also run the moemerge that this Python imports",
    )
    add("--options", type=shlex.split, default=[], metavar="TEXT",
        help="more options for moemerge, as in --options='--no-verify'")  # fmt: skip
    add("--layers", type=int, default=8, help="of each model (default: %(default)s)")
    add("--hidden", type=int, default=4096, help="width; a multiple of 512 (default: %(default)s)")
    add("--inner", type=int, default=14336, help="width of an MLP (default: %(default)s)")
    add("--experts", type=int, default=4, help="models; the first is also the base (default: "
        "%(default)s)")  # fmt: skip
    add("--shard-size", type=float, default=2, metavar="GB", help="of the sources (default: 2)")
    options = parser.parse_args()
    if min(options.runs, options.layers, options.hidden, options.experts) < 1:
        parser.error("--runs, --layers, --hidden and --experts are at least 1")
    if options.hidden % 512:
        parser.error(f"--hidden is a multiple of 512, not {options.hidden}")
    if options.cold and not os.access(DROP_CACHES, os.W_OK):
        parser.error(f"--cold: no right to write {DROP_CACHES}")
    if options.against and package_of(options.against) == package_of(sys.executable):
        parser.error(f"--against: {options.against} imports the very moemerge that is measured")
    check_room(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up then, too
    work = Path(tempfile.mkdtemp(prefix="moemerge-engine-", dir=options.work)).absolute()
    try:
        peer = None if options.no_peer else peer_programs()
        in_child(model_dir)  # the tokenizer, fetched on the first call
        print("\n".join(surroundings(work, peer, options.against)))
        medians = measure_cases(options, work, peer)
        peaks = measure_flat(options, work) if options.flat else []
        met = [report(*target) for target in targets(medians, peaks)]
    finally:
        if options.keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work)
    sys.exit(not all(met))


def program(name: str) -> str:
    """The path of a program; an argument's type."""
    if found := shutil.which(name):
        return str(Path(found).absolute())
    raise argparse.ArgumentTypeError(f"{name} is no program")


def package_of(python: str) -> str:
    """Where the moemerge that `python` imports stands."""
    return output_of([python, "-c", "import moemerge; print(moemerge.__file__)"])


def check_room(options: argparse.Namespace) -> None:
    """Refuse to begin what the disk has no room for: the sources, a mixture and its copy."""
    mlps = 2 * options.layers * 3 * options.hidden * options.inner  # bytes
    rest = 2 * options.hidden * (options.layers * 2.5 * options.hidden + 2 * 49152)
    need = options.experts * (mlps + rest) + 2 * (options.experts * mlps + rest)
    free = shutil.disk_usage(options.work or tempfile.gettempdir()).free
    if need > 0.98 * free:
        raise SystemExit(
            f"this needs {need / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB are free; "
            "take another place (--work) or smaller models (--layers, --hidden)"
        )


def measure_cases(options: argparse.Namespace, work: Path, peer: Path | None) -> Medians:
    """Run every case's programs in turn, several times; print a row for each."""
    print(NOTES.format(**vars(options)))
    print("| case | cache | program | input cached | wall s | flushed s | CPU s | peak MB ", end="")
    print("| wall / cp | wall / mergekit |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)
    found: Medians = {}
    outputs = work / "outputs"
    mine, copy, theirs = (outputs / name for name in ("moemerge", "cp", "mergekit"))
    for name, case in CASES.items():
        if name not in options.cases:
            continue
        layers = options.layers if case.dtype == "bfloat16" else max(1, options.layers // 2)
        models = models_of(options, work, case.dtype, layers)
        config = write_config(work, models, case)
        merge = [*MOEMERGE[1:], config, mine, *case.options, *options.options]
        programs: dict[str, tuple[list[Any], Path]] = {}  # the command, and what it reads
        if options.against:
            programs["against"] = ([options.against, *merge], models)
        programs["moemerge"] = ([sys.executable, *merge], models)
        programs["cp"] = (["cp", "-r", mine, copy], mine)  # right after what it copies
        if peer and case.has_peer:
            command = [peer / "mergekit-moe", config, theirs, "--quiet", *case.peer_options]
            programs["mergekit"] = (command, models)
        samples: dict[tuple[str, str], list[Sample]] = {}
        for _ in range(options.runs):
            for cache in ("warm", "cold") if options.cold else ("warm",):
                for program, (command, source) in programs.items():
                    shutil.rmtree(copy if program == "cp" else outputs, ignore_errors=True)
                    outputs.mkdir(exist_ok=True)
                    output = mine if program == "against" else outputs / program
                    sample = measure(command, source, cache, output)
                    samples.setdefault((cache, program), []).append(sample)
                    if (program, cache, case.dtype) == ("cp", "warm", "float32"):
                        converted = 2 * sum(file.stat().st_size for file in weights(mine))
                        times = in_child(torch_seconds, models / "0", converted)
                        for way, seconds in zip(("torch", "torch .to()"), times, strict=True):
                            sample = Sample(seconds, math.nan, math.nan, math.nan, math.nan)
                            samples.setdefault((cache, way), []).append(sample)
        for (cache, program), runs in samples.items():
            fields = zip(*map(astuple, runs), strict=True)
            found[name, cache, program] = Sample(*map(statistics.median, fields))
        for cache, program in samples:
            print(row(found, name, cache, program), flush=True)
    return found


def measure_flat(options: argparse.Namespace, work: Path) -> list[float]:
    """Peak memory in MB of random gates for two depths and two sizes of shards."""
    print(f"\n| layers | shards | peak MB |\n{'|---' * 3}|")
    peaks = []
    for layers in (1, options.layers):
        models = models_of(options, work, "bfloat16", layers)
        config = write_config(work, models, CASES["random"])
        for size in ("500MB", "50GB"):
            runs = []
            for _ in range(options.runs):
                out = work / "outputs" / "moemerge"
                shutil.rmtree(out.parent, ignore_errors=True)
                out.parent.mkdir()
                command = [*MOEMERGE, config, out, "--shard-size", size, *options.options]
                runs.append(measure(command, models, "warm", out).peak)
            peaks.append(statistics.median(runs))
            print(f"| {layers} | {size} | {peaks[-1]:.0f} |", flush=True)
    return peaks


def targets(found: Medians, flat: list[float]) -> Iterator[tuple[str, float, str, float]]:
    """What is promised of what was measured: text, value, relation, limit."""
    warm = {(key[0], key[2]): run for key, run in found.items() if key[1] == "warm"}
    for (case, other), run in warm.items():
        if other == "against":
            mine = astuple(warm[case, "moemerge"])
            wall, flushed, cpu, peak, _ = (a / b for a, b in zip(mine, astuple(run), strict=True))
            print(f"{case}: {flushed:.3f} of the other's time until flushed, {cpu:.3f} of its CPU "
                  f"time, {peak:.3f} of its peak memory")  # fmt: skip
            yield f"{case}: wall time / that of --against", wall, "at most", 1.03
    for case, other, most in (
        ("random", "cp", 0.9), ("random", "mergekit", 1 / 4), ("cheap_embed", "mergekit", 1 / 4),
        ("hidden-lazy", "mergekit", 1 / 2),
    ):  # fmt: skip
        if (case, other) in warm:
            ratio = warm[case, "moemerge"].wall / warm[case, other].wall
            yield f"{case}: wall time / {other}'s", ratio, "at most", most
    for case, megabytes in (("random", 300), ("cheap_embed", 400), ("hidden-lazy", 1000)):
        if (case, "moemerge") in warm:
            yield f"{case}: peak MB", warm[case, "moemerge"].peak, "at most", megabytes
    if {("hidden", "moemerge"), ("hidden-lazy", "moemerge")} <= warm.keys():
        ratio = warm["hidden", "moemerge"].wall / warm["hidden-lazy", "moemerge"].wall
        yield "hidden: wall time / hidden-lazy's", ratio, "at most", 1.1
    if {("ridge-lazy", "moemerge"), ("hidden-lazy", "moemerge")} <= warm.keys():
        ratio = warm["ridge-lazy", "moemerge"].wall / warm["hidden-lazy", "moemerge"].wall
        yield "ridge-lazy: wall time / hidden-lazy's", ratio, "at most", 1.3
    if ("float32", "torch .to()") in warm:
        rate = warm["float32", "torch .to()"].wall / warm["float32", "moemerge"].wall
        yield "float32: rate / that of torch in memory", rate, "at least", 0.6
    if flat:
        yield "flat: largest peak / smallest", max(flat) / min(flat), "at most", 1.1


def report(text: str, value: float, relation: str, limit: float) -> bool:
    """Print a target and whether it is met; return the latter."""
    met = value <= limit if relation == "at most" else value >= limit
    print(f"{text}: {value:.4g}, {relation} {limit:g}: {'met' if met else 'MISSED'}")
    return met


def row(found: Medians, case: str, cache: str, program: str) -> str:
    """A line of the table."""
    run = found[case, cache, program]
    cells = [case, cache, program, f"{run.cached:.0%}", f"{run.wall:.2f}", f"{run.flushed:.2f}",
             f"{run.cpu:.2f}", f"{run.peak:.0f}"]  # fmt: skip
    for other in ("cp", "mergekit"):
        known = other != program and (case, cache, other) in found
        cells.append(f"{run.wall / found[case, cache, other].wall:.2f}" if known else "")
    return f"| {' | '.join(cells)} |".replace(" nan% ", " ").replace(" nan ", " ")


def measure(command: list[Any], source: Path, cache: str, output: Path) -> Sample:
    """Run `command`, which reads the weights of `source`, with a warm or a cold page cache."""
    os.sync()
    if cache == "cold":
        DROP_CACHES.write_text("3")
    else:
        read_through(source)
    cached = math.nan if cache == "cold" else cached_share(source)
    log = output.parent / "log"
    with log.open("wb") as file:
        begun = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), **surrounded(command), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    wall = time.perf_counter() - begun
    process.returncode = status
    if status:
        said = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{said}\nfailed: {shlex.join(map(str, command))}")
    for path in weights(output):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    flushed = time.perf_counter() - begun
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = usage.ru_maxrss * unit / 1e6
    return Sample(wall, flushed, usage.ru_utime + usage.ru_stime, peak, cached)


def read_through(directory: Path) -> None:
    """Read all weights once, for the page cache."""
    buffer = bytearray(8 << 20)
    for file in weights(directory):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def cached_share(directory: Path) -> float:
    """The share of the weights in the page cache, by a sample every 16 MiB; NaN if not known."""
    seen = [0, 0]  # absent, present
    for file in weights(directory):
        with file.open("rb", buffering=0) as opened:
            for offset in range(0, file.stat().st_size, 16 << 20):
                try:
                    os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
                    seen[1] += 1
                except BlockingIOError:
                    seen[0] += 1
                except (OSError, AttributeError):  # the file system or the platform cannot tell
                    return math.nan
    return seen[1] / sum(seen)


def weights(directory: Path) -> list[Path]:
    """The weight files below `directory`."""
    return sorted(directory.rglob("*.safetensors"))


def torch_seconds(model: Path, size: int) -> tuple[float, float]:
    """How long torch takes for `size` bytes of float32 in memory to bf16, on all cores.

    Into memory that is there already, which is bound by the memory's bandwidth, and, as `.to()`
    does it, into memory that the kernel has yet to give.
    """
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(os.cpu_count() or 1)
    done, reused, fresh = 0, 0.0, 0.0
    for file in weights(model):  # a shard at a time, for a single tensor may fit the CPU's cache
        tensors = [tensor.clone() for tensor in load_file(file).values()]
        result = torch.ones(max(tensor.numel() for tensor in tensors), dtype=torch.bfloat16)
        for tensor in tensors:
            begun = time.perf_counter()
            result[: tensor.numel()].copy_(tensor.view(-1))
            reused += time.perf_counter() - begun
            done += tensor.nbytes
        for tensor in tensors:
            begun = time.perf_counter()
            tensor.to(torch.bfloat16)
            fresh += time.perf_counter() - begun
    return reused * size / done, fresh * size / done


def models_of(options: argparse.Namespace, work: Path, dtype: str, layers: int) -> Path:
    """The directory of models 0, 1, ...: made when needed, those of other dtypes deleted."""
    for other in {case.dtype for case in CASES.values()} - {dtype}:
        shutil.rmtree(work / other, ignore_errors=True)
    models = work / dtype / f"{layers}-layers"
    if not models.exists():
        shutil.rmtree(work / "outputs", ignore_errors=True)
        size = (layers, options.hidden, options.inner, int(options.shard_size * 1e9))
        in_child(make_models, models, options.experts, dtype, *size)
    return models


def make_models(
    models: Path, count: int, dtype: str, layers: int, hidden: int, inner: int, shard_bytes: int
) -> None:
    """Write random Mistral models with SmolLM2's tokenizer, in shards."""
    import numpy as np

    tokenizer = model_dir()
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    heads = hidden // 128
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": 128,
        "vocab_size": vocabulary, "tie_word_embeddings": False, "torch_dtype": dtype,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "sliding_window": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    width = 4 if dtype == "float32" else 2
    sizes = {name: width * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    for number in range(count):
        random = np.random.default_rng(number)
        values = random.standard_normal((16 << 20) + 1, dtype=np.float32) * np.float32(0.02)
        ones = np.ones(hidden, dtype=np.float32)
        # A bf16 is the upper half of a float32. One block serves every matrix, from anywhere on.
        block, norm = (
            memoryview(
                a.tobytes() if width == 4 else (a.view(np.uint32) >> 16).astype("<u2").tobytes()
            )
            for a in (values, ones)
        )
        directory = models / str(number)
        directory.mkdir(parents=True)
        index: dict[str, str] = {}
        for part, names in enumerate(shards, 1):
            file_name = f"model-{part:05}-of-{len(shards):05}.safetensors"
            index |= dict.fromkeys(names, file_name)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in names:
                offsets = [end, end := end + sizes[name]]
                kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
                header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": offsets}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with (directory / file_name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    left = sizes[name]
                    start = width * int(random.integers(len(block) // width))
                    while left:
                        piece = (norm if len(shapes[name]) == 1 else block[start:])[:left]
                        left -= file.write(piece)
                        start = 0
        total = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(total))
        (directory / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, directory)


def write_config(work: Path, models: Path, case: Case) -> Path:
    """The config that both tools read: every model an expert, with five prompts."""
    experts = [
        {
            "source_model": str(models / str(number)),
            "positive_prompts": [prompt.format(TOPICS[number % len(TOPICS)]) for prompt in PROMPTS],
        }
        for number in range(len(list(models.iterdir())))
    ]
    gate = {"mode": case.gate_mode, **dict(case.gate)} if case.gate else None
    modes = {"gate": gate} if gate else {"gate_mode": case.gate_mode}
    config = {"base_model": experts[0]["source_model"], **modes}
    path = work / "config.yaml"  # JSON is YAML
    path.write_text(json.dumps({**config, "dtype": "bfloat16", "experts": experts}))
    return path


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a new process and return what it returns."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peer_programs() -> Path:
    """The directory of mergekit's programs, made when needed."""
    return Path(output_of([str(ROOT / "scripts" / "environment"), "mergekit"])) / "bin"


def surroundings(work: Path, peer: Path | None, against: str | None = None) -> Iterator[str]:
    """Date, hardware and versions, a line each."""
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(": ")[2] if names else processor
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    df = ["df", "-T" if sys.platform == "linux" else "-Y", str(work)]
    found = subprocess.run(df, capture_output=True, text=True, check=False).stdout.split("\n")
    file_system = found[1].split()[1] if len(found) > 1 else "unknown file system"
    yield f"{date.today()}: {processor}, {os.cpu_count()} cores, {memory:.0f} GB memory"
    yield f"{platform.system()} {platform.release()}, {file_system}"
    for python in filter(None, (sys.executable, against)):
        moemerge = output_of([python, "-m", "moemerge", "--version"])
        where = f" of {Path(package_of(python)).parent.parent}" if against else ""
        yield f"{moemerge}{where}, {output_of([python, '-c', VERSIONS])}"
    if peer:
        yield output_of([str(peer / "python"), "-c", VERSIONS])


def output_of(command: list[str]) -> str:
    """What `command` prints."""
    where = surrounded(command)
    done: subprocess.CompletedProcess[str]
    done = subprocess.run(command, **where, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def surrounded(command: list[Any]) -> dict[str, Any]:
    """How a process is begun, so that this Python alone imports the moemerge that stands here."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if command[0] == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    return {"env": environment, "cwd": os.sep}


if __name__ == "__main__":
    main()
