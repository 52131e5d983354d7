"""hidden: prompt averaging as `hidden_avg`, centred over the experts and sharpened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moemerge.gates.fitting import KAPPA, averaged, not_positive
from moemerge.gates.needs import GateSettings, Needs, Prompts
from moemerge.gates.task import Routers, Task

NEEDS = Needs(prompts=Prompts.REQUIRED, body_pass=True)


@dataclass(frozen=True)
class Settings(GateSettings):
    """`kappa`: the spread of the logits over the experts."""

    kappa: float = KAPPA

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """What cannot be."""
        yield from not_positive(kappa=self.kappa)


def routers(task: Task) -> Routers:
    """(E, D) per layer: each expert's mean router input, less the mean over the experts.

    What all prompts share tells no expert from another; without it, and scaled so that its logits
    differ enough to choose, the same average routes far better (`scripts/bench_routing.py`).
    """
    return averaged(task, lambda inputs: inputs.mean(axis=0), task.settings.kappa)
