"""What a gate mode is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
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
    """What a gate mode works from. `names` are the routers', one a layer, in order.

    `donors` are the experts, or the slices of a split, for which there is a `cutter`; `encoder` is
    there if the mode uses prompts; `settings` is the mode's own `Settings`, None where it has none.
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

    @property
    def shape(self) -> tuple[int, int]:
        """A router's: (E, D)."""
        return len(self.experts), int(self.body.base.model.config["hidden_size"])


@dataclass(frozen=True)
class Example:
    """A text that should find expert number `expert`, or, if not `positive`, should not."""

    prompt: Prompt
    expert: int
    positive: bool = True


@dataclass(frozen=True)
class Routers:
    """What a gate mode made: a router (E, D) for each layer, and how such routers do held out.

    `held_out[layer][n]` holds the logits (T, E) that text `texts[n]` gets from a router made
    without it; both are empty where a mode reads no text.
    """

    matrices: list[Matrix]
    texts: tuple[Example, ...] = ()
    held_out: tuple[list[Matrix], ...] = ()
