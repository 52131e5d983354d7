"""self: each expert writes text of its own, begun by its prompts if it has any; ridge on that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moemerge.fitting import KAPPA, Example, Routers, Task, examples_of, not_positive, ridge
from moemerge.own_text import write_texts
from moemerge.prompts import Prompt

USES = frozenset({"any prompts", "model", "experts", "seed"})


@dataclass(frozen=True)
class Settings:
    """`samples` texts of `tokens` tokens an expert, drawn with `temperature` and `top_p`.

    `lambda` and `kappa` as in ridge.
    """

    samples: int = 20
    tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    lambda_: float | None = None
    kappa: float = KAPPA

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """What cannot be."""
        yield from not_positive(
            samples=self.samples, tokens=self.tokens, temperature=self.temperature,
            top_p=self.top_p, **{"lambda": self.lambda_}, kappa=self.kappa,
        )  # fmt: skip
        if self.samples * self.tokens > 10**7:
            yield "samples", f"is {self.samples}", "write fewer: a thousand is much"
        if self.top_p > 1:
            yield "top_p", f"is {self.top_p:g}", "write a number above 0, at most 1"


def routers(task: Task) -> Routers:
    """(E, D) per layer: ridge on the experts' own text, read through their own MLPs.

    Text that a model writes shows what it was trained on (self-generated calibration data: Williams
    and Aletras 2024, "Self-calibration for language model quantization and pruning",
    https://arxiv.org/abs/2410.17170). Of a text begun from nothing the first quarter does not
    count: it has yet to come to anything (`scripts/bench_routing.py`). Negative prompts and
    calibration texts count as in ridge.
    """
    own, written = task.settings, []
    assert task.encoder is not None
    read = task.body.base.model.config["vocab_size"]  # the body has no row for what lies beyond
    for index, donor in enumerate(task.donors):
        beyond = range(read, donor.model.config["vocab_size"])
        texts = write_texts(
            donor,
            f"expert {index}",
            task.experts[index].positive or (task.encoder.start(),),
            own,
            [*task.encoder.special(), *beyond],
            task.sources,
            task.options,
            task.reporter,
        )
        unsettled = 0 if task.experts[index].positive else own.tokens // 4
        written += [Example(Prompt(text.ids, text.own + unsettled), index) for text in texts]
    given = [
        x for x in examples_of(task.experts) if x.prompt not in task.experts[x.expert].positive
    ]
    return ridge(task, [*written, *given], own.lambda_, own.kappa, on_policy=True)
