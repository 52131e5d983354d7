"""The command `merge`."""

from __future__ import annotations

from pathlib import Path

from moemerge.cli.describe import router_lines
from moemerge.cli.options import with_options
from moemerge.cli.program import AsMergekit, Config, Out, app, check_config_path
from moemerge.cli.terminal import Terminal, peak_memory
from moemerge.options import Options
from moemerge.reporting import count, size


@app.command(cls=AsMergekit)
@with_options()
def merge(config: Config, out: Out, options: Options, terminal: Terminal) -> None:
    """Merge the models of CONFIG into OUT (the default command)."""
    check_config_path(config)
    write_mixture(config, out, options, terminal)


def write_mixture(config: Path, out: Path, options: Options, terminal: Terminal) -> None:
    """Merge, then print what was written and how well the routers route."""
    from moemerge.merging import merge

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
