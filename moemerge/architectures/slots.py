"""An output architecture as slots: each tensor's name, shape, and content.

Dense tensors have the same names in every family (`model.layers.0.mlp.gate_proj.weight`). Shapes: D
hidden size, F an expert's intermediate size, S the intermediate size of all shared experts
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.families import DOWN, EMBEDDING, GATE, HEAD, LAYER, UP, dense

ALL = -1
"""In place of an expert's number: every expert has an equal part of the tensor."""


@dataclass(frozen=True)
class FromBody:
    """The body's own dense tensor."""

    tensor: str


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
class Slot:
    """One tensor that the architecture needs; `dtype` is set if it must have one of its own."""

    name: str
    shape: tuple[int, ...]
    of: FromBody | FromExpert | Constant | Made | Joined
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
    qkv_bias: bool | None = None,
    o_bias: bool | None = None,
) -> Iterator[Slot]:
    """Embeddings, layers, final norm, and head; `mlp` yields each layer's experts.

    Biases that the architecture has and the dense model lacks are zeros. A tied head is a copy of
    the embeddings, because some readers need it in the file.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield same(EMBEDDING, (vocab, hidden))
    for layer in range(config["num_hidden_layers"]):
        yield from _attention(config, LAYER.format(layer=layer), qkv_bias, o_bias)
        yield from mlp(layer)
    yield same("model.norm.weight", (hidden,))
    head = EMBEDDING if config["tie_word_embeddings"] else HEAD
    yield Slot(HEAD, (vocab, hidden), FromBody(head))


def _attention(
    config: dict[str, Any], layer: str, qkv_bias: bool | None, o_bias: bool | None
) -> Iterator[Slot]:
    """A layer's norms and attention, which every architecture names as dense models do."""
    hidden = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    before = ("post_attention_layernorm", "post_feedforward_layernorm")
    norms = before if config["post_norm"] else ("input_layernorm", "post_attention_layernorm")
    yield same(f"{layer}{norms[0]}.weight", (hidden,))
    for name, rows, width, own, wanted in (
        ("q_proj", queries, hidden, config["qkv_bias"], qkv_bias),
        ("k_proj", keys, hidden, config["qkv_bias"], qkv_bias),
        ("v_proj", keys, hidden, config["qkv_bias"], qkv_bias),
        ("o_proj", hidden, queries, config["o_bias"], o_bias),
    ):
        yield same(f"{layer}self_attn.{name}.weight", (rows, width))
        bias = f"{layer}self_attn.{name}.bias"
        if own:
            yield same(bias, (rows,))
        elif wanted:
            yield Slot(bias, (rows,), Constant(0.0))
    if config["qk_norm"]:
        full = config["qk_norm"] == "full"
        for name, size in (("q_norm", queries), ("k_norm", keys)):
            yield same(f"{layer}self_attn.{name}.weight", (size if full else config["head_dim"],))
    yield same(f"{layer}{norms[1]}.weight", (hidden,))


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
    """One of an expert's three matrices: gate and up (F, D), down (D, F)."""
    hidden, inner = config["hidden_size"], mixture.inner
    shape = (hidden, inner) if which == DOWN else (inner, hidden)
    return Slot(name, shape, FromExpert(dense(layer, which), expert))


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
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def mlp(layer: int) -> Iterator[Slot]:
        for which in (GATE, UP, DOWN):
            shape = (hidden, inner) if which == DOWN else (inner, hidden)
            yield same(dense(layer, which), shape)

    slots = whole(config, mlp)
    return {slot.name: slot.shape for slot in slots if slot.of == FromBody(slot.name)}
