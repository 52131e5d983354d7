"""The commands; the only room that prints or exits."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moemerge.cli.describe import plan_lines, router_lines, routing_lines
from moemerge.cli.options import (
    BUILDING,
    GATING,
    READING,
    TUNING,
    UNHEARD,
    meaningful,
    with_options,
    with_ray_address,
)
from moemerge.cli.terminal import Terminal, explained, peak_memory, show
from moemerge.errors import InputError, Problem, nearest
from moemerge.options import Options
from moemerge.reporting import count, size
from moemerge.version import __version__

if TYPE_CHECKING:
    from moemerge.rebuild import Built

INTERRUPTED = "interrupted; run the same command again to go on"


class DefaultToMerge(TyperGroup):
    """`moemerge CONFIG OUT` is `moemerge merge CONFIG OUT`."""

    def main(self, *args: Any, **more: Any) -> Any:
        """Run, and say one line if Ctrl-C ended it, wherever it came."""
        try:
            return super().main(*args, **more)
        except SystemExit as end:
            if end.code == 130:
                print(INTERRUPTED, file=sys.stderr)
            raise

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `merge` where no command stands, and drop what means nothing here, saying so."""
        own = ("--help", "-h", "--version")
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["merge", *args]
        if args[:1] in (["merge"], ["split"], ["plan"]):
            unheard: list[str] = ctx.meta.setdefault(UNHEARD, [])
            args = list(meaningful(list(with_ray_address(args)), unheard))
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultToMerge,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Make one mixture-of-experts language model out of several dense ones.\n\n"
    "`moemerge CONFIG OUT` merges; the commands below do the rest.",
)


MERGE_ALONE = {
    "overwrite", "verify", "copy_tokenizer", "jobs", "direct", "checksums", "shards", "ray",
    "card", "card_config", "push", "private", "push_as_you_go",
}  # fmt: skip
"""The options of how files are written; `plan` takes them, so that a command is easily edited."""


def main() -> None:
    """Run the command line; the console script. What is interrupted ends with 130 and one line."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the terminal's encoding cannot
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        app(prog_name="moemerge")
    except Exception:  # an import that Ctrl-C cuts off may end as any error
        if not interrupts:
            raise
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moemerge {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The output directory.")]


@app.command()
@with_options()
def merge(config: Config, out: Out, options: Options, terminal: Terminal) -> None:
    """Merge the models of CONFIG into OUT (the default command)."""
    _check_config_path(config)
    _merge(config, out, options, terminal)


@app.command()
@with_options()
def split(config: Config, out: Out, options: Options, terminal: Terminal) -> None:
    """Cut the MLPs of one model into slices, as CONFIG's `split:` says; merge does it too."""
    from moemerge.config import load_config

    _check_config_path(config)
    said = load_config(config)
    if not said.split:
        fix = "add it (`split: {slices: 8}`), or use `moemerge merge`"
        raise InputError([Problem(said.where("split"), "is missing", fix)])
    _merge(config, out, options, terminal)


def _merge(config: Path, out: Path, options: Options, terminal: Terminal) -> None:
    from moemerge.pipeline import merge

    merged = merge(config, out, options, terminal)
    if merged.missing:
        terminal.result(
            f"{out}: wrote {size(merged.written)} in {merged.seconds:.1f} s; {merged.missing} of "
            f"{len(merged.plan.shards)} shards are still to come from the other shares"
        )
        return
    plan = merged.plan
    checked = "verified" if options.verify else "not verified"
    terminal.result(
        f"{out}: {count(plan.parameters)} parameters ({count(plan.active_parameters)} active a "
        f"token), {size(plan.nbytes)} in {len(plan.shards)} shards, {checked}"
    )
    for line in router_lines(merged):
        terminal.result(line)
    hub = merged.transfer
    if options.stream and hub.ranges:
        saved = f"{size(max(0, hub.sources - hub.ranges))} of {size(hub.sources)} not needed"
        terminal.result(f"read {size(hub.ranges)} from the Hub, {saved}, and kept none of it")
    rate = merged.written / max(merged.seconds, 1e-3)
    terminal.result(
        f"wrote {size(merged.written)} in {merged.seconds:.1f} s ({size(round(rate))}/s)"
        + (f", peak memory {size(peak)}" if (peak := peak_memory()) else "")
    )
    if merged.address:
        terminal.result(f"pushed to {merged.address}")


