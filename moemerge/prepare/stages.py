"""Prepares a merge: opens the models, checks everything, and makes the plan; reads no weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from moemerge import output
from moemerge.checkpoint import INSTALL, QUANTISED, Donor, Opener
from moemerge.config import Expert, MergeConfig, as_config, check_values
from moemerge.dense import Body
from moemerge.errors import Findings, InputError, flag, nearest
from moemerge.families import NO_HOST, RECORDS, record_of
from moemerge.files import BESIDE, GGUF_SUFFIX
from moemerge.fit import fit_of
from moemerge.gates import ExpertPrompts, Gate, check_device_is_here
from moemerge.gates import setup as gate_setup
from moemerge.options import Options
from moemerge.plan import Plan, recipe
from moemerge.prepare.choose import no_host
from moemerge.prepare.compatibility import compare
from moemerge.prepare.gguf.layout import as_gguf, gguf_host
from moemerge.prepare.layout import Layout, check_dtype, lay_out
from moemerge.prepare.likely_family import likely_family, read_as, unread
from moemerge.prepare.members import factor_of, parts_of, target_of
from moemerge.prepare.records import Chosen, Prepared
from moemerge.prepare.source_cards import read_own
from moemerge.reporting import Reporter, listener
from moemerge.split import Cutting, Split, check_split, read_text, split_of, with_slices
from moemerge.text import Encoder, Prompt, Vocabulary, shared_rows
from moemerge.text import build_vocabulary as vocabulary_choice


def make_plan(
    config: MergeConfig | str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> Prepared:
    """Plan a merge from the models' headers; nothing is written.

    Args:
        config: a `MergeConfig`, or the path of a YAML file.
        options: the options of the merge.
        reporter: receives progress; by default nobody does.
        progress: print progress instead, as `Console` does.

    Raises:
        InputError: with every problem of the config and its models.
    """
    return prepare(as_config(config), options or Options(), listener(reporter, progress))


def prepare(
    config: MergeConfig, options: Options, reporter: Reporter, out: Path | None = None
) -> Prepared:
    """Open the models' headers, check everything, and make the plan.

    `out` is checked too if it is given.

    Raises:
        InputError: with every problem of the config, the models and the output directory.
    """
    with reporter.progress("opening the models", 1, "config"):
        return _Preparation(config, options, out).run()


@dataclass(frozen=True)
class _Opened:
    """The models that a config names; None for each one with a recorded problem.

    `config` has one expert for each routed slice of its `split`.
    """

    config: MergeConfig
    gate: Gate | None
    split: Split | None
    base: Donor | None
    donors: list[Donor | None]
    shared: list[Donor | None]


class _Preparation:
    """The stages of a preparation: open, choose, plan. Each stage records all its problems."""

    def __init__(self, config: MergeConfig, options: Options, out: Path | None):
        self.config, self.options, self.out = config, options, out
        self.findings = Findings()
        self.opener = Opener(self.findings, config.folder, options.cache_dir)
        self.refused: set[str] = set()

    def run(self) -> Prepared:
        self.file = self._gguf_file()
        chosen = self._choose(self._open())
        if chosen is None:
            self._check_output(self.out, None, ())
            raise InputError(self.findings.problems)
        return self._plan(chosen)

    def _gguf_file(self) -> str:
        """The name of the GGUF file to write; empty if it is a directory."""
        name, options = self.out.name if self.out else "", self.options
        if name.endswith(GGUF_SUFFIX + BESIDE):
            if options.push_as_you_go:
                fix = "pass --push without it: the file is uploaded when it is whole"
                self.findings.problem("--push-as-you-go", "does not take GGUF files", fix)
            return name.removesuffix(BESIDE)
        asked = next((flag(n) for n in ("type", "exact", "imatrix") if getattr(options, n)), "")
        if asked and self.out:
            fix = f"write {name}{GGUF_SUFFIX}"
            self.findings.problem(asked, "is for GGUF files alone", fix)
        return f"model{GGUF_SUFFIX}" if asked else ""

    def _open(self) -> _Opened:
        """The gate mode, the split, and the headers of every model."""
        config, findings, said = self.config, self.findings, self.config.base_model
        check_values(config, findings)
        if config.family is not None and config.family not in RECORDS:
            what, fix = f"{config.family!r} is no known family", nearest(config.family, RECORDS)
            findings.problem(config.where("family"), what, fix)
        gate = gate_setup.gate_of(config, findings)
        base = self._dense(said, self.opener.donor(said, config.where("base_model"), "base"), True)
        split = split_of(config, findings)
        if split and base:
            check_split(config, split, base.model.config.get("intermediate_size"), findings)
        if gate:
            gate = gate_setup.with_split(config, gate, split, findings)
            gate = gate_setup.with_fit(config, gate)
            if gate.needs.body_pass:
                check_device_is_here(self.options, findings)
        if split:
            config = with_slices(config, split)
        donors = self._donors(config.experts, "experts")
        shared = self._donors(config.shared_experts, "shared_experts")
        return _Opened(config, gate, split, base, donors, shared)

    def _choose(self, opened: _Opened) -> Chosen | None:
        """The architecture, the vocabulary and the prompts; None after any problem."""
        config, gate, split, base = opened.config, opened.gate, opened.split, opened.base
        options, findings = self.options, self.findings
        every = [*opened.donors, *opened.shared]
        if base and self.file and config.architecture is None:
            config = replace(config, architecture=gguf_host(base.model.config))
        target = target_of(config, split, base, findings) if base else None
        check_dtype(config, findings)
        own_card = read_own(options.card, findings) if options.card else ""
        self._check_ray()
        vocabulary = vocabulary_choice.choose(config, base, every, findings) if base else None
        if vocabulary and vocabulary.written and not options.copy_tokenizer:
            findings.note("--no-copy-tokenizer: no file will have the added tokens")
        encoder: Encoder | None = None
        prompts: tuple[ExpertPrompts, ...] = ()
        if gate:
            gated = target is not None and target.mixture.gated
            asked = [*opened.donors, *opened.shared[:gated]]
            encoder, prompts = gate_setup.read_prompts(config, gate, vocabulary, asked, findings)
        cutting = self._cutting(config, split, gate, vocabulary)
        for donor in every:
            if base and donor:
                compare(
                    base,
                    donor,
                    donor.where,
                    findings,
                    options.allow_crimes,
                    attention=config.body != "base",
                    runs=gate is not None and gate.needs.expert_models,
                    vocabulary=vocabulary,
                )
        if base is None or vocabulary is None or target is None or gate is None:
            return None
        donors = tuple(donor for donor in opened.donors if donor)
        shared = tuple(donor for donor in opened.shared if donor)
        if gate.needs.expert_models and donors:
            gate_setup.check_room(config, options, donors, gate, findings)
        if findings.problems:  # tensor names come from a config that may be wrong
            return None
        return Chosen(
            config, gate, split, base, donors, shared, target, vocabulary, encoder, prompts,
            cutting, own_card,
        )  # fmt: skip

    def _plan(self, chosen: Chosen) -> Prepared:
        """The plan of every tensor; the output directory is checked for its files."""
        config, options, findings = chosen.config, self.options, self.findings
        gate, split, target, base = chosen.gate, chosen.split, chosen.target, chosen.base
        donors, shared, vocabulary = chosen.donors, chosen.shared, chosen.vocabulary
        self._note_what_has_no_effect(chosen)
        sees = target.architecture.READING.sees
        body = replace(self._body(config, base, donors), vocabulary=vocabulary, sees=sees)
        fit = fit_of(
            config, gate, body, donors, chosen.prompts, chosen.encoder, vocabulary, findings
        )
        body = fit.body(body) if fit else body
        made_of = gate_setup.digest_of_inputs(config, options, gate, chosen.prompts, chosen.cutting)
        experts = fit.donors(donors) if fit else donors
        parts = parts_of(config, split, target, body, experts, shared)
        layout = Layout(
            config, options, target, parts, donors, shared, gate.needs, made_of, bool(self.file)
        )
        weighing = options.imatrix and self.file
        imatrix = self.opener.imatrix(str(options.imatrix)) if weighing else None
        plan = lay_out(layout, self.opener.opened.values(), findings)
        if self.file and not findings.problems:
            opened = {ref.text: one for ref, one in self.opener.opened.items()}
            plan = as_gguf(layout, plan, self.file, opened, imatrix, findings)
        self._check_decoder(plan, gate)
        factor = factor_of(config, split, target)
        if plan.dtype != "F32" and factor & (factor - 1):
            findings.note(
                f"down projections are multiplied by {factor}, which rounds them in "
                f"{plan.config['dtype']}; a power of two, or dtype: float32, keeps them exact"
            )
        if options.copy_tokenizer and base.model.lost_its_tokenizer:
            what = f"{base.model.reference.text}: the Hub's cache has no tokenizer for it"
            fix = "download it where there is a network, or pass --no-copy-tokenizer"
            findings.problem(base.where, what, fix)
        copied = options.copy_tokenizer and not self.file
        carried = () if self.file else output.carried_files(vocabulary, copied)
        output.check_carried(vocabulary, carried, base.where, findings)
        beside = fit.nbytes(body, plan) if fit else 0
        self._check_output(self.out, plan, carried, beside)
        findings.refuse()
        return Prepared(
            **vars(chosen),
            plan=plan,
            body=body,
            fit=fit,
            checkpoints={ref.text: opened for ref, opened in self.opener.opened.items()},
            carried=carried,
            notes=tuple(findings.notes),
        )

    def _check_decoder(self, plan: Plan, gate: Gate) -> None:
        """Values in blocks are decoded by a package; copies need none."""
        opened = {one.reference.text: one for one in self.opener.opened.values()}
        sources = {name: one.tensors for name, one in opened.items()}
        blocks = any(at.encoding.name in QUANTISED for of in sources.values() for at in of.values())
        if not blocks or importlib.util.find_spec("gguf"):
            return
        reads = (
            gate.needs.body_pass
            or gate.needs.text
            or any(
                not (tensor.made or recipe.is_copy(tensor.recipe, tensor.dtype, sources))
                for tensor in plan.tensors
            )
        )
        if reads:
            what = "values of quantised GGUF files are to be read, and the gguf package is missing"
            self.findings.problem("GGUF", what, INSTALL)

    def _cutting(
        self,
        config: MergeConfig,
        split: Split | None,
        gate: Gate | None,
        vocabulary: Vocabulary | None,
    ) -> Cutting | None:
        """The inputs of the config's split; the text is read only if something depends on it."""
        if split is None:
            return None
        text: tuple[Prompt, ...] = ()
        if gate and gate.needs.text and split.text and vocabulary:
            text = read_text(config, split, vocabulary, self.findings)
        return Cutting(split, split.per_token(config), text)

    def _body(self, config: MergeConfig, base: Donor, donors: tuple[Donor, ...]) -> Body:
        if config.body == "base":
            return Body(base)
        weights = [expert.body_weight for expert in config.experts]
        shared = [shared_rows(base, donor) for donor in donors]
        for donor, found, weight in zip(donors, shared, weights, strict=True):
            if found.left and weight:
                self.findings.note_of(donor.name, found.left)
        total = sum(weights)
        rows = tuple(found.rows for found in shared)
        return Body(base, donors, tuple(w / total for w in weights), rows)

    def _donors(self, experts: tuple[Expert, ...], key: str) -> list[Donor | None]:
        donors: list[Donor | None] = []
        taken = {expert.name for expert in experts}
        for index, expert in enumerate(experts):
            where = self.config.where(f"{key}[{index}].source_model")
            source = expert.source_model
            donor = self._dense(source, self.opener.donor(source, where, expert.name))
            if donor:
                name, number = donor.name, 2
                while name in taken and not expert.name:
                    name, number = f"{donor.name}-{number}", number + 1
                taken.add(name)
                donor = Donor(donor.where, name, donor.model, donor.adapter)
            donors.append(donor)
        return donors

    def _dense(self, said: str, donor: Donor | None, is_base: bool = False) -> Donor | None:
        """The donor, if a mixture can be made of it; otherwise None, with one problem a model.

        An expert of an unknown family is kept, because it may be a known family with a new name.
        """
        if donor is None:
            return None
        donor, family = self._read_as(donor), donor.model.config.get("model_type")
        unknown = record_of(donor.model.config) is None and family not in NO_HOST
        likely = likely_family(donor.model) if unknown and is_base else ""
        what, fix = no_host(donor.model.config, known_alone=not is_base, likely=likely)
        if what and said not in self.refused:
            self.findings.problem(donor.where, what, fix)
            self.refused.add(said)
        return None if what else donor

    def _read_as(self, donor: Donor) -> Donor:
        """The donor as the config's `family`, if its own family is not known."""
        said, own = self.config.family, donor.model.config
        if not said or record_of(own) or own.get("model_type") in NO_HOST or said not in RECORDS:
            return donor
        try:
            made = read_as(donor, said)
            left = unread(made.model, made.model.config) if record_of(made.model.config) else ""
        except (ValueError, TypeError) as error:
            self.findings.problem(donor.where, f"is no {said}: {error}", "leave out family")
            return donor
        if left:
            what = f"has {left}, which a {said} does not have"
            self.findings.problem(donor.where, what, "leave out family")
        line = f"a {own.get('model_type')!r}, read as a {said}: unchecked"
        self.findings.note_of(donor.name, f"{line}; `moemerge plan --probe` compares")
        return made

    def _check_ray(self) -> None:
        if self.options.ray and importlib.util.find_spec("ray") is None:
            self.findings.problem("--ray", "Ray is not installed", "pip install 'moemerge[ray]'")

    def _note_what_has_no_effect(self, chosen: Chosen) -> None:
        config, needs, donors = chosen.config, chosen.gate.needs, chosen.donors
        idle, given, mode = self.findings.without_effect, self.options.chosen, config.mode
        if not needs.body_pass:
            for option in ("lazy", "device", "load_in_4bit", "load_in_8bit"):
                if option in given:
                    idle(flag(option), f": gate_mode: {mode} runs no model")
        noise = config.draws
        if "seed" in given and not needs.seed and not noise:
            without = "without noise_scale or renew"
            idle("--seed", f": gate_mode: {mode} {without} draws nothing")
        if self.options.statistics and not hasattr(chosen.gate.settings, "lambda_"):
            idle("--statistics", f": gate_mode: {mode} fits nothing to router inputs")
        opened = self.opener.opened
        if "cache_dir" in given and all(reference.directory for reference in opened):
            idle("--cache-dir", ": no source is on the Hub")
        if self.options.stream and not any(one.absent for one in opened.values()):
            idle("--stream", ": every source is on this disk")
        families = {d.model.config.get("model_type") for d in (chosen.base, *donors)}
        if self.options.allow_crimes and len(families) == 1:
            idle("--allow-crimes", ": all models are of one family")
        same = {donor.identity for donor in donors}
        alike = len(donors) > 1 and len(same) == 1 and not noise and not chosen.split
        if alike and not self.options.untrained_ok:
            self.findings.note(
                "all experts are the same model: useful only if you train the result"
            )

    def _check_output(
        self, out: Path | None, plan: Plan | None, carried: tuple[Path, ...], beside: int = 0
    ) -> None:
        if out is None:
            return
        directories = [opened.place for opened in self.opener.opened.values()]
        output.check(out, plan, carried, directories, self.options, self.findings, beside)
