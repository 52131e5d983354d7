"""One expert of a mixture as a dense model again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moemerge.architectures import MLP, dense_shapes
from moemerge.errors import Findings
from moemerge.families import PARTIAL, RECORDS
from moemerge.mixture.edit import is_made_of, opened_mixture
from moemerge.mixture.edited_plan import Edit
from moemerge.mixture.open import Moe
from moemerge.mixture.rebuild import EditResult, build
from moemerge.mixture.runnable import check_whole, long_name
from moemerge.options import Options
from moemerge.reporting import Reporter, listener

_OURS = (PARTIAL, "o_bias", "post_norm", "qk_norm", "qkv_bias", "saved_as")
"""The keys that `normalise` adds for moemerge's own use; no reader knows them."""


def extract(
    old: str | Path,
    expert: str | int,
    out: str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> EditResult:
    """Write one expert, named by its number or name, as a dense model in the mixture's body.

    Raises:
        InputError: `old` is no mixture that is known, has no such expert, or no dense family has
            such a body.
        RunError: a failure on the way; the same call again goes on.
    """
    options, reporter, findings = options or Options(), listener(reporter, progress), Findings()
    moe = opened_mixture(old, options, findings, reporter)
    number = moe.number(str(expert), "--expert", findings)
    check_whole(moe, findings)
    for what in _no_dense(moe):
        findings.problem(moe.text, what, "there is no dense family like it")
    findings.refuse()
    shapes = dense_shapes({**moe.dense, "intermediate_size": moe.inner})
    parts = []
    for part in moe.parts:
        if part.expert == number:
            name = f"{part.layer}mlp.{MLP[part.which]}.weight"
            parts.append(replace(part, name=name, expert=None))
        elif part.expert is None and not part.made and not part.shared:
            parts.append(part)
    found = {part.name: part for part in parts if part.name in shapes}
    wrong = [
        name for name, shape in shapes.items() if name not in found or found[name].shape != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        what = f"{wrong[0]} is not what a {moe.dense['model_type']} has{more}"
        findings.problem(moe.text, what, "there is no dense family like it")
        findings.refuse()
    if any(part.shared for part in moe.parts):
        reporter.say("its shared experts, which are always on, are no part of the dense model")
    kind = moe.dense["model_type"]
    config = {key: value for key, value in moe.dense.items() if key not in _OURS}
    long = long_name(next(iter(found.values())).dtype)
    config |= {"architectures": [RECORDS[kind].causal], "intermediate_size": moe.inner}
    config |= {"dtype": long, "torch_dtype": long, "use_cache": True}
    assert number is not None
    story = f"{moe.names[number]} of {Path(moe.text).name} as a dense model."
    experts = (moe.names[number],)
    edit = Edit(moe, list(found.values()), config, experts, 1, story)
    return build(edit, Path(out), options, reporter, findings)


def _no_dense(moe: Moe) -> Iterator[str]:
    """Why no dense model has this body, as far as config.json tells."""
    kind = moe.dense["model_type"]
    if not is_made_of(moe, kind):
        yield f"is a {moe.family}, whose body is no {kind}'s"
    if moe.dense[PARTIAL] != 1:
        yield "turns a part of each head only"
    if len(set(moe.dense.get("layer_types") or ["one"])) > 1:
        yield "mixes kinds of attention by layer"
    if not moe.reading.attends(moe.config):
        yield "has layers without attention"
    if not moe.reading.has_positions(moe.config):
        yield "has attention without positions"
