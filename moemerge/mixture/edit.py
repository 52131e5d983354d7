"""Edits of a mixture: experts added or dropped, and the number that each token chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.architectures import MLP, find, name_of
from moemerge.checkpoint import FLOATS, Donor, Location, Opener
from moemerge.config import Expert, MergeConfig, parse_config
from moemerge.dense import Body
from moemerge.errors import Findings, InputError, Line, flag, no_effect
from moemerge.families import DOWN, UP
from moemerge.gates import kept_in, texts_in, with_expert
from moemerge.mixture.edited_plan import Edit
from moemerge.mixture.open import Moe, open_moe
from moemerge.mixture.parts import Part
from moemerge.mixture.rebuild import EditResult, build, build_in_place
from moemerge.mixture.runnable import (
    check_groups,
    check_whole,
    config_of,
    has_factor,
    most_per_token,
    weighed,
)
from moemerge.options import Options, RunOptions
from moemerge.output import changed_sources, held
from moemerge.plan import ROUTERS, Cut, Fill, Join, Mean, Read, Recipe, Sources, recipe
from moemerge.prepare import compare, no_host
from moemerge.reporting import Reporter, Silent, listener
from moemerge.text import PIECE_TOKENS, Prompt

if TYPE_CHECKING:
    from moemerge.gates import Matrix

_NUMBERS = ("F64", *FLOATS.values())


def top_k(
    old: str | Path,
    per_token: int,
    out: str | Path | None = None,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> EditResult:
    """Let each token choose `per_token` experts; without `out`, `old` itself changes.

    In place, only config.json and the manifest change. A split multiplies the sum of the chosen
    slices by their number. Most classes keep this factor in the down projections, so they are
    rewritten, which needs an `out`.

    Raises:
        InputError: `old` is no mixture that is known, or cannot choose so many experts.
        RunError: a failure on the way; the same call again goes on.
    """
    options, reporter, findings = options or Options(), listener(reporter, progress), Findings()
    moe = opened_mixture(old, options, findings, reporter)
    edit = _choosing(moe, per_token, out is None, findings)
    if out is not None:
        return build(edit, Path(out), options, reporter, findings)
    if flags := [flag(name, value) for name, value in options.chosen.items()]:
        reporter.say(Line(no_effect(flags, ": only config.json changes")))
    with held(moe.checkpoint.directory) as change:
        moe = opened_mixture(
            old, options, findings, Silent()
        )  # again, because the lock is held only now
        return build_in_place(_choosing(moe, per_token, True, findings), change, reporter)


def _choosing(moe: Moe, per_token: int, in_place: bool, findings: Findings) -> Edit:
    """The edit that lets each token choose `per_token` experts.

    Raises:
        InputError: the mixture cannot run with this number.
    """
    check_groups(moe, moe.experts, findings)
    most = most_per_token(moe)
    if not 1 <= per_token <= most:
        fix = f"write a number from 1 to {most}"
        findings.problem("K", f"{per_token} of {moe.experts} experts cannot be chosen", fix)
    elif per_token % moe.segments:
        what = f"is {per_token}, and each expert is {moe.segments} segments, which belong together"
        findings.problem("K", what, f"write a multiple of {moe.segments}")
    if in_place and not moe.checkpoint.reference.directory:
        findings.problem(moe.text, "is on the Hub, where nothing is changed", "name an OUT")
    parts = list(moe.parts) if has_factor(moe) else [weighed(p, per_token, moe) for p in moe.parts]
    if in_place and parts != list(moe.parts):
        what = f"is a split, whose down projections are multiplied by {moe.factor}, so they change"
        findings.problem(moe.text, what, "name an OUT")
    findings.refuse()
    config = config_of(moe, moe.experts, per_token)
    each = per_token // moe.segments
    said = retold(moe, lambda merge: replace(merge, experts_per_token=each))
    story = f"{Path(moe.text).name}, with {per_token} of its {moe.experts} experts a token."
    return Edit(moe, parts, config, moe.names, per_token, story, text=said, same_model=True)


def drop(
    old: str | Path,
    expert: str | int,
    out: str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> EditResult:
    """The mixture without one expert, named by its number or name, and without its router rows.

    Raises:
        InputError: `old` is no mixture that is known, or has no such expert, or no other.
        RunError: a failure on the way; the same call again goes on.
    """
    options, reporter, findings = options or Options(), listener(reporter, progress), Findings()
    moe = opened_mixture(old, options, findings, reporter)
    number, segments = moe.number(str(expert), "--expert", findings), moe.segments
    count = moe.experts - segments
    if moe.factor:
        what = "is a split: all its slices together are the model"
        findings.problem(moe.text, what, "split the model anew, or let a token choose fewer: top-k")
    elif not count:
        findings.problem("--expert", "is the only one there is", "use extract")
    else:
        check_groups(moe, count, findings)
    findings.refuse()
    assert number is not None
    gone = range(number * segments, (number + 1) * segments)
    parts = [
        _renumbered(part, part.expert - segments * (part.expert >= gone.stop), moe)
        if part.expert is not None
        else _rows(part, [(0, gone.start), (gone.stop, moe.experts)])
        if part.made
        else part
        for part in moe.parts
        if part.expert not in gone
    ]
    per_token = min(moe.per_token, count)
    if per_token < moe.per_token:
        reporter.say(f"{per_token} experts a token: there are no more")
    experts = tuple(name for name in moe.names if name != moe.names[number])
    if moe.manifest is None:
        experts = moe.names[:-1]

    def without(merge: MergeConfig) -> MergeConfig:
        left = (*merge.experts[:number], *merge.experts[number + 1 :])
        return replace(merge, experts=left, experts_per_token=per_token // segments)

    story = f"{Path(moe.text).name} without {moe.names[number]}."
    config = config_of(moe, count, per_token)
    edit = Edit(moe, parts, config, experts, per_token, story, text=retold(moe, without))
    return build(edit, Path(out), options, reporter, findings)


def add(
    old: str | Path,
    source: str | Path,
    out: str | Path,
    name: str = "",
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
    text: str = "",
) -> EditResult:
    """The mixture with the MLPs of one more dense model, `model` or `model+adapter`, as its last
    expert.

    The routers' rows stay, and one is appended that is their mean: it is never a token's first
    choice. Where `old` has a manifest, `regate` then fits them all. With `text`, a file of the new
    expert's text, and what `old` was merged with (`--statistics`), all rows are solved anew at
    once; the body stays as it is.

    Raises:
        InputError: `old` is no mixture that is known, or the model's MLPs do not fit it.
        RunError: a failure on the way; the same call again goes on.
    """
    options, reporter, findings = options or Options(), listener(reporter, progress), Findings()
    moe = opened_mixture(old, options, findings, reporter)
    opener = Opener(findings, None, options.cache_dir)
    donor = opener.donor(str(source), "SOURCE", name)
    if moe.experts == 1:
        findings.problem(moe.text, "has one expert: a router has nothing to go by", "merge anew")
    check_whole(moe, findings)
    if moe.manifest and donor and donor.name in moe.names:
        donor = replace(donor, name=_free(donor.name, moe.names)) if not name else donor
        if name:
            findings.problem("--name", f"{name} is there already", "choose another")
    check_groups(moe, moe.experts + 1, findings)
    what, fix = no_host(donor.model.config, known_alone=True) if donor else ("", "")
    if what:
        findings.problem("SOURCE", what, fix)
    elif donor and not findings.problems:
        _check_donor(moe, donor, options, findings)
    kept, texts = None, tuple[Prompt, ...]()
    if text:
        directory = moe.checkpoint.directory
        size = moe.dense["num_hidden_layers"], moe.dense["hidden_size"], len(moe.names)
        kept = kept_in(directory, moe.text, size, findings)
        limit = moe.dense.get("max_position_embeddings") or PIECE_TOKENS
        texts = texts_in(text, directory, limit, findings)
        if moe.segments > 1 or moe.factor:
            what = "has segments or slices, whose rows are not solved anew"
            findings.problem(moe.text, what, "leave out --text")
    if moe.manifest:
        opened = {reference.text: one for reference, one in opener.opened.items()}
        findings.problems += changed_sources(moe.manifest.plan, opened, Path(moe.text))
    findings.refuse()
    assert donor is not None
    parts = [
        _solved(part, moe.experts)
        if text and part.made == "router"
        else _with_mean_row(part, moe.experts)
        if part.made
        else part
        for part in moe.parts
    ]
    for part in moe.parts:
        if part.expert == 0:
            dense = f"{part.layer}mlp.{MLP[part.which]}.weight"
            own = _filled_up(recipe.of_donor(donor, dense), donor.model.tensors[dense], part.shape)
            made = replace(part, recipe=own, file="")
            parts.append(_renumbered(made, moe.experts, moe))
    experts = (*moe.names, donor.name if moe.manifest else f"expert {moe.experts}")

    def with_it(merge: MergeConfig) -> MergeConfig:
        new = Expert(str(source), name=donor.name, calibration=text or None)
        return replace(merge, experts=(*merge.experts, new))

    story = f"{Path(moe.text).name} with {donor.name} as one more expert."
    config = config_of(moe, moe.experts + 1, moe.per_token)
    said = retold(moe, with_it)
    edit = Edit(moe, parts, config, experts, moe.per_token, story, (donor,), said)
    if kept:

        def routers(sources: Sources) -> dict[str, Matrix]:
            of_mixture = replace(moe.checkpoint, config=moe.dense)
            base, family = Donor("MOE", Path(moe.text).name, of_mixture), name_of(moe.family)
            body = Body(base, sees=find(family).READING.sees) if family else Body(base)
            made = with_expert(kept, body, donor, texts, sources, options, reporter)
            names = [part.name for part in parts if part.made == "router"]
            return dict(zip(names, made, strict=True))

        edit = replace(edit, routers=routers)
    return build(edit, Path(out), options, reporter, findings)


def opened_mixture(
    old: str | Path, options: RunOptions, findings: Findings, reporter: Reporter
) -> Moe:
    """Open the mixture `old` and say its notes.

    Raises:
        InputError: `old` is no mixture of a class that moemerge knows.
    """
    moe = open_moe(old, options.cache_dir, findings)
    for note in findings.notes:
        reporter.say(note)
    findings.notes.clear()
    return moe


def retold(moe: Moe, change: Callable[[MergeConfig], MergeConfig] = lambda merge: merge) -> str:
    """The YAML config of the merge with `change` applied; empty if it is not known."""
    if moe.manifest is None or not moe.manifest.config:
        return ""
    try:
        merge = parse_config(moe.manifest.config)
        if len(merge.experts) != len(moe.names) and not merge.split:
            return ""
        return replace(change(merge), text="").as_yaml()
    except InputError:
        return ""


def _free(name: str, taken: Iterable[str]) -> str:
    number = 2
    while f"{name}-{number}" in taken:
        number += 1
    return f"{name}-{number}"


def _check_donor(moe: Moe, donor: Donor, options: Options, findings: Findings) -> None:
    """Record why the MLPs of the model cannot be an expert of this mixture."""
    inner = donor.model.config.get("intermediate_size")
    config = {**moe.dense, "intermediate_size": inner if _widest(donor) == moe.inner else moe.inner}
    host = Donor("MOE", "the mixture", replace(moe.checkpoint, config=config))
    scaled = moe.config.get("residual_multiplier", 1) != 1
    alike = not scaled and is_made_of(moe, str(donor.model.config.get("model_type")))
    compare(host, donor, "SOURCE", findings, allow_crimes=options.allow_crimes or alike)
    wrong = []
    for part in moe.parts:
        if part.expert != 0:
            continue
        name = f"{part.layer}mlp.{MLP[part.which]}.weight"
        at = donor.model.tensors.get(name)
        if obstacle := donor.obstacle((name,)):
            wrong.append(f"{name}: {obstacle[1]}")
        elif at is None or not _fits(at.shape, part, moe, donor) or at.dtype not in _NUMBERS:
            is_it = f"{list(at.shape)} of {at.dtype}" if at else "missing"
            wrong.append(f"{name} is {is_it}, an expert's is {list(part.shape)}")
        elif f"{name.removesuffix('.weight')}.bias" in donor.model.tensors:
            wrong.append(f"{name} has a bias, which an expert has no place for")
    if wrong and not findings.problems:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        fix = "name a dense model with MLPs like the mixture's"
        findings.problem("SOURCE", wrong[0] + more, fix)


def _widest(donor: Donor) -> int:
    """The width of the model's widest MLP; they differ where some are of double width."""
    ups = (
        at.shape[0] for name, at in donor.model.tensors.items() if name.endswith(f"mlp.{UP}.weight")
    )
    return max(ups, default=0)


