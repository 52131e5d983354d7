"""A mixture of another tool with names that every reader knows."""

from __future__ import annotations

from pathlib import Path

from moemerge.errors import Findings
from moemerge.mixture.edit import opened_mixture, retold
from moemerge.mixture.edited_plan import Edit
from moemerge.mixture.rebuild import EditResult, build
from moemerge.mixture.runnable import check_groups, config_of, is_wrong
from moemerge.options import Options
from moemerge.reporting import Reporter, listener


def repair(
    old: str | Path,
    out: str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> EditResult | None:
    """Write `old` to `out` with the tensor names and the config.json that every reader knows.

    Returns None and writes nothing if `old` has them already.

    Raises:
        InputError: `old` is no mixture that is known, or `out` cannot be; nothing was written.
        RunError: a failure on the way; the same call again goes on.
    """
    options, reporter, findings = options or Options(), listener(reporter, progress), Findings()
    moe = opened_mixture(old, options, findings, reporter)
    if not is_wrong(moe):
        return None
    check_groups(moe, moe.experts, findings)
    findings.refuse()
    edit = Edit(
        moe,
        moe.parts,
        config_of(moe, moe.experts, moe.per_token),
        moe.names,
        moe.per_token,
        f"{Path(moe.text).name}, with the names that every reader knows.",
        text=retold(moe),
        same_model=True,
    )
    return build(edit, Path(out), options, reporter, findings)
