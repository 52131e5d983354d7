"""The main types: a `Plan` is a list of shards, a shard a list of tensors, each with a recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moemerge.architectures import COUNTS, PER_TOKEN
from moemerge.checkpoint import ENCODINGS
from moemerge.families import HEAD
from moemerge.files import WEIGHTS_SUFFIX
from moemerge.plan import recipe
from moemerge.plan.recipe import Recipe

ALIGNMENT = 32
"""Tensors of a GGUF file begin at multiples of it."""

INDEX_FILE = f"model{WEIGHTS_SUFFIX}.index.json"


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor: its name, shape, safetensors dtype and recipe.

    `expert` is the index of the one expert that the tensor belongs to. It is -1 where the tensor
    holds an equal part of every expert, and None where it belongs to no expert. `made` is
    `router`, `bias` (the selection bias) or `shared gate` for a tensor that a gate mode makes, and
    empty for any other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    recipe: Recipe
    expert: int | None = None
    made: str = ""

    @property
    def parameters(self) -> int:
        """How many values the tensor holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return ENCODINGS[self.dtype].nbytes(self.parameters)


@dataclass(frozen=True)
class Head:
    """The first bytes of a GGUF file: their number, and their digest."""

    nbytes: int
    digest: str

    @classmethod
    def of(cls, content: bytes) -> Head:
        """The head that these bytes are."""
        return cls(len(content), hashlib.blake2b(content, digest_size=16).hexdigest())


@dataclass(frozen=True)
class Shard:
    """One output file, independent of every other.

    `digest` is equal for two shards exactly when they have the same recipes and sources. Of a GGUF
    file, the plan knows the first bytes by `head` alone, because they hold a whole tokenizer;
    `first` are these bytes, if they are known.
    """

    file: str
    tensors: tuple[PlannedTensor, ...]
    digest: str
    head: Head | None = None
    first: bytes = field(default=b"", repr=False, compare=False)

    def header(self) -> bytes:
        """The file's first bytes: length and JSON, padded so that the data begins at a multiple
        of 8 bytes; or those of a GGUF file."""
        if self.head:
            return self.first
        return file_header(self.tensors, {"format": "pt", "moemerge": self.digest})

    def is_header(self, found: bytes) -> bool:
        """Whether these are the file's first bytes."""
        return Head.of(found) == self.head if self.head else found == self.header()

    @property
    def header_bytes(self) -> int:
        """The size of the file's first bytes."""
        return self.head.nbytes if self.head else len(self.header())

    def starts(self) -> Iterator[int]:
        """Where each tensor begins in the file."""
        at = self.header_bytes
        for tensor in self.tensors:
            yield at
            at += tensor.nbytes
            at += -at % ALIGNMENT if self.head else 0

    @property
    def nbytes(self) -> int:
        """The file's size in bytes, header included."""
        size = self.header_bytes
        for start, tensor in zip(self.starts(), self.tensors, strict=True):
            size = start + tensor.nbytes
        return size + (-size % ALIGNMENT if self.head else 0)


