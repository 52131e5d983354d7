"""The plan of a GGUF file: each tensor under llama.cpp's name, in the type that it gets there.

Body and experts are the recipes of any merge. Where all sources of a tensor are GGUF files with the
same type of it, its bytes are copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.architectures import (
    GGUF_ALIASES,
    GGUF_HOSTS,
    GGUF_KINDS,
    GgufHost,
    Mixture,
    Shape,
    find,
    key_heads,
    needs_importance,
    stays_whole,
    type_of,
)
from moemerge.checkpoint import ENCODINGS, QUANTISED, Checkpoint, lacks
from moemerge.errors import Findings, nearest
from moemerge.files import GGUF_SUFFIX
from moemerge.options import ShardSize, WriteOptions
from moemerge.plan import (
    ROUTERS,
    Head,
    Plan,
    PlannedTensor,
    Recipe,
    Shard,
    cut,
    digest_of,
    head_of,
    recipe,
    split_fields,
)
from moemerge.prepare.gguf.fields import fields_of
from moemerge.prepare.gguf.importance import Importance, is_copied, is_weighed
from moemerge.prepare.gguf.tensors import Wanted, body_tensors, experts, frequencies
from moemerge.prepare.layout import Layout


@dataclass(frozen=True)
class Content:
    """What a GGUF file holds. `config` is that of the dense model, `base` gives fields and
    tokenizer, `names` are the experts', and `shared` is the width of what is always active.
    `imatrix` is the importance matrix."""

    host: GgufHost
    config: Mapping[str, Any]
    mixture: Mixture
    tensors: Sequence[Wanted]
    base: Checkpoint
    names: tuple[str, ...]
    shared: int = 0
    imatrix: Checkpoint | None = None


def host_of(name: str, where: str, findings: Findings) -> GgufHost | None:
    """The GGUF architecture of a class; None, with a problem, if it is not written."""
    if name not in GGUF_HOSTS:
        fix = f"use {', '.join(GGUF_HOSTS)}"
        findings.problem(where, f"a {name} is not written as GGUF", fix)
    return GGUF_HOSTS.get(name)


def gguf_host(config: Mapping[str, Any]) -> str | None:
    """The first class that is written as GGUF and holds models of this config's family."""
    family = config.get("model_type")
    return next((name for name in GGUF_HOSTS if family in find(name).HOLDS.families), None)


def as_gguf(
    made: Layout,
    plan: Plan,
    file: str,
    opened: Mapping[str, Checkpoint],
    imatrix: Checkpoint | None,
    findings: Findings,
) -> Plan:
    """The plan of the same mixture as the GGUF file `file`; `imatrix` is one of `opened`.

    Reasons against it are recorded as problems.
    """
    host = host_of(made.target.name, made.config.where("architecture"), findings)
    if host is None:
        return plan
    body, mixture = made.parts.body, made.target.mixture
    tensors = [*body_tensors(body.config, body.recipe, host), *frequencies(body.base.model)]
    tensors += experts(made, plan)
    shared = mixture.inner * len(made.parts.shared)
    names = tuple(donor.name for donor in made.donors)
    content = Content(host, body.config, mixture, tensors, body.base.model, names, shared, imatrix)
    sources = {name: one.tensors for name, one in opened.items()}
    return planned(content, plan, file, sources, made.options, findings)


