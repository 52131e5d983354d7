"""A mixture that is built, whoever built it, read as experts and a body; no weight is read.

Shapes: E experts, D hidden size, F an expert's intermediate size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.architectures import (
    COUNTS,
    LAYER,
    MLP,
    SEGMENTS,
    SPLIT_FACTOR,
    Names,
    Reading,
    count_of,
    dense_shapes,
    find,
    names,
    reading_of,
)
from moemerge.checkpoint import (
    FLOATS,
    Checkpoint,
    NoSource,
    SourceProblem,
    open_checkpoint,
    parse_source,
)
from moemerge.config import parse_config
from moemerge.errors import Findings, InputError, nearest
from moemerge.families import PARTIAL, most_like, normalise
from moemerge.output import MANIFEST_FILE, Manifest, is_shard, read_manifest, settle
from moemerge.plan import Join, PlannedTensor, Read, Recipe, reads

PER_TOKEN = "num_experts_per_tok"
_NEEDED = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "vocab_size",
)  # fmt: skip
_KEPT = (
    "dtype", "original_max_position_embeddings", "pad_token_id", PARTIAL, "rope_parameters",
    "rope_scaling", "torch_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A tensor of a mixture, with how it is made; of stacked experts, one expert's own matrix.

    `expert` and `which` (by its place in `MLP`) tell whose matrix it is; `made` that each of its
    rows is for an expert: a `router` (E, D) or its selection `bias` (E); `shared` that it is of
    experts that are always on, or their gate. `file` is where it lay.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    recipe: Recipe
    file: str = ""
    layer: str = ""
    expert: int | None = None
    which: int = 0
    made: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Moe:
    """A mixture, opened. `config` is its config.json as it stands, `dense` that of its body.

    `names` are the experts' names where a manifest tells them, else `expert 0` and so on. Each has
    so many `segments`, which stand for themselves in the tensors and in `per_token`. Of a split
    `factor` is what the chosen slices' sum was multiplied by, else it is 0.
    """

    text: str
    checkpoint: Checkpoint
    family: str
    reading: Reading
    config: dict[str, Any]
    dense: dict[str, Any]
    names: tuple[str, ...]
    per_token: int
    parts: tuple[Part, ...]
    manifest: Manifest | None = None
    segments: int = 1
    factor: int = 0

    @property
    def tensors(self) -> Names:
        """The names of its experts and routers."""
        return self.reading.names

    @property
    def experts(self) -> int:
        """How many experts its class has, each segment counted."""
        return len(self.names) * self.segments

    @property
    def inner(self) -> int:
        """The neurons of an expert."""
        return next(p.shape[0] for p in self.parts if p.expert is not None and p.which < 2)

    @property
    def is_misnamed(self) -> bool:
        """Whether some of its tensors go by names that not every reader knows."""
        if self.checkpoint.renamed:
            return True
        own = self.tensors
        usual = (own.uppers[0], own.lowers[0]) if own.stacked else ()
        return any(not view.of.endswith(usual) for view in self.checkpoint.views.values())

    def number(self, said: str, where: str, findings: Findings) -> int | None:
        """The expert that a person means by its number or name; else a problem is recorded."""
        count = len(self.names)
        if said.isascii() and said.isdigit() and len(said) < 9 and int(said) < count:
            return int(said)
        if said in self.names:
            return self.names.index(said)
        fix = f"name one of 0 to {count - 1}"
        if self.manifest:
            fix = nearest(said, self.names) + f", or a number from 0 to {count - 1}"
        findings.problem(where, f"{said!r} is none of its {count} experts", fix)
        return None


def open_moe(named: str | Path, cache_dir: str | Path | None, findings: Findings) -> Moe | None:
    """Open a mixture: a directory or a Hub id; on problems, record them and return None."""
    text = str(named)
    try:
        reference, on_top = parse_source(text)
        if on_top:
            what = "a mixture with an adapter on top cannot be taken apart"
            raise NoSource(what, "name a mixture's directory, or user/name")
        if reference.directory:
            settle(reference.directory)
        opened = open_checkpoint(reference, cache_dir)
    except NoSource as error:
        findings.problem(text, str(error), error.fix)
        return None
    except SourceProblem as error:
        findings.problem(text, error.what, error.fix)
        return None
    for note in opened.notes:
        findings.note(f"{text}: {note}")
    config = opened.config
    family = str(config.get("model_type"))
    reading = reading_of(config.get("model_type"), opened.tensors)
    if reading is None:
        what = f"is of type {family!r}, no mixture that is known"
        findings.problem(text, what, "name a mixture whose experts go by usual names")
        return None
    before = len(findings.problems)
    count, per_token = count_of(config), config.get(PER_TOKEN)
    for key, value in (("the number of experts", count), (PER_TOKEN, per_token)):
        if type(value) is not int or value < 1:
            findings.problem(text, f"config.json: {key} is {value!r}", "write how many there are")
    if any(config[key] != count for key in COUNTS if key in config):
        said = " and ".join(key for key in COUNTS if key in config)
        findings.problem(text, f"config.json: {said} disagree", "write how many there are")
    if len(findings.problems) > before:
        return None
    parts = tuple(_parts(opened, reading.names))
    inner = _check(parts, count, config, text, findings)
    dense = _dense(opened, reading, inner, text, findings)
    if len(findings.problems) == before and family in names() and reading.attends(config):
        _check_body(parts, dense, text, findings)
    manifest = _manifest(opened.directory, text, findings)
    segments, factor = portions(config, manifest, count, per_token, text, findings)
    if len(findings.problems) > before:
        return None
    assert isinstance(count, int) and isinstance(per_token, int)
    whole = count // segments
    called = manifest.plan.experts if manifest and len(manifest.plan.experts) == whole else None
    return Moe(
        text=reference.text,
        checkpoint=opened,
        family=family,
        reading=reading,
        config=config,
        dense=dense,
        names=called or tuple(f"expert {number}" for number in range(whole)),
        per_token=per_token,
        parts=parts,
        manifest=manifest,
        segments=segments,
        factor=factor,
    )


def planned(parts: Iterable[Part], names: Names) -> Iterator[tuple[str, PlannedTensor]]:
    """The parts as tensors that readers know, each with the file that it lay in.

    Where experts are stacked, a layer's parts become two tensors, in the place of the first.
    """
    stacks: dict[str, list[Part]] = {}
    parts = tuple(parts)
    for part in parts if names.stacked else ():
        if part.expert is not None:
            stacks.setdefault(part.layer, []).append(part)
    for part in parts:
        if part.expert is None or not names.stacked:
            made = PlannedTensor(
                part.name, part.shape, part.dtype, part.recipe, part.expert, part.made
            )
            yield part.file, made
        elif own := stacks.pop(part.layer, ()):
            own = sorted(own, key=lambda one: (one.expert or 0, one.which))
            yield part.file, _stacked(part.layer + names.uppers[0], own, (0, 1))
            yield part.file, _stacked(part.layer + names.lowers[0], own, (2,))


def _stacked(name: str, own: list[Part], matrices: tuple[int, ...]) -> PlannedTensor:
    """Some of a layer's matrices, those of one expert after those of another."""
    chosen = [part for part in own if part.which in matrices]
    first = chosen[0]
    shape = (len(chosen) // len(matrices), first.shape[0] * len(matrices), first.shape[1])
    return PlannedTensor(name, shape, first.dtype, Join(tuple(p.recipe for p in chosen)), -1)


def _parts(opened: Checkpoint, names: Names) -> Iterator[Part]:
    """Every tensor, in the order of the files and of what lies in them."""
    text = opened.reference.text
    matrices = "|".join(names.matrices)
    own = re.compile(rf"{re.escape(names.expert)}(0|[1-9]\d{{0,5}})\.({matrices})\.weight")
    order = sorted(opened.tensors.items(), key=lambda one: (one[1].file.name, one[1].offset))
    for name, at in order:
        part = Part(name, at.shape, at.dtype, Read(text, name), at.file.name)
        if found := LAYER.fullmatch(name):
            inside = found[3]
            shared = inside.startswith(names.shared)
            part = dataclasses.replace(part, layer=found[1], shared=shared)
            matrix = own.fullmatch(inside)
            if inside == names.router:
                part = dataclasses.replace(part, made="router")
            elif inside.endswith(names.bias):
                part = dataclasses.replace(part, made="bias")
            elif matrix:
                which = names.matrices.index(matrix[2])
                part = dataclasses.replace(part, expert=int(matrix[1]), which=which)
        yield part


def _check(
    parts: Iterable[Part],
    count: object,
    config: dict[str, Any],
    text: str,
    findings: Findings,
) -> int:
    """Record what does not make a whole mixture, each claim of a file looked at; returns F."""
    fix = "use the weights and the config.json of one and the same model"
    hidden = config.get("hidden_size")
    found: dict[str, dict[tuple[int, int], Part]] = {}
    routers: dict[str, Part] = {}
    inner = 0
    for part in parts:
        rows = part.made and part.shape[:1] != (count,)
        wide = part.made == "router" and part.shape[1:] != (hidden,)
        if rows or wide:
            said = f"{part.name} is {list(part.shape)}, config.json says {count} experts"
            findings.problem(text, said, fix)
        if part.made == "router":
            routers[part.layer] = part
        if part.expert is None:
            continue
        found.setdefault(part.layer, {})[part.expert, part.which] = part
        inner = inner or part.shape[-1 if part.which == 2 else 0]
        wanted = (hidden, inner) if part.which == 2 else (inner, hidden)
        if part.shape != wanted:
            said = f"{part.name} is {list(part.shape)}, config.json says {list(wanted)}"
            findings.problem(text, said, fix)
        if part.dtype not in FLOATS.values():
            what = f"{part.name} holds {part.dtype} values"
            findings.problem(text, what, "use the original weights")
    if not found:
        findings.problem(text, "holds no experts under names that are known", fix)
    for layer in found.keys() | routers.keys():
        have = found.get(layer, {})
        all_there = isinstance(count, int) and len(have) == count * len(MLP)
        if not all_there or layer not in routers or max(have)[0] != len(have) // len(MLP) - 1:
            what = f"{layer.removesuffix('.')} holds {len(have)} matrices of experts"
            router = "a router" if layer in routers else "no router"
            findings.problem(text, f"{what} and {router}, config.json says {count} experts", fix)
    return inner


def _dense(
    opened: Checkpoint, reading: Reading, inner: int, text: str, findings: Findings
) -> dict[str, Any]:
    """The config of the dense model that the body is of, normalised; see `normalise`."""
    config, windows = opened.config, _windows(opened.config, reading)
    family = config.get("model_type")
    scaled = family in names() and find(str(family)).HOLDS.multipliers
    record = most_like(opened.tensors, bool(windows.get("sliding_window")), scaled)
    if not inner:
        return {}
    missing = [key for key in _NEEDED if key not in config]
    if not any(key in config for key in ("rope_theta", "rope_parameters")):
        missing.append("rope_theta")
    if missing:
        what = f"config.json does not say {', '.join(missing)}"
        findings.problem(text, what, "write it there as the model has it")
        return {}
    own = {key: config[key] for key in (*record.defaults, "head_dim", *_KEPT) if key in config}
    own |= windows
    if own.get(PARTIAL) is None:
        own[PARTIAL] = reading.turned
    if own.get("head_dim") is None:  # families differ in what they then assume
        own["head_dim"] = _head_dim(opened, config["num_attention_heads"])
    own["attention_bias"] = any(name.endswith("self_attn.o_proj.bias") for name in opened.tensors)
    try:
        return normalise({**own, "model_type": record.name, "intermediate_size": inner})
    except ValueError as error:
        findings.problem(text, f"config.json: {error}", "repair it")
        return {}


def _check_body(
    parts: Iterable[Part], dense: dict[str, Any], text: str, findings: Findings
) -> None:
    """Record tensors of the body that are missing, or not what config.json says."""
    shapes = {name: at for name, at in dense_shapes(dense).items() if ".mlp." not in name}
    there = {part.name: part.shape for part in parts}
    wrong = [name for name, shape in shapes.items() if there.get(name) != shape]
    if wrong:
        shape, more = there.get(wrong[0]), len(wrong) - 1
        what = f"is {list(shape)}, not {list(shapes[wrong[0]])}" if shape else "is missing"
        fix = "use the weights and the config.json of one and the same model"
        findings.problem(text, f"{wrong[0]} {what}" + f" (and {more} more)" * bool(more), fix)


def _head_dim(opened: Checkpoint, heads: object) -> int | None:
    """How wide a head is, by the first layer's queries."""
    queries = opened.tensors.get("model.layers.0.self_attn.q_proj.weight")
    if queries is None or type(heads) is not int or heads < 1:
        return None
    return queries.shape[0] // heads if queries.shape else None


def _windows(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Which layers have a sliding window, in the words of a dense model's config.json."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if types is not None and not isinstance(types, list):
        return {"layer_types": types}  # which `normalise` refuses
    kinds = reading.windows(config) if window else None
    if kinds is None:
        return {"sliding_window": None, "use_sliding_window": False}
    return {"sliding_window": window, "use_sliding_window": True, "layer_types": kinds}


def portions(
    config: dict[str, Any],
    manifest: Manifest | None,
    count: Any,
    per_token: Any,
    text: str,
    findings: Findings,
) -> tuple[int, int]:
    """`Moe.segments` and `Moe.factor`: by config.json, else by the config that it was merged by.

    What cannot be is recorded.
    """
    told = {key: config[key] for key in (SEGMENTS, SPLIT_FACTOR) if key in config}
    if manifest and manifest.config and not told:
        try:
            merge = parse_config(manifest.config)
            told = {SEGMENTS: merge.segments, SPLIT_FACTOR: per_token if merge.split else 0}
        except InputError:
            pass
    segments, factor = told.get(SEGMENTS, 1), told.get(SPLIT_FACTOR, 0)
    for key, value, least in ((SEGMENTS, segments, 1), (SPLIT_FACTOR, factor, 0)):
        if type(value) is not int or not least <= value <= count:
            findings.problem(text, f"config.json: {key} is {value!r}", "write what it was")
            return 1, 0
    if count % segments or per_token % segments:
        what = (
            f"config.json: {per_token} of {count} experts are no multiples of {segments} segments"
        )
        findings.problem(text, what, "write the numbers that it was merged with")
        return 1, 0
    return segments, factor


def _manifest(directory: Path, text: str, findings: Findings) -> Manifest | None:
    """The manifest, if there is one that can be believed; else a note says why not."""
    if not (directory / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(directory)
        told = [manifest.config, *(source.reference for source in manifest.plan.sources)]
        for read in (one for t in manifest.plan.tensors for one in reads(t.recipe)):
            told += [read.source, read.tensor]
        if not all(isinstance(one, str) for one in told):
            raise ValueError("it names what is no text")
        for shard in manifest.plan.shards:
            path = directory / shard.file
            if path.is_file() and not is_shard(path, shard):
                raise ValueError(f"{shard.file} is not the file that it tells of")
    except (OSError, ValueError, RecursionError) as error:
        findings.note(f"{text}: its {MANIFEST_FILE} is not used: {error}")
        return None
    return manifest
