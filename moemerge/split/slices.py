"""The neurons of each slice, layer by layer, while the dense model reads the text.

Legend: F intermediate neurons, D hidden size, N slices, T tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from moemerge.config import MergeConfig
from moemerge.dense import ROUTER, Body, Passage, layer_inputs
from moemerge.errors import Findings
from moemerge.families import DOWN, GATE, UP, dense
from moemerge.options import RunOptions
from moemerge.plan import Sources, generator, load, recipe
from moemerge.reporting import Reporter
from moemerge.split import neurons
from moemerge.text import PIECE_TOKENS, Prompt, Vocabulary, documents_of, open_encoder

if TYPE_CHECKING:
    from moemerge.split.neurons import Matrix, Order
from moemerge.split.config import ORDER, Split

TEXT_TOKENS = 1 << 13
"""The most tokens of the text that are read: all activations of a layer are in memory at once."""

_SEES, _ACTIVATES = ROUTER, "mlp.down_proj"


def read_text(
    config: MergeConfig, split: Split, vocabulary: Vocabulary, findings: Findings
) -> tuple[Prompt, ...]:
    """The text of `split.text` in pieces of tokens; a text that cannot be read is recorded."""
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
    # A BOS token counts as well, because the MLP runs on it.
    return tuple(Prompt(piece.ids, 0) for piece in pieces)


@dataclass(frozen=True)
class SlicedLayer:
    """One layer on the text: its router's `inputs` (T, D) and the `energies` (T, N - shared) of its
    routed slices. A slice's energy is the sum of its neurons' strengths squared."""

    inputs: Matrix
    energies: Matrix


@dataclass(frozen=True)
class Cutting:
    """A checked split: `text` is empty where the assignment does not depend on a text."""

    split: Split
    per_token: int
    text: tuple[Prompt, ...] = ()

    @property
    def active(self) -> int:
        """How many routed slices a token chooses while neurons are grouped; half of them where
        the model chooses all."""
        routed = self.split.routed
        return self.per_token if self.per_token < routed else max(1, routed // 2)

    def digest(self) -> dict[str, Any]:
        """Everything that decides the orders of neurons besides the sources and the seed."""
        text = [piece.ids for piece in self.text]
        return {**asdict(self.split), "text": text, "per_token": self.per_token}


@dataclass
class Cutter:
    """Makes the orders of neurons, layer by layer; the body reads the text if they depend on it."""

    cutting: Cutting
    body: Body
    sources: Sources
    options: RunOptions
    reporter: Reporter
    orders: dict[str, Order] = field(default_factory=dict)

    def layers(self) -> Iterator[SlicedLayer]:
        """Run the body on the text; yield the data that each layer's router is fitted to.

        Each layer's order of neurons is made on the way.
        """
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
        """Return every layer's order (F) by its name; missing orders are made now."""
        count = self.body.base.model.config["num_hidden_layers"]
        if len(self.orders) < count and self.cutting.split.reads_text:
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
    """All passages concatenated, (T, ...); the list is emptied to free its memory."""
    import numpy as np

    whole = np.concatenate(passages)
    passages.clear()
    return whole


def _lengths(weights: Matrix, axis: int) -> Matrix:
    """The Euclidean norms along an axis."""
    import numpy as np

    lengths: Matrix = np.linalg.norm(weights, axis=axis)
    return lengths
