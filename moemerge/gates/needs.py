"""What a gate mode declares: its inputs, its options, and the models that it runs."""

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
    """What a gate mode's routers are made from.

    `prompts`: the experts' prompts. `body_pass`: the mixture's body runs, so torch, a device and
    all of the base model's tensors are needed. `expert_models`: every expert's own dense model
    runs as a whole, and `own_passes`: layer by layer. `text`: the text that a split names. `seed`:
    random numbers.
    """

    prompts: Prompts = Prompts.NONE
    body_pass: bool = False
    expert_models: bool = False
    own_passes: bool = False
    text: bool = False
    seed: bool = False

    @property
    def untaught(self) -> str:
        """What to call routers that are made from no model and no text; empty for other routers.

        Such routers choose nothing useful before they are trained. Routers that are the same for
        every expert do no harm if each token passes all experts.
        """
        reads = self.prompts is not Prompts.NONE or self.text
        if reads or self.body_pass or self.expert_models:
            return ""
        return "random" if self.seed else "the same for every expert"


@dataclass(frozen=True)
class Passes:
    """How a gate mode runs its models; the plan's costs are computed from this.

    With `own_mlps`, every text passes the MLPs of its own expert in place of the base model's.
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
        """Problems with values that have the right type: key, what is wrong, fix."""
        yield from ()

    def passes(self) -> Passes:
        """How the mode runs its models with these options."""
        return Passes()
