"""An output architecture as slots: each tensor's name, shape, and content.

Dense tensors have the same names in every family (`model.layers.0.mlp.gate_proj.weight`). Shapes: D
hidden size, F an expert's intermediate size, S the intermediate size of all shared experts
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.families import (
    DOWN,
    EMBEDDING,
    GATE,
    HEAD,
    PARTIAL,
    RECORDS,
    TEXT_PREFIX,
    UP,
    Family,
    dense,
    one_width,
    record_of,
)

_OF_TEXT = (
    "model.layers.", "model.norm.", "model.embed_tokens", "model.per_layer_"
)  # fmt: skip
"""What names of the language part's tensors begin with."""

ALL = -1
"""In place of an expert's number: every expert has an equal part of the tensor."""


@dataclass(frozen=True)
class FromBody:
    """The body's own dense tensor.

    If `halved`, the rows of each head are in another order: rope turns the halves of a head, where
    the dense model turns neighbours.
    """

    tensor: str
    halved: bool = False


@dataclass(frozen=True)
class FromExpert:
    """The dense tensor of a routed expert's MLP, or of the `shared` expert of that number."""

    tensor: str
    expert: int
    shared: bool = False


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


@dataclass(frozen=True)
class Made:
    """A tensor that the gate mode makes: a layer's `router` (E, D), the selection `bias` (E) that
    balances the load, or the `shared gate` (1, D)."""

    kind: str


@dataclass(frozen=True)
class Joined:
    """Slots without names, joined: one below another (axis 0) or side by side (axis 1)."""

    parts: tuple[Slot, ...]
    axis: int = 0


@dataclass(frozen=True)
class Transposed:
    """A slot without a name, with rows and columns exchanged."""

    of: Slot


@dataclass(frozen=True)
class Slot:
    """One tensor that the architecture needs; `dtype` is set if it must have one of its own."""

    name: str
    shape: tuple[int, ...]
    of: FromBody | FromExpert | Constant | Made | Joined | Transposed
    dtype: str | None = None

    @property
    def expert(self) -> int | None:
        """The number of the routed expert in the tensor, `ALL` for all of them, or None."""
        owners = {p.of.expert for p in self.parts if isinstance(p.of, FromExpert)}
        routed = not any(isinstance(p.of, FromExpert) and p.of.shared for p in self.parts)
        return None if not owners or not routed else owners.pop() if len(owners) == 1 else ALL

    @property
    def parts(self) -> Iterator[Slot]:
        """The slots that it is joined of, or itself."""
        if isinstance(self.of, Joined):
            for part in self.of.parts:
                yield from part.parts
        elif isinstance(self.of, Transposed):
            yield from self.of.of.parts
        else:
            yield self


@dataclass(frozen=True)
class Mixture:
    """The shape of the routing: `experts` of `inner` neurons, of which `per_token` are chosen.

    `shared` experts of `inner` neurons each are always on; if `gated`, they are scaled by a gate
    that is made from prompts. `settings` are the architecture's own options. `training` holds
    training keys of the config, and `told` keys for later edits (`SEGMENTS`, `SPLIT_FACTOR`).
    """

    experts: int
    per_token: int
    inner: int
    shared: int = 0
    gated: bool = False
    settings: Any = None
    training: tuple[tuple[str, Any], ...] = ()
    told: tuple[tuple[str, Any], ...] = ()


def whole(
    config: dict[str, Any],
    mlp: Callable[[int], Iterator[Slot]],
    qkv_bias: bool = False,
    o_bias: bool = False,
    copies_head: bool = True,
    halves: bool = True,
) -> Iterator[Slot]:
    """Embeddings, layers, final norm, and head; `mlp` yields each layer's experts.

    Biases that the architecture has and the dense model lacks are zeros. A tied head is a copy of
    the embeddings, because some readers need it in the file, unless not `copies_head`. If the dense
    model's rope turns neighbours, the class's turns `halves`, or neighbours too.
    """
    record = family_of(config)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    wanted = {"q_proj": qkv_bias, "k_proj": qkv_bias, "v_proj": qkv_bias, "o_proj": o_bias}
    yield same(EMBEDDING, (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        before = record.layer(config, layer)
        for name, shape in before.items():
            module, _, kind = name.rpartition(".")
            which = module.rpartition(".")[2]
            halved = halves and record.interleaved and which in ("q_proj", "k_proj")
            yield Slot(name, shape, FromBody(name, halved))
            bias = f"{module}.bias"
            if kind == "weight" and wanted.get(which) and bias not in before:
                yield Slot(bias, shape[:1], Constant(0.0))
        if record.width(config, layer):
            yield from mlp(layer)
    for name, shape in record.top(config).items():
        yield same(name, shape)
    tied = config["tie_word_embeddings"]
    if copies_head or not tied:
        yield Slot(HEAD, (vocab, hidden), FromBody(EMBEDDING if tied else HEAD))


def family_of(config: dict[str, Any]) -> Family:
    """The record of a normalised config's family.

    Raises:
        ValueError: it has none.
    """
    record = record_of(config)
    if record is None:
        raise ValueError(f"{config.get('model_type')!r} is no known family")
    return record


def width_of(config: dict[str, Any]) -> int:
    """The intermediate size of the widest layer."""
    width, layers = family_of(config).width, config["num_hidden_layers"]
    return max(width(config, at) for at in range(1 if width is one_width else layers))


def turned_rows(config: dict[str, Any]) -> int:
    """The rows of each head that rope turns."""
    head: int = config["head_dim"]
    return round(head * float(config[PARTIAL]))


def same(name: str, shape: tuple[int, ...]) -> Slot:
    """The body's tensor with the same name."""
    return Slot(name, shape, FromBody(name))


def joined(name: str, parts: Sequence[Slot], axis: int = 0) -> Slot:
    """Slots joined to one tensor; a single slot is only renamed."""
    if len(parts) == 1:
        return Slot(name, parts[0].shape, parts[0].of)
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Slot(name, tuple(shape), Joined(tuple(parts), axis))


def dense_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the dense model with its shape; a tied head is not a tensor of its own."""
    hidden, record = config["hidden_size"], family_of(config)

    def mlp(layer: int) -> Iterator[Slot]:
        inner = record.width(config, layer)
        for which in (GATE, UP, DOWN) if record.gated else (UP, DOWN):
            shape = (hidden, inner) if which == DOWN else (inner, hidden)
            yield same(dense(layer, which), shape)

    return {slot.name: slot.shape for slot in whole(config, mlp, copies_head=False)}


def in_files(name: str, config: dict[str, Any]) -> str:
    """A tensor's name in files: inside the model that sees or hears, if there is one."""
    if "wrapper" in config and name.startswith(_OF_TEXT):
        return name.replace("model.", TEXT_PREFIX, 1)
    record = RECORDS.get(str(config.get("model_type")))
    return record.name_in_files(name) if record else name


def as_file(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose language part, if it has a `wrapper`, is inside that."""
    if "wrapper" not in config:
        return config
    text = {key: value for key, value in config.items() if key != "wrapper"}
    return {**config["wrapper"], "text_config": text}
