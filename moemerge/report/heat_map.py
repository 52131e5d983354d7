"""A routing report's heat map as a PNG for a model card; needs `moemerge[report]`."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

from moemerge.errors import InputError, Problem, one_line
from moemerge.report.data import RoutingPicture


def save(report: RoutingPicture, path: Path) -> None:
    """Draw for each text which expert its tokens find first, layer by layer, and write the PNG.

    One panel a text, (E, L): the share of its tokens whose first expert is the row's. The text's
    own expert is in bold. The same report gives the same bytes.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        problem = Problem("--png", "matplotlib is not installed", "pip install 'moemerge[report]'")
        raise InputError([problem]) from None
    from matplotlib.figure import Figure

    texts, names = report["texts"], [_shown(name) for name in report["experts"]]
    columns = min(2, len(texts))
    rows = math.ceil(len(texts) / columns)
    size = (1.0 + 4.5 * columns, 0.9 + rows * (0.6 + 0.24 * len(names)))  # inches
    with matplotlib.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # boxes stand for what the font lacks
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, text in zip(grid.flat, texts, strict=False):
            share = list(zip(*text["first"], strict=True))  # (E, L)
            image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axes.set_title(_shown(text["name"]), loc="left", fontsize=10, parse_math=False)
            axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
            axes.tick_params(labelsize=9, length=2)
            axes.spines[:].set_visible(False)
            if text["expert"] is not None:
                axes.yaxis.get_ticklabels()[text["expert"]].set_fontweight("bold")
        for axes in list(grid.flat)[len(texts) :]:
            axes.remove()
        figure.supxlabel("layer", fontsize=9)
        title = f"{_shown(report['model'])}: the first expert of each text's tokens"
        figure.suptitle(title, fontsize=12, parse_math=False)
        aspect = 5 * size[1]  # as narrow for many texts as for few
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.9, pad=0.02, aspect=aspect)
        bar.set_label("share of tokens")
        bar.outline.set_visible(False)
        figure.savefig(path, format="png", metadata={"Software": None})


def _shown(name: str) -> str:
    """A name as it fits a label."""
    line = one_line(name)
    return line if len(line) <= 24 else line[:21] + "..."
