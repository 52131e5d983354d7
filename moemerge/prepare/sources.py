"""Finds every tensor that a merge reads, and downloads its file if it is on the Hub."""

from __future__ import annotations

from collections.abc import Iterable

from moemerge import checkpoint
from moemerge.checkpoint import Donor, Location
from moemerge.options import RunOptions
from moemerge.plan import ROUTERS, recipe
from moemerge.prepare.records import Prepared
from moemerge.reporting import Reporter

Tensors = dict[str, dict[str, Location]]


def fetch(
    ready: Prepared, options: RunOptions, reporter: Reporter, whole: Iterable[Donor] = ()
) -> Tensors:
    """The tensors of every source, after the files that the plan reads were downloaded.

    Every file of the `whole` donors is downloaded, because these run as whole models. With
    --stream, files stay on the Hub and are read over the network.

    Raises:
        ReadError: a download failed, or the files are not those of the plan.
    """
    needed: dict[str, set[str]] = {text: set() for text in ready.checkpoints}
    for tensor in ready.plan.tensors:
        for read in recipe.reads(tensor.recipe):
            if read.source != ROUTERS:
                needed[read.source].add(read.tensor)
    runs = [ready.base] if ready.gate.needs.body_pass else []
    needs = ready.gate.needs
    runs += ready.donors if needs.expert_models or needs.own_passes else ()
    for donor in (*runs, *whole):
        for text, names in _of_donor(donor):
            needed[text] |= names
    found = {}
    for text, opened in ready.checkpoints.items():
        opened = checkpoint.fetch(opened, needed[text], options.cache_dir, reporter, options.stream)
        found[text] = opened.tensors
    return found


def _of_donor(donor: Donor) -> list[tuple[str, set[str]]]:
    """The checkpoints of a donor, its model and its adapter, with the names of their tensors."""
    models = [donor.model, *([donor.adapter.checkpoint] if donor.adapter else [])]
    return [(model.reference.text, set(model.tensors)) for model in models]
