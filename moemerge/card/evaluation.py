"""An evaluation in a card: a section with a table, and the Hub's model-index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moemerge.card.card import head_of, with_head
from moemerge.card.markdown import shown, table
from moemerge.card.slots import EVALUATION, NOT_EVALUATED, UNEVALUATED, block, content_of, filled
from moemerge.report import Evaluation, EvaluationRow
from moemerge.reporting import count

_OURS = "<!-- the model-index is moemerge's -->"
_INDEX = "model-index"
_BETTER = {True: " ↑", False: " ↓", None: ""}


def with_evaluation(text: str, found: Evaluation) -> str:
    """A card's text with these results, in place of earlier ones.

    A `model-index` that a person wrote in the card is kept.

    Raises:
        NoSlot: the card has no place for them.
    """
    text, marks = without_evaluation(text), []
    head = head_of(text)
    if _INDEX not in head:
        text, marks = with_head(text, {**head, _INDEX: _index(found)}), [_OURS]
    section = block(["## Evaluation", *marks, *_paragraphs(found)])
    return filled(filled(text, EVALUATION, section), NOT_EVALUATED, "")


def without_evaluation(text: str) -> str:
    """A card's text without evaluation results, because its routers have changed.

    Raises:
        NoSlot: the card has no place for results.
    """
    if _OURS in content_of(text, EVALUATION):
        head = head_of(text)
        head.pop(_INDEX, None)
        text = with_head(text, head)
    return filled(filled(text, EVALUATION, ""), NOT_EVALUATED, UNEVALUATED)


def cells(row: EvaluationRow) -> list[str]:
    """A row's values as text, each with its standard error; `-` if there is none."""
    places = 2 if row["kind"] == "text" else 4
    texts = ["-" if value is None else f"{value:.{places}f}" for value in row["values"]]
    errors = ["" if error is None else f" ± {error:.{places}f}" for error in row["stderr"]]
    return [text + error for text, error in zip(texts, errors, strict=True)]


def metric_of(row: EvaluationRow) -> str:
    """The metric of a row, with lm-eval's filter of the answers, if there was one."""
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
            shown(metric_of(row)) + _BETTER[row["higher_is_better"]],
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
    """The mixture's own results in the Hub's format."""
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
