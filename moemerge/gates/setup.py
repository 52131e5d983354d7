"""A config's gate mode made ready: options checked, prompts read, costs noted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig, Picture, read_settings
from moemerge.dense import available_memory, model_bytes
from moemerge.errors import Findings, nearest
from moemerge.gates import modes
from moemerge.gates.modes import GateMode
from moemerge.gates.needs import GateSettings, Needs, Passes, Prompts
from moemerge.gates.prompts import ExpertPrompts, check_prompts, encode_prompts, read_documents
from moemerge.gates.task import Routers, Task
from moemerge.options import RunOptions
from moemerge.plan import digest_of
from moemerge.reporting import size
from moemerge.split import Cutting, Split
from moemerge.text import Encoder, Prompt, Vocabulary, open_encoder, other_ids
from moemerge.tokenizer import shown


@dataclass(frozen=True)
class Gate:
    """A config's gate mode with its options. `needs` joins what the mode and the split need."""

    mode: GateMode
    settings: GateSettings
    needs: Needs

    def routers(self, task: Task) -> Routers:
        """The routers: one float32 (E, D) matrix for each layer."""
        return self.mode.routers(task)


def gate_of(config: MergeConfig, findings: Findings) -> Gate | None:
    """The config's gate mode; None, with a problem recorded, if no mode has that name.

    Problems with its options are recorded too; the gate then has no options.
    """
    name = config.mode
    if name not in modes.names():
        where = config.where("gate.mode" if "mode" in config.gate else "gate_mode")
        findings.problem(where, f"{name!r} is no gate mode", nearest(name, modes.names()))
        return None
    mode = modes.find(name)
    settings = read_settings(
        modes.settings_class(mode),
        {key: value for key, value in config.gate.items() if key != "mode"},
        lambda key: config.where(f"gate.{key}"),
        f"is no option of gate mode {name}",
        findings,
    )
    settings = settings or GateSettings()
    for key, what, fix in settings.problems():
        findings.problem(config.where(f"gate.{key}"), what, fix)
    return Gate(mode, settings, mode.NEEDS)


def with_split(config: MergeConfig, gate: Gate, split: Split | None, findings: Findings) -> Gate:
    """The gate with the split's needs added; record a problem if the two do not fit together."""
    needs = gate.needs
    if split is None:
        if needs.text and not config.split:
            what, fix = "is for the slices of a split", "add a split, or use gate_mode: ridge"
            findings.problem(config.where("gate_mode"), what, fix)
        return gate
    if needs.prompts is not Prompts.NONE:
        what = f"{config.mode} routes by experts' prompts, and slices have none"
        findings.problem(config.where("gate_mode"), what, f"use {_without_prompts()}")
    if needs.text and not split.reads_text and not split.text:
        what = f"is missing; gate_mode: {config.mode} reads it to see which slices are active"
        fix = "name a text or jsonl file, or use gate_mode: random or zeros"
        findings.problem(config.where("split.text"), what, fix)
    if split.text and not needs.text and not split.reads_text:
        findings.note("split.text has no effect: neither neurons nor routers depend on it")
    needs = replace(
        needs,
        text=needs.text or split.reads_text,
        body_pass=needs.body_pass or split.reads_text,
        seed=needs.seed or split.draws,
    )
    return replace(gate, needs=needs)


def planned_texts(
    gate: Gate, experts: Sequence[ExpertPrompts], encoder: Encoder
) -> list[list[Prompt]] | None:
    """What each expert will write, as `modes.Writer.planned`; None if experts do not write."""
    writes = modes.writer(gate.mode)
    return writes.planned(gate.settings, experts, encoder.start()) if writes else None


def with_fit(config: MergeConfig, gate: Gate) -> Gate:
    """The gate with what a fitted body or fitted experts need: texts, and every model."""
    if not config.fits or config.split:
        return gate
    prompts = gate.needs.prompts
    prompts = Prompts.REQUIRED if prompts is Prompts.NONE else prompts
    return replace(
        gate, needs=replace(gate.needs, prompts=prompts, body_pass=True, own_passes=True)
    )


def _without_prompts() -> str:
    """The gate modes that a split can use, in words."""
    needs = {name: modes.find(name).NEEDS for name in modes.names()}
    *names, last = (
        name + " (with a split.text)" * of_one.text
        for name, of_one in needs.items()
        if of_one.prompts is Prompts.NONE
    )
    return f"{', '.join(names)} or {last}"


def check_device_is_here(options: RunOptions, findings: Findings) -> None:
    """Record a problem if this machine does not have the device that the options name."""
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
    """The config with all shared experts joined to one more expert, if these have prompts."""
    prompts = tuple(p for one in config.shared_experts for p in one.positive_prompts)
    against = tuple(p for one in config.shared_experts for p in one.negative_prompts)
    if not prompts:
        return config
    one = replace(config.shared_experts[0], positive_prompts=prompts, negative_prompts=against)
    return replace(config, experts=(*config.experts, one))


