"""The plan of a GGUF file: each tensor under llama.cpp's name, in the type that it gets there.

Body and experts are the recipes of any merge. Where all sources of a tensor are GGUF files with the
same type of it, its bytes are copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from moemerge.architectures import dense_shapes
from moemerge.architectures.ggml_types import ALIASES, KINDS, Shape, type_of
from moemerge.architectures.gguf_hosts import GGUF_HOSTS, TURNED, GgufHost, counts
from moemerge.checkpoint import ENCODINGS, QUANTISED, Checkpoint, lacks
from moemerge.errors import Findings, nearest
from moemerge.families import DOWN, EMBEDDING, GATE, HEAD, NORM, UP
from moemerge.plan import (
    ROUTERS,
    Halve,
    Head,
    Join,
    Plan,
    PlannedTensor,
    Recipe,
    Shard,
    digest_of,
    head_of,
    recipe,
)
from moemerge.prepare.gguf_fields import FREQUENCIES, fields_of
from moemerge.prepare.layout import Layout

_TOP = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
_MLP = {GATE: "ffn_gate", UP: "ffn_up", DOWN: "ffn_down"}


def host_problem(name: str) -> tuple[str, str] | None:
    """Why a class cannot be written as GGUF, and the fix; None if it can."""
    if name in GGUF_HOSTS:
        return None
    return f"a {name} is not written as GGUF", f"use {', '.join(GGUF_HOSTS)}"


def as_gguf(
    made: Layout, plan: Plan, file: str, opened: Mapping[str, Checkpoint], findings: Findings
) -> Plan:
    """The plan of the same mixture as the GGUF file `file`.

    Reasons against it are recorded as problems.
    """
    host = GGUF_HOSTS.get(made.target.name)
    if host is None:
        what, fix = host_problem(made.target.name) or ("", "")
        findings.problem(made.config.where("architecture"), what, fix)
        return plan
    kind = made.options.type.lower()
    kind = ALIASES.get(kind, kind)
    if kind and kind not in KINDS:
        what = f"{made.options.type!r} is no type of GGUF files that can be written here"
        findings.problem("--type", what, nearest(kind, KINDS))
        return plan
    sources = {name: one.tensors for name, one in opened.items()}
    shape = _shape_of(made, plan)
    tensors = []
    for name, own, of, made_by, expert in _tensors(made, host, plan):
        shown = recipe.shape_of(of, sources) if not made_by else own
        count = math.prod(own)
        assert math.prod(shown) == count, name
        if len(own) == 1 or made_by:
            dtype = "F32"
        elif kind:
            dtype = type_of(kind, name, own[-1], shape)
        else:
            dtype = _as_stored(name, of, sources, own[-1], made.options.exact, findings)
        tensors.append(PlannedTensor(name, own, dtype, of, expert, made_by))
    for missing in sorted({lacks(t.dtype) for t in _computed(tensors, sources)} - {""}):
        kinds = sorted({t.dtype for t in _computed(tensors, sources) if lacks(t.dtype) == missing})
        findings.problem("--type", f"{', '.join(kinds)} needs llama.cpp's quantiser", missing)
    base = made.parts.body.base.model
    number = KINDS[kind][0] if kind else None
    fields = fields_of(base, made, host, counts(made.target.mixture), number, findings)
    head = head_of(fields, tensors)
    digest = digest_of([
        [vars(one) | {"recipe": recipe.to_json(one.recipe)} for one in tensors],
        [source.fingerprint for source in plan.sources],
        made.gate_inputs,
    ])  # fmt: skip
    shard = Shard(file, tuple(tensors), digest, Head.of(head), head)
    config = {**plan.config, "dtype": kind or _most(tensors)}
    return dataclasses.replace(plan, dtype=_most(tensors), config=config, shards=(shard,))


def _tensors(
    made: Layout, host: GgufHost, plan: Plan
) -> Iterator[tuple[str, tuple[int, ...], Recipe, str, int | None]]:
    """Each tensor: name, shape, recipe, whether a gate mode makes it, and whose it is."""
    parts, mixture = made.parts, made.target.mixture
    body, config = parts.body, parts.body.config
    shapes = dense_shapes(config)
    for name, own in shapes.items():
        if ".mlp." in name:
            continue
        stem, _, leaf = name.rpartition(".")
        part, turned = _TOP.get(name), False
        if part is None:
            _, _, layer, rest = stem.split(".", 3)
            part, turned = f"blk.{layer}.{host.body[rest]}", rest in TURNED
        of = body.recipe(name)
        if turned and host.turns_neighbours:
            of = Halve(of, config["head_dim"], config["head_dim"], back=True)
        yield f"{part}.{leaf}" if name not in _TOP else f"{part}.weight", own, of, "", None
    base = body.base.model
    if FREQUENCIES in base.tensors:
        at = base.tensors[FREQUENCIES]
        yield FREQUENCIES, at.shape, recipe.Read(base.reference.text, FREQUENCIES), "", None
    routers = [tensor for tensor in plan.shards[0].tensors if tensor.made == "router"]
    hidden, inner = config["hidden_size"], mixture.inner
    for number, router in enumerate(routers):
        layer = str(number)
        name = f"blk.{layer}.ffn_gate_inp.weight"
        rows = _renamed(router.recipe, router.name, name)
        yield name, (mixture.experts, hidden), rows, "router", None
        for which, ours in _MLP.items():
            dense = f"model.layers.{layer}.mlp.{which}.weight"
            one = (hidden, inner) if which == DOWN else (inner, hidden)
            routed = tuple(
                member.recipe(dense, made.options.seed, f"expert {at}")
                for at, member in enumerate(parts.routed)
            )
            yield f"blk.{layer}.{ours}_exps.weight", (len(routed), *one), Join(routed), "", -1
            always = tuple(
                member.recipe(dense, made.options.seed, f"shared expert {at}")
                for at, member in enumerate(parts.shared)
            )
            if always:
                axis = 1 if which == DOWN else 0
                wide = list(one)
                wide[axis] *= len(always)
                of = Join(always, axis) if len(always) > 1 else always[0]
                yield f"blk.{layer}.{ours}_shexp.weight", tuple(wide), of, "", None


def _renamed(of: Recipe, old: str, new: str) -> Recipe:
    """A router's recipe that reads what the gate mode makes under the file's own name."""
    if isinstance(of, recipe.Read):
        assert of == recipe.Read(ROUTERS, old)
        return recipe.Read(ROUTERS, new)
    if isinstance(of, recipe.Cut):
        return dataclasses.replace(of, of=_renamed(of.of, old, new))
    assert isinstance(of, Join)
    return Join(tuple(_renamed(part, old, new) for part in of.of), of.axis)


def _shape_of(made: Layout, plan: Plan) -> Shape:
    config, mixture = made.parts.body.config, made.target.mixture
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    tied = bool(config.get("tie_word_embeddings"))
    of_70b = made.target.name == "mixtral" and layers == 80 and heads != keys
    return Shape(heads // keys, mixture.experts, layers, tied, of_70b)


def _as_stored(
    name: str,
    of: Recipe,
    sources: recipe.Sources,
    width: int,
    exact: bool,
    findings: Findings,
) -> str:
    """The type that all sources of a tensor have, or the widest of theirs."""
    found = {
        sources[read.source][read.tensor].encoding.name: None
        for read in recipe.reads(of)
        if read.source != ROUTERS and not _is_small(sources, read)
    }
    types = ["F32" if one == "F64" else one for one in found]
    widest = max(types, key=lambda one: ENCODINGS[one].block_bytes / ENCODINGS[one].block_values)
    if len(types) > 1:
        if exact:
            what = f"its sources have {', '.join(types)}, and --exact changes no values"
            findings.problem(name, what, "use files of one quantisation, or leave out --exact")
        else:
            findings.note(f"{name}: of {', '.join(types)}; all become {widest}")
    if width % ENCODINGS[widest].block_values:
        widest = "F16"
    if not recipe.is_copy(of, widest, sources) and exact and len(types) == 1:
        findings.problem(name, "is computed, and --exact changes no values", "leave out --exact")
    return widest


def _is_small(sources: recipe.Sources, read: recipe.Read) -> bool:
    """Whether it is a part of an adapter, which decides no type."""
    return sources[read.source][read.tensor].shape == () or ".lora_" in read.tensor


def _computed(tensors: list[PlannedTensor], sources: recipe.Sources) -> list[PlannedTensor]:
    """The quantised tensors that are not only copied."""
    return [
        one
        for one in tensors
        if one.dtype in QUANTISED and not one.made
        and not recipe.is_copy(one.recipe, one.dtype, sources)
    ]  # fmt: skip


def _most(tensors: list[PlannedTensor]) -> str:
    """The type of most bytes."""
    sizes: dict[str, int] = {}
    for one in tensors:
        sizes[one.dtype] = sizes.get(one.dtype, 0) + one.nbytes
    return max(sizes, key=lambda name: sizes[name])
