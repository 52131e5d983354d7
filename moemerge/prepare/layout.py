"""Lays out the plan: each tensor of the architecture, its recipe, and what its sources lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moemerge.architectures import (
    Constant,
    FromBody,
    FromExpert,
    Joined,
    Made,
    Slot,
    Transposed,
    dense_shapes,
    in_files,
    turned_rows,
)
from moemerge.checkpoint import FLOATS, PLAIN, TIED, Checkpoint, Donor, Reference
from moemerge.config import MergeConfig
from moemerge.dense import VOCABULARY, Body
from moemerge.errors import Findings, nearest
from moemerge.families import HEAD, record_of
from moemerge.gates import Needs
from moemerge.options import Options, ShardSize
from moemerge.plan import ROUTERS, Plan, PlannedTensor, Recipe, Source, make_shards, recipe
from moemerge.prepare.choose import Target
from moemerge.prepare.members import MixtureParts
from moemerge.text import BASE

_DTYPES = {**FLOATS, "bf16": "BF16", "fp16": "F16", "fp32": "F32", "half": "F16", "float": "F32"}
_LONG_NAMES = {short: long for long, short in FLOATS.items()}
_MLP = ".mlp."
_FURTHER = ("mtp.", "model.mtp.")
_NO_HEAD = "write that if the head is the embeddings; otherwise save the model again"
_MOST_F16 = 65504.0
_LEAST_F16 = 2.0**-24
"""The smallest float16 above zero: a constant above zero must not become zero."""


@dataclass(frozen=True)
class Layout:
    """The inputs that decide a plan's tensors.

    `needs` are the gate mode's, because a model that runs must have tensors that are not in the
    output. `gate_inputs` is the digest of the inputs of the routers. `gguf`: a GGUF file is
    written.
    """

    config: MergeConfig
    options: Options
    target: Target
    parts: MixtureParts
    donors: tuple[Donor, ...]
    shared: tuple[Donor, ...]
    needs: Needs
    gate_inputs: str
    gguf: bool = False


def lay_out(made: Layout, opened: Iterable[Checkpoint], findings: Findings) -> Plan:
    """The plan: every slot of the architecture with its recipe, cut into shards.

    A tensor that is missing, quantised or of a wrong shape is recorded as a problem. Tensors that
    are not used are noted. A plan with recorded problems must not be run.
    """
    config, options, target, body = made.config, made.options, made.target, made.parts.body
    model = body.config
    slots = list(target.architecture.slots(model, target.mixture))
    dtype = _dtype(config, body.base, slots)
    tensors = [
        PlannedTensor(
            in_files(slot.name, model),
            slot.shape,
            slot.dtype or dtype,
            _recipe(slot, made, slot.dtype or dtype),
            slot.expert,
            slot.of.kind if isinstance(slot.of, Made) else "",
        )
        for slot in slots
    ]
    tensors += _beside_text(body.base)
    speak = _speakers(made)
    sources = tuple(source_of(one, one.reference in speak) for one in opened)
    tensors_of = {checkpoint.reference.text: checkpoint.tensors for checkpoint in opened}
    needs = _needs(made, slots)
    _check_sources(needs, made, tensors_of, findings)
    _check_left_over(tensors, made, findings)
    if config.dtype is None and not made.gguf:
        _note_what_is_narrowed(needs, made, tensors_of, dtype, findings)
    limit = ShardSize.parse(options.shard_size).max_bytes(PLAIN[dtype].block_bytes)
    routers = [tensor for tensor in tensors if tensor.made]
    others = [tensor for tensor in tensors if not tensor.made]
    return Plan(
        architecture=target.name,
        gate_mode=config.mode,
        gate_inputs=made.gate_inputs,
        seed=options.seed,
        dtype=dtype,
        experts=tuple(donor.name for donor in made.donors),
        experts_per_token=target.mixture.per_token * len(made.donors) // target.mixture.experts,
        config=target.architecture.output_config(model, target.mixture, _LONG_NAMES[dtype]),
        sources=sources,
        shards=make_shards(routers, others, limit, sources, made.gate_inputs),
    )


def _beside_text(base: Donor) -> Iterator[PlannedTensor]:
    """What a base that sees or hears has beside its language part: its tensors, byte for byte.

    A block that predicts further tokens (`mtp.`) is not among them, because no class holds it.
    """
    model = base.model
    if "wrapper" not in model.config:
        return
    text = {*model.renamed.values(), HEAD}
    for name, at in model.tensors.items():
        if name not in text and not name.startswith(_FURTHER):
            made = recipe.Read(model.reference.text, name)
            yield PlannedTensor(name, at.shape, at.dtype, made)


def check_dtype(config: MergeConfig, findings: Findings) -> None:
    """Record a problem if a merge cannot write the config's dtype."""
    if config.dtype is not None and config.dtype.removeprefix("torch.") not in _DTYPES:
        findings.problem(
            config.where("dtype"),
            f"{config.dtype!r} is no dtype that a merge can write",
            nearest(config.dtype, FLOATS),
        )


