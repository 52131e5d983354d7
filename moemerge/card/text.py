"""The text of a model card: what the mixture is, its sources, its licence, and how to run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moemerge.card.markdown import HUB, shown, source, table
from moemerge.card.origins import making, sources
from moemerge.card.running import running, sees
from moemerge.card.slots import (
    EVALUATION,
    NOT_EVALUATED,
    ROUTERS_LIMIT,
    ROUTING,
    UNEVALUATED,
    block,
    slot,
)
from moemerge.checkpoint import is_hub_id, last_part
from moemerge.config import PromptText
from moemerge.gates import Prompts, verdict
from moemerge.plan import Plan
from moemerge.prepare import Claims, Prepared, caveats
from moemerge.report import Collision, FitSummary, RoutingSummary, fit_lines
from moemerge.reporting import count, size
from moemerge.split import Split
from moemerge.text import find

_MOST_PROMPTS = 5


@dataclass(frozen=True)
class CardOptions:
    """What a person wants in the card: `own` is their card's text, which comes first. Without
    `config`, the card shows neither the config nor any prompt."""

    own: str = ""
    config: bool = True


def sections(
    ready: Prepared,
    claims: dict[str, Claims],
    routing: RoutingSummary,
    told: CardOptions,
    picture: str,
    fitted: FitSummary,
) -> Iterator[str]:
    """The card's paragraphs, headings and tables, in markdown and in order; see `card.render`."""
    yield from _what(ready)
    yield from _experts(ready, told)
    yield from running(ready)
    yield slot(ROUTING, block(_routing(ready, routing, told, picture)))
    if lines := list(fit_lines(fitted)):
        yield "## Fitted to texts"
        yield "\n".join(f"- {shown(line, 300)}" for line in lines)
    yield slot(EVALUATION)
    yield from _limits(ready, routing)
    yield from sources(ready, claims)
    yield from making(ready, told.config)


def _what(ready: Prepared) -> Iterator[str]:
    """What the mixture is, for a reader who does not know the field, and its size."""
    plan, config = ready.plan, ready.config
    number = len(plan.experts)
    body = f"the base model's, {source(ready.base)}"
    if config.body != "base":
        weights = [expert.body_weight for expert in config.experts]
        body = "the average of the experts'"
        if config.body == "regmean":
            body += ", with attention's matrices fitted to their texts (RegMean)"
        body += f" (weights {', '.join(f'{w:g}' for w in weights)})" * (len(set(weights)) > 1)
    each = "is" if number == 1 else "are"
    pieces, always = config.segments, ready.target.mixture.shared
    cut = f", each cut into {pieces} segments" if pieces > 1 else ""
    beside = f" beside {always} always on" * bool(always)
    merged = (
        f"A language model put together from trained ones, without training them further: the "
        f"feed-forward parts (MLPs) of {number} model{'s' * (number != 1)} {each} its experts"
        f"{cut}, and in every layer a small router chooses {plan.routed_per_token} of "
        f"{plan.routed} for each token{beside}. All else, attention, norms and embeddings, is "
        f"{body}. It takes text{' and pictures' * sees(plan)} and continues it, and runs wherever "
        f"a {plan.architecture} runs."
    )
    yield _cut(ready, ready.cutting.split) if ready.cutting else merged
    config_said = plan.config.get("text_config", plan.config)
    context = config_said.get("max_position_embeddings")
    rows = {
        "Parameters": f"{count(plan.parameters)}, of which {count(plan.active_parameters)} work on "
        "any one token",
        "Size": size_of(plan),
        "Context": f"{context} tokens" if context else "",
        "Vocabulary": shown(ready.vocabulary.summary),
        "Router initialisation": f"`{plan.gate_mode}`: {_gate(ready)}",
    }
    yield "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items() if v)])


def size_of(plan: Plan) -> str:
    """The size of the weights in words."""
    kind = plan.config.get("dtype") or plan.dtype
    return f"{size(plan.nbytes)} ({kind}), on disk and, at least, in memory"


def _cut(ready: Prepared, split: Split) -> str:
    """The description of a mixture that was made by a split."""
    plan = ready.plan
    always = f" beside {split.shared} always on" * bool(split.shared)
    return (
        f"A language model whose feed-forward parts (MLPs) are cut into {split.slices} slices of "
        f"equal size ({split.assignment}), without training them further: in every layer a small "
        f"router chooses {plan.experts_per_token} of {split.routed} for each token{always}. All "
        f"weights are those of {source(ready.base)}. It takes text and continues it, and runs "
        f"wherever a {plan.architecture} runs."
    )


def _gate(ready: Prepared) -> str:
    """The gate mode in words, with its options."""
    line = (ready.gate.mode.__doc__ or "").partition("\n")[0].partition(": ")[2]
    options = dataclasses.asdict(ready.gate.settings)
    chosen = [
        f"{key.rstrip('_')} {value:g}" if isinstance(value, float) else f"{key.rstrip('_')} {value}"
        for key, value in options.items()
        if value is not None
    ]
    words = line.removeprefix("the default; ").rstrip(".")
    return words + f" ({shown(', '.join(chosen), 300)})" * bool(chosen)