@dataclass(frozen=True)
class Source:
    """A source of tensors, a model or adapter: a `directory`, or the Hub's `repo` at `commit`.

    `fingerprint` is the commit, or a digest of headers, config and some bytes of every tensor.
    `modified` is the time in ns when a file of the directory last changed. `tokens` is a digest of
    the source's tokenizer, or None where the mixture does not depend on the tokenizer.
    """

    reference: str
    fingerprint: str
    directory: str | None = None
    repo: str | None = None
    commit: str | None = None
    modified: int | None = None
    tokens: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that a merge writes, and the sources that it reads.

    `config` is the output's config.json. `gate_inputs` is a digest of everything that decides the
    routers besides the sources' weights: the gate mode, its settings and the prompts' tokens.
    """

    architecture: str
    gate_mode: str
    gate_inputs: str
    seed: int
    dtype: str
    experts: tuple[str, ...]
    experts_per_token: int
    config: dict[str, Any]
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """Every output tensor, in the order in which they are written."""
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def is_gguf(self) -> bool:
        """Whether it writes GGUF files."""
        return any(shard.head for shard in self.shards)

    @property
    def tied_head(self) -> PlannedTensor | None:
        """The head, where it is written as a copy of the embeddings; None otherwise."""
        tied = self.config.get("tie_word_embeddings")
        return next((one for one in self.tensors if tied and one.name == HEAD), None)

    @property
    def parameters(self) -> int:
        """The parameters of the whole model; a tied head does not count."""
        again = self.tied_head
        return sum(tensor.parameters for tensor in self.tensors if tensor is not again)

    @property
    def routed(self) -> int:
        """How many experts a router chooses from; each segment of an expert counts as one."""
        return next((int(self._text[key]) for key in COUNTS if key in self._text), 1)

    @property
    def routed_per_token(self) -> int:
        """How many routed experts a router chooses for each token."""
        return next((int(self._text[key]) for key in PER_TOKEN if key in self._text), 1)

    @property
    def _text(self) -> dict[str, Any]:
        """The language part of config.json."""
        text: dict[str, Any] = self.config.get("text_config", self.config)
        return text

    @property
    def active_parameters(self) -> int:
        """The parameters that one token uses: all but those of experts not chosen."""
        of_experts = sum(t.parameters for t in self.tensors if t.expert is not None)
        idle = of_experts * (self.routed - self.routed_per_token) // self.routed
        return self.parameters - idle

    @property
    def nbytes(self) -> int:
        """The size of all shards in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """Equal for two plans exactly when they make the same files from the same sources."""
        return digest_of(self.without_places(self.to_json()))

    @staticmethod
    def without_places(data: dict[str, Any]) -> dict[str, Any]:
        """A plan's plain data without the sources' `directory` and `modified`.

        Raises:
            KeyError, TypeError, AttributeError: `data` is not a plan's plain data.
        """
        places = ("directory", "modified")
        kept = [{k: v for k, v in one.items() if k not in places} for one in data["sources"]]
        return {**data, "sources": kept}

    def remembered(self, source: Source) -> Source:
        """The source with the `fingerprint` and `modified` that this plan has for it, if any."""
        old = next((one for one in self.sources if one.reference == source.reference), source)
        return dataclasses.replace(source, fingerprint=old.fingerprint, modified=old.modified)

    @property
    def run_digest(self) -> str:
        """Equal for two runs that may share unfinished files: same plan, no source changed."""
        return digest_of([self.digest, [source.modified for source in self.sources]])

    @property
    def contents(self) -> dict[str, list[Any]]:
        """Each source's fingerprint, tokenizer digest and time, by its reference."""
        return {one.reference: [one.fingerprint, one.tokens, one.modified] for one in self.sources}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        data = dataclasses.asdict(dataclasses.replace(self, shards=()))
        for source in data["sources"]:
            if source["tokens"] is None:
                del source["tokens"]
        data["shards"] = [
            {
                "file": shard.file,
                "digest": shard.digest,
                **({"head": vars(shard.head)} if shard.head else {}),
                "tensors": [
                    {**vars(tensor), "recipe": recipe.to_json(tensor.recipe)}
                    for tensor in shard.tensors
                ],
            }
            for shard in self.shards
        ]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Read a plan from the data that `to_json` gives.

        Raises:
            ValueError, KeyError, TypeError: the data is not a plan's.
        """
        shards = tuple(
            Shard(
                shard["file"],
                tuple(
                    PlannedTensor(
                        **{
                            **tensor,
                            "shape": tuple(tensor["shape"]),
                            "recipe": recipe.from_json(tensor["recipe"]),
                        }
                    )
                    for tensor in shard["tensors"]
                ),
                shard["digest"],
                Head(**shard["head"]) if "head" in shard else None,
            )
            for shard in data["shards"]
        )
        sources = tuple(Source(**source) for source in data["sources"])
        tuples = {"shards": shards, "sources": sources, "experts": tuple(data["experts"])}
        return cls(**{**data, **tuples})


def file_header(tensors: Iterable[PlannedTensor], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file that holds `tensors` in this order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def digest_of(data: object) -> str:
    """A digest of plain data, 32 hex digits; equal data has the same digest."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
