"""The command `regate`."""

from __future__ import annotations

from moemerge.cli.describe import router_lines
from moemerge.cli.options import GATING, with_options
from moemerge.cli.program import Config, Out, app, check_config_path
from moemerge.cli.terminal import Terminal
from moemerge.options import Options


@app.command()
@with_options(*GATING)
def regate(out: Out, config: Config, options: Options, terminal: Terminal) -> None:
    """Give the mixture in OUT the routers that CONFIG asks for; nothing else is rewritten."""
    from moemerge.merging import regate

    check_config_path(config)
    merged = regate(out, config, options, terminal)
    terminal.result(f"{out}: new routers, gate_mode {merged.plan.gate_mode}")
    for line in router_lines(merged):
        terminal.result(line)
