"""self: each expert writes text of its own, begun by its prompts if it has any; ridge on that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moemerge.checkpoint import Donor
from moemerge.dense import write_texts
from moemerge.gates.fitting import KAPPA, examples_of, not_positive, ridge
from moemerge.gates.needs import GateSettings, Needs, Passes, Prompts
from moemerge.gates.task import Example, Routers, Task
from moemerge.text import Prompt, other_ids

NEEDS = Needs(prompts=Prompts.OPTIONAL, body_pass=True, expert_models=True, seed=True)


@dataclass(frozen=True)
class Settings(GateSettings):
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

    def passes(self) -> Passes:
        """Every expert's model writes, and the texts pass their own expert's MLPs."""
        return Passes(own_mlps=True, texts=self.samples, tokens=self.tokens)


def routers(task: Task) -> Routers:
    """(E, D) per layer: ridge on the experts' own text, read through their own MLPs.

    Text that a model writes shows what it was trained on (self-generated calibration data: Williams
    and Aletras 2024, "Self-calibration for language model quantization and pruning",
    https://arxiv.org/abs/2410.17170). Of a text begun from nothing the first quarter does not
    count: it has yet to come to anything (`scripts/bench_routing.py`). Negative prompts,
    calibration texts, and prompts that no text was begun with, count as in ridge.
    """
    own, written, used = task.settings, [], set()
    assert task.encoder is not None
    start = task.encoder.start()
    read = task.body.base.model.config["vocab_size"]  # the body has no row for what lies beyond
    for index, donor in enumerate(task.donors):
        beyond = range(read, donor.model.config["vocab_size"])
        others = _others(task, donor)
        begun = beginnings(task.experts[index].positive, start, own.samples)
        texts = write_texts(
            donor,
            f"expert {index}",
            begun,
            own,
            [*task.encoder.special(), *beyond, *others],
            task.sources,
            task.options,
            task.reporter,
        )
        for text, beginning in zip(texts, begun, strict=True):
            unsettled = own.tokens // 4 if beginning == start else 0
            written.append(Example(Prompt(text.ids, text.own + unsettled), index))
            used.add((index, beginning))
    given = [x for x in examples_of(task.experts) if (x.expert, x.prompt) not in used]
    return ridge(task, [*written, *given], own.lambda_, own.kappa, on_policy=True)


def _others(task: Task, donor: Donor) -> frozenset[int]:
    """What the donor may not write: the body would read another token."""
    vocabulary = task.body.vocabulary
    try:
        return other_ids(vocabulary, donor) if vocabulary else frozenset()
    except ValueError:  # which was said: they are taken for the same
        return frozenset()


def beginnings(prompts: Sequence[Prompt], start: Prompt, samples: int) -> list[Prompt]:
    """What texts begin with: each prompt in turn and, after each, nothing but `start`.

    What is begun by a few prompts alone is too much alike: where half is begun from nothing, the
    loss on other text of the same kind is lower (`scripts/bench_routing.py`).
    """
    free = (start,) if start.ids or not prompts else ()
    turns = [one for prompt in prompts for one in (prompt, *free)] or free
    return [turns[number % len(turns)] for number in range(samples)]
