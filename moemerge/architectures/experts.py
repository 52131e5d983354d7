"""The slots of a layer's experts: routers, routed experts, shared ones.

Shapes: E experts, D hidden size, F an expert's intermediate size, S that of all shared experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.architectures.slots import (
    Constant,
    FromExpert,
    Joined,
    Made,
    Mixture,
    Slot,
    Transposed,
    family_of,
    joined,
    width_of,
)
from moemerge.families import DOWN, GATE, LAYER, UP, dense

NARROW = 32
"""Neurons of a shared expert of zeros, if a class cannot be without one.

llama.cpp's quantiser refuses rows that 32 does not divide.
"""

HALF = 1e-12
"""A gate's weights for which the sigmoid is exactly 1/2; llama.cpp gives NaN for a logit of zero.
"""


def router(name: str, config: dict[str, Any], mixture: Mixture) -> Slot:
    """A layer's router."""
    return Slot(name, (mixture.experts, config["hidden_size"]), Made("router"))


def routed(config: dict[str, Any], mixture: Mixture, layer: int) -> Iterator[Slot]:
    """A layer's router and experts, with the names of most classes."""
    block = f"{LAYER.format(layer=layer)}mlp."
    yield router(f"{block}gate.weight", config, mixture)
    yield from separate(f"{block}experts.", config, mixture, layer)


def separate(
    prefix: str,
    config: dict[str, Any],
    mixture: Mixture,
    layer: int,
    matrices: tuple[str, ...] = (GATE, UP, DOWN),
) -> Iterator[Slot]:
    """Each expert's matrices as tensors of their own: `prefix`, its number, the matrix's name."""
    for expert in range(mixture.experts):
        for which in matrices:
            name = f"{prefix}{expert}.{which}.weight"
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
    prefix: str,
    config: dict[str, Any],
    mixture: Mixture,
    layer: int,
    width: int,
    matrices: tuple[str, ...] = (GATE, UP, DOWN),
) -> Iterator[Slot]:
    """The matrices of all shared experts as one MLP; without any, of one of zeros, `width` wide."""
    hidden = config["hidden_size"]
    for which in matrices:
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
    yield from shared_or_zeros(
        f"{block}shared_expert.", config, mixture, layer, shared_width(mixture)
    )
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
