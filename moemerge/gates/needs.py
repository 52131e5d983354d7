"""What a gate mode says of itself: its inputs, its options, and the passes that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Prompts(Enum):
    """Whether a gate mode reads prompts and calibration texts."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


@dataclass(frozen=True)
class Needs:
    """What a gate mode's routers depend on.

    `prompts`: the experts' prompts. `body_pass`: the mixture's body runs, so torch, a device and
    all of the base model's tensors are needed. `expert_models`: every expert's own dense model
    runs. `text`: the text that a split names. `seed`: random draws.
    """

    prompts: Prompts = Prompts.NONE
    body_pass: bool = False
    expert_models: bool = False
    text: bool = False
    seed: bool = False

    @property
    def untaught(self) -> str:
        """What routers are that come neither from models nor from text; empty if they do.

        Such routers choose nothing before they are trained; those that are the same for every
        expert do no harm where a token passes all experts.
        """
        reads = self.prompts is not Prompts.NONE or self.text
        if reads or self.body_pass or self.expert_models:
            return ""
        return "random" if self.seed else "the same for every expert"


@dataclass(frozen=True)
class Passes:
    """How the models that a gate mode runs are used; the plan's costs come from it.

    With `own_mlps` every text passes the MLPs of its own expert, not those of the base model.
    Each expert's own model writes `texts` texts of `tokens` new tokens.
    """

    own_mlps: bool = False
    texts: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class GateSettings:
    """A gate mode's options: none. A mode that has options defines `Settings`, a subclass of this.

    A field of `Settings` is a key of the config's `gate:` (`lambda_` is `lambda`).
    """

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """What is wrong with values of the right type: key, what, fix."""
        yield from ()

    def passes(self) -> Passes:
        """What the mode runs with these options."""
        return Passes()
