"""A config and its models to a checked `Plan`: every problem found, before a weight is read."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge import architectures, gates, output
from moemerge.architectures import Architecture
from moemerge.body import Body
from moemerge.calibration import read_documents
from moemerge.checkpoint import Checkpoint, Donor, Opener
from moemerge.compare import compare, same_vocabulary
from moemerge.config import MergeConfig, check_values, held
from moemerge.dense import available_memory, model_bytes
from moemerge.errors import Findings, nearest
from moemerge.gates import GateMode
from moemerge.layout import check_dtype, lay_out
from moemerge.options import Options
from moemerge.plan import Plan, digest_of
from moemerge.prompts import (
    Encoder,
    ExpertPrompts,
    check_prompts,
    encode_prompts,
    open_encoder,
)
from moemerge.reporting import size
from moemerge.source_cards import read_own


@dataclass(frozen=True)
class Prepared:
    """A merge that can begin: its plan, its opened models, and what a person should know.

    `own_card` is the text of the card that a person wrote for it.
    """

    config: MergeConfig
    plan: Plan
    body: Body
    donors: tuple[Donor, ...]
    checkpoints: dict[str, Checkpoint]
    gate: GateMode
    settings: Any
    encoder: Encoder | None
    prompts: tuple[ExpertPrompts, ...]
    carried: tuple[Path, ...]
    notes: tuple[str, ...]
    own_card: str = ""

    @property
    def folder(self) -> str | None:
        """Where the config file stands, if anything that it names is on this machine."""
        local = any(source.directory for source in self.plan.sources)
        local = local or any(expert.calibration for expert in self.config.experts)
        return str(self.config.folder) if self.config.folder and local else None

    @property
    def base(self) -> Donor:
        """The base model."""
        return self.body.base


def prepare(config: MergeConfig, options: Options, out: Path | None = None) -> Prepared:
    """Open the models by their headers, check everything, and lay the plan.

    `out` is checked too if given.

    Raises:
        InputError: with every problem of the config, the models and the output directory.
    """
    return _Preparation(config, options).run(out)


class _Preparation:
    def __init__(self, config: MergeConfig, options: Options):
        self.config, self.options = config, options
        self.findings = Findings()
        self.opener = Opener(self.findings, config.folder, options.cache_dir)

    def run(self, out: Path | None) -> Prepared:
        config, options, findings = self.config, self.options, self.findings
        check_values(config, findings)
        gate = self._gate_mode()
        settings = self._settings(gate)
        base = self.opener.donor(config.base_model, config.where("base_model"), "base")
        donors = self._donors()
        architecture = self._architecture(base)
        check_dtype(config, findings)
        own_card = read_own(options.card, findings) if options.card else ""
        self._check_device(gate)
        self._check_ray()
        encoder, prompts = self._prompts(gate, settings, base, donors)
        for donor in donors:
            if base and donor:
                compare(
                    base,
                    donor,
                    donor.where,
                    findings,
                    options.allow_crimes,
                    attention=config.body == "average",
                    runs="experts" in gate.USES if gate else False,
                )
        if base is None or architecture is None or gate is None:
            self._check_output(out, None, ())
            findings.refuse()
            raise AssertionError("unreachable")
        self._note_what_has_no_effect(gate, base, donors)
        if "experts" in gate.USES and any(donors):
            self._check_room_for([donor for donor in donors if donor], settings)
        if findings.problems:  # tensors are named from a config that is not trusted yet
            self._check_output(out, None, ())
            findings.refuse()
        there = [donor for donor in donors if donor]
        body = self._body(base, there)
        plan = lay_out(
            config,
            options,
            architecture,
            body,
            there,
            self.opener.opened.values(),
            findings,
            uses=gate.USES,
            gate_inputs=self._gate_inputs(gate, settings, prompts),
        )
        carried = output.carried_files(base.model.directory, options.copy_tokenizer)
        output.check_carried(base.model.directory, carried, base.where, findings)
        self._check_output(out, plan, carried)
        findings.refuse()
        checkpoints = {ref.text: opened for ref, opened in self.opener.opened.items()}
        return Prepared(
            config=config,
            plan=plan,
            body=body,
            donors=tuple(there),
            checkpoints=checkpoints,
            gate=gate,
            settings=settings,
            encoder=encoder,
            prompts=prompts,
            carried=carried,
            notes=tuple(findings.notes),
            own_card=own_card,
        )

    def _gate_mode(self) -> GateMode | None:
        mode = self.config.mode
        if mode in gates.names():
            return gates.find(mode)
        where = self.config.where("gate.mode" if "mode" in self.config.gate else "gate_mode")
        self.findings.problem(where, f"{mode!r} is no gate mode", nearest(mode, gates.names()))
        return None

    def _settings(self, gate: GateMode | None) -> Any:
        """The gate mode's own options as it declares them; None where it has none."""
        config, findings = self.config, self.findings
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

    def _body(self, base: Donor, donors: list[Donor]) -> Body:
        if self.config.body == "base":
            return Body(base)
        weights = [expert.body_weight for expert in self.config.experts]
        agree = [same_vocabulary(base, donor) for donor in donors]
        if not all(agree):
            name = donors[agree.index(False)].name
            what = f"{name} has another vocabulary, or another head on it"
            self.findings.note(f"body: embeddings and head are the base's: {what}")
        total = sum(weights)
        return Body(base, tuple(donors), tuple(w / total for w in weights), all(agree))

    def _donors(self) -> list[Donor | None]:
        donors: list[Donor | None] = []
        taken = {expert.name for expert in self.config.experts}
        for index, expert in enumerate(self.config.experts):
            where = self.config.where(f"experts[{index}].source_model")
            donor = self.opener.donor(expert.source_model, where, expert.name)
            if donor:
                name, number = donor.name, 2
                while name in taken and not expert.name:
                    name, number = f"{donor.name}-{number}", number + 1
                taken.add(name)
                donor = Donor(donor.where, name, donor.model, donor.adapter)
            donors.append(donor)
        return donors

    def _architecture(self, base: Donor | None) -> Architecture | None:
        config, findings = self.config, self.findings
        name = config.architecture or "mixtral"
        if name.lower() not in architectures.names():
            findings.problem(
                config.where("architecture"),
                f"{name!r} is no architecture that moemerge writes",
                nearest(name, architectures.names()),
            )
            return None
        architecture = architectures.find(name.lower())
        if config.shared_experts and not architecture.SHARED_EXPERTS:
            findings.problem(
                config.where("shared_experts"),
                f"a {name} has no shared experts",
                "remove them, or make them ordinary experts",
            )
        if base:
            family = str(base.model.config.get("model_type"))
            if family not in architecture.FAMILIES:
                findings.problem(
                    base.where,
                    f"a {name} cannot be made of a {family!r} model",
                    f"use a base model of type {' or '.join(architecture.FAMILIES)}",
                )
                return None
            for what, fix in architecture.refusals(base.model.config):
                findings.problem(base.where, what, fix)
            for line in architecture.caveats(base.model.config):
                findings.note(line)
        return architecture

    def _check_device(self, gate: GateMode | None) -> None:
        name = self.options.device
        if gate is None or "model" not in gate.USES or name in ("auto", "cpu"):
            return
        import torch

        kind, _, number = name.partition(":")
        there = (
            int(number or 0) < torch.cuda.device_count()
            if kind == "cuda"
            else torch.backends.mps.is_available()
        )
        if not there:
            flag = self.options.flags["device"]
            self.findings.problem(flag, f"there is no {name} device here", "use --device cpu")

    def _check_ray(self) -> None:
        if self.options.ray and importlib.util.find_spec("ray") is None:
            self.findings.problem("--ray", "Ray is not installed", "pip install 'moemerge[ray]'")

    def _prompts(
        self,
        gate: GateMode | None,
        settings: Any,
        base: Donor | None,
        donors: list[Donor | None],
    ) -> tuple[Encoder | None, tuple[ExpertPrompts, ...]]:
        config, findings = self.config, self.findings
        none = tuple(ExpertPrompts() for _ in config.experts)
        if gate is None or not {"prompts", "any prompts"} & gate.USES:
            if gate and any(e.positive_prompts or e.negative_prompts for e in config.experts):
                findings.note(f"prompts have no effect with gate_mode: {config.mode}")
            if gate and any(expert.calibration for expert in config.experts):
                findings.note(f"calibration has no effect with gate_mode: {config.mode}")
            return None, none
        if "prompts" in gate.USES:
            check_prompts(config, findings)
        documents = read_documents(config, findings)
        encoder = open_encoder(base, findings) if base else None
        if base is None or encoder is None:
            return None, none
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
            self._check_own_text(encoder, prompts, [base, *donors], settings)
        return encoder, prompts

    def _check_own_text(
        self,
        encoder: Encoder,
        prompts: tuple[ExpertPrompts, ...],
        models: list[Donor | None],
        settings: Any,
    ) -> None:
        """Record what is too long to be written and read, and beginnings that an expert lacks.

        The first of `models` is the base, the others are the experts.
        """
        begun = [expert.positive or (encoder.start(),) for expert in prompts]
        longest = max((len(prompt.ids) for of_one in begun for prompt in of_one), default=0)
        positions = [d.model.config.get("max_position_embeddings") for d in models if d]
        most = min((limit for limit in positions if isinstance(limit, int)), default=2**63)
        if settings and longest + settings.tokens > most:
            what = f"is {settings.tokens}, after prompts of up to {longest}; the models take {most}"
            fix = f"write at most {most - longest}, or shorten the prompts"
            self.findings.problem(self.config.where("gate.tokens"), what, fix)
        for of_one, donor in zip(begun, models[1:], strict=True):
            last = max((token for prompt in of_one for token in prompt.ids), default=0)
            known = donor.model.config.get("vocab_size") if donor else None
            if donor and isinstance(known, int) and last >= known:
                what = f"its text would begin with token {last}, and it embeds {known}"
                fix = "use other prompts, or gate_mode: ridge"
                self.findings.problem(donor.where, what, fix)

    def _gate_inputs(
        self, gate: GateMode, settings: Any, prompts: tuple[ExpertPrompts, ...]
    ) -> str:
        """A digest of what routers come from besides the sources' weights."""
        options = self.options
        bits = 4 if options.load_in_4bit else 8 if options.load_in_8bit else 16
        made_of = {
            "mode": self.config.mode,
            "settings": dataclasses.asdict(settings) if settings else None,
            "body": [self.config.body, *(expert.body_weight for expert in self.config.experts)],
            "prompts": [dataclasses.asdict(expert) for expert in prompts],
            "bits": bits if "model" in gate.USES else None,
            "seed": options.seed if "seed" in gate.USES else None,
            "base": self.config.base_model,
        }
        return digest_of(made_of)

    def _check_room_for(self, donors: list[Donor], settings: Any) -> None:
        """Say what it costs that every expert's own model runs; record one that has no room."""
        sizes = [model_bytes(donor.model.tensors.values()) for donor in donors]
        free = available_memory()
        largest, steps = max(sizes), settings.tokens if settings else 0
        streamed = sum(sizes) * steps
        if free is not None and largest > free and not self.options.lazy:
            self.findings.problem(
                donors[sizes.index(largest)].where,
                f"writes its own text, for which it needs {size(largest)} of memory; {size(free)} "
                "are free",
                f"pass --lazy to read it layer by layer for every token ({size(streamed)} in all), "
                f"or use gate_mode: ridge with prompts",
            )
        elif settings:
            read = streamed if self.options.lazy else sum(sizes)
            self.findings.note(
                f"gate_mode: {self.config.mode}: each of {len(donors)} experts writes "
                f"{settings.samples} texts of {settings.tokens} tokens, for which {size(read)} are "
                "read" + (f" ({size(streamed)} with --lazy)" if not self.options.lazy else "")
            )

    def _note_what_has_no_effect(
        self, gate: GateMode, base: Donor, donors: list[Donor | None]
    ) -> None:
        note, flags, mode = self.findings.note, self.options.flags, self.config.mode
        if "model" not in gate.USES:
            for option in ("lazy", "device", "load_in_4bit", "load_in_8bit"):
                if option in flags:
                    note(f"{flags[option]} has no effect: gate_mode: {mode} runs no model")
        noise = any(expert.noise_scale for expert in self.config.experts)
        if "seed" in flags and "seed" not in gate.USES and not noise:
            note(f"--seed has no effect: gate_mode: {mode} without noise_scale draws nothing")
        opened = self.opener.opened
        if "cache_dir" in flags and all(reference.directory for reference in opened):
            note("--cache-dir has no effect: no source is on the Hub")
        if self.options.stream and not any(one.absent for one in opened.values()):
            note("--stream has no effect: every source is on this disk")
        families = {d.model.config.get("model_type") for d in [base, *donors] if d}
        if self.options.allow_crimes and len(families) == 1:
            note("--allow-crimes has no effect: all models are of one family")
        same = {donor.identity for donor in donors if donor}
        alike = len(donors) > 1 and len(same) == 1 and not noise
        if alike and not self.options.untrained_ok:
            note("all experts are the same model: useful only if you train the result")

    def _check_output(self, out: Path | None, plan: Plan | None, carried: tuple[Path, ...]) -> None:
        if out is None:
            return
        directories = [opened.directory for opened in self.opener.opened.values()]
        output.check(out, plan, carried, directories, self.options, self.findings)
