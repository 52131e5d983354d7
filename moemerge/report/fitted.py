"""What the fit of body and experts did, in lines and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moemerge.report.data import FitSummary

_BARS = "▁▂▃▄▅▆▇█"
Pairs = Sequence[tuple[float, float]]


def fit_lines(fit: FitSummary) -> Iterator[str]:
    """What it won, a fact a line; nothing without a fit."""
    if pairs := fit.get("attention"):
        before, after = _means(pairs)
        yield (
            f"body: attention's outputs are {after:.1%} from the experts' own on their texts "
            f"({before:.1%} with the average); by layer {bars(pairs)}"
        )
    experts = fit.get("experts", [])
    for one in experts:
        if one["losses"]:
            without, aligned = one["losses"]
            kept = "aligned" if one["aligned"] else "left as it is"
            yield (
                f"{one['name']}: {kept}; loss on held-out texts {aligned:.3f} with alignment, "
                f"{without:.3f} without"
            )
    if always := [one["name"] for one in experts if one["aligned"] and not one["losses"]]:
        yield f"aligned: {', '.join(always)}"
    if pairs := fit.get("drift"):
        before, after = _means(pairs)
        yield (
            f"drift: the state is {after:.1%} from the experts' own models' with alignment, "
            f"{before:.1%} without; by layer {bars(pairs)}"
        )


def bars(pairs: Pairs) -> str:
    """A bar for each layer after the fit, beside the largest before it."""
    most = max((max(pair) for pair in pairs), default=0.0) or 1.0
    return "".join(_BARS[min(int(len(_BARS) * after / most), len(_BARS) - 1)] for _, after in pairs)


def _means(pairs: Pairs) -> tuple[float, float]:
    before, after = zip(*pairs, strict=True)
    return sum(before) / len(pairs), sum(after) / len(pairs)
