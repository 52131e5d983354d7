"""hidden: averages as in `hidden_avg`, centred over the experts and scaled."""

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
        """Numbers that are not above 0."""
        yield from not_positive(kappa=self.kappa)


def routers(task: Task) -> Routers:
    """(E, D) for each layer: each expert's mean router input, minus the mean over the experts.

    The part that all prompts share does not help to choose an expert. The average routes far better
    without that part, and scaled so that the logits differ enough (`scripts/bench_routing.py`).
    """
    return averaged(task, lambda inputs: inputs.mean(axis=0), task.settings.kappa)