@app.command()
@with_options()
def plan(
    config: Config,
    options: Options,
    terminal: Terminal,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,
) -> None:
    """Show what a merge of CONFIG would build; headers are read, nothing is written."""
    from moemerge.costs import expected_peak, transfer
    from moemerge.pipeline import make_plan

    _check_config_path(config)
    ready = make_plan(config, options)
    made = ready.plan
    without_effect = [flag for name, flag in options.flags.items() if name in MERGE_ALONE]
    for flag in [*without_effect, *["--verbose"] * terminal.verbose]:
        terminal.say(f"{flag} has no effect: plan writes nothing")
    if as_json:
        totals = {
            "parameters": made.parameters,
            "active_parameters": made.active_parameters,
            "bytes": made.nbytes,
            "expected_peak_bytes": expected_peak(ready, options),
            "transfer": dataclasses.asdict(transfer(ready, options)),
            "digest": made.digest,
            "notes": list(ready.notes),
        }
        show(json.dumps({**totals, **made.to_json()}, indent=1))
        return
    for line in plan_lines(ready, options):
        terminal.result(line)
    for note in ready.notes:
        terminal.say(note)


@app.command()
def architectures(
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """List what can be written: of which dense models, with which shared experts, who reads it."""
    from moemerge.hosts import listing

    rows = listing()
    if as_json:
        show(json.dumps(rows, indent=1))
        return
    for row in rows:
        show(row.pop("architecture"))
        for what, which in row.items():
            show(f"  {what:15} {which}")


@app.command()
def verify(
    out: Out,
    cache_dir: Annotated[
        str | None, typer.Option("--cache-dir", metavar="DIR", help="The Hub's cache.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Check a finished OUT, every byte, against its manifest and the sources at hand."""
    with explained():
        from moemerge.verify import verify_checkpoint

        terminal = Terminal(quiet, False)
        found = verify_checkpoint(out, terminal, cache_dir)
        terminal.result(
            f"{out}: {size(found.bytes_read)} as the manifest says; {found.compared} of "
            f"{found.tensors} tensors equal to their sources'; {found.seconds:.1f} s"
        )


@app.command()
def push(
    out: Out,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository a private one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Upload a finished OUT to the Hub: what is new, in one commit; the same again goes on."""
    with explained():
        from moemerge.publish import push

        terminal = Terminal(quiet, False)
        terminal.result(f"{out}: pushed to {push(out, repo, private, terminal)}")


@app.command()
@with_options(*GATING)
def regate(out: Out, config: Config, options: Options, terminal: Terminal) -> None:
    """Give the mixture in OUT the routers that CONFIG asks for; nothing else is rewritten."""
    from moemerge.new_routers import regate

    _check_config_path(config)
    merged = regate(out, config, options, terminal)
    terminal.result(f"{out}: new routers, gate_mode {merged.plan.gate_mode}")
    for line in router_lines(merged):
        terminal.result(line)


@app.command()
@with_options(*TUNING)
def tune(
    out: Out,
    options: Options,
    terminal: Terminal,
    adapter: Annotated[
        Path | None, typer.Argument(metavar="[ADAPTER]", help="Where --lora writes its adapter.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            show_default=False,
            help="Text to learn from, plain or jsonl; again for more.",
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            "--only",
            metavar="routers",
            show_default=False,
            help="What is trained; all else is frozen.",
        ),
    ] = "",
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a LoRA adapter of all linears and experts.")
    ] = False,
    qlora: Annotated[
        bool, typer.Option("--qlora", help="The same, with what is frozen in 4 bits.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", help="The adapter's.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="Its scale times its rank.")] = 32,
    packing: Annotated[
        bool,
        typer.Option("--packing/--no-packing", help="Put short texts side by side in a row."),
    ] = True,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute each layer twice, and hold less in memory.",
        ),
    ] = True,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps to a checkpoint.")] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from ADAPTER's last checkpoint.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Give it back the routers from before the last tuning.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="At most so many.")] = 100,
    batch: Annotated[int, typer.Option("--batch", help="Passages a step.")] = 8,
    length: Annotated[int, typer.Option("--length", help="Tokens a passage, at most.")] = 256,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            show_default=False,
            help="Its highest; then a cosine.  [default: 5e-3 for routers, 2e-4 for LoRA]",
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option("--held-out", help="The share of the data never trained on.")
    ] = 0.1,
    balance: Annotated[
        float | None,
        typer.Option(
            "--balance",
            show_default=False,
            help="The weight of the load-balancing loss, if not as config.json says.",
        ),
    ] = None,
    distil: Annotated[
        float,
        typer.Option(
            "--distil",
            help="The share of the loss that is the distance to what the best "
            "expert for each passage says alone.",
        ),
    ] = 0.0,
) -> None:
    """Train the mixture in OUT: its routers, in place (--only routers), or a LoRA adapter of it."""
    from moemerge.router_training import shape
    from moemerge.tune import tune
    from moemerge.tune import undo as undo_tuning
    from moemerge.tuning import Tuning

    if undo:
        undo_tuning(out, terminal)
        terminal.result(f"{out}: has the routers from before its last tuning")
        return
    chosen = [name for name, one in (("lora", lora), ("qlora", qlora), ("only", bool(only))) if one]
    if len(chosen) != 1 or only not in ("", "routers"):
        fix = "write one of --only routers, --lora, --qlora, --undo"
        raise InputError([Problem("tune", "needs one thing to train", fix)])
    of_lora = {
        "ADAPTER": adapter is not None, "--rank": rank != 16, "--alpha": alpha != 32,
        "--no-packing": not packing, "--no-gradient-checkpointing": not checkpointing,
        "--save-every": save_every != 50, "--resume": resume,
    }  # fmt: skip
    of_routers = {"--balance": balance is not None, "--distil": distil != 0}
    idle, where = (of_lora, "--only routers") if only else (of_routers, f"--{chosen[0]}")
    if wrong := [flag for flag, said in idle.items() if said]:
        fix = "remove it"
        raise InputError([Problem(one, f"has no effect with {where}", fix) for one in wrong])
    rate = learning_rate or (5e-3 if only else 2e-4)
    tuning = Tuning(tuple(data or ()), steps, batch, length, rate, held_out, balance, distil)
    if not only:
        from moemerge.finetune import Lora, finetune

        if adapter is None:
            fix = "name a new directory for the adapter"
            raise InputError([Problem("ADAPTER", "is missing", fix)])
        if qlora:
            options = dataclasses.replace(options, load_in_4bit=True)
        wanted = Lora(rank, alpha, packing, checkpointing, save_every, resume)
        made = finetune(str(out), adapter, tuning, wanted, options, terminal)
        terminal.result(
            f"{adapter}: {count(made.parameters)} parameters trained for {made.steps} steps, "
            f"held-out loss {made.before:.4f} to {made.after:.4f}"
        )
        return
    done = tune(out, tuning, options, terminal)
    trained = done.trained
    terminal.result(
        f"{out}: held-out loss {trained.before:.4f} to {trained.after:.4f} at step {trained.best}, "
        f"{done.seconds:.0f} s ({shape(trained.curve)})"
    )


@app.command()
@with_options(*BUILDING)
def merge_adapter(
    moe: Annotated[str, typer.Argument(metavar="MOE", help="A directory or user/name.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A directory or user/name.")],
    out: Out,
    options: Options,
    terminal: Terminal,
) -> None:
    """Write a mixture with a LoRA adapter merged into it: a full checkpoint."""
    from moemerge.merge_adapter import merge_adapter

    _tell_of(merge_adapter(moe, adapter, out, options, terminal), terminal)


Moe = Annotated[str, typer.Argument(metavar="MOE", help="A mixture: a directory or user/name.")]
One = Annotated[
    str, typer.Option("--expert", metavar="N|NAME", show_default=False, help="Which, from 0.")
]


@app.command()
@with_options(*BUILDING)
def repair(moe: Moe, out: Out, options: Options, terminal: Terminal) -> None:
    """Give a mixture the names and config.json that every reader knows, whoever wrote it."""
    from moemerge.take_apart import repair

    built = repair(moe, out, options, terminal)
    if built is None:
        terminal.result(f"{moe}: is as every reader knows it; nothing to do")
    else:
        _tell_of(built, terminal)


@app.command()
@with_options("shard_size", *BUILDING)
def extract(moe: Moe, out: Out, options: Options, terminal: Terminal, expert: One) -> None:
    """Make one expert of a mixture a dense model: its MLPs in the mixture's body."""
    from moemerge.take_apart import extract

    _tell_of(extract(moe, expert, out, options, terminal), terminal)


@app.command()
@with_options("shard_size", "allow_crimes", *BUILDING)
def add(
    moe: Moe,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="model, or model+adapter.")],
    out: Out,
    options: Options,
    terminal: Terminal,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", show_default=False, help="The expert's name.")
    ] = "",
) -> None:
    """Give a mixture one more expert; its routers' new row is the mean of the others: regate."""
    from moemerge.take_apart import add

    built = add(moe, source, out, name, options, terminal)
    _tell_of(built, terminal)
    terminal.result("its row of the routers is the others' mean: `moemerge regate` fits them all")


@app.command()
@with_options(*BUILDING)
def drop(moe: Moe, out: Out, options: Options, terminal: Terminal, expert: One) -> None:
    """Take one expert out of a mixture, and its row out of the routers."""
    from moemerge.take_apart import drop

    _tell_of(drop(moe, expert, out, options, terminal), terminal)


@app.command()
@with_options(*BUILDING)
def top_k(
    moe: Moe,
    k: Annotated[int, typer.Argument(metavar="K", help="Experts a token.")],
    options: Options,
    terminal: Terminal,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The output directory; or MOE itself.")
    ] = None,
) -> None:
    """Let each token of a mixture choose K experts; without OUT only config.json changes."""
    from moemerge.take_apart import top_k

    _tell_of(top_k(moe, k, out, options, terminal), terminal)


def _tell_of(built: Built, terminal: Terminal) -> None:
    plan = built.plan
    experts = f"{len(plan.experts)} experts, {plan.experts_per_token} a token; "
    terminal.result(
        f"{built.out}: {plan.architecture}, {experts if len(plan.experts) > 1 else ''}"
        f"wrote {size(built.written)}, copied {size(built.copied)} of {size(plan.nbytes)}"
    )


@app.command()
@with_options(*READING)
def routing(
    out: Out,
    options: Options,
    terminal: Terminal,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="NAME=FILE",
            show_default=False,
            help="Text for the expert NAME (or of none), plain or jsonl; again for more.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the page.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write the heat map.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show how the mixture in OUT routes: the config's prompts held out, or given texts."""
    from moemerge import heat_map, page
    from moemerge.output import writing
    from moemerge.routing import report

    texts = _texts(text or ())
    for path in filter(None, (html, png)):
        if not path.absolute().parent.is_dir():
            fix = "name a file in a directory that exists"
            raise InputError([Problem(str(path), "its directory does not exist", fix)])
        if path.is_dir():
            raise InputError([Problem(str(path), "is a directory", "name a file")])
    if png and importlib.util.find_spec("matplotlib") is None:
        fix = "pip install 'moemerge[report]'"
        raise InputError([Problem("--png", "matplotlib is not installed", fix)])
    found = report(out, texts, options, terminal)
    if html:
        with writing(html):
            html.write_text(page.render(found), encoding="utf-8")
    if png:
        with writing(png):
            heat_map.save(found, png)
    if as_json:
        show(json.dumps(found))
        return
    for line in routing_lines(found):
        terminal.result(line)


def _texts(given: Iterable[str]) -> dict[str, Path]:
    texts: dict[str, Path] = {}
    for one in given:
        name, equals, file = one.partition("=")
        if not equals or not name or not file:
            raise InputError([Problem("--text", f"{one!r} is no NAME=FILE", "write NAME=FILE")])
        if name in texts:
            raise InputError([Problem("--text", f"{name} stands twice", "keep one of them")])
        texts[name] = Path(file)
    return texts


def _check_config_path(config: Path) -> None:
    try:
        config.stat()
    except FileNotFoundError:
        pass
    except OSError:
        return  # reading it will say what is wrong
    else:
        return
    commands = [
        command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback
    ]
    guess = nearest(str(config), commands)
    fix = f"{guess} (a command)" if guess.startswith("did") else "name a YAML file"
    raise InputError([Problem(str(config), "there is no such config file", fix)])
