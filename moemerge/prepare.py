"""A config and its models to a checked `Plan`: every problem found, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moemerge import architectures, gates, output, recipe
from moemerge.architectures import Architecture, Slot
from moemerge.checkpoint import FLOATS, Checkpoint, Donor, Opener
from moemerge.compare import compare
from moemerge.config import MergeConfig
from moemerge.errors import Findings, nearest
from moemerge.gates import ExpertPrompts, GateMode
from moemerge.options import Options, ShardSize
from moemerge.plan import Plan, PlannedTensor, Source, make_shards, router_tensor
from moemerge.prompts import Encoder, Prompt

_DTYPES = {**FLOATS, "bf16": "BF16", "fp16": "F16", "fp32": "F32", "half": "F16", "float": "F32"}
_LONG = {short: long for long, short in FLOATS.items()}


@dataclass(frozen=True)
class Prepared:
    """A merge that can begin: its plan, its opened models, and what a person should know."""

    plan: Plan
    base: Donor
    checkpoints: dict[str, Checkpoint]
    gate: GateMode
    prompts: tuple[ExpertPrompts, ...]
    carried: tuple[Path, ...]
    notes: tuple[str, ...]


def prepare(
    config: MergeConfig, options: Options, out: Path | None = None, beside: Path | None = None
) -> Prepared:
    """Open the models by their headers, check everything, and lay the plan.

    `out` is checked too if given; `beside` is the folder that relative sources may stand in.

    Raises:
        InputError: with every problem of the config, the models and the output directory.
    """
    return _Preparation(config, options, beside).run(out)


class _Preparation:
    def __init__(self, config: MergeConfig, options: Options, beside: Path | None):
        self.config, self.options = config, options
        self.findings = Findings()
        self.opener = Opener(self.findings, beside, options.cache_dir)

    def run(self, out: Path | None) -> Prepared:
        config, options, findings = self.config, self.options, self.findings
        gate = self._gate_mode()
        base = self.opener.donor(config.base_model, config.where("base_model"), "base")
        donors = self._donors()
        architecture = self._architecture(base)
        self._check_dtype()
        self._check_device(gate)
        prompts = self._prompts(gate, base)
        if base is None or architecture is None or gate is None:
            findings.refuse()
            raise AssertionError("unreachable")
        for donor in filter(None, donors):
            compare(base, donor, donor.where, findings, options.allow_crimes)
        self._note_what_has_no_effect(gate, base, donors)
        if findings.problems:  # tensors are named from a config that is not trusted yet
            self._check_output(out, None, base)
            findings.refuse()
        plan = self._plan(architecture, base, [donor for donor in donors if donor])
        carried = output.carried_files(base.model.directory, options.copy_tokenizer)
        self._check_output(out, plan, base)
        findings.refuse()
        checkpoints = {ref.text: opened for ref, opened in self.opener.opened.items()}
        return Prepared(plan, base, checkpoints, gate, prompts, carried, tuple(findings.notes))

    def _gate_mode(self) -> GateMode | None:
        mode = self.config.gate_mode
        if mode in gates.names():
            return gates.find(mode)
        fix = nearest(mode, gates.names())
        self.findings.problem(self.config.where("gate_mode"), f"{mode!r} is no gate mode", fix)
        return None

    def _donors(self) -> list[Donor | None]:
        donors: list[Donor | None] = []
        taken: set[str] = set()
        for index, expert in enumerate(self.config.experts):
            where = self.config.where(f"experts[{index}].source_model")
            donor = self.opener.donor(expert.source_model, where, expert.name)
            if donor:
                name, number = donor.name, 2
                while name in taken:
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

    def _check_dtype(self) -> None:
        dtype = self.config.dtype
        if dtype is not None and dtype.removeprefix("torch.") not in _DTYPES:
            self.findings.problem(
                self.config.where("dtype"),
                f"{dtype!r} is no dtype a merge can write",
                nearest(dtype, FLOATS),
            )

    def _check_device(self, gate: GateMode | None) -> None:
        name = self.options.device
        if gate is None or "model" not in gate.USES or name not in ("cuda", "mps"):
            return
        import torch

        there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if not there[name]():
            self.findings.problem("--device", f"there is no {name} device here", "use --device cpu")

    def _prompts(self, gate: GateMode | None, base: Donor | None) -> tuple[ExpertPrompts, ...]:
        config, findings = self.config, self.findings
        empty = tuple(ExpertPrompts((), ()) for _ in config.experts)
        if gate is None:
            return empty
        if "prompts" not in gate.USES:
            if any(e.positive_prompts or e.negative_prompts for e in config.experts):
                findings.note(f"prompts have no effect with gate_mode: {config.gate_mode}")
            return empty
        self._check_prompts()
        if base is None:
            return empty
        try:
            encoder = Encoder(base.model.directory)
        except ValueError as error:
            fix = "add its tokenizer.json, or use gate_mode: random"
            findings.problem(base.where, f"prompts cannot be read: {error}", fix)
            return empty
        return tuple(
            ExpertPrompts(
                tuple(self._encode(encoder, index, "positive_prompts", base)),
                tuple(self._encode(encoder, index, "negative_prompts", base)),
            )
            for index in range(len(config.experts))
        )

    def _check_prompts(self) -> None:
        config, findings = self.config, self.findings
        seen: dict[tuple[frozenset[str], frozenset[str]], int] = {}
        for index, expert in enumerate(config.experts):
            where = config.where(f"experts[{index}]")
            both = (frozenset(expert.positive_prompts), frozenset(expert.negative_prompts))
            if not expert.positive_prompts:
                findings.problem(
                    where,
                    f"has no positive_prompts, which gate_mode: {config.gate_mode} needs",
                    "add some, or use gate_mode: random and train the routers afterwards",
                )
            elif both[0] == both[1]:
                findings.problem(
                    where, "its positive and negative prompts are the same", "change one of them"
                )
            elif both in seen:
                findings.problem(
                    where,
                    f"has the same prompts as experts[{seen[both]}], so neither can be told apart",
                    "give each expert its own, or use gate_mode: random",
                )
            seen.setdefault(both, index)

    def _encode(self, encoder: Encoder, index: int, kind: str, base: Donor) -> Iterator[Prompt]:
        longest = base.model.config.get("max_position_embeddings")
        for number, text in enumerate(getattr(self.config.experts[index], kind)):
            prompt = encoder.encode(text)
            where = self.config.where(f"experts[{index}].{kind}[{number}]")
            if len(prompt.ids) == prompt.own:
                self.findings.problem(where, "has no tokens", "write another prompt")
            elif isinstance(longest, int) and len(prompt.ids) > longest:
                what = f"is {len(prompt.ids)} tokens long, the base model takes {longest}"
                self.findings.problem(where, what, "shorten it")
            elif max(prompt.ids) >= base.model.config.get("vocab_size", 0):
                what = f"has token {max(prompt.ids)}, the base model embeds fewer"
                self.findings.problem(where, what, "use the tokenizer that the model came with")
            else:
                yield prompt

    def _note_what_has_no_effect(
        self, gate: GateMode, base: Donor, donors: list[Donor | None]
    ) -> None:
        note, given, mode = self.findings.note, self.options.given, self.config.gate_mode
        if "model" not in gate.USES:
            for option in ("lazy", "device", "load_in_4bit", "load_in_8bit"):
                if option in given:
                    flag = option.replace("_", "-")
                    note(f"--{flag} has no effect: gate_mode: {mode} runs no model")
        noise = any(expert.noise_scale for expert in self.config.experts)
        if "seed" in given and "seed" not in gate.USES and not noise:
            note(f"--seed has no effect: gate_mode: {mode} without noise_scale draws nothing")
        opened = self.opener.opened
        if "cache_dir" in given and all(reference.directory for reference in opened):
            note("--cache-dir has no effect: no source is on the Hub")
        families = {d.model.config.get("model_type") for d in [base, *donors] if d}
        if self.options.allow_crimes and len(families) == 1:
            note("--allow-crimes has no effect: all models are of one family")
        same = {donor.identity for donor in donors if donor}
        alike = len(donors) > 1 and len(same) == 1 and not noise
        if alike and not self.options.untrained_ok:
            note("all experts are the same model: useful only if you train the result")

    def _plan(self, architecture: Architecture, base: Donor, donors: list[Donor]) -> Plan:
        config, model = self.config, base.model.config
        count = len(config.experts)
        per_token = config.experts_per_token or min(2, count)
        slots = list(architecture.slots(model, count))
        dtype = self._dtype(base, slots)
        tensors = [self._tensor(slot, base, donors, dtype) for slot in slots if slot.source]
        routers = [
            router_tensor(slot.name, *slot.shape, dtype) for slot in slots if not slot.source
        ]
        self._note_unused(base, donors, tensors)
        sources = tuple(
            Source(
                reference=reference.text,
                fingerprint=opened.fingerprint,
                directory=str(opened.directory) if reference.directory else None,
                repo=reference.repo or None,
                commit=opened.commit,
            )
            for reference, opened in self.opener.opened.items()
        )
        itemsize = 4 if dtype == "F32" else 2
        limit = ShardSize.parse(self.options.shard_size).max_bytes(itemsize)
        return Plan(
            architecture=config.architecture or "mixtral",
            gate_mode=config.gate_mode,
            seed=self.options.seed,
            dtype=dtype,
            experts=tuple(donor.name for donor in donors),
            experts_per_token=per_token,
            config=architecture.output_config(model, count, per_token, _LONG[dtype]),
            sources=sources,
            shards=make_shards(routers, tensors, limit, sources),
        )

    def _dtype(self, base: Donor, slots: list[Slot]) -> str:
        """The config's dtype, else that of the base model's first tensor."""
        if self.config.dtype:
            return _DTYPES[self.config.dtype.removeprefix("torch.")]
        first = base.model.tensors.get(slots[0].source or "")
        if first and first.dtype in _LONG:
            return first.dtype
        return "BF16"

    def _tensor(self, slot: Slot, base: Donor, donors: list[Donor], dtype: str) -> PlannedTensor:
        donor = base if slot.expert is None else donors[slot.expert]
        made = recipe.of_donor(donor, slot.source or "")
        self._check_source(slot, donor, next(recipe.reads(made)))
        if slot.expert is not None:
            expert = self.config.experts[slot.expert]
            if expert.noise_scale:
                made = recipe.Noise(made, expert.noise_scale, self.options.seed)
            if slot.residual and expert.residual_scale != 1:
                made = recipe.Scale(made, expert.residual_scale)
        return PlannedTensor(slot.name, slot.shape, dtype, made, slot.expert)

    def _check_source(self, slot: Slot, donor: Donor, read: recipe.Read) -> None:
        opened = {ref.text: checkpoint for ref, checkpoint in self.opener.opened.items()}
        location = opened[read.source].tensors.get(read.tensor)
        layers = read.tensor.split(".layers.")[0] if ".layers." in read.tensor else None
        problem = self.findings.problem
        if location is None:
            fix = "download or save the model again"
            if (
                layers
                and self.findings.problems
                and self.findings.problems[-1].where == donor.where
            ):
                return
            problem(donor.where, f"{donor.name} has no tensor {read.tensor!r}", fix)
        elif location.shape != slot.shape:
            what = f"{read.tensor} is {list(location.shape)}, its config says {list(slot.shape)}"
            problem(donor.where, what, "use weights and config.json of one and the same model")
        elif location.dtype not in ("F64", *_LONG):
            what = f"{read.tensor} holds {location.dtype} values: it is quantised"
            problem(donor.where, what, "merge from the original weights")

    def _note_unused(self, base: Donor, donors: list[Donor], tensors: list[PlannedTensor]) -> None:
        used = {read for tensor in tensors for read in recipe.reads(tensor.recipe)}
        for donor in donors:
            if donor.adapter is None:
                continue
            text = donor.adapter.checkpoint.reference.text
            names = {delta.down for delta in donor.adapter.deltas.values()}
            names |= set(donor.adapter.replacements.values())
            unused = [name for name in names if recipe.Read(text, name) not in used]
            if unused:
                self.findings.note(
                    f"{donor.name}: {len(unused)} of the adapter's {len(names)} changes are not "
                    "used (attention, norms, embeddings): those parts are the base model's"
                )
        read = {r.tensor for r in used if r.source == base.model.reference.text}
        stray = sorted(
            name
            for name in base.model.tensors.keys() - read
            if not name.endswith("inv_freq") and ".mlp." not in name
        )
        if any(name.endswith(".bias") for name in stray):
            self.findings.problem(
                base.where,
                f"holds {stray[0]!r}, a bias that the output has no place for",
                "use a model without biases",
            )
        elif stray and not (stray == ["lm_head.weight"] and not self._untied(base)):
            more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
            self.findings.note(f"base: {stray[0]!r}{more} is not used")

    def _untied(self, base: Donor) -> bool:
        return not base.model.config.get("tie_word_embeddings")

    def _check_output(self, out: Path | None, plan: Plan | None, base: Donor) -> None:
        if out is None:
            return
        directories = [opened.directory for opened in self.opener.opened.values()]
        files = (
            output.file_names(
                plan, output.carried_files(base.model.directory, self.options.copy_tokenizer)
            )
            if plan
            else ()
        )
        needed = plan.nbytes if plan else 0
        output.check(out, files, needed, directories, self.options.overwrite, self.findings)
