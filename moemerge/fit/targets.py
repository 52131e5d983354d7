"""What a fit computes: the tensors' names and shapes, known before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moemerge.architectures import dense_shapes
from moemerge.checkpoint import Donor, Location
from moemerge.dense import Body
from moemerge.families import ATTENTION, DOWN, record_of
from moemerge.fit.align import MOST_TOKENS, is_factored
from moemerge.plan import ROUTERS, Fill, Plan, PlannedTensor, Read, Recipe, of_donor
from moemerge.text import Prompt

EVERY = 4
"""Of this many texts of an expert, one is held out to see whether alignment helps."""

_PROJECTION = re.compile(r"model\.layers\.\d+\.self_attn\.(?:q|k|v|o|out)_proj\.weight")
_DOWN = re.compile(rf"model\.layers\.\d+\.mlp\.{DOWN}\.weight")
_Factors = tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """The texts of an expert: those that the body and its alignment are fitted to, and those that
    are held out of the alignment."""

    body: tuple[Prompt, ...] = ()
    aligned: tuple[Prompt, ...] = ()
    held: tuple[Prompt, ...] = ()

    @property
    def tokens(self) -> int:
        """The tokens that the alignment is fitted to."""
        return sum(len(prompt.ids) - prompt.own for prompt in self.aligned)


@dataclass(frozen=True)
class Fit:
    """The fit of a merge: the body's `matrices`, and for each expert its `downs` that are aligned,
    with their names in the computed checkpoint (as in `Donor.aligned`).

    `always`: alignment is kept whatever held-out texts say. `texts` are each expert's.
    """

    matrices: Mapping[str, str]
    downs: tuple[Mapping[str, _Factors], ...]
    texts: tuple[Texts, ...]
    always: bool = False

    @property
    def aligns(self) -> bool:
        """Whether an expert is aligned."""
        return any(self.downs)

    def nbytes(self, body: Body, plan: Plan) -> int:
        """The bytes of the computed checkpoint, which is beside the output until that is whole."""
        return sum(tensor.nbytes for tensor in self.tensors(body, self.dtype(plan)))

    @staticmethod
    def dtype(plan: Plan) -> str:
        """The dtype of the computed checkpoint: the output's, or float32 for a GGUF file."""
        return "F32" if plan.is_gguf else plan.dtype

    def body(self, of: Body) -> Body:
        """The body with its fitted matrices."""
        return replace(of, fitted=self.matrices)

    def unfitted(self, of: Body) -> Body:
        """The body without them: the mean of the experts, or the base."""
        return replace(of, fitted={})

    def donors(self, of: Sequence[Donor]) -> tuple[Donor, ...]:
        """The experts with their aligned projections."""
        aligned = zip(of, self.downs, strict=True)
        return tuple(replace(donor, aligned=downs) if downs else donor for donor, downs in aligned)

    def tensors(self, body: Body, dtype: str) -> Iterator[PlannedTensor]:
        """Everything that the computed checkpoint has."""
        shapes, none = dense_shapes(body.base.model.config), Fill(0.0, ())
        for name, computed in self.matrices.items():
            yield PlannedTensor(computed, shapes[name], dtype, none)
        for downs, texts in zip(self.downs, self.texts, strict=True):
            for name, names in downs.items():
                hidden, inner = shapes[name]
                sizes: list[tuple[int, ...]] = [(hidden, inner)]
                if len(names) > 1:
                    sizes = [(texts.tokens, inner), (hidden, texts.tokens)]
                for one, size in zip(names, sizes, strict=True):
                    yield PlannedTensor(one, size, dtype, none)


def as_written(
    fit: Fit, donors: Sequence[Donor], places: Mapping[Recipe, Location]
) -> tuple[Fit, dict[str, Location]]:
    """The fit whose tensors are all whole, and where each lies in a finished mixture, of which
    `places` has the tensors by their recipes.

    Raises:
        KeyError: the mixture does not have one as it was fitted.
    """
    found = {name: places[Read(ROUTERS, name)] for name in fit.matrices.values()}
    whole: list[dict[str, _Factors]] = []
    for number, donor in enumerate(fit.donors(donors)):
        own = {name: (f"aligned.{number}.{name}",) for name in donor.aligned}
        found |= {own[name][0]: places[of_donor(donor, name)] for name in own}
        whole.append(dict(own))
    return replace(fit, downs=tuple(whole)), found


def matrices_of(body: Body) -> dict[str, str]:
    """The body's matrices that RegMean can fit, those of attention that all experts have alike, and
    their names in the computed checkpoint."""
    return {
        name: f"fitted.{name}"
        for name in dense_shapes(body.base.model.config)
        if _PROJECTION.fullmatch(name) and body.is_mean(name)
    }


def downs_of(body: Body, expert: int, texts: Texts) -> dict[str, _Factors]:
    """The down projections that can be aligned, because their output is added to the residual
    stream as it is; none without texts."""
    config = body.base.model.config
    record, tokens = record_of(config), texts.tokens
    plain = record and record.layers == ATTENTION and not record.post_norm and record.gated
    if not plain or not tokens:
        return {}
    found: dict[str, _Factors] = {}
    for name, shape in dense_shapes(config).items():
        if _DOWN.fullmatch(name):
            stem = f"aligned.{expert}.{name}"
            two = is_factored(tokens, *shape)
            found[name] = (f"{stem}.down", f"{stem}.up") if two else (stem,)
    return found


def held_apart(real: Sequence[Prompt], written: Sequence[Prompt] | None, always: bool) -> Texts:
    """An expert's texts. What it wrote is fitted to, and all real texts are held out; otherwise
    every fourth real text is held out, unless alignment is kept `always`."""
    if written is not None:
        return Texts(tuple(written), _few(written), () if always else tuple(real))
    if always:
        return Texts(tuple(real), _few(real))
    fitted = [prompt for at, prompt in enumerate(real) if at % EVERY != EVERY - 1]
    return Texts(tuple(real), _few(fitted), tuple(real[EVERY - 1 :: EVERY]))


def with_written(fit: Fit, written: Sequence[Sequence[Prompt]]) -> Fit:
    """The fit with the texts that the experts wrote in place of the planned ones."""
    texts = tuple(
        replace(of_one, body=tuple(own), aligned=_few(own))
        for of_one, own in zip(fit.texts, written, strict=False)
    )
    return replace(fit, texts=texts)


def _few(texts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The first texts, with at most `MOST_TOKENS` tokens in all."""
    found, tokens = list[Prompt](), 0
    for prompt in texts:
        tokens += len(prompt.ids) - prompt.own
        if tokens > MOST_TOKENS and found:
            break
        found.append(prompt)
    return tuple(found)