def _experts(ready: Prepared, told: CardOptions) -> Iterator[str]:
    """A table of the experts; columns without content are left out."""
    columns: dict[str, list[str]] = {"#": [], "expert": [], "made of": []}
    prompts = {"for text like": "positive_prompts", "not for text like": "negative_prompts"}
    uses = ready.gate.needs.prompts is not Prompts.NONE
    for number, (name, donor, expert) in enumerate(
        zip(ready.plan.experts, ready.donors, ready.config.experts, strict=True)
    ):
        changes = {
            "noise": expert.noise_scale or None,
            "share of neurons drawn anew": expert.renew or None,
            "scaled by": expert.residual_scale,
        }
        extra = [f"{k} {v:g}" for k, v in changes.items() if v is not None and v != 1]
        row = {"#": str(number), "expert": shown(name)}
        row["made of"] = ", ".join([source(donor), *extra])
        if told.config and uses:
            row |= {title: _prompts(getattr(expert, key)) for title, key in prompts.items()}
        if uses and expert.calibration:
            row["calibrated on"] = _calibration(expert.calibration, ready.config.folder)
        for title, value in row.items():
            columns.setdefault(title, [""] * number).append(value)
        for values in columns.values():
            values += [""] * (number + 1 - len(values))
    titles = [title for title, values in columns.items() if any(values)]
    yield "## The experts"
    if told.config and uses:
        yield "Routers were set so that text like the prompts of an expert, shown here, finds it."
    yield table(titles, zip(*(columns[title] for title in titles), strict=True))


def _routing(
    ready: Prepared, routing: RoutingSummary, told: CardOptions, picture: str
) -> Iterator[str]:
    """The summary of the routers as a section; empty if it is not known."""
    confusion = routing.get("confusion")
    if not confusion:
        return
    names = ready.plan.experts
    if not told.config or any(expert.calibration for expert in ready.config.experts):
        collisions: list[Collision] = [{**one, "texts": []} for one in routing["collisions"]]
        routing = {**routing, "collisions": collisions}
    yield "## Routing"
    yield "\n".join(
        f"- {shown(line, 300)}" for line in verdict(routing, names, ready.plan.gate_mode)
    )
    yield "Each row: where the tokens of one expert's prompts go first, over all layers."
    titles = ["prompts of", *map(shown, names)]
    rows = zip(names, confusion, strict=True)
    yield table(titles, ([shown(n), *(f"{x:.0%}" for x in shares)] for n, shares in rows))
    if picture:
        yield (
            f"![Heat maps, one for each expert's prompts: for every layer, the share of tokens "
            f"that each expert gets first]({picture})"
        )


def _limits(ready: Prepared, routing: RoutingSummary) -> Iterator[str]:
    """What a reader must not expect of the mixture."""
    lines = [
        f"It was not trained{slot(NOT_EVALUATED, UNEVALUATED)} as a whole: try it on your own "
        "task, and beside each of its sources, before you rely on it. What its sources get wrong "
        "it may get wrong too."
    ]
    of_routers = _routers_limit(ready, routing)
    lines[0] += slot(ROUTERS_LIMIT, f"\n- {of_routers}" * bool(of_routers))
    if ready.cutting:
        if ready.cutting.per_token < ready.cutting.split.routed:
            lines.append("A token passes some of the slices only: train it before use.")
    elif (
        len(ready.donors) > 1
        and len({d.identity for d in ready.donors}) == 1
        and not ready.config.draws
    ):
        lines.append("All its experts are the same model: without training it gains nothing.")
    target = ready.target
    known = caveats(target.architecture, ready.base.model.config, target.mixture)
    lines += [shown(line, 300) for _, line in known]
    yield "## Limits"
    yield "\n".join(f"- {line}" for line in lines)


def _routers_limit(ready: Prepared, routing: RoutingSummary) -> str:
    """What a reader must not expect of the routers; empty if there is nothing to say."""
    plan, needs = ready.plan, ready.gate.mode.NEEDS
    if needs.untaught:
        if not needs.seed and plan.experts_per_token == len(plan.experts):
            return ""  # all experts weigh the same, as in a split with all slices on
        return f"Its routers are {needs.untaught} (`{plan.gate_mode}`): train it before use."
    if routing.get("confusion"):
        return (
            f"The routing numbers come from {routing['tokens']} tokens of prompts; other text may "
            "be routed otherwise."
        )
    if len(plan.experts) > 1:
        return "How well its routers choose was not measured; training them may help."
    return ""


def _calibration(named: str, folder: Path | None) -> str:
    if find(named, folder) or not is_hub_id(named):
        return shown(last_part(named))
    return f"[{shown(named)}]({HUB}/datasets/{named})"


def _prompts(prompts: tuple[PromptText, ...]) -> str:
    more = len(prompts) - _MOST_PROMPTS
    return "<br>".join(map(shown, map(str, prompts[:_MOST_PROMPTS]))) + f"<br>and {more} more" * (
        more > 0
    )