def _fits(shape: tuple[int, ...], part: Part, moe: Moe, donor: Donor) -> bool:
    """Whether a matrix is an expert's, or becomes one by zeros because another layer is wider."""
    axis = 1 if MLP[part.which] == DOWN else 0
    narrow = len(shape) == 2 and shape[axis] < part.shape[axis] and _widest(donor) == moe.inner
    return shape == part.shape or (narrow and shape[1 - axis] == part.shape[1 - axis])


def _filled_up(made: Recipe, at: Location, shape: tuple[int, ...]) -> Recipe:
    """The matrix at `at` with zeros below or beside it, up to `shape`."""
    if at.shape == shape:
        return made
    axis = 0 if at.shape[1] == shape[1] else 1
    lacks = list(shape)
    lacks[axis] -= at.shape[axis]
    return Join((made, Fill(0.0, tuple(lacks))), axis)


def is_made_of(moe: Moe, family: str) -> bool:
    """Whether the mixture's class computes models of that family exactly."""
    name = name_of(moe.family)
    return name is not None and family in find(name).HOLDS.families


def _renumbered(part: Part, expert: int, moe: Moe) -> Part:
    name = part.layer + moe.tensors.matrix(expert, part.which)
    return replace(part, name=name, expert=expert)


def _rows(part: Part, spans: Iterable[tuple[int, int]]) -> Part:
    """The given rows of a router; consecutive rows are one read."""
    chosen = [Cut(part.recipe, 0, start, stop) for start, stop in spans if start < stop]
    count = sum(one.stop - one.start for one in chosen)
    made: Recipe = chosen[0] if len(chosen) == 1 else Join(tuple(chosen))
    return replace(part, shape=(count, *part.shape[1:]), recipe=made)


def _solved(part: Part, experts: int) -> Part:
    """A router that is solved anew, with one more row."""
    shape = (experts + 1, *part.shape[1:])
    return replace(part, shape=shape, recipe=Read(ROUTERS, part.name))


def _with_mean_row(part: Part, experts: int) -> Part:
    """A router with one more row, the mean of its rows."""
    own = tuple(Cut(part.recipe, 0, row, row + 1) for row in range(experts))
    mean = Mean(own, (1 / experts,) * experts)
    shape = (experts + 1, *part.shape[1:])
    return replace(part, shape=shape, recipe=Join((part.recipe, mean)))
