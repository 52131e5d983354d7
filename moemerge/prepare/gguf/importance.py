"""Which row of an importance matrix weighs which matrix of a GGUF file."""

from __future__ import annotations

import dataclasses
import re

from moemerge.checkpoint import COUNTS, QUANTISED, SUMS, Checkpoint
from moemerge.errors import Findings
from moemerge.plan import Join, PlannedTensor, Read, Recipe, Values, Weighed, recipe

_EXPERTS = re.compile(r"(\.ffn_\w+)_exps(?=\.)")
_VOCABULARY = ("token_embd.weight", "output.weight")


class Importance:
    """Gives quantised tensors their importance; what does not fit becomes a problem.

    Experts may also take the row of the dense model's matrix.
    """

    def __init__(self, imatrix: Checkpoint, sources: recipe.Sources, findings: Findings):
        self.imatrix, self.sources, self.findings = imatrix, sources, findings
        self.used, self.unknown = 0, list[str]()

    def of(self, tensor: PlannedTensor) -> PlannedTensor:
        """The tensor, weighed where it is quantised anew and the file knows it."""
        if tensor.dtype not in QUANTISED or is_copied(tensor, self.sources):
            return tensor
        known = self.imatrix.tensors
        own = tensor.name if tensor.name + SUMS in known else _EXPERTS.sub(r"\1", tensor.name)
        if own + SUMS not in known:
            if tensor.name not in _VOCABULARY:
                self.unknown.append(tensor.name)
            return tensor
        shape, count = known[own + SUMS].shape, tensor.shape[0] if len(tensor.shape) == 3 else 1
        rows = shape[0] if len(shape) == 2 else 1
        if shape[-1] != tensor.shape[-1] or rows not in (1, count):
            if tensor.name not in _VOCABULARY:
                what = f"has {own} as {list(shape)}, the model as {list(tensor.shape)}"
                self.findings.problem("--imatrix", what, "use one of this model or of its base")
            return tensor
        self.used += 1
        text = self.imatrix.reference.text
        sums, counts = Read(text, own + SUMS), Read(text, own + COUNTS)
        if count == 1:
            return dataclasses.replace(tensor, recipe=Weighed(tensor.recipe, sums, counts, 0))
        assert isinstance(tensor.recipe, Join)
        parts = [
            part
            if recipe.is_copy(part, tensor.dtype, self.sources)
            else Weighed(part, sums, counts, at if rows > 1 else 0)
            for at, part in enumerate(tensor.recipe.of)
        ]
        return dataclasses.replace(tensor, recipe=Join(tuple(parts)))

    def say(self) -> None:
        """Note what the file does not know."""
        if self.unknown:
            more = f" (and {len(self.unknown) - 1} more)" if len(self.unknown) > 1 else ""
            what = f"{self.unknown[0]}{more}: not in {self.imatrix.reference.short}, so not weighed"
            self.findings.note(what)
        if not self.used:
            self.findings.without_effect("--imatrix", ": nothing that it knows is quantised anew")


def is_weighed(of: Recipe) -> bool:
    """Whether an importance matrix weighs the values; at least those of one expert."""
    if isinstance(of, Join):
        return any(map(is_weighed, of.of))
    return isinstance(of, Weighed)


def is_copied(tensor: PlannedTensor, sources: recipe.Sources) -> bool:
    """Whether the tensor's bytes are copies, or no source's."""
    if tensor.made or isinstance(tensor.recipe, Values):
        return True
    return recipe.is_copy(tensor.recipe, tensor.dtype, sources)
