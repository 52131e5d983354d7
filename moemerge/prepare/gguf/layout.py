"""The plan of a GGUF file: each tensor under llama.cpp's name, in the type that it gets there.

Body and experts are the recipes of any merge. Where all sources of a tensor are GGUF files with the
same type of it, its bytes are copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.architectures import (
    GGUF_ALIASES,
    GGUF_HOSTS,
    GGUF_KINDS,
    TURNED,
    GgufHost,
    Mixture,
    Shape,
    dense_shapes,
    find,
    needs_importance,
    type_of,
)
from moemerge.checkpoint import ENCODINGS, QUANTISED, Checkpoint, lacks, llama3_factors
from moemerge.errors import Findings, nearest
from moemerge.families import DOWN, EMBEDDING, GATE, HEAD, NORM, UP
from moemerge.files import GGUF_SUFFIX
from moemerge.options import ShardSize, WriteOptions
from moemerge.plan import (
    ROUTERS,
    Halve,
    Head,
    Join,
    Plan,
    PlannedTensor,
    Recipe,
    Shard,
    Values,
    cut,
    digest_of,
    head_of,
    recipe,
    split_fields,
)
from moemerge.prepare.gguf.fields import FREQUENCIES, fields_of
from moemerge.prepare.gguf.importance import Importance, is_copied, is_weighed
from moemerge.prepare.layout import Layout

_TOP = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
_MLP = {GATE: "ffn_gate", UP: "ffn_up", DOWN: "ffn_down"}
Wanted = tuple[str, tuple[int, ...], Recipe, str, int | None]
"""A tensor of the file: name, shape, recipe, what a gate mode makes of it, and whose it is."""


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
    tensors = [*body_tensors(body.config, body.recipe, host), *_frequencies(body.base.model)]
    tensors += _experts(made, plan)
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
    shape, tensors, differ = _shape_of(content), list[PlannedTensor](), dict[str, list[str]]()
    for name, own, of, made_by, expert in content.tensors:
        if len(own) == 1 or made_by:
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
    if options.exact and (changed := [one for one in computed if len(one.shape) > 1]):
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


def body_tensors(
    config: dict[str, Any], recipe_of: Callable[[str], Recipe], host: GgufHost
) -> Iterator[Wanted]:
    """The tensors beside the MLPs, from the dense model's."""
    head = config["head_dim"]
    for name, own in dense_shapes(config).items():
        if ".mlp." in name:
            continue
        of = recipe_of(name)
        if name in _TOP:
            yield f"{_TOP[name]}.weight", own, of, "", None
            continue
        stem, _, leaf = name.rpartition(".")
        _, _, layer, rest = stem.split(".", 3)
        if rest in TURNED and host.turns_neighbours:
            of = Halve(of, head, head, back=True)
        yield f"blk.{layer}.{host.body[rest]}.{leaf}", own, of, "", None


def _frequencies(base: Checkpoint) -> Iterator[Wanted]:
    """The tensor that a Llama 3's rope scaling becomes."""
    scaling = base.config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        theta, head = base.config["rope_theta"], base.config["head_dim"]
        values = tuple(llama3_factors(scaling, theta, head))
        yield FREQUENCIES, (len(values),), Values(values), "", None


def expert_tensors(
    layer: int, which: str, routed: Sequence[Recipe], one: tuple[int, ...]
) -> Wanted:
    """One matrix of all experts of a layer, end to end."""
    name = f"blk.{layer}.{_MLP[which]}_exps.weight"
    return name, (len(routed), *one), Join(tuple(routed)), "", -1


def shared_tensor(layer: int, which: str, of: Recipe, own: tuple[int, ...]) -> Wanted:
    """One matrix of a layer's always active experts, which are one wide MLP."""
    return f"blk.{layer}.{_MLP[which]}_shexp.weight", own, of, "", None


def router_name(layer: int) -> str:
    """The name of a layer's router."""
    return f"blk.{layer}.ffn_gate_inp.weight"


def _experts(made: Layout, plan: Plan) -> Iterator[Wanted]:
    parts, mixture, seed = made.parts, made.target.mixture, made.options.seed
    hidden, inner = parts.body.config["hidden_size"], mixture.inner
    routers = [tensor for tensor in plan.shards[0].tensors if tensor.made == "router"]
    for layer, router in enumerate(routers):
        name = router_name(layer)
        rows = _renamed(router.recipe, router.name, name)
        yield name, (mixture.experts, hidden), rows, "router", None
        for which in _MLP:
            dense = f"model.layers.{layer}.mlp.{which}.weight"
            one = (hidden, inner) if which == DOWN else (inner, hidden)
            routed = [
                member.recipe(dense, seed, f"expert {at}") for at, member in enumerate(parts.routed)
            ]
            yield expert_tensors(layer, which, routed, one)
            always = tuple(
                member.recipe(dense, seed, f"shared expert {at}")
                for at, member in enumerate(parts.shared)
            )
            if always:
                axis = 1 if which == DOWN else 0
                wide = list(one)
                wide[axis] *= len(always)
                of = Join(always, axis) if len(always) > 1 else always[0]
                yield shared_tensor(layer, which, of, tuple(wide))


def _renamed(of: Recipe, old: str, new: str) -> Recipe:
    """A router's recipe that reads what the gate mode makes under the file's own name."""
    if isinstance(of, recipe.Read):
        assert of == recipe.Read(ROUTERS, old)
        return recipe.Read(ROUTERS, new)
    if isinstance(of, recipe.Cut):
        return dataclasses.replace(of, of=_renamed(of.of, old, new))
    assert isinstance(of, Join)
    return Join(tuple(_renamed(part, old, new) for part in of.of), of.axis)


def _shape_of(content: Content) -> Shape:
    config = content.config
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    layers, tied = config["num_hidden_layers"], bool(config.get("tie_word_embeddings"))
    of_70b = content.host.name == "llama" and layers == 80 and heads != keys
    weighed = content.imatrix is not None
    return Shape(heads // keys, content.mixture.experts, layers, tied, of_70b, weighed)


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
