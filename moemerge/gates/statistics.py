"""How texts are routed, in numbers: accuracy, load, collisions, and a verdict on them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moemerge.gates.modes import find
from moemerge.gates.task import Routers
from moemerge.report import Collision, PassageRouting, RoutingSummary, TextRouting
from moemerge.text import Encoder

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

POOR = 0.75
"""Routers need help if fewer than this share of the tokens have the right first expert."""

COLLIDING = 0.15
"""Two experts collide if one gets at least this share of the other's tokens first."""

IDLE = 0.2
"""An expert with less than this part of an even load is hardly ever chosen.

Only experts that own some of the texts are judged, or all experts if no text has an owner."""

BLIND = 0.25
"""A layer cannot tell experts apart if its accuracy is below this part from chance to 1."""


@dataclass(frozen=True)
class Routed:
    """The logits of every layer's router on one passage.

    `logits` is (L, T, E). `name` is the text's name, and `expert` the expert that owns the text, if
    any. `tokens` are the passage's tokens as text.
    """

    name: str
    expert: int | None
    logits: Array
    tokens: tuple[str, ...] = ()

    @property
    def excerpt(self) -> str:
        """The passage's first characters, at most 60, on one line."""
        text = " ".join("".join(self.tokens).split())
        return text if len(text) <= 60 else text[:57] + "..."


def held_out(routers: Routers, encoder: Encoder | None) -> list[Routed]:
    """The logits on each text of a gate mode, by routers made without that text."""
    import numpy as np

    found = []
    for number, text in enumerate(routers.texts):
        logits = np.stack([layer[number] for layer in routers.held_out])
        own = text.prompt.ids[text.prompt.own :]
        tokens = tuple(encoder.spelled(own)) if encoder and len(own) <= 512 else ()
        found.append(Routed(str(text.expert), text.expert, logits, tokens))
    return found


def summary(routed: Sequence[Routed], experts: Sequence[str], per_token: int) -> RoutingSummary:
    """The measures of all texts together; empty if there is no text.

    `t1` is the share of tokens whose own expert comes first, `t2` the share whose own expert is
    among the first two, and `layer_t1` is `t1` of each layer. `confusion[i][j]` is the share of
    expert i's tokens for which expert j comes first. `load` is each expert's share of the places in
    the top `per_token`, and `entropy` is the entropy of `load`, divided by log E. All layers have
    the same weight, and so have texts of different names.
    """
    import numpy as np

    if not routed:
        return {}
    count, groups = len(experts), _groups(routed)
    shares = {name: _shares(of_one, per_token) for name, of_one in groups.items()}
    load = np.mean([share["load"].mean(axis=0) for share in shares.values()], axis=0)
    used = load[load > 0]
    entropy = float(-(used * np.log(used)).sum() / np.log(count)) if count > 1 else 1.0
    read = sorted({one.expert for one in routed if one.expert is not None}) or range(count)
    found: RoutingSummary = {
        "tokens": sum(one.logits.shape[1] for one in routed),
        "load": _rounded(load),
        "entropy": round(entropy, 4),
        "idle": [e for e in read if load[e] < IDLE / count],
        "t1": None, "t2": None, "layer_t1": None, "by_expert": {}, "confusion": None,
        "collisions": [], "blind_layers": [],
    }  # fmt: skip
    owned = {name: of_one for name, of_one in groups.items() if of_one[0].expert is not None}
    if not owned or count == 1:
        return found
    first = {name: shares[name]["first"] for name in owned}
    own = {name: of_one[0].expert or 0 for name, of_one in owned.items()}
    by_layer = np.mean([first[name][:, own[name]] for name in owned], axis=0)
    confusion = [
        np.mean([first[name].mean(axis=0) for name in owned if own[name] == e] or [np.zeros(count)],
                axis=0)
        for e in range(count)
    ]  # fmt: skip
    least = 1 / count + BLIND * (1 - 1 / count)
    found |= {
        "t1": round(float(by_layer.mean()), 4),
        "t2": round(float(np.mean([shares[name]["second"] for name in owned])), 4),
        "layer_t1": _rounded(by_layer),
        "by_expert": {
            experts[e]: round(float(confusion[e][e]), 4) for e in sorted(set(own.values()))
        },
        "confusion": [_rounded(row) for row in confusion],
        "collisions": list(_collisions(routed, confusion)),
        "blind_layers": [n for n, share in enumerate(by_layer) if share < least],
    }
    return found


