"""The sources of a mixture, each as a model in transformers: base, experts, and their average."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moemerge.architectures import dense_shapes
from moemerge.config import parse_config
from moemerge.dense import Body, available_memory, compute_dtype, pick_device, whole_model
from moemerge.errors import InputError
from moemerge.families import EMBEDDING
from moemerge.options import Options, RunOptions
from moemerge.output import MANIFEST_FILE, Manifest, check_sources
from moemerge.plan import Recipe, recipe
from moemerge.prepare import Prepared, Tensors, fetch, prepare
from moemerge.reporting import Reporter, size
from moemerge.text import other_ids, shared_rows


@dataclass(frozen=True)
class Source:
    """A dense model that the mixture was made of; `kind` is `base`, `expert` or `average`.

    `others` are ids that mean another token in it than in the mixture; it cannot read text with
    them. `directory` holds its own tokenizer and generation config. Equal experts have the same
    `identity`.
    """

    kind: str
    name: str
    config: dict[str, Any]
    recipe_of: Callable[[str], Recipe]
    tensors: Tensors
    directory: Path | None = None
    others: frozenset[int] = frozenset()
    identity: tuple[object, ...] = ()

    def why_not(self, ids: Collection[int]) -> str:
        """Why it cannot read a text with these token ids of the mixture; empty if it can."""
        if others := self.others.intersection(ids):
            return f"{len(others)} of the tokens have other ids in it, or none"
        last = max(ids, default=0)
        return f"it does not know token {last}" if last >= self.config["vocab_size"] else ""

    def model(self, options: RunOptions, reporter: Reporter) -> Any:
        """The model in transformers; layer by layer if memory is too small, or `options.lazy`."""
        device = pick_device(options.device)
        dtype = compute_dtype(self.recipe_of(EMBEDDING), self.tensors, device)
        needed = dtype.itemsize * sum(map(math.prod, dense_shapes(self.config).values()))
        free = available_memory()
        if not options.lazy and free is not None and needed > free:
            told = f"{size(needed)} of weights, {size(free)} of memory free"
            reporter.say(f"{self.name}: {told}, so it is read layer by layer")
            options = dataclasses.replace(options, lazy=True)
        with reporter.progress(f"loading {self.name}", 1, "model"):
            return whole_model(self.config, self.recipe_of, self.tensors, options)


def sources_of(
    manifest: Manifest | None, options: Options, reporter: Reporter, out: Path
) -> list[Source]:
    """The base, each expert and the experts' average of the mixture in `out`; only the base of a
    split.

    If they are not known or not available, the list is empty, and a note says why.
    """
    if manifest is None or not manifest.config:
        return []
    try:
        ready = prepared(manifest, options, reporter, out)
    except InputError as error:
        reporter.say(f"the sources are not compared: {error.problems[0].typed}")
        return []
    vocabulary, donors = ready.vocabulary, ready.donors
    tensors = fetch(ready, options, reporter, (ready.base, *donors))
    base = Body(ready.base, vocabulary=vocabulary)
    own = ready.base.model.directory
    where = own if own == vocabulary.directory and not vocabulary.written else None
    found = [Source("base", "base", base.config, base.recipe, tensors, where)]
    if ready.cutting:
        return found
    for donor in donors:
        if obstacle := donor.obstacle(dense_shapes(donor.model.config)):
            reporter.say(f"{donor.name} is not run alone: {obstacle[0]}: {obstacle[1]}")
            continue
        of, others = donor.model, frozenset[int]()
        made = partial(recipe.of_donor, donor)
        try:
            others = other_ids(vocabulary, donor)
        except ValueError as error:
            reporter.say(f"{donor.name}: its token ids are taken to be the mixture's: {error}")
        found.append(
            Source(
                "expert", donor.name, of.config, made, tensors, of.directory, others,
                donor.identity,
            )
        )  # fmt: skip
    if any(donor.obstacle(dense_shapes(donor.model.config)) for donor in donors):
        return found
    rows = tuple(shared_rows(ready.base, one).rows for one in donors)
    average = Body(ready.base, donors, (1 / len(donors),) * len(donors), rows, vocabulary)
    return [*found, Source("average", "average", average.config, average.recipe, tensors)]


def prepared(manifest: Manifest, options: Options, reporter: Reporter, out: Path) -> Prepared:
    """The merge of the manifest in `out`, prepared again from its sources.

    Raises:
        InputError: a source has changed, or is not available.
    """
    folder = Path(manifest.folder) if manifest.folder else None
    config = dataclasses.replace(
        parse_config(manifest.config, str(out / MANIFEST_FILE)), folder=folder
    )
    # what was merged may be looked at
    options = dataclasses.replace(options, seed=manifest.plan.seed, allow_crimes=True)
    ready = prepare(config, options, reporter)
    check_sources(manifest.plan, ready.checkpoints, out)
    return ready
