"""Every tensor that a merge reads, by source, downloaded or read over the network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moemerge import checkpoint
from moemerge.checkpoint import Donor, Location
from moemerge.options import RunOptions
from moemerge.plan import ROUTERS, recipe
from moemerge.prepare.stages import Prepared
from moemerge.reporting import Reporter

if TYPE_CHECKING:
    pass


Tensors = dict[str, dict[str, Location]]


def fetch(
    ready: Prepared, options: RunOptions, reporter: Reporter, whole: Iterable[Donor] = ()
) -> Tensors:
    """Every source's tensors, with the files that the plan reads from the Hub downloaded.

    Those that are to run as the models that they are come `whole`.
    """
    needed: dict[str, set[str]] = {text: set() for text in ready.checkpoints}
    for tensor in ready.plan.tensors:
        for read in recipe.reads(tensor.recipe):
            if read.source != ROUTERS:
                needed[read.source].add(read.tensor)
    runs = [ready.base] if ready.gate.needs.body_pass else []
    runs += ready.donors if ready.gate.needs.expert_models else ()
    for donor in (*runs, *whole):
        for text, names in _of_donor(donor):
            needed[text] |= names
    found = {}
    for text, opened in ready.checkpoints.items():
        files = {opened.tensors[name].file.name for name in needed[text]} & set(opened.absent)
        if options.stream and files and not any(name.endswith(".bin") for name in files):
            opened = checkpoint.streamed(opened, needed[text])
        else:
            if files:
                reporter.say(f"{text}: downloading what is needed into the Hub's cache")
            opened = checkpoint.fetch(opened, needed[text], options.cache_dir, reporter)
        found[text] = opened.tensors
    return found


def _of_donor(donor: Donor) -> list[tuple[str, set[str]]]:
    """The checkpoints that a donor's tensors are read from, and all that they hold."""
    models = [donor.model, *([donor.adapter.checkpoint] if donor.adapter else [])]
    return [(model.reference.text, set(model.tensors)) for model in models]