def _dtype(config: MergeConfig, base: Donor, slots: list[Slot]) -> str:
    """The config's dtype, otherwise the dtype of most bytes that come from the base model."""
    if config.dtype:
        return _DTYPES[config.dtype.removeprefix("torch.")]
    sizes: Counter[str] = Counter()
    for slot in slots:
        found = base.model.tensors.get(slot.of.tensor) if isinstance(slot.of, FromBody) else None
        if found:
            sizes[found.encoding.name] += found.nbytes
    most = max(sizes, key=sizes.__getitem__, default="BF16")
    return "F32" if most == "F64" else most if most in _LONG_NAMES else "BF16"


def _recipe(slot: Slot, made: Layout, dtype: str) -> Recipe:
    """The recipe that makes the slot's tensor from its sources."""
    parts, of = made.parts, slot.of
    if isinstance(of, FromBody):
        own, config = parts.body.recipe(of.tensor), parts.body.config
        return recipe.Halve(own, config["head_dim"], turned_rows(config)) if of.halved else own
    if isinstance(of, FromExpert):
        member = (parts.shared if of.shared else parts.routed)[of.expert]
        which = f"{'shared ' * of.shared}expert {of.expert}"
        return member.recipe(of.tensor, made.options.seed, which)
    if isinstance(of, Constant):
        least = _LEAST_F16 if dtype == "F16" and of.value > 0 else of.value
        most = -_MOST_F16 if dtype == "F16" else of.value
        return recipe.Fill(max(of.value, least, most), slot.shape)
    if isinstance(of, Transposed):
        return recipe.Transpose(_recipe(of.of, made, dtype))
    if isinstance(of, Joined):
        return recipe.Join(tuple(_recipe(part, made, dtype) for part in of.parts), of.axis)
    whole = recipe.Read(ROUTERS, in_files(slot.name, parts.body.config))
    times = made.target.mixture.experts // len(made.donors)
    if of.kind == "shared gate" or times == 1:
        return whole
    rows = (recipe.Cut(whole, 0, at, at + 1) for at in range(len(made.donors)))
    return recipe.Join(tuple(row for row in rows for _ in range(times)))


def _speakers(made: Layout) -> set[Reference]:
    """The models whose tokenizers the mixture depends on."""
    found = [made.parts.body.base, *made.parts.body.experts]
    if made.config.tokenizer != BASE or made.needs.expert_models or made.needs.own_passes:
        found += [*made.donors, *made.shared]
    adapters = {donor.adapter.checkpoint.reference for donor in found if donor.adapter}
    return adapters | {donor.model.reference for donor in found}


def source_of(checkpoint: Checkpoint, speaks: bool = False) -> Source:
    """The plan's entry for a model or adapter; with its tokenizer's digest if it `speaks`."""
    reference = checkpoint.reference
    return Source(
        reference=reference.text,
        fingerprint=checkpoint.fingerprint,
        directory=str(checkpoint.place) if reference.directory else None,
        repo=reference.repo or None,
        commit=checkpoint.commit,
        modified=checkpoint.modified,
        tokens=checkpoint.tokens if speaks and not checkpoint.commit else None,
    )


@dataclass(frozen=True)
class _Need:
    """Tensors of a donor that must exist, with their shapes; `written` if the output has them."""

    donor: Donor
    shapes: dict[str, tuple[int, ...]]
    written: bool = True


def _needs(made: Layout, slots: Sequence[Slot]) -> list[_Need]:
    """The tensors that are needed from each donor."""
    body, base = made.parts.body, made.parts.body.base
    dense = dense_shapes(base.model.config)
    mlps = {name: shape for name, shape in dense.items() if _MLP in name}
    rest = {name: shape for name, shape in dense.items() if _MLP not in name}
    found = [_Need(base, rest)]
    if any(isinstance(member.donor, Body) for member in made.parts.routed):
        found.append(_Need(base, mlps))
    found += [_Need(donor, mlps) for donor in (*made.donors, *made.shared)]
    attention = {name: shape for name, shape in rest.items() if name not in VOCABULARY}
    found += [_Need(donor, attention) for donor in body.experts]
    found += [_Need(donor, shapes) for donor, shapes in body.shared()]
    if body.vocabulary:
        found += [_Need(donor, shapes) for donor, shapes in body.vocabulary.needs()]
    if made.needs.body_pass:
        found += [_Need(donor, mlps, False) for donor in (base, *body.experts)]
    if made.needs.expert_models or made.needs.own_passes:
        found += [_Need(d, dense_shapes(d.model.config), False) for d in made.donors]
    return found


