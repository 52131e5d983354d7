"""One expert of a mixture as a dense model again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moemerge.architectures import LAYER, MLP, dense_shapes
from moemerge.errors import Findings
from moemerge.families import ATTENTION, HEAD, PARTIAL, RECORDS, Family, record_of
from moemerge.mixture.edit import is_made_of, opened_mixture
from moemerge.mixture.edited_plan import Edit
from moemerge.mixture.open import Moe
from moemerge.mixture.parts import Part
from moemerge.mixture.rebuild import EditResult, build
from moemerge.mixture.runnable import check_whole, long_name
from moemerge.options import Options
from moemerge.plan import Join, Recipe
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
    config = _config_of(moe)
    long = long_name(next(iter(found.values())).dtype)
    config |= {"architectures": [RECORDS[kind].causal], "intermediate_size": moe.inner}
    config |= {"dtype": long, "torch_dtype": long, "use_cache": True}
    assert number is not None
    story = f"{moe.names[number]} of {Path(moe.text).name} as a dense model."
    experts = (moe.names[number],)
    text = {*moe.checkpoint.renamed.values()} if "wrapper" in config else {*moe.checkpoint.tensors}
    beside = [part for part in moe.parts if not part.layer and part.name not in {*text, HEAD}]
    own = [*_as_named(found, RECORDS[kind]), *beside]
    edit = Edit(moe, own, config, experts, 1, story)
    return build(edit, Path(out), options, reporter, findings)


def _config_of(moe: Moe) -> dict[str, Any]:
    """The dense model's config.json, as its family has it."""
    said = moe.dense.get("said")
    if said:
        config = {key: moe.dense[key] for key in said}
        for kind, causal in RECORDS[moe.dense["model_type"]].inside.items():
            if wrapper := moe.dense.get("wrapper"):
                names = {"model_type": kind, "architectures": [causal]}
                config["wrapper"] = {**wrapper, **names}
        return config
    return {key: value for key, value in moe.dense.items() if key not in _OURS}


def _as_named(parts: Mapping[str, Part], record: Family) -> Iterator[Part]:
    """The dense model's tensors under its family's own names; some are several joined."""
    whole = {part: (own, list(of)) for own, of in record.fused.items() for part in of}
    for name, part in parts.items():
        layer = LAYER.fullmatch(name)
        module, _, leaf = layer[3].rpartition(".") if layer else ("", "", "")
        if layer is None or module not in whole:
            yield part
            continue
        own, of = whole[module]
        if module != of[0]:
            continue
        several = [parts[f"{layer[1]}{one}.{leaf}"] for one in of]
        rows = sum(one.shape[0] for one in several)
        made: Recipe = Join(tuple(one.recipe for one in several)) if of[1:] else part.recipe
        shape = (rows, *part.shape[1:])
        yield replace(part, name=f"{layer[1]}{own}.{leaf}", shape=shape, recipe=made)


def _no_dense(moe: Moe) -> Iterator[str]:
    """Why no dense model has this body, as far as config.json tells."""
    kind = moe.dense["model_type"]
    if not is_made_of(moe, kind):
        yield f"is a {moe.family}, whose body is no {kind}'s"
    record = record_of(moe.dense)
    if record and record.layers != ATTENTION:
        return
    if moe.dense[PARTIAL] != 1:
        yield "turns a part of each head only"
    if len(set(moe.dense.get("layer_types") or ["one"])) > 1:
        yield "mixes kinds of attention by layer"