def planned(
    content: Content,
    plan: Plan,
    file: str,
    sources: recipe.Sources,
    options: WriteOptions,
    findings: Findings,
) -> Plan:
    """The plan with this content as a GGUF file, or several parts of one."""
    kind = options.type.lower()
    kind = GGUF_ALIASES.get(kind, kind)
    if kind and kind not in GGUF_KINDS:
        what = f"{options.type!r} is no type of GGUF files that can be written here"
        findings.problem("--type", what, nearest(kind, GGUF_KINDS))
        return plan
    text = plan.config.get("text_config", plan.config)
    for key, values in content.host.needs.items():
        if text.get(key) not in values:
            what = f"its {key} is {text.get(key)!r}; llama.cpp computes a {content.host.name} "
            fix = "write a directory, which transformers runs"
            findings.problem(content.base.reference.text, f"{what}with {values[-1]!r}", fix)
    shape, tensors, differ = _shape_of(content), list[PlannedTensor](), dict[str, list[str]]()
    for name, own, of, made_by, expert in content.tensors:
        if len(own) == 1 or made_by or stays_whole(name):
            dtype = "F32"
        elif kind:
            dtype = type_of(kind, name, own[-1], shape)
        else:
            dtype = _as_stored(name, of, sources, own[-1], differ, plan.dtype)
        tensors.append(PlannedTensor(name, own, dtype, of, expert, made_by))
    weighed = Importance(content.imatrix, sources, findings) if content.imatrix else None
    tensors = [weighed.of(one) if weighed else one for one in tensors]
    for one in tensors:
        if kind and needs_importance(kind, one.name, one.dtype) and not is_weighed(one.recipe):
            what = f"{one.name} becomes {one.dtype}, which needs an importance matrix"
            findings.problem("--type", what, "pass --imatrix FILE, which llama-imatrix writes")
            break
    if weighed:
        weighed.say()
    for what, names in differ.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        findings.note(f"{names[0]}{more}: {what}")
    computed = [one for one in tensors if not is_copied(one, sources)]
    changed = [one for one in computed if len(one.shape) > 1 and not stays_whole(one.name)]
    if options.exact and changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        what = f"is made anew{more}, and --exact changes no values"
        findings.problem(changed[0].name, what, "use files of one quantisation, or leave it out")
    wanting: dict[str, set[str]] = {}
    for one in computed:
        if one.dtype in QUANTISED and (missing := lacks(one.dtype)):
            wanting.setdefault(missing, set()).add(one.dtype)
    for missing, kinds in wanting.items():
        what = f"{', '.join(sorted(kinds))} needs llama.cpp's quantiser"
        first = f"{file.removesuffix(GGUF_SUFFIX)}-f16{GGUF_SUFFIX}"
        run = f", or write {first} with --type f16, then `llama-quantize {first} {file} {kind}`"
        findings.problem("--type", what, missing + run * bool(kind))
    number = GGUF_KINDS[kind][0] if kind else None
    try:
        fields = fields_of(
            content.base, content.config, content.host, content.mixture, content.names,
            content.shared, number, content.imatrix,
        )  # fmt: skip
    except ValueError as error:
        fix = "write a directory, and convert it with llama.cpp's convert_hf_to_gguf.py"
        findings.problem(content.base.reference.text, str(error), fix)
        return plan
    most = _most(tensors)
    config = {**plan.config, "dtype": kind or most}
    shards = _files(file, tensors, fields, plan, options)
    return dataclasses.replace(plan, dtype=most, config=config, shards=shards)


def _files(
    file: str,
    tensors: list[PlannedTensor],
    fields: Mapping[str, bytes],
    plan: Plan,
    options: WriteOptions,
) -> tuple[Shard, ...]:
    """The file, or its parts if a size is asked for; the first has the fields and the routers."""
    groups = [tuple(tensors)]
    if options.shard_size != WriteOptions.shard_size:
        most = ShardSize.parse(options.shard_size).max_bytes(2)
        made = [one for one in tensors if one.made]
        groups = list(cut([*made, *(one for one in tensors if not one.made)], most))
    prints = [source.fingerprint for source in plan.sources]
    shards = []
    for number, group in enumerate(groups):
        own, name = dict(fields), file
        if len(groups) > 1:
            stem = file.removesuffix(GGUF_SUFFIX)
            name = f"{stem}-{number + 1:05d}-of-{len(groups):05d}{GGUF_SUFFIX}"
            own = (own if number == 0 else {}) | split_fields(number, len(groups), len(tensors))
        head = head_of(own, group)
        told = [vars(one) | {"recipe": recipe.to_json(one.recipe)} for one in group]
        digest = digest_of([told, prints, plan.gate_inputs])
        shards.append(Shard(name, group, digest, Head.of(head), head))
    return tuple(shards)


def _shape_of(content: Content) -> Shape:
    config = content.config
    heads, keys = config["num_attention_heads"], key_heads(config)
    layers, tied = config["num_hidden_layers"], bool(config.get("tie_word_embeddings"))
    of_70b = content.host.name == "llama" and layers == 80 and heads != keys[0]
    groups = heads // keys[0] if keys[0] else 0
    attends = tuple(layer for layer, count in enumerate(keys) if count)
    weighed = content.imatrix is not None
    return Shape(groups, content.mixture.experts, layers, tied, of_70b, weighed, attends)


def _as_stored(
    name: str,
    of: Recipe,
    sources: recipe.Sources,
    width: int,
    differ: dict[str, list[str]],
    usual: str,
) -> str:
    """The type that all sources of a tensor have, or the widest of theirs, which is noted; the
    `usual` one of a tensor that is fitted."""
    found = {
        sources[read.source][read.tensor].encoding.name: None
        for read in recipe.reads(of)
        if read.source != ROUTERS and ".lora_" not in read.tensor
    }
    types = [*dict.fromkeys("F32" if one == "F64" else one for one in found)] or [usual]
    widest = max(types, key=lambda one: ENCODINGS[one].block_bytes / ENCODINGS[one].block_values)
    if len(types) > 1:
        line = f"its sources are {', '.join(types)}; all become {widest}"
        differ.setdefault(line, []).append(name)
    return widest if width % ENCODINGS[widest].block_values == 0 else "F16"


def _most(tensors: list[PlannedTensor]) -> str:
    """The type of most bytes."""
    sizes: dict[str, int] = {}
    for one in tensors:
        sizes[one.dtype] = sizes.get(one.dtype, 0) + one.nbytes
    return max(sizes, key=lambda name: sizes[name])
