"""self: ridge regression on text that each expert writes, from its prompts if it has any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moemerge.checkpoint import Donor
from moemerge.dense import write_texts
from moemerge.gates.fitting import KAPPA, examples_of, not_positive, ridge
from moemerge.gates.needs import GateSettings, Needs, Passes, Prompts
from moemerge.gates.prompts import ExpertPrompts
from moemerge.gates.task import Example, Routers, Task
from moemerge.text import Prompt, other_ids

NEEDS = Needs(prompts=Prompts.OPTIONAL, body_pass=True, expert_models=True, seed=True)


@dataclass(frozen=True)
class Settings(GateSettings):
    """Each expert writes `samples` texts of `tokens` tokens, with `temperature` and `top_p`.

    `lambda` and `kappa` are as in ridge.
    """

    samples: int = 20
    tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    lambda_: float | None = None
    kappa: float = KAPPA

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Numbers that are not above 0, or too large."""
        yield from not_positive(
            samples=self.samples, tokens=self.tokens, temperature=self.temperature,
            top_p=self.top_p, **{"lambda": self.lambda_}, kappa=self.kappa,
        )  # fmt: skip
        if self.samples * self.tokens > 10**7:
            yield "samples", f"is {self.samples}", "write a smaller number: a thousand is much"
        if self.top_p > 1:
            yield "top_p", f"is {self.top_p:g}", "write a number above 0, at most 1"

    def passes(self) -> Passes:
        """Every expert's model writes texts, and the texts pass their own expert's MLPs."""
        return Passes(own_mlps=True, texts=self.samples, tokens=self.tokens)


def planned(own: Settings, experts: Sequence[ExpertPrompts], start: Prompt) -> list[list[Prompt]]:
    """What each expert will write, with zeros for the tokens that are not known yet."""
    return [
        [
            _settled(Prompt((*begun.ids, *[0] * own.tokens), len(begun.ids)), begun, start, own)
            for begun in beginnings(one.positive, start, own.samples)
        ]
        for one in experts
    ]


def write(task: Task) -> list[list[Prompt]]:
    """What each expert writes.

    If a text begins without a prompt, its first quarter is not its own, because it has no subject
    yet (`scripts/bench_routing.py`).
    """
    own, written = task.settings, []
    assert task.encoder is not None
    start = task.encoder.start()
    read = task.body.base.model.config["vocab_size"]  # the body has no row for larger ids
    for index, donor in enumerate(task.donors):
        beyond = range(read, donor.model.config["vocab_size"])
        others = _others(task, donor)
        begun = beginnings(task.experts[index].positive, start, own.samples)
        texts = write_texts(
            donor.alone,
            f"expert {index}",
            begun,
            own,
            [*task.encoder.special(), *beyond, *others],
            task.sources,
            task.options,
            task.reporter,
        )
        pairs = zip(texts, begun, strict=True)
        written.append([_settled(text, beginning, start, own) for text, beginning in pairs])
    return written


def routers(task: Task) -> Routers:
    """(E, D) for each layer: ridge on the experts' own text, which passes their own MLPs.

    Text that a model writes shows what it was trained on (self-generated calibration data: Williams
    and Aletras 2024, "Self-calibration for language model quantization and pruning",
    https://arxiv.org/abs/2410.17170). Negative prompts, calibration texts, and prompts with which
    no text begins, are used as in ridge.
    """
    own = task.settings
    assert task.encoder is not None
    start = task.encoder.start()
    texts = task.written or write(task)
    written = [Example(text, index) for index, of_one in enumerate(texts) for text in of_one]
    used = {
        (index, one)
        for index, expert in enumerate(task.experts)
        for one in beginnings(expert.positive, start, own.samples)
    }
    given = [x for x in examples_of(task.experts) if (x.expert, x.prompt) not in used]
    return ridge(task, [*written, *given], own.lambda_, own.kappa, on_policy=True)


def _settled(text: Prompt, beginning: Prompt, start: Prompt, own: Settings) -> Prompt:
    """The text, without its first quarter where it begins without a prompt."""
    return Prompt(text.ids, text.own + (own.tokens // 4 if beginning == start else 0))


def _others(task: Task, donor: Donor) -> frozenset[int]:
    """The ids that the donor may not write, because they are other tokens for the body."""
    vocabulary = task.body.vocabulary
    try:
        return other_ids(vocabulary, donor) if vocabulary else frozenset()
    except ValueError:  # a note says already that the ids are taken to be the same
        return frozenset()


def beginnings(prompts: Sequence[Prompt], start: Prompt, samples: int) -> list[Prompt]:
    """The beginnings of `samples` texts: each prompt in turn and, after each, `start` alone.

    Texts from only a few prompts are too similar. If half of the texts begin without a prompt, the
    loss on other text of the same kind is lower (`scripts/bench_routing.py`).
    """
    free = (start,) if start.ids or not prompts else ()
    turns = [one for prompt in prompts for one in (prompt, *free)] or free
    return [turns[number % len(turns)] for number in range(samples)]
