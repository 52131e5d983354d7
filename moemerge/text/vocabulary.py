"""The mixture's vocabulary: its tokenizer, and the origin of the rows of its embedding and head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.families import EMBEDDING, HEAD
from moemerge.plan import Join, Mean, Recipe, of_donor, rows
from moemerge.tokenizer import TOKENIZER_FILE, chat_template, read_content


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a donor's embedding, and of its head."""

    donor: Donor
    start: int
    stop: int


@dataclass(frozen=True)
class MeanRow:
    """One row, the mean of some of a donor's rows."""

    donor: Donor
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's files, and the rows that go with it.

    The files are those in `directory`, except that `written` ones count instead. `rows` are those
    of embedding and head, in order; without any, both are the base model's. `config` holds the keys
    of config.json that the vocabulary decides.
    """

    base: Donor
    directory: Path
    written: dict[str, bytes] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Rows | MeanRow, ...] = ()

    @property
    def speaker(self) -> Donor:
        """The base model with its config changed for this vocabulary."""
        config = {**self.base.model.config, **self.config}
        return replace(self.base, model=replace(self.base.model, config=config))

    def tokenizer(self) -> bytes:
        """The tokenizer.json.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        return self.written.get(TOKENIZER_FILE) or read_content(self.directory)

    @property
    def template(self) -> Any:
        """The chat template, one text or several by name; None if there is none."""
        return chat_template(self.directory, self.written)

    @property
    def summary(self) -> str:
        """The origins of the rows, for a person; empty if all are the base model's own."""
        counts: Counter[str] = Counter()
        for part in self.rows:
            if isinstance(part, Rows):
                counts[f"of {part.donor.name}"] += part.stop - part.start
            else:
                counts["that are means"] += 1
        told = ", ".join(f"{count} {whose}" for whose, count in counts.items())
        return f"{counts.total()} rows: {told}" if counts else ""

    def has_rows_of(self, donor: Donor) -> bool:
        """Whether some row is from the donor."""
        return any(part.donor is donor for part in self.rows)

    def needs(self) -> Iterator[tuple[Donor, dict[str, tuple[int, ...]]]]:
        """The tensors that are read of other models than the base: names and shapes."""
        tied = self.base.model.config.get("tie_word_embeddings")
        names = (EMBEDDING,) if tied else (EMBEDDING, HEAD)
        for donor in {id(part.donor): part.donor for part in self.rows}.values():
            if donor is not self.base:
                shape = (size_of(donor), int(donor.model.config["hidden_size"]))
                yield donor, {_name_in(donor, name): shape for name in names}

    def recipe(self, tensor: str, whole: Recipe) -> Recipe:
        """The recipe of the embedding or the head; `whole` is the recipe of the base model's
        tensor."""
        if not self.rows:
            return whole
        parts = tuple(self._part(part, tensor, whole) for part in self.rows)
        return parts[0] if len(parts) == 1 else Join(parts)

    def _part(self, part: Rows | MeanRow, tensor: str, whole: Recipe) -> Recipe:
        own = part.donor is self.base
        matrix = whole if own else of_donor(part.donor, _name_in(part.donor, tensor))
        if isinstance(part, Rows):
            return rows(matrix, part.start, part.stop)
        cuts = tuple(rows(matrix, row, row + 1) for row in part.rows)
        return Mean(cuts, (1 / len(cuts),) * len(cuts))


def size_of(donor: Donor) -> int:
    """The number of rows of a donor's embedding; 0 if its config.json gives none that can be."""
    size = donor.model.config.get("vocab_size")
    return size if type(size) is int else 0


def _name_in(donor: Donor, tensor: str) -> str:
    """The name of a donor's head: its embedding if it has no head of its own."""
    tied = bool(donor.model.config.get("tie_word_embeddings"))
    return EMBEDDING if tensor == HEAD and tied else tensor
