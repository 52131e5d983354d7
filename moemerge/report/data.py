"""The contents of a routing report and an evaluation, as plain data for JSON."""

from __future__ import annotations

from typing import Any, TypedDict


class Collision(TypedDict):
    """Two experts: a `share` of the first expert's tokens is routed to the second. With such
    texts."""

    experts: list[int]
    share: float
    texts: list[str]


class TextRouting(TypedDict, total=False):
    """How one text is routed.

    `first`, `load` and `weight` are (L, E): how often an expert comes first, its share of the top
    k, and its mean weight. `t1` and `t2` are the shares of tokens whose own `expert` comes first,
    or among the first two; None if the text belongs to no expert. `perplexity` is by model: `moe`,
    the sources, and `experts` by name.
    """

    name: str
    expert: int | None
    tokens: int
    first: list[list[float]]
    load: list[list[float]]
    weight: list[list[float]]
    t1: float | None
    t2: float | None
    perplexity: dict[str, Any] | None


class RoutingSummary(TypedDict, total=False):
    """The summary of all texts; empty without any.

    `layer_t1` is `t1` by layer. `confusion[i][j]` is the share of expert i's tokens for which
    expert j comes first. `load` is each expert's share of the top k, and `entropy` is the load's
    entropy as a part of log E. `texts` are kept if the heat map is drawn from them.
    """

    tokens: int
    load: list[float]
    entropy: float
    idle: list[int]
    t1: float | None
    t2: float | None
    layer_t1: list[float] | None
    by_expert: dict[str, float]
    confusion: list[list[float]] | None
    collisions: list[Collision]
    blind_layers: list[int]
    texts: list[TextRouting]


class FittedExpert(TypedDict):
    """What alignment did for an expert: its mean loss on held-out texts without and with it, if
    there are such texts, and whether it was kept."""

    name: str
    aligned: bool
    losses: tuple[float, float] | None


class FitSummary(TypedDict, total=False):
    """What the fit of body and experts did; empty without a fit.

    `attention` is, for each layer, how far the outputs of attention's matrices are from the
    experts' own, as a share of their size, on the texts of the fit: with the mean and with the
    fitted ones. `drift` is, for each layer, the mean distance of the mixture's state from that of
    the expert's own model, as a share of its size, on held-out texts without and with alignment.
    """

    body: str
    experts: list[FittedExpert]
    attention: list[tuple[float, float]]
    drift: list[tuple[float, float]]


class PassageRouting(TypedDict):
    """A passage of text number `text`: its tokens, and the softmax of every layer's router over the
    experts, (L, T, E) as bytes in base64."""

    text: int
    tokens: list[str]
    weights: str


class RoutingPicture(TypedDict):
    """The content of the heat map, with the title `model`."""

    model: str
    experts: list[str]
    texts: list[TextRouting]


class RoutingReport(RoutingPicture):
    """How a mixture routes. `by_experts_per_token` is its perplexity for other values of k."""

    experts_per_token: int
    layers: int
    held_out: bool
    verdicts: list[str]
    summary: RoutingSummary
    by_experts_per_token: dict[str, float] | None
    passages: list[PassageRouting]


class EvaluationRow(TypedDict, total=False):
    """A text's perplexity or a task's metric: a value for each column, None if there is none."""

    kind: str
    name: str
    metric: str
    filter: str
    shots: int
    higher_is_better: bool | None
    samples: int
    values: list[float | None]
    stderr: list[float | None]


class Evaluation(TypedDict):
    """A mixture compared with its sources.

    `columns` are the models, the mixture first. `length` is the number of tokens in a piece of
    text. `limit` is the number of documents of each task. `versions` are those of the libraries
    that measured.
    """

    model: str
    plan_digest: str | None
    columns: list[str]
    rows: list[EvaluationRow]
    length: int | None
    limit: int | None
    versions: dict[str, str]
