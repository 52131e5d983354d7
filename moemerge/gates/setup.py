"""A config's gate mode made ready: its options checked, its prompts read, its costs said."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import replace
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig, held
from moemerge.dense import available_memory, model_bytes
from moemerge.errors import Findings, nearest
from moemerge.gates import modes as gates
from moemerge.gates.modes import GateMode
from moemerge.gates.prompts import ExpertPrompts, check_prompts, encode_prompts, read_documents
from moemerge.options import RunOptions
from moemerge.plan import digest_of
from moemerge.reporting import size
from moemerge.split import Cutting
from moemerge.text import Encoder, Vocabulary, open_encoder, other_ids
from moemerge.tokenizer import shown


def find_mode(config: MergeConfig, findings: Findings) -> GateMode | None:
    """The config's gate mode; None, with a problem recorded, where it is none."""
    mode = config.mode
    if mode in gates.names():
        return gates.find(mode)
    where = config.where("gate.mode" if "mode" in config.gate else "gate_mode")
    findings.problem(where, f"{mode!r} is no gate mode", nearest(mode, gates.names()))
    return None


def settings_of(config: MergeConfig, gate: GateMode | None, findings: Findings) -> Any:
    """The gate mode's own options as it declares them; None where it has none."""
    declared: Any = getattr(gate, "Settings", None)
    hints = typing.get_type_hints(declared) if declared else {}
    known = {name.rstrip("_"): name for name in hints}
    values: dict[str, Any] = {}
    for key, value in config.gate.items():
        where = config.where(f"gate.{key}")
        if key in known:
            values[known[key]] = held(value, hints[known[key]], where, findings)
        elif key != "mode" and gate:
            what = f"is no option of gate mode {config.mode}"
            fix = nearest(key, known) if known else "remove it: it has none"
            findings.problem(where, what, fix)
    if declared is None or findings.problems:
        return None
    settings = declared(**values)
    for key, what, fix in settings.problems():
        findings.problem(config.where(f"gate.{key}"), what, fix)
    return settings


def check_device(options: RunOptions, gate: GateMode | None, findings: Findings) -> None:
    """Record a device that the gate mode needs and that is not here."""
    if gate is not None and "model" in gate.USES:
        check_device_is_here(options, findings)


def check_device_is_here(options: RunOptions, findings: Findings) -> None:
    """Record a device that is not here."""
    name = options.device
    if name in ("auto", "cpu"):
        return
    import torch

    kind, _, number = name.partition(":")
    there = (
        int(number or 0) < torch.cuda.device_count()
        if kind == "cuda"
        else torch.backends.mps.is_available()
    )
    if not there:
        findings.problem("--device", f"there is no {name} device here", "use --device cpu")


def with_shared(config: MergeConfig) -> MergeConfig:
    """The config with all shared experts as one more expert, if prompts are to gate them."""
    prompts = tuple(p for one in config.shared_experts for p in one.positive_prompts)
    against = tuple(p for one in config.shared_experts for p in one.negative_prompts)
    if not prompts:
        return config
    one = replace(config.shared_experts[0], positive_prompts=prompts, negative_prompts=against)
    return replace(config, experts=(*config.experts, one))


def read_prompts(
    config: MergeConfig,
    gate: GateMode | None,
    settings: Any,
    vocabulary: Vocabulary | None,
    donors: list[Donor | None],
    findings: Findings,
) -> tuple[Encoder | None, tuple[ExpertPrompts, ...]]:
    """The tokenizer and each expert's prompts, as far as the gate mode uses them.

    Those of shared experts come last, as one expert's, where they have some.
    """
    config = with_shared(config)
    none = tuple(ExpertPrompts() for _ in config.experts)
    if gate is None or not {"prompts", "any prompts"} & gate.USES:
        if gate and any(e.positive_prompts or e.negative_prompts for e in config.experts):
            findings.without_effect("prompts", f" with gate_mode: {config.mode}")
        if gate and any(expert.calibration for expert in config.experts):
            findings.without_effect("calibration", f" with gate_mode: {config.mode}")
        return None, none
    if "prompts" in gate.USES:
        check_prompts(config, findings)
    documents = read_documents(config, findings)
    encoder = open_encoder(vocabulary, findings) if vocabulary else None
    if vocabulary is None or encoder is None:
        return None, none
    base = vocabulary.speaker
    if "experts" in gate.USES and not encoder.start().ids:
        for index, expert in enumerate(config.experts):
            if not expert.positive_prompts:
                findings.problem(
                    config.where(f"experts[{index}]"),
                    "has no positive_prompts, and the tokenizer no token that texts begin with",
                    "add some prompts",
                )
    apart = "experts" not in gate.USES  # which go on from the same prompts in their own ways
    prompts = encode_prompts(config, encoder, base, documents, findings, apart)
    if "experts" in gate.USES:
        _check_own_text(config, encoder, prompts, [base, *donors], settings, findings)
        _check_beginnings(vocabulary, encoder, prompts, donors, findings)
    return encoder, prompts


