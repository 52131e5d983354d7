"""The input of a gate mode, a `Task`, and its result, `Routers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor
from moemerge.dense import Body
from moemerge.gates.prompts import ExpertPrompts
from moemerge.options import RunOptions
from moemerge.plan import Sources
from moemerge.reporting import Reporter
from moemerge.split import Cutter
from moemerge.text import Encoder, Prompt

if TYPE_CHECKING:
    import numpy as np

    Vector = np.ndarray[Any, np.dtype[np.float32]]
    Matrix = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Task:
    """The input of a gate mode. `names` are the routers' tensor names, one for each layer.

    `donors` are the experts; with a split, they are its slices, and `cutter` computes them.
    `encoder` is None if the mode uses no prompts. `settings` are the mode's options. `written` is
    what each expert wrote already. `keep` gets the router inputs of each layer that a ridge fit
    sees.
    """

    names: Sequence[str]
    body: Body
    donors: tuple[Donor, ...]
    sources: Sources
    experts: tuple[ExpertPrompts, ...]
    encoder: Encoder | None
    settings: Any
    options: RunOptions
    reporter: Reporter
    cutter: Cutter | None = None
    written: Sequence[Sequence[Prompt]] = ()
    keep: Callable[[Sequence[Example], Sequence[Matrix]], None] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of a router: (E, D)."""
        return len(self.experts), int(self.body.base.model.config["hidden_size"])


@dataclass(frozen=True)
class Example:
    """A text whose tokens should go to expert `expert`; if not `positive`, they should not."""

    prompt: Prompt
    expert: int
    positive: bool = True


@dataclass(frozen=True)
class Routers:
    """The routers of a gate mode: (E, D) for each layer, and their logits on held-out texts.

    `held_out[layer][n]` are the logits (T, E) of text `texts[n]` from a router made without this
    text. Both are empty if a mode reads no text.
    """

    matrices: list[Matrix]
    texts: tuple[Example, ...] = ()
    held_out: tuple[list[Matrix], ...] = ()
