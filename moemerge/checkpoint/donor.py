"""A donor: the model of `base_model` or `experts[i]`, with its adapter, if any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moemerge.checkpoint.lora import Adapter, open_adapter
from moemerge.checkpoint.not_a_model import SourceProblem
from moemerge.checkpoint.open import Checkpoint, open_checkpoint
from moemerge.checkpoint.reference import NoSource, Reference, parse_source
from moemerge.errors import Findings


@dataclass(frozen=True)
class Donor:
    """A dense model of the config, opened. `where` is its key in the config, for errors.

    Of `aligned` tensors, the computed checkpoint has the whole tensor (one name), or a change of it
    as two factors (two names).
    """

    where: str
    name: str
    model: Checkpoint
    adapter: Adapter | None = None
    aligned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def alone(self) -> Donor:
        """The model by itself, nothing of it aligned."""
        return replace(self, aligned={}) if self.aligned else self

    def obstacle(self, tensors: Iterable[str]) -> tuple[str, str, str] | None:
        """One of these tensors that the adapter changes in a way that cannot be reproduced: its
        name, what the adapter does, and the fix; None if there is none."""
        known = self.adapter.obstacles if self.adapter else {}
        return next(((name, *known[name]) for name in tensors if name in known), None)

    @property
    def identity(self) -> tuple[Path | str, ...]:
        """Equal for two donors exactly when they are the same weights."""
        adapter = (str(self.adapter.checkpoint.directory.resolve()),) if self.adapter else ()
        return (str(self.model.place.resolve()), *adapter)


@dataclass
class Opener:
    """Opens each source once, even if a config names it several times."""

    findings: Findings
    beside: Path | None = None
    cache_dir: str | Path | None = None
    opened: dict[Reference, Checkpoint] = field(default_factory=dict)
    vocabularies: dict[str, Path] = field(default_factory=dict)

    def donor(self, text: str, where: str, name: str = "") -> Donor | None:
        """Open the source `text`; on a problem, record it and return None."""
        try:
            reference, on_top = parse_source(text, self.beside)
        except NoSource as error:
            self.findings.problem(where, str(error), error.fix)
            return None
        opening = reference
        try:
            model = self._open(opening)
            if model.is_imatrix:
                raise SourceProblem("is an importance matrix", "pass it as --imatrix FILE")
            if model.is_adapter:
                raise SourceProblem("is a LoRA adapter", "write `base+adapter`")
            adapter = None
            if on_top:
                opening = on_top
                found = self._open(opening)
                if not found.is_adapter:
                    raise SourceProblem("is no adapter", "write `base+adapter`")
                adapter = open_adapter(found, model)
                self.opened[on_top] = adapter.checkpoint
                model = adapter.model(model)
                for note in adapter.notes:
                    self.findings.note(f"{on_top.text}: {note}")
        except SourceProblem as error:
            self.findings.problem(where, f"{opening.text}: {error.what}", error.fix)
            return None
        return Donor(where, name or (on_top or reference).short, model, adapter)

    def imatrix(self, text: str) -> Checkpoint | None:
        """Open an importance matrix; on a problem, record it and return None."""
        where, fix = "--imatrix", "name a GGUF file that llama-imatrix wrote"
        try:
            reference, _ = parse_source(text)
            opened = self._open(reference) if reference.directory else None
        except NoSource as error:
            self.findings.problem(where, str(error), fix)
        except SourceProblem as error:
            self.findings.problem(where, f"{text}: {error.what}", error.fix)
        else:
            if opened and opened.is_imatrix:
                return opened
            self.findings.problem(where, f"{text} is no importance matrix", fix)
        return None

    def _open(self, reference: Reference) -> Checkpoint:
        if reference not in self.opened:
            opened = self.opened[reference] = open_checkpoint(
                reference, self.cache_dir, self.vocabularies
            )
            for note in opened.notes:
                self.findings.note(f"{reference.text}: {note}")
        return self.opened[reference]
