"""An architecture's slots filled from the donors: each tensor's recipe, and what does not fit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable

from moemerge import recipe
from moemerge.architectures import Architecture, Slot
from moemerge.body import VOCABULARY, Body
from moemerge.checkpoint import FLOATS, ITEMSIZE, Checkpoint, Donor
from moemerge.config import Expert, MergeConfig
from moemerge.errors import Findings, nearest
from moemerge.options import Options, ShardSize
from moemerge.plan import Plan, PlannedTensor, Source, make_shards, router_tensor

_DTYPES = {**FLOATS, "bf16": "BF16", "fp16": "F16", "fp32": "F32", "half": "F16", "float": "F32"}
_LONG_NAMES = {short: long for long, short in FLOATS.items()}


def lay_out(
    config: MergeConfig,
    options: Options,
    architecture: Architecture,
    body: Body,
    donors: list[Donor],
    opened: Iterable[Checkpoint],
    findings: Findings,
    uses: Collection[str],
    gate_inputs: str,
) -> Plan:
    """The plan: every slot of the architecture with its recipe, cut into shards.

    Tensors that are missing, of another shape, quantised or left over are recorded; a plan with
    recorded problems must not be run. `uses` is the gate mode's: running a model needs tensors
    that are not in the output; `gate_inputs` is the digest of what routers are made from.
    """
    base, count = body.base, len(donors)
    model = base.model.config
    per_token = config.experts_per_token or min(2, count)
    slots = list(architecture.slots(model, count))
    dtype = _dtype(config, base, slots)
    routers = [router_tensor(slot.name, slot.shape, dtype) for slot in slots if not slot.source]
    tensors = [
        _tensor(
            slot,
            body if slot.expert is None else donors[slot.expert],
            None if slot.expert is None else config.experts[slot.expert],
            dtype,
            options.seed,
        )
        for slot in slots
        if slot.source
    ]
    sources = tuple(map(_source, opened))
    tensors_of = {checkpoint.reference.text: checkpoint.tensors for checkpoint in opened}
    _check_sources(tensors, base, donors, tensors_of, findings)
    if "model" in uses:
        own = (dataclasses.replace(slot, expert=None) for slot in slots if slot.expert == 0)
        mlps = [_tensor(slot, body, None, dtype, options.seed) for slot in own]
        _check_sources(mlps, base, donors, tensors_of, findings)
    if "experts" in uses:
        for number, donor in enumerate(donors):
            dense = (slot for slot in architecture.slots(donor.model.config, 1) if slot.source)
            own = (dataclasses.replace(slot, expert=number) for slot in dense)
            whole = [_tensor(slot, donor, None, dtype, options.seed) for slot in own]
            _check_sources(whole, base, donors, tensors_of, findings)
    for number, donor in enumerate(body.experts):
        own = (dataclasses.replace(slot, expert=number) for slot in slots if slot.expert is None)
        parts = [slot for slot in own if slot.source and slot.source not in VOCABULARY]
        attention = [_tensor(slot, donor, None, dtype, options.seed) for slot in parts]
        _check_sources(attention, base, donors, tensors_of, findings)
    _check_left_over(tensors, body, donors, findings)
    if config.dtype is None:
        _note_what_is_narrowed(tensors, base, donors, tensors_of, dtype, findings)
    return Plan(
        architecture=(config.architecture or "mixtral").lower(),
        gate_mode=config.mode,
        gate_inputs=gate_inputs,
        seed=options.seed,
        dtype=dtype,
        experts=tuple(donor.name for donor in donors),
        experts_per_token=per_token,
        config=architecture.output_config(model, count, per_token, _LONG_NAMES[dtype]),
        sources=sources,
        shards=make_shards(
            routers,
            tensors,
            ShardSize.parse(options.shard_size).max_bytes(ITEMSIZE[dtype]),
            sources,
            gate_inputs,
        ),
    )


def check_dtype(config: MergeConfig, findings: Findings) -> None:
    """Record a dtype that a merge cannot write."""
    if config.dtype is not None and config.dtype.removeprefix("torch.") not in _DTYPES:
        findings.problem(
            config.where("dtype"),
            f"{config.dtype!r} is no dtype that a merge can write",
            nearest(config.dtype, FLOATS),
        )


def _dtype(config: MergeConfig, base: Donor, slots: list[Slot]) -> str:
    """The config's dtype, else the one that most bytes of the base model's part are in."""
    if config.dtype:
        return _DTYPES[config.dtype.removeprefix("torch.")]
    sizes: Counter[str] = Counter()
    for slot in slots:
        found = base.model.tensors.get(slot.source or "")
        if slot.expert is None and found:
            sizes[found.dtype] += found.nbytes
    most = max(sizes, key=sizes.__getitem__, default="BF16")
    return "F32" if most == "F64" else most if most in _LONG_NAMES else "BF16"


def _tensor(
    slot: Slot, donor: Donor | Body, expert: Expert | None, dtype: str, seed: int
) -> PlannedTensor:
    name = slot.source or ""
    made = donor.recipe(name) if isinstance(donor, Body) else recipe.of_donor(donor, name)
    if expert and expert.noise_scale:
        made = recipe.Noise(made, expert.noise_scale, seed)
    if expert and slot.residual and expert.residual_scale != 1:
        made = recipe.Scale(made, expert.residual_scale)
    return PlannedTensor(slot.name, slot.shape, dtype, made, slot.expert)


def _source(checkpoint: Checkpoint) -> Source:
    reference = checkpoint.reference
    return Source(
        reference=reference.text,
        fingerprint=checkpoint.fingerprint,
        directory=str(checkpoint.directory) if reference.directory else None,
        repo=reference.repo or None,
        commit=checkpoint.commit,
        modified=checkpoint.modified,
    )


def _check_sources(
    tensors: list[PlannedTensor],
    base: Donor,
    donors: list[Donor],
    sources: recipe.Sources,
    findings: Findings,
) -> None:
    """Record, once a donor and kind, the tensors that are missing or not what they should be."""
    wrong: dict[tuple[int | None, str, str], list[str]] = {}
    for tensor, read in [(t, read) for t in tensors for read in recipe.firsts(t.recipe)]:
        found = sources[read.source].get(read.tensor)
        if found is None:
            kind = ("is missing", "download or save the model again")
        elif found.shape != tensor.shape:
            kind = (
                f"is {list(found.shape)}, config.json says {list(tensor.shape)}",
                "use the weights and the config.json of one and the same model",
            )
        elif found.dtype not in ("F64", *_LONG_NAMES):
            kind = (f"holds {found.dtype} values: it is quantised", "merge the original weights")
        elif f"{read.tensor.removesuffix('.weight')}.bias" in sources[read.source]:
            kind = ("has a bias, which the output has no place for", "use a model without biases")
        else:
            continue
        expert = tensor.expert
        if expert is None and read.source != base.model.reference.text:  # a part of an average
            texts = [donor.model.reference.text for donor in donors]
            expert = texts.index(read.source) if read.source in texts else None
        wrong.setdefault((expert, *kind), []).append(read.tensor)
    for (expert, what, fix), names in wrong.items():
        who = base if expert is None else donors[expert]
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        findings.problem(who.where, f"{names[0]} {what}{more}", fix)


def _note_what_is_narrowed(
    tensors: list[PlannedTensor],
    base: Donor,
    donors: list[Donor],
    sources: recipe.Sources,
    dtype: str,
    findings: Findings,
) -> None:
    """Say, once a donor, which of its values the dtype that nobody chose cannot hold exactly."""
    narrowed: dict[int | None, set[str]] = {}
    lossy = {"F64"} if dtype == "F32" else {"F64", *_LONG_NAMES} - {dtype}
    for tensor in tensors:
        for read in recipe.firsts(tensor.recipe):
            found = sources[read.source].get(read.tensor)
            if found and found.dtype in lossy:
                narrowed.setdefault(tensor.expert, set()).add(found.dtype)
    for expert, dtypes in narrowed.items():
        who = base if expert is None else donors[expert]
        kinds = " and ".join(sorted(_LONG_NAMES.get(kind, "float64") for kind in dtypes))
        keep = "the widest there is" if dtype == "F32" else "set dtype: float32 to keep them"
        findings.note(f"{who.name}: {kinds} tensors are written as {_LONG_NAMES[dtype]}; {keep}")


def _check_left_over(
    tensors: list[PlannedTensor], made: Body, donors: list[Donor], findings: Findings
) -> None:
    """Say what of the adapters and of the base model's body is not used."""
    base = made.base
    used = {read for tensor in tensors for read in recipe.reads(tensor.recipe)}
    body_only = "(attention, norms, embeddings): those parts are the base model's"
    for donor in (base, *donors):
        if donor.adapter is None:
            continue
        text = donor.adapter.checkpoint.reference.text
        names = {delta.down for delta in donor.adapter.deltas.values()}
        names |= set(donor.adapter.replacements.values())
        unused = sum(recipe.Read(text, name) not in used for name in names)
        if unused:
            why = "(MLPs): those parts are the experts'" if donor is base else body_only
            findings.note(
                f"{donor.name}: {unused} of the adapter's {len(names)} changes are not used {why}"
            )
    body = {read.tensor for read in used if read.source == base.model.reference.text}
    if base.adapter:
        body |= {*base.adapter.deltas, *base.adapter.replacements}
    stray = sorted(
        name
        for name in base.model.tensors.keys() - body
        if not name.endswith(("inv_freq", ".bias")) and ".mlp." not in name
    )
    if base.model.config.get("tie_word_embeddings"):
        stray = [name for name in stray if name != "lm_head.weight"]
    if stray and not made.experts:
        more = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
        findings.note(f"base: {stray[0]} is not used{more}")
