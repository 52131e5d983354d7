"""ridge: the default; ridge regression of the expert on what each layer's router sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moemerge.gates.fitting import KAPPA, examples_of, not_positive, ridge
from moemerge.gates.needs import GateSettings, Needs, Passes, Prompts
from moemerge.gates.task import Routers, Task

NEEDS = Needs(prompts=Prompts.REQUIRED, body_pass=True)


@dataclass(frozen=True)
class Settings(GateSettings):
    """`lambda`: the penalty, by default by the number of tokens; `kappa`: the logits' spread.

    `on_policy`: each prompt passes its own expert's MLPs, not the base model's, so that layers see
    what they will see; it routes better, and reads the experts' MLPs twice.
    """

    lambda_: float | None = None
    kappa: float = KAPPA
    on_policy: bool = True

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """What cannot be."""
        yield from not_positive(**{"lambda": self.lambda_}, kappa=self.kappa)

    def passes(self) -> Passes:
        """Each prompt passes its expert's MLPs with `on_policy`."""
        return Passes(own_mlps=self.on_policy)


def routers(task: Task) -> Routers:
    """(E, D) per layer; see `fitting.ridge`."""
    own = task.settings
    return ridge(task, examples_of(task.experts), own.lambda_, own.kappa, own.on_policy)
