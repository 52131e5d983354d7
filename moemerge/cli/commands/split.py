"""The command `split`."""

from __future__ import annotations

from moemerge.cli.commands.merge import write_mixture
from moemerge.cli.options import with_options
from moemerge.cli.program import AsMergekit, Config, Out, app, check_config_path
from moemerge.cli.terminal import Terminal
from moemerge.errors import InputError, Problem
from moemerge.options import Options


@app.command(cls=AsMergekit)
@with_options()
def split(config: Config, out: Out, options: Options, terminal: Terminal) -> None:
    """Cut the MLPs of one model into experts, as `split:` in CONFIG says. `merge` does it too."""
    from moemerge.config import load_config

    check_config_path(config)
    said = load_config(config)
    if not said.split:
        fix = "add it (`split: {slices: 8}`), or use `moemerge merge`"
        raise InputError([Problem(said.where("split"), "is missing", fix)])
    write_mixture(config, out, options, terminal)