def verdict(found: RoutingSummary, experts: Sequence[str], mode: str) -> Iterator[str]:
    """A summary in words: the accuracy on held-out prompts, and what would help if it is poor.

    `mode` is the gate mode that made the routers.
    """
    share = found.get("t1")
    if share is None:
        return
    yield (
        f"routers: {share:.0%} of the prompts' tokens find their expert first when their "
        f"prompt is held out (chance {1 / len(experts):.0%})"
    )
    yield from troubles(found, experts)
    if share < POOR and find(mode).NEEDS.expert_models:
        yield (
            "what would help: positive_prompts with which the experts' texts begin, calibration "
            "texts, more samples, or `moemerge tune routers` with text of each kind"
        )
    elif share < POOR:
        yield (
            "what would help: whole sentences in the style of the expert's own text instead of "
            "keywords, more of them, or gate_mode: self, where experts write their own"
        )


def troubles(found: RoutingSummary, experts: Sequence[str]) -> Iterator[str]:
    """The problems of a summary in words: collisions, idle experts, blind layers."""
    for pair in found["collisions"][:3]:
        one, other = (experts[e] for e in pair["experts"])
        texts = " and ".join(f"{text!r}" for text in pair["texts"])
        yield f"{one} and {other} collide: {pair['share']:.0%} of {one}'s tokens go to {other}" + (
            f", as of {texts}" if texts else ""
        )
    if found["idle"]:
        names = ", ".join(experts[e] for e in found["idle"])
        yield f"hardly ever chosen: {names}"
    if found["blind_layers"]:
        numbers = ", ".join(map(str, found["blind_layers"]))
        yield f"layers that hardly tell experts apart: {numbers}"


def texts_of(routed: Sequence[Routed], per_token: int) -> list[TextRouting]:
    """The routing of each text by name: `first`, `load` and mean `weight`, each (L, E)."""
    found: list[TextRouting] = []
    for name, of_one in _groups(routed).items():
        shares, expert = _shares(of_one, per_token), of_one[0].expert
        found.append(
            {
                "name": name,
                "expert": expert,
                "tokens": sum(one.logits.shape[1] for one in of_one),
                "first": [_rounded(row) for row in shares["first"]],
                "load": [_rounded(row) for row in shares["load"]],
                "weight": [_rounded(row) for row in shares["weight"]],
                "t1": None if expert is None else float(shares["first"][:, expert].mean()),
                "t2": None if expert is None else float(shares["second"]),
            }
        )
    return found


def passage_of(routed: Routed, text: int, most_tokens: int) -> PassageRouting:
    """A passage for the page: its tokens, and the softmax (L, T, E) over the experts.

    The softmax is in base64: one byte for each value, 255 for 1.
    """
    import numpy as np

    bytes_ = np.rint(255 * _softmax(routed.logits[:, :most_tokens])).astype(np.uint8)
    weights = base64.b64encode(np.ascontiguousarray(bytes_).tobytes()).decode()
    return {"text": text, "tokens": list(routed.tokens[:most_tokens]), "weights": weights}


def _groups(routed: Sequence[Routed]) -> dict[str, list[Routed]]:
    groups: dict[str, list[Routed]] = {}
    for one in routed:
        groups.setdefault(one.name, []).append(one)
    return groups


def _shares(routed: Sequence[Routed], per_token: int) -> dict[str, Any]:
    """The shares of one text: `first`, `load` and `weight`, each (L, E), and `second`, a number."""
    import numpy as np

    logits = np.concatenate([one.logits for one in routed], axis=1)
    order = np.argsort(-logits, axis=2, kind="stable")
    one_hot = np.eye(logits.shape[2])
    chosen = one_hot[order[:, :, :per_token]].sum(axis=2)
    weights = _softmax(np.where(chosen > 0, logits, -np.inf))
    expert = routed[0].expert
    second = (order[:, :, :2] == expert).any(axis=2).mean() if expert is not None else 0.0
    return {
        "first": one_hot[order[:, :, 0]].mean(axis=1),
        "load": chosen.mean(axis=1) / per_token,
        "weight": weights.mean(axis=1),
        "second": float(second),
    }


def _collisions(routed: Sequence[Routed], confusion: Sequence[Array]) -> Iterator[Collision]:
    """Pairs of experts (i, j), the worst first, with two texts of i that go to j most often."""
    pairs = [
        (float(row[other]), one, other)
        for one, row in enumerate(confusion)
        for other in range(len(row))
        if other != one and row[other] >= COLLIDING
    ]
    for share, one, other in sorted(pairs, reverse=True):
        taken = [
            (float((text.logits.argmax(axis=2) == other).mean()), text.excerpt)
            for text in routed
            if text.expert == one and text.tokens
        ]
        texts = list(dict.fromkeys(text for _, text in sorted(taken, reverse=True)))
        yield {"experts": [one, other], "share": round(share, 4), "texts": texts[:2]}


def _softmax(logits: Array) -> Array:
    import numpy as np

    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    softmax: Array = powers / powers.sum(axis=-1, keepdims=True)
    return softmax


def _rounded(values: Array) -> list[float]:
    return [round(float(value), 4) for value in values]
