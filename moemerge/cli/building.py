"""The commands that make a mixture, check it, show it and let others have it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from moemerge.cli.describe import plan_lines, router_lines, routing_lines
from moemerge.cli.options import (
    READING,
    with_options,
)
from moemerge.cli.program import (
    Config,
    Out,
    Texts,
    app,
    check_config_path,
    check_file_to_write,
    texts_by_name,
)
from moemerge.cli.terminal import Terminal, peak_memory, show
from moemerge.errors import InputError, Problem, no_effect
from moemerge.options import Options
from moemerge.reporting import count, size
from moemerge.version import __version__

MERGE_ALONE = {
    "overwrite", "verify", "copy_tokenizer", "jobs", "direct", "checksums", "shards", "ray",
    "card", "card_config", "push", "private", "push_as_you_go",
}  # fmt: skip
"""The options of how files are written; `plan` takes them, so that a command is easily edited."""


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


@app.command()
@with_options()
def merge(config: Config, out: Out, options: Options, terminal: Terminal) -> None:
    """Merge the models of CONFIG into OUT (the default command)."""
    check_config_path(config)
    _merge(config, out, options, terminal)


@app.command()
@with_options()
def split(config: Config, out: Out, options: Options, terminal: Terminal) -> None:
    """Cut the MLPs of one model into slices, as CONFIG's `split:` says; merge does it too."""
    from moemerge.config import load_config

    check_config_path(config)
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

    check_config_path(config)
    ready = make_plan(config, options, terminal)
    made = ready.plan
    without_effect = [flag for name, flag in options.flags.items() if name in MERGE_ALONE]
    if idle := [*without_effect, *["--verbose"] * terminal.verbose]:
        terminal.say(no_effect(idle, ": plan writes nothing"))
    if as_json:
        totals = {
            "parameters": made.parameters,
            "active_parameters": made.active_parameters,
            "routed_experts": made.routed,
            "routed_experts_per_token": made.routed_per_token,
            "shared_experts": ready.host.mixture.shared,
            "bytes": made.nbytes,
            "expected_peak_bytes": expected_peak(ready, options),
            "transfer": dataclasses.asdict(transfer(ready, options)),
            "digest": made.digest,
            "notes": [note.typed for note in ready.notes],
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
    from moemerge.publish import push

    terminal = Terminal(quiet, False)
    terminal.result(f"{out}: pushed to {push(out, repo, private, terminal)}")


@app.command()
@with_options(*READING)
def routing(
    out: Out,
    options: Options,
    terminal: Terminal,
    text: Texts = None,
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

    texts = texts_by_name(text or ())
    for path in filter(None, (html, png)):
        check_file_to_write(path)
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
