"""The lines that commands print: of plans, routers, routing reports and edits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moemerge.options import Options
from moemerge.reporting import count, size

if TYPE_CHECKING:
    from moemerge.mixture import EditResult
    from moemerge.report import RoutingReport


def plan_lines(ready: Any, options: Options) -> Iterator[str]:
    """A plan as lines."""
    from moemerge.plan import recipe
    from moemerge.prepare import expected_peak, transfer

    made = ready.plan
    sources = {text: opened.tensors for text, opened in ready.checkpoints.items()}
    yield (
        f"{made.architecture}: {experts_line(made, ready)}, {made.config['dtype']}, "
        f"gate_mode {made.gate_mode}"
    )
    yield (
        f"{count(made.parameters)} parameters in all, {count(made.active_parameters)} active "
        f"a token"
    )
    tensors = [tensor for tensor in made.tensors if not tensor.made]
    copied = [t for t in tensors if recipe.is_copy(t.recipe, t.dtype, sources)]
    yield (
        f"{size(made.nbytes)} in {len(made.shards)} shards; {len(copied)} of {len(tensors)} "
        "tensors are copied byte for byte, the others computed"
    )
    if head := made.tied_head:
        yield (
            f"{head.name} ({size(head.nbytes)}) is a copy of the tied embeddings, for the programs "
            "that look for it in the files"
        )
    if fit := ready.fit:
        aligned = f", {sum(map(bool, fit.downs))} experts aligned" * fit.aligns
        beside = size(fit.nbytes(ready.body, made))
        yield f"fitted: {len(fit.matrices)} matrices of the body{aligned}; {beside} of disk for it"
    yield f"about {size(expected_peak(ready, options))} of memory at the peak"
    hub = transfer(ready, options)
    if hub.files or hub.cached:
        yield (
            f"from the Hub: {size(hub.files)} to download into the cache, which has "
            f"{size(hub.cached)} of it; or {size(hub.ranges)} with --stream, and nothing is kept"
        )
        yield (
            f"disk: {size(made.nbytes)} for the output"
            + (f" and {size(hub.files)} for the cache, unless with --stream" if hub.files else "")
        )
    if hub.ranges > hub.files > 0:
        yield (
            "--stream reads more than it saves: the gate mode runs the experts, which are then "
            "read twice (ridge with on_policy: false does not)"
        )
    for text in hub.whole:
        yield f"{text} can only be had whole: its files are downloaded, even with --stream"
    yield f"base      {ready.base.model.reference.text}"
    if rows := ready.vocabulary.summary:
        yield f"vocabulary: {rows}"
    if ready.cutting:
        split = ready.cutting.split
        yield f"split     {split.slices} slices by {split.assignment}, {split.shared} always on"
    for index, name in enumerate(() if ready.cutting else made.experts):
        expert = ready.prompts[index]
        yield (
            f"expert {index}  {name}: {len(expert.positive)} positive and "
            f"{len(expert.negative)} negative prompts"
            + (f", {len(expert.calibration)} pieces of text" if expert.calibration else "")
        )
    for donor in ready.shared:
        yield f"shared    {donor.name}: always on"
    for source in made.sources:
        where = source.directory or f"{source.repo} at {str(source.commit)[:12]}"
        yield f"source    {source.reference}: {where}"


def edit_line(built: EditResult) -> str:
    """What an edit of a mixture wrote."""
    plan = built.plan
    experts = f"{experts_line(plan)}; " if len(plan.experts) > 1 else ""
    return (
        f"{built.out}: {plan.architecture}, {experts}wrote {size(built.written)}, "
        f"copied {size(built.copied)} of {size(plan.nbytes)}"
    )


def experts_line(made: Any, ready: Any = None) -> str:
    """The numbers of experts: routed, per token, segments and shared."""
    line = f"{made.routed} experts, {made.routed_per_token} a token"
    if ready is None:
        return line
    if (segments := ready.config.segments) > 1:
        line += f" ({segments} segments of each of {len(made.experts)})"
    if shared := ready.target.mixture.shared:
        line += f", {shared} shared expert{'s' * (shared > 1)} always on"
    return line


def router_lines(merged: Any) -> Iterator[str]:
    """What a fit won, and how well the new routers route, as lines."""
    from moemerge.gates import modes, verdict
    from moemerge.report import fit_lines

    plan = merged.plan
    yield from fit_lines(merged.fitted)
    lines = list(verdict(merged.routing, plan.experts, plan.gate_mode))
    needs = modes.find(plan.gate_mode).NEEDS
    if lines:
        yield from lines
    elif needs.untaught:
        if needs.seed or plan.experts_per_token < len(plan.experts):
            yield f"routers: {needs.untaught}, so they choose nothing yet: train them"
    elif len(plan.experts) > 1:
        yield "routers: not measured; `moemerge routing --text` shows how they route text"


def routing_lines(found: RoutingReport) -> Iterator[str]:
    """A routing report as lines."""
    experts, summary = found["experts"], found["summary"]
    head = "first expert"
    widths = [max(5, len(name)) for name in experts]
    left = max(len(name) for name in (head, *(text["name"] for text in found["texts"])))
    yield "  ".join([f"{head:{left}}", *map(str.rjust, experts, widths)])
    for text in found["texts"]:
        shares = (sum(layer) / len(layer) for layer in zip(*text["first"], strict=True))
        cells = [f"{share:{width}.0%}" for share, width in zip(shares, widths, strict=True)]
        yield "  ".join([f"{text['name']:{left}}", *cells])
    load = (f"{name} {share:.0%}" for name, share in zip(experts, summary["load"], strict=True))
    yield f"load: {', '.join(load)} (entropy {summary['entropy']:.2f} of 1)"
    if summary["t1"] is not None:
        yield f"own expert first {summary['t1']:.0%}, among the first two {summary['t2']:.0%}"
    for text in found["texts"]:
        if text["perplexity"]:
            said = dict(text["perplexity"])
            numbers = [*said.pop("experts", {}).items()]
            cells = [f"{who} {number:.2f}" for who, number in [*said.items(), *numbers]]
            yield f"perplexity on {text['name']}: {', '.join(cells)}"
    yield from found["verdicts"]