def _check_sources(
    needs: list[_Need], made: Layout, sources: recipe.Sources, findings: Findings
) -> None:
    """Record tensors that are missing or wrong: one problem for each donor and kind."""
    wrong: dict[tuple[str, str, str], list[str]] = {}
    for need in needs:
        config = need.donor.model.config
        held = dense_shapes(config) if record_of(config) else need.shapes
        for name, shape in need.shapes.items():
            if obstacle := need.donor.obstacle((name,)):
                wrong.setdefault((need.donor.where, f": {obstacle[1]}", obstacle[2]), []).append(
                    name
                )
                continue
            read = next(recipe.reads(recipe.of_donor(need.donor, name)))
            found = sources[read.source].get(read.tensor)
            bias = f"{name.removesuffix('.weight')}.bias"
            if found is None and name == HEAD:
                kind = (f" is missing, and config.json does not say {TIED}: true", _NO_HEAD)
            elif found is None:
                kind = (" is missing", "download or save the model again")
            elif found.shape != shape:
                kind = (
                    f" is {list(found.shape)}, config.json says {list(shape)}",
                    "use the weights and the config.json of one and the same model",
                )
            elif found.dtype not in ("F64", *_LONG_NAMES):
                kind = (
                    f" holds {found.dtype} values: it is quantised",
                    "merge the original weights",
                )
            elif bias in need.donor.model.tensors and bias not in held:
                kind = (" has a bias, and the output has no place for it", "use one without biases")
            else:
                continue
            names = wrong.setdefault((need.donor.where, *kind), [])
            names += [] if read.tensor in names else [read.tensor]
    for (where, what, fix), names in wrong.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        findings.problem(where, f"{names[0]}{what}{more}", fix)


def _note_what_is_narrowed(
    needs: list[_Need], made: Layout, sources: recipe.Sources, dtype: str, findings: Findings
) -> None:
    """Note each donor with values that the plan's dtype cannot hold exactly."""
    narrowed: dict[str, set[str]] = {}
    lossy = {"F64"} if dtype == "F32" else {"F64", *_LONG_NAMES} - {dtype}
    for need in needs:
        for name in need.shapes if need.written else ():
            read = next(recipe.reads(recipe.of_donor(need.donor, name)))
            found = sources[read.source].get(read.tensor)
            if found and found.dtype in lossy:
                narrowed.setdefault(need.donor.name, set()).add(found.dtype)
    for name, dtypes in narrowed.items():
        kinds = " and ".join(sorted(_LONG_NAMES.get(kind, "float64") for kind in dtypes))
        keep = "the widest there is" if dtype == "F32" else "set dtype: float32 to keep them"
        findings.note_of(name, f"{kinds} tensors are written as {_LONG_NAMES[dtype]}; {keep}")


def _check_left_over(tensors: list[PlannedTensor], made: Layout, findings: Findings) -> None:
    """Note tensors of the adapters and of the base model that are not used."""
    base = made.parts.body.base
    used = {read for tensor in tensors for read in recipe.reads(tensor.recipe)}
    for name in made.parts.body.fitted:
        used |= {read for one in made.donors for read in recipe.reads(recipe.of_donor(one, name))}
    body_only = "(attention, norms, embeddings): those parts are the base model's"
    for donor in (base, *made.donors, *made.shared):
        if donor.adapter is None:
            continue
        text = donor.adapter.checkpoint.reference.text
        names = {delta.down for delta in donor.adapter.deltas.values()}
        names |= {*donor.adapter.replacements.values(), *donor.adapter.obstacles}
        unused = sum(recipe.Read(text, name) not in used for name in names)
        if unused:
            why = "(MLPs): those parts are the experts'" if donor is base else body_only
            what = f"{unused} of the adapter's {len(names)} changes are not used {why}"
            findings.note_of(donor.name, what)
    body = {read.tensor for read in used if read.source == base.model.reference.text}
    if base.adapter:
        body |= {*base.adapter.deltas, *base.adapter.replacements}
    stray = sorted(
        name
        for name in base.model.tensors.keys() - body
        if not name.endswith(("inv_freq", ".bias")) and _MLP not in name
    )
    if base.model.config.get(TIED):
        stray = [name for name in stray if name != HEAD]
    if stray and not made.parts.body.experts:
        more = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
        findings.note(f"base: {stray[0]} is not used{more}")
