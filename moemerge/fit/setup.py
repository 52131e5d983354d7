"""A config's fit, made ready: which texts, which matrices, which experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig
from moemerge.dense import Body
from moemerge.errors import Findings
from moemerge.fit.targets import Fit, downs_of, held_apart, matrices_of
from moemerge.gates import ExpertPrompts, Gate, planned_texts
from moemerge.text import Encoder, Prompt, Vocabulary, other_ids


def fit_of(
    config: MergeConfig,
    gate: Gate,
    body: Body,
    donors: Sequence[Donor],
    prompts: Sequence[ExpertPrompts],
    encoder: Encoder | None,
    vocabulary: Vocabulary,
    findings: Findings,
) -> Fit | None:
    """The fit that the config asks for; None if it asks for none."""
    if not config.fits or encoder is None:
        return None
    always = config.align == "true"
    written = planned_texts(gate, prompts, encoder)
    texts, downs = [], []
    for number, donor in enumerate(donors):
        reads, own = _reader(vocabulary, donor), prompts[number].own
        real = [prompt for prompt in own if reads(prompt)]
        if len(real) < len(own):
            what = f"{len(own) - len(real)} of its texts are not fitted to: it cannot read them"
            findings.note_of(donor.name, what)
        of_one = held_apart(real, written[number] if written else None, always)
        decided = config.aligns and (always or of_one.held)
        if config.aligns and not decided:
            what = "not aligned: no real text is held out to tell whether it helps"
            findings.note_of(donor.name, what)
        texts.append(of_one)
        downs.append(downs_of(body, number, of_one) if decided else {})
    matrices = matrices_of(body) if config.body == "regmean" else {}
    if config.aligns and not any(downs) and any(one.tokens for one in texts):
        findings.without_effect("align", ": no expert is aligned")
    return Fit(matrices, tuple(downs), tuple(texts), always)


def _reader(vocabulary: Vocabulary, donor: Donor) -> Callable[[Prompt], bool]:
    """Whether an expert's own model reads a text: its tokens are the same for it, and no picture
    is in it."""
    rows = donor.model.config["vocab_size"]
    try:
        others = other_ids(vocabulary, donor)
    except ValueError:  # a note says already that the ids are taken to be the same
        others = frozenset()
    return lambda prompt: (
        not (prompt.seen or max(prompt.ids) >= rows or others.intersection(prompt.ids))
    )