def read_prompts(
    config: MergeConfig,
    gate: Gate,
    vocabulary: Vocabulary | None,
    donors: list[Donor | None],
    findings: Findings,
) -> tuple[Encoder | None, tuple[ExpertPrompts, ...]]:
    """The tokenizer and each expert's prompts; None and empty prompts if the mode uses none.

    The prompts of all shared experts, if there are any, come last, as those of one expert.
    """
    config = with_shared(config)
    none = tuple(ExpertPrompts() for _ in config.experts)
    if gate.needs.prompts is Prompts.NONE:
        if any(e.positive_prompts or e.negative_prompts for e in config.experts):
            findings.without_effect("prompts", f" with gate_mode: {config.mode}")
        if any(expert.calibration for expert in config.experts):
            findings.without_effect("calibration", f" with gate_mode: {config.mode}")
        return None, none
    if gate.needs.prompts is Prompts.REQUIRED:
        own = gate.mode.NEEDS.prompts is not Prompts.NONE
        fit = "align" if config.body != "regmean" else "body: regmean"
        check_prompts(config, f"gate_mode: {config.mode}" if own else fit, findings)
    documents = read_documents(config, findings)
    encoder = open_encoder(vocabulary, findings) if vocabulary else None
    if vocabulary is None or encoder is None:
        return None, none
    base = vocabulary.speaker
    if gate.needs.expert_models and not encoder.start().ids:
        for index, expert in enumerate(config.experts):
            if not expert.positive_prompts:
                findings.problem(
                    config.where(f"experts[{index}]"),
                    "has no positive_prompts, and the tokenizer has no token that texts begin with",
                    "add some prompts",
                )
    _check_pictures(config, gate, findings)
    apart = not gate.needs.expert_models  # two models continue the same prompt differently
    prompts = encode_prompts(config, encoder, base, documents, findings, apart)
    if gate.needs.expert_models:
        _check_own_text(config, encoder, prompts, [base, *donors], gate.settings.passes(), findings)
        _check_beginnings(vocabulary, encoder, prompts, donors, findings)
    return encoder, prompts


def _check_pictures(config: MergeConfig, gate: Gate, findings: Findings) -> None:
    """Record a problem if prompts have pictures, and the gate mode runs no body that sees."""
    prompts = (p for e in config.experts for p in (*e.positive_prompts, *e.negative_prompts))
    if any(isinstance(prompt, Picture) for prompt in prompts) and (
        gate.needs.expert_models or not gate.needs.body_pass
    ):
        what = f"{config.mode} cannot use prompts with pictures"
        findings.problem(config.where("gate_mode"), what, "use ridge or hidden")


def _check_own_text(
    config: MergeConfig,
    encoder: Encoder,
    prompts: tuple[ExpertPrompts, ...],
    models: list[Donor | None],
    passes: Passes,
    findings: Findings,
) -> None:
    """Record a problem if a prompt with its continuation is too long for one of the `models`."""
    begun = [expert.positive or (encoder.start(),) for expert in prompts]
    longest = max((len(prompt.ids) for of_one in begun for prompt in of_one), default=0)
    positions = [d.model.config.get("max_position_embeddings") for d in models if d]
    most = min((limit for limit in positions if isinstance(limit, int)), default=2**63)
    if passes.texts and longest + passes.tokens > most:
        what = f"is {passes.tokens}, after prompts of up to {longest}; the models take {most}"
        fix = f"write at most {most - longest}, or shorten the prompts"
        findings.problem(config.where("gate.tokens"), what, fix)


def _check_beginnings(
    vocabulary: Vocabulary,
    encoder: Encoder,
    prompts: tuple[ExpertPrompts, ...],
    donors: list[Donor | None],
    findings: Findings,
) -> None:
    """Record prompts with a token that an expert lacks, or that is another token for it."""
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
            findings.note_of(donor.name, f"its token ids are taken to be the mixture's: {error}")
            continue
        if others:
            names = shown(encoder.spelled(others[:4]))
            what = f"its text would begin with tokens that are different in its tokenizer ({names})"
            findings.problem(donor.where, what, fix)


def check_room(
    config: MergeConfig,
    options: RunOptions,
    donors: Sequence[Donor],
    gate: Gate,
    findings: Findings,
) -> None:
    """Note the cost of running every expert's own model; record one that memory cannot hold."""
    sizes, passes = [model_bytes(d.model.tensors.values()) for d in donors], gate.settings.passes()
    free = available_memory()
    largest, streamed = max(sizes), sum(sizes) * max(passes.tokens, 1)
    if free is not None and largest > free and not options.lazy:
        findings.problem(
            donors[sizes.index(largest)].where,
            f"{'writes its own text' if passes.texts else 'runs as a whole model'} and "
            f"needs {size(largest)} of memory; {size(free)} are free",
            f"pass --lazy to read it layer by layer for every token ({size(streamed)} in all), "
            f"or use gate_mode: ridge with prompts",
        )
    elif passes.texts:
        read = streamed if options.lazy else sum(sizes)
        findings.note(
            f"gate_mode: {config.mode}: each of {len(donors)} experts writes "
            f"{passes.texts} texts of {passes.tokens} tokens; {size(read)} are "
            "read for this" + (f" ({size(streamed)} with --lazy)" if not options.lazy else "")
        )


def _plain(prompt: Prompt) -> dict[str, Any]:
    """A prompt as plain data, with the digest of what is seen in it."""
    seen = {"seen": prompt.seen.digest} if prompt.seen else {}
    return {"ids": prompt.ids, "own": prompt.own, **seen}


def digest_of_inputs(
    config: MergeConfig,
    options: RunOptions,
    gate: Gate,
    prompts: tuple[ExpertPrompts, ...],
    cutting: Cutting | None = None,
) -> str:
    """A digest of all inputs of the routers and a split's slices, except the sources' weights."""
    bits = 4 if options.load_in_4bit else 8 if options.load_in_8bit else 16
    made_of = {
        "mode": config.mode,
        "settings": dataclasses.asdict(gate.settings) or None,
        "body": [config.body, *(expert.body_weight for expert in config.experts)],
        **({"align": config.align} if config.aligns else {}),
        "prompts": [
            {name: [_plain(one) for one in texts] for name, texts in vars(expert).items()}
            for expert in prompts
        ],
        "bits": bits if gate.needs.body_pass else None,
        "seed": options.seed if gate.needs.seed else None,
        "base": config.base_model,
    }
    if cutting:
        made_of["split"] = cutting.digest()
    return digest_of(made_of)
