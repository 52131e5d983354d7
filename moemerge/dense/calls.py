"""How a model calls each of its layers: masks, positions and whatever else a layer gets.

The model's own forward runs once for each batch, with layers that only note their call. So every
kind of model prepares its layers' inputs by its own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Calls:
    """The state (B, T, D) before the first layer of a batch, and each layer's further arguments.

    `added` is what the model adds to the state before a layer, by the layer's number.
    """

    state: torch.Tensor
    layers: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    added: Mapping[int, torch.Tensor]

    def run(self, number: int, layer: Any, state: torch.Tensor) -> torch.Tensor:
        """The layer's output (B, T, D) for its input `state`."""
        arguments, named = self.layers[number]
        if number in self.added:
            state = state + self.added[number]
        done = layer(state, *arguments, **named)
        made: torch.Tensor = done[0] if isinstance(done, tuple) else done
        return made


def calls_of(model: Any, layers: Sequence[Any], **given: Any) -> Calls:
    """Run the model's forward on `given`, with `layers` that return zeros.

    What then enters a layer is what the model adds before it.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entered: dict[int, torch.Tensor] = {}

    def note(state: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if not found or state.any():
            entered[len(found)] = state
        found.append((arguments, named))
        return state.new_zeros(state.shape)

    try:
        for layer in layers:
            layer.forward = note
        model(**given, use_cache=False)
    finally:
        for layer in layers:
            # The class's own again: a bound method in the layer would be a circle, which keeps the
            # weights of every copy in memory.
            del layer.forward
    return Calls(entered.pop(0), found, entered)
