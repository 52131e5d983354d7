"""The command `plan`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from moemerge.cli.describe import plan_lines
from moemerge.cli.options import with_options
from moemerge.cli.program import AsMergekit, Config, app, check_config_path
from moemerge.cli.terminal import Terminal, show
from moemerge.errors import flag, no_effect
from moemerge.options import Options

PROBE = (
    "For a config with `family:`, compare a layer on random input with transformers' own class. "
    "Loads torch."
)
MERGE_ALONE = {
    "overwrite", "verify", "copy_tokenizer", "jobs", "direct", "checksums", "shards", "ray",
    "card", "card_config", "push", "private", "push_as_you_go",
}  # fmt: skip
"""The options of how files are written; `plan` takes them, so that a command is easily edited."""


@app.command(cls=AsMergekit)
@with_options()
def plan(
    config: Config,
    options: Options,
    terminal: Terminal,
    typed: frozenset[str],
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help=PROBE)] = False,
) -> None:
    """Show what a merge of CONFIG would build. Reads headers only and writes nothing."""
    from moemerge.prepare import check_family, expected_peak, make_plan, transfer

    check_config_path(config)
    ready = make_plan(config, options, terminal)
    if probe:
        terminal.say(check_family(ready))
    made = ready.plan
    without_effect = [
        flag(n, value) for n, value in vars(options).items() if n in MERGE_ALONE & typed
    ]
    if idle := [*without_effect, *["--verbose"] * terminal.verbose]:
        terminal.say(no_effect(idle, ": plan writes nothing"))
    if as_json:
        totals = {
            "parameters": made.parameters,
            "active_parameters": made.active_parameters,
            "routed_experts": made.routed,
            "routed_experts_per_token": made.routed_per_token,
            "shared_experts": ready.target.mixture.shared,
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
