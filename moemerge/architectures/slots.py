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
    LAYER,
    PARTIAL,
    RECORDS,
    TEXT_PREFIX,
    UP,
    Family,
    dense,
    one_width,
    record_of,
)

NARROW = 32
"""Neurons of a shared expert of zeros, if a class cannot be without one.

llama.cpp's quantiser refuses rows that 32 does not divide.
"""

HALF = 1e-12
"""A gate's weights for which the sigmoid is exactly 1/2; llama.cpp gives NaN for a logit of zero.
"""

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


def router(name: str, config: dict[str, Any], mixture: Mixture) -> Slot:
    """A layer's router."""
    return Slot(name, (mixture.experts, config["hidden_size"]), Made("router"))


def routed(config: dict[str, Any], mixture: Mixture, layer: int) -> Iterator[Slot]:
    """A layer's router and experts, with the names of most classes."""
    block = f"{LAYER.format(layer=layer)}mlp."
    yield router(f"{block}gate.weight", config, mixture)
    for expert in range(mixture.experts):
        for which in (GATE, UP, DOWN):
            name = f"{block}experts.{expert}.{which}.weight"
            yield projection(name, config, mixture, layer, expert, which)


def projection(
    name: str, config: dict[str, Any], mixture: Mixture, layer: int, expert: int, which: str
) -> Slot:
    """One of an expert's three matrices: gate and up (F, D), down (D, F).

    In a layer whose MLP is narrower than others', zeros fill it up to the same width.
    """
    hidden, inner = config["hidden_size"], mixture.inner
    lacking = width_of(config) - family_of(config).width(config, layer)

    def shape(wide: int) -> tuple[int, int]:
        return (hidden, wide) if which == DOWN else (wide, hidden)

    own = Slot(name, shape(inner - lacking), FromExpert(dense(layer, which), expert))
    if not lacking:
        return own
    zeros = Slot("", shape(lacking), Constant(0.0))
    return joined(name, (own, zeros), axis=1 if which == DOWN else 0)


def shared_width(mixture: Mixture) -> int:
    """The width of all shared experts together, or of one of zeros where there are none."""
    return mixture.shared * mixture.inner or min(mixture.inner, NARROW)


def shared_or_zeros(
    prefix: str, config: dict[str, Any], mixture: Mixture, layer: int
) -> Iterator[Slot]:
    """The matrices of all shared experts as one MLP, or of one of zeros where there are none."""
    hidden, width = config["hidden_size"], shared_width(mixture)
    for which in (GATE, UP, DOWN):
        name = f"{prefix}{which}.weight"
        if mixture.shared:
            yield shared(name, config, mixture, layer, which)
        else:
            shape = (hidden, width) if which == DOWN else (width, hidden)
            yield Slot(name, shape, Constant(0.0))


def gated_shared(
    block: str, config: dict[str, Any], mixture: Mixture, layer: int
) -> Iterator[Slot]:
    """A shared expert with its sigmoid gate, which is 1/2 unless prompts make it."""
    yield from shared_or_zeros(f"{block}shared_expert.", config, mixture, layer)
    gate = Made("shared gate") if mixture.gated else Constant(HALF)
    yield Slot(f"{block}shared_expert_gate.weight", (1, config["hidden_size"]), gate)


def stacked(
    config: dict[str, Any],
    mixture: Mixture,
    layer: int,
    upper: str,
    lower: str,
    transposed: bool = False,
) -> Iterator[Slot]:
    """All experts in two tensors: gates and ups in turn (E, 2F, D), and downs (E, D, F).

    If `transposed`, each expert's matrix is: (E, D, 2F) and (E, F, D).
    """
    hidden, inner, count = config["hidden_size"], mixture.inner, mixture.experts
    if transposed:

        def turned(expert: int, *which: str) -> Slot:
            parts = [projection("", config, mixture, layer, expert, one) for one in which]
            own = joined("", parts)
            return Slot("", own.shape[::-1], Transposed(own))

        uppers = tuple(turned(expert, GATE, UP) for expert in range(count))
        lowers = tuple(turned(expert, DOWN) for expert in range(count))
        yield Slot(upper, (count, hidden, 2 * inner), Joined(uppers))
        yield Slot(lower, (count, inner, hidden), Joined(lowers))
        return

    def all_of(*which: str) -> Joined:
        parts = (
            projection("", config, mixture, layer, expert, one)
            for expert in range(count)
            for one in which
        )
        return Joined(tuple(parts))

    yield Slot(upper, (count, 2 * inner, hidden), all_of(GATE, UP))
    yield Slot(lower, (count, hidden, inner), all_of(DOWN))


def shared(name: str, config: dict[str, Any], mixture: Mixture, layer: int, which: str) -> Slot:
    """One matrix of all shared experts as one wide MLP: gate and up (S, D), down (D, S).

    A joined MLP gives exactly the sum of the outputs of its parts.
    """
    parts = tuple(
        Slot("", part.shape, FromExpert(dense(layer, which), number, shared=True))
        for number in range(mixture.shared)
        for part in [projection("", config, mixture, layer, number, which)]
    )
    return joined(name, parts, axis=1 if which == DOWN else 0)


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
