"""One dense model's MLPs cut into slices: what a config says of it, and the neurons of each slice.

Legend: F intermediate neurons, D hidden size, N slices, T tokens of the given text.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moemerge import neurons, recipe
from moemerge.arithmetic import generator, load
from moemerge.body import Body
from moemerge.calibration import documents_of
from moemerge.config import Expert, MergeConfig, held
from moemerge.errors import Findings, nearest
from moemerge.options import Options
from moemerge.prompts import PIECE_TOKENS, Prompt, open_encoder
from moemerge.recipe import Sources
from moemerge.reporting import Reporter
from moemerge.router_inputs import Passage, layer_inputs
from moemerge.slots import DOWN, GATE, LAYER, UP, dense
from moemerge.vocabulary import Vocabulary

if TYPE_CHECKING:
    from moemerge.neurons import Matrix, Order

ORDER = LAYER + "mlp.order"
"""The name of a layer's order of neurons, among what is made of the sources."""

TEXT_TOKENS = 1 << 13
"""What is read of the text: a layer's activations on it are in memory at once."""

MOST_SLICES = 4096

TEXT = "split text"
"""In a gate mode's `USES`: the text that a split names."""

_SEES, _ACTIVATES = "mlp", "mlp.down_proj"


@dataclass(frozen=True)
class Split:
    """A config's `split:`. Of `slices` equal ones, the first `shared` are always on.

    `assign` says which neurons make up a slice, one of `neurons.ASSIGNMENTS`; None is coactivation
    where there is a `text` (a file, a directory or a dataset), else kmeans.
    """

    slices: int = 8
    shared: int = 0
    assign: str | None = None
    text: str | None = None

    @property
    def routed(self) -> int:
        """The slices that a router chooses from."""
        return self.slices - self.shared

    @property
    def assignment(self) -> str:
        """Which neurons make up a slice, wherever it is said."""
        return self.assign or ("coactivation" if self.text else "kmeans")

    @property
    def order(self) -> str:
        """The name of a layer's order of neurons; empty where they stand as they were."""
        return "" if self.assignment == "order" else ORDER

    @property
    def uses(self) -> frozenset[str]:
        """What the orders of neurons depend on, in the words of a gate mode's `USES`."""
        return {
            "order": frozenset[str](),
            "coactivation": frozenset({TEXT, "model", "seed"}),
        }.get(self.assignment, frozenset({"seed"}))

    def per_token(self, config: MergeConfig) -> int:
        """The routed slices that a token passes: if nothing is said, half of all are on."""
        return config.experts_per_token or max(1, self.slices // 2 - self.shared)

    def problems(self, inner: Any) -> Iterator[tuple[str, str, str]]:
        """What cannot be where MLPs have `inner` neurons: key, what, fix."""
        if not 2 <= self.slices <= MOST_SLICES:
            yield "slices", f"is {self.slices}", f"write a number from 2 to {MOST_SLICES}"
        elif isinstance(inner, int) and inner % self.slices:
            fits = ", ".join(str(n) for n in range(2, 65) if inner % n == 0)
            what = f"is {self.slices}, which does not divide the MLPs' {inner} neurons"
            yield "slices", what, f"write one of {fits}"
        if not 0 <= self.shared < self.slices:
            what = f"is {self.shared} of {self.slices} slices"
            yield "shared", what, "leave at least one for the router to choose"
        if self.assignment not in neurons.ASSIGNMENTS:
            fix = nearest(self.assignment, neurons.ASSIGNMENTS)
            yield "assign", f"{self.assign!r} is no assignment", fix
        if self.assignment == "coactivation" and not self.text:
            what = "is missing: co-activation is that of neurons on a text"
            yield "text", what, "name a text or jsonl file, or use assign: kmeans"


@dataclass
class Gate:
    """A gate mode, and what a split uses besides."""

    USES: frozenset[str]
    mode: Any

    def routers(self, task: Any) -> Any:
        """The gate mode's."""
        return self.mode.routers(task)


def of_config(config: MergeConfig, findings: Findings) -> Split | None:
    """A config's split, None where it has none; what is wrong with it alone is recorded."""
    if not config.split:
        return None
    hints, values, before = typing.get_type_hints(Split), {}, len(findings.problems)
    for key, value in config.split.items():
        where = config.where(f"split.{key}")
        if key in hints:
            values[key] = held(value, hints[key], where, findings)
        else:
            findings.problem(where, "is nothing that a split has", nearest(key, hints))
    for key, why in _at_odds(config):
        findings.problem(config.where(key), f"has no place beside split: {why}", "remove one")
    if len(findings.problems) > before:
        return None
    return Split(**values)


def _at_odds(config: MergeConfig) -> Iterator[tuple[str, str]]:
    """What else a config says that a split leaves no room for: key, why."""
    one = "the slices of the base model are all the experts"
    if config.experts:
        yield "experts", one
    if config.shared_experts:
        yield "shared_experts", "its own slices are, with `shared:`"
    if config.segments != 1:
        yield "segments", "write more slices"
    if config.body != "base":
        yield "body", one


def with_slices(config: MergeConfig, split: Split) -> MergeConfig:
    """The config with an expert for each routed slice, all of the base model."""
    count = max(1, min(split.routed, MOST_SLICES))
    names = [f"slice-{number}" for number in range(split.shared, split.shared + count)]
    experts = tuple(Expert(config.base_model, name=name) for name in names)
    return replace(config, experts=experts)


def check(
    config: MergeConfig, split: Split, inner: Any, uses: frozenset[str], findings: Findings
) -> None:
    """Record what cannot be of a split of MLPs of `inner` neurons; `uses` is its gate mode's."""
    for key, what, fix in split.problems(inner):
        findings.problem(config.where(f"split.{key}"), what, fix)
    per_token = config.experts_per_token
    if per_token is not None and split.routed > 0 and not 1 <= per_token <= split.routed:
        what = f"is {per_token}, and routers choose from {split.routed} slices"
        fix = f"write a number from 1 to {split.routed}"
        findings.problem(config.where("experts_per_token"), what, fix)
    if {"prompts", "any prompts"} & uses:
        what = f"{config.mode} routes by experts' prompts, and slices have none"
        fix = "use activation (with a split.text), random, uniform_random or zeros"
        findings.problem(config.where("gate_mode"), what, fix)
    if TEXT in uses and split.assignment != "coactivation" and not split.text:
        what = f"is missing, on which gate_mode: {config.mode} sees what slices are active"
        fix = "name a text or jsonl file, or use gate_mode: random or zeros"
        findings.problem(config.where("split.text"), what, fix)
    if split.text and TEXT not in uses | split.uses:
        findings.note("split.text has no effect: neither neurons nor routers depend on it")


def read_text(
    config: MergeConfig, split: Split, vocabulary: Vocabulary, findings: Findings
) -> tuple[Prompt, ...]:
    """The text in pieces, as the base model reads it; record one that it cannot read."""
    where = config.where("split.text")
    try:
        documents = documents_of(str(split.text), config.folder)
    except ValueError as error:
        fix = "name a UTF-8 text or jsonl file, a directory, or a dataset on the Hub"
        findings.problem(where, str(error), fix)
        return ()
    encoder = open_encoder(vocabulary, findings)
    if encoder is None:
        return ()
    model = vocabulary.speaker.model.config
    longest = min(PIECE_TOKENS, model.get("max_position_embeddings") or PIECE_TOKENS)
    pieces = encoder.pieces(documents, longest, TEXT_TOKENS)
    highest = max((token for piece in pieces for token in piece.ids), default=-1)
    if highest < 0:
        findings.problem(where, "holds no text", "name one that does")
    elif highest >= model["vocab_size"]:
        what = f"has token {highest}, the base model embeds {model['vocab_size']}"
        findings.problem(where, what, "use the tokenizer that the model came with")
    return tuple(Prompt(piece.ids, 0) for piece in pieces)  # what stands first is active too


@dataclass(frozen=True)
class SlicedLayer:
    """A layer on the text: its router's `inputs` (T, D), and the `energies` (T, N - shared) of its
    routed slices, each its neurons' squared contributions."""

    inputs: Matrix
    energies: Matrix


@dataclass(frozen=True)
class Cutting:
    """What a split is made from, once it is checked; `text` is empty where nothing reads one."""

    split: Split
    per_token: int
    text: tuple[Prompt, ...] = ()

    @property
    def active(self) -> int:
        """How many routed slices a token is to find; half where it passes them all anyway."""
        routed = self.split.routed
        return self.per_token if self.per_token < routed else max(1, routed // 2)

    def digest(self) -> dict[str, Any]:
        """What decides the orders of neurons, besides the sources and the seed."""
        text = [piece.ids for piece in self.text]
        return {**asdict(self.split), "text": text, "per_token": self.per_token}


@dataclass
class Cutter:
    """The orders of neurons, made layer by layer while the body reads the text, if it must."""

    cutting: Cutting
    body: Body
    sources: Sources
    options: Options
    reporter: Reporter
    orders: dict[str, Order] = field(default_factory=dict)

    def layers(self) -> Iterator[SlicedLayer]:
        """What a router is fitted to, layer by layer; each layer's order is made with it."""
        import numpy as np

        split = self.cutting.split
        passages = [Passage(piece) for piece in self.cutting.text]
        modules = (_SEES, _ACTIVATES)
        read = layer_inputs(modules, self.body, self.sources, passages, self.options, self.reporter)
        for layer, seen in enumerate(read):
            inputs, strengths = (_joined(seen.pop(module)) for module in modules)
            strengths = np.abs(strengths) * _lengths(self._weights(layer, DOWN), 0)
            parts = np.split(self._order(layer, strengths), split.slices)[split.shared :]
            energies = [np.square(strengths[:, part]).sum(axis=1) for part in parts]
            yield SlicedLayer(inputs, np.stack(energies, axis=1))

    def finish(self) -> dict[str, Order]:
        """Every layer's order by its name; those that no router asked for are made now."""
        count = self.body.base.model.config["num_hidden_layers"]
        if len(self.orders) < count and self.cutting.split.assignment == "coactivation":
            for _ in self.layers():
                pass
        for layer in range(len(self.orders), count):
            self._order(layer, None)
        return self.orders

    def _order(self, layer: int, strengths: Matrix | None) -> Order:
        split, name = self.cutting.split, ORDER.format(layer=layer)
        count = self.body.base.model.config["intermediate_size"]
        random = generator(self.options.seed, name, 0)
        if split.assignment == "order":
            made = neurons.in_order(count)
        elif split.assignment == "random":
            made = neurons.at_random(count, random)
        elif split.assignment == "kmeans":
            gate = self._weights(layer, GATE)
            sizes = _lengths(gate, 1) * _lengths(self._weights(layer, UP), 1)
            sizes *= _lengths(self._weights(layer, DOWN), 0)
            made = neurons.by_weights(gate, sizes, split.slices, split.shared, random)
        else:
            assert strengths is not None
            active = self.cutting.active
            made = neurons.by_activation(strengths, split.slices, split.shared, active, random)
        self.orders[name] = made
        return made

    def _weights(self, layer: int, which: str) -> Matrix:
        name = dense(layer, which)
        made = self.body.recipe(name)
        shape = recipe.shape_of(made, self.sources)
        found: Matrix = load(name, shape, made, self.sources).float().numpy()
        return found


def _joined(passages: list[Matrix]) -> Matrix:
    """(T, ...) of all passages; the list is emptied, so that both are not in memory for long."""
    import numpy as np

    whole = np.concatenate(passages)
    passages.clear()
    return whole


def _lengths(weights: Matrix, axis: int) -> Matrix:
    """The norms along an axis."""
    import numpy as np

    lengths: Matrix = np.linalg.norm(weights, axis=axis)
    return lengths
