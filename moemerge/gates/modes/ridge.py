"""ridge: the default; ridge regression of the expert on each layer's router inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moemerge.gates.fitting import KAPPA, examples_of, not_positive, ridge
from moemerge.gates.needs import GateSettings, Needs, Passes, Prompts
from moemerge.gates.task import Routers, Task

NEEDS = Needs(prompts=Prompts.REQUIRED, body_pass=True)


@dataclass(frozen=True)
class Settings(GateSettings):
    """`lambda`: the penalty, by default from the number of tokens; `kappa`: the logits' spread.

    `on_policy`: each prompt passes its own expert's MLPs in place of the base model's, as in the
    mixture. This routes better, and reads the experts' MLPs twice.
    """

    lambda_: float | None = None
    kappa: float = KAPPA
    on_policy: bool = True

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Numbers that are not above 0."""
        yield from not_positive(**{"lambda": self.lambda_}, kappa=self.kappa)

    def passes(self) -> Passes:
        """One pass; each prompt passes its own expert's MLPs with `on_policy`."""
        return Passes(own_mlps=self.on_policy)


def routers(task: Task) -> Routers:
    """(E, D) for each layer; see `fitting.ridge`."""
    own = task.settings
    return ridge(task, examples_of(task.experts), own.lambda_, own.kappa, own.on_policy)
