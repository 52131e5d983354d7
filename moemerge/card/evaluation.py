"""An evaluation as a card tells it: a section with a table, and the Hub's model-index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from moemerge.card.card import head_of, with_head
from moemerge.card.text import shown, table
from moemerge.report import Evaluation, EvaluationRow
from moemerge.reporting import count

_TITLE = "## Evaluation"
_MARK, _WITH_INDEX = "<!-- moemerge:eval -->", "<!-- moemerge:eval, model-index -->"
_INDEX = "model-index"
_SECTION = re.compile(
    rf"^{_TITLE}\n\n({_MARK}|{_WITH_INDEX})\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE
)
_BETTER = {True: " ↑", False: " ↓", None: ""}
_UNKNOWN = "It was not trained or evaluated as a whole:"
_KNOWN = "It was not trained as a whole:"


def told(text: str, found: Evaluation) -> str:
    """A card's text with these results, in the place of earlier ones, before its limits.

    A `model-index` that a person gave the card stays theirs.
    """
    text = untold(text)
    head, mark = head_of(text), _MARK
    if _INDEX not in head:
        text, mark = with_head(text, {**head, _INDEX: _index(found)}), _WITH_INDEX
    section = "\n\n".join([_TITLE, mark, *_paragraphs(found)])
    before, limits, after = text.replace(_UNKNOWN, _KNOWN).rpartition("## Limits\n")
    return f"{before}{section}\n\n{limits}{after}" if limits else f"{after}{section}\n\n"


def untold(text: str) -> str:
    """A card's text without the results of an evaluation: its routers are others now."""
    section = _SECTION.search(text)
    if not section:
        return text
    head = head_of(text)
    if section[1] == _WITH_INDEX:
        head.pop(_INDEX, None)
    return _SECTION.sub("", with_head(text, head)).replace(_KNOWN, _UNKNOWN)


def cells(row: EvaluationRow) -> list[str]:
    """A row's values as they are shown, a standard error behind them; `-` where there is none."""
    places = 2 if row["kind"] == "text" else 4
    texts = ["-" if value is None else f"{value:.{places}f}" for value in row["values"]]
    errors = ["" if error is None else f" ± {error:.{places}f}" for error in row["stderr"]]
    return [text + error for text, error in zip(texts, errors, strict=True)]


def metric_of(row: EvaluationRow) -> str:
    """What a row's values are, with the filter that lm-eval put answers through, if it did."""
    filtered = row.get("filter", "none")
    return f"{row['metric']} ({filtered})" if filtered != "none" else str(row["metric"])


def _paragraphs(found: Evaluation) -> Iterator[str]:
    versions, kinds = found["versions"], {row["kind"] for row in found["rows"]}
    yield (
        "This model (`mixture`) beside what it was made of, where that was at hand: the base, each "
        "expert alone, and the plain average of the experts' weights (`average`)."
    )
    titles = ["", "", *map(shown, found["columns"]), "of"]
    rows = (
        [
            shown(row["name"]),
            metric_of(row) + _BETTER[row["higher_is_better"]],
            *cells(row),
            f"{count(row['samples'])} " + ("tokens" if row["kind"] == "text" else "documents"),
        ]
        for row in found["rows"]
    )
    yield table(titles, rows)
    how = []
    if "text" in kinds:
        how.append(f"Texts were read in pieces of at most {found['length']} tokens.")
    if "task" in kinds:
        shots = sorted({row["shots"] for row in found["rows"] if row["kind"] == "task"})
        told = f"Tasks: lm-eval {versions['lm_eval']}, {', '.join(map(str, shots))} shots"
        limit = f", the first {found['limit']} documents of each" if found["limit"] else ""
        how.append(f"{told}{limit}, ± the standard error.")
    with_versions = [f"{k} {v}" for k, v in versions.items() if k != "lm_eval"]
    yield " ".join([*how, f"Measured with {', '.join(with_versions)}."])


def _index(found: Evaluation) -> Any:
    """The mixture's own results as the Hub reads them."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text" if row["kind"] == "text" else row["name"],
            dataset_name=row["name"],
            dataset_config=row["name"] if row["kind"] == "text" else None,
            dataset_args=None if row["kind"] == "text" else {"num_few_shot": row["shots"]},
            metric_type=row["metric"],
            metric_name=metric_of(row),
            metric_value=round(value, 4),
        )
        for row in found["rows"]
        if (value := row["values"][0]) is not None
    ]
    data = ModelCardData(model_name=found["model"], eval_results=results)
    return data.to_dict()[_INDEX]  # type: ignore[no-untyped-call]