def _check_own_text(
    config: MergeConfig,
    encoder: Encoder,
    prompts: tuple[ExpertPrompts, ...],
    models: list[Donor | None],
    settings: Any,
    findings: Findings,
) -> None:
    """Record what is too long to be written and read by one of the `models`."""
    begun = [expert.positive or (encoder.start(),) for expert in prompts]
    longest = max((len(prompt.ids) for of_one in begun for prompt in of_one), default=0)
    positions = [d.model.config.get("max_position_embeddings") for d in models if d]
    most = min((limit for limit in positions if isinstance(limit, int)), default=2**63)
    if settings and longest + settings.tokens > most:
        what = f"is {settings.tokens}, after prompts of up to {longest}; the models take {most}"
        fix = f"write at most {most - longest}, or shorten the prompts"
        findings.problem(config.where("gate.tokens"), what, fix)


def _check_beginnings(
    vocabulary: Vocabulary,
    encoder: Encoder,
    prompts: tuple[ExpertPrompts, ...],
    donors: list[Donor | None],
    findings: Findings,
) -> None:
    """Record beginnings of which an expert does not know a token, or as another."""
    fix = "use other prompts, or gate_mode: ridge"
    for expert, donor in zip(prompts, donors, strict=True):
        if donor is None:
            continue
        begun = expert.positive or (encoder.start(),)
        ids = {token for prompt in begun for token in prompt.ids}
        last, known = max(ids, default=0), donor.model.config.get("vocab_size")
        if isinstance(known, int) and last >= known:
            what = f"its text would begin with token {last}, and it embeds {known}"
            findings.problem(donor.where, what, fix)
            continue
        try:
            others = sorted(ids & other_ids(vocabulary, donor))
        except ValueError as error:
            findings.note_of(donor.name, f"its tokens are taken for the mixture's: {error}")
            continue
        if others:
            names = shown(encoder.spelled(others[:4]))
            what = f"its text would begin with tokens that are others in its tokenizer ({names})"
            findings.problem(donor.where, what, fix)


def check_room(
    config: MergeConfig, options: RunOptions, donors: list[Donor], settings: Any, findings: Findings
) -> None:
    """Say what it costs that every expert's own model runs; record one that has no room."""
    sizes = [model_bytes(donor.model.tensors.values()) for donor in donors]
    free = available_memory()
    largest, steps = max(sizes), settings.tokens if settings else 0
    streamed = sum(sizes) * steps
    if free is not None and largest > free and not options.lazy:
        findings.problem(
            donors[sizes.index(largest)].where,
            f"writes its own text, for which it needs {size(largest)} of memory; {size(free)} "
            "are free",
            f"pass --lazy to read it layer by layer for every token ({size(streamed)} in all), "
            f"or use gate_mode: ridge with prompts",
        )
    elif settings:
        read = streamed if options.lazy else sum(sizes)
        findings.note(
            f"gate_mode: {config.mode}: each of {len(donors)} experts writes "
            f"{settings.samples} texts of {settings.tokens} tokens, for which {size(read)} are "
            "read" + (f" ({size(streamed)} with --lazy)" if not options.lazy else "")
        )


def digest_of_inputs(
    config: MergeConfig,
    options: RunOptions,
    gate: GateMode,
    settings: Any,
    prompts: tuple[ExpertPrompts, ...],
    cutting: Cutting | None = None,
) -> str:
    """A digest of what routers, and a split's slices, come from besides the sources' weights."""
    bits = 4 if options.load_in_4bit else 8 if options.load_in_8bit else 16
    made_of = {
        "mode": config.mode,
        "settings": dataclasses.asdict(settings) if settings else None,
        "body": [config.body, *(expert.body_weight for expert in config.experts)],
        "prompts": [dataclasses.asdict(expert) for expert in prompts],
        "bits": bits if "model" in gate.USES else None,
        "seed": options.seed if "seed" in gate.USES else None,
        "base": config.base_model,
    }
    if cutting:
        made_of["split"] = cutting.digest()
    return digest_of(made_of)
