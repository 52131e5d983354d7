"""The card and its picture as files of the output; files that a person edited stay as they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moemerge.card import card
from moemerge.card.evaluation import with_evaluation, without_evaluation
from moemerge.card.slots import NoSlot
from moemerge.card.text import CardOptions
from moemerge.card.training import with_training
from moemerge.files import read_json
from moemerge.output import (
    CARD_FILE,
    MANIFEST_FILE,
    PICTURE_FILE,
    Change,
    FileEntry,
    held,
    settle,
    writing,
)
from moemerge.prepare import Prepared
from moemerge.report import Evaluation, FitSummary, RoutingSummary, heat_map
from moemerge.reporting import Reporter


def write(
    change: Change,
    ready: Prepared,
    routing: RoutingSummary,
    told: CardOptions,
    reporter: Reporter,
    ours: bool = True,
    fitted: FitSummary | None = None,
) -> dict[str, FileEntry]:
    """Write the card and, if routing is known and matplotlib is installed, the picture.

    Returns the picture's entry for the manifest, if there is one. Without `ours`, a picture that
    exists is another program's, and is kept.

    Raises:
        WriteError: the output cannot be written.
    """
    with writing(change.out):
        drawn = _draw(change, ready, routing, reporter, ours)
        text = card.render(ready, routing, told, PICTURE_FILE if drawn else "", fitted)
        path = change.out / CARD_FILE
        if path.exists() and not card.is_untouched(path.read_bytes()):
            reporter.say(f"{path}: was edited since it was written, so it stays as it is")
        else:
            change.write(CARD_FILE, text.encode())
        return {PICTURE_FILE: change.entry(PICTURE_FILE)} if drawn else {}


def tell_evaluation(out: Path, found: Evaluation, reporter: Reporter) -> bool:
    """Write the results of `evaluate` into the card of a finished mixture; returns whether it was
    possible.

    Raises:
        RunError: another run is at work there.
        WriteError: `out` cannot be written.
    """
    settle(out)
    if not (out / CARD_FILE).is_file():
        reporter.say(f"{out / CARD_FILE}: is not there, so nothing tells the results")
        return False
    with held(out) as change:
        if read_json(out / MANIFEST_FILE).get("plan_digest") != found.get("plan_digest"):
            reporter.say(f"{out}: was changed since it was evaluated, so its card does not tell it")
            return False
        done = _rewrite(change, lambda text: with_evaluation(text, found), reporter)
        if done:
            change.commit()
        return done


def tell_training(change: Change, tuned: dict[str, Any], reporter: Reporter) -> None:
    """Write into the card how the routers were trained; `tuned` is the manifest's record of it."""
    _rewrite(change, lambda text: with_training(text, tuned), reporter)


def drop_evaluation(change: Change, reporter: Reporter) -> None:
    """Remove the results of an evaluation from the card, because the mixture has changed."""
    _rewrite(change, without_evaluation, reporter)


def rewritten(path: Path, edit: Callable[[str], str], reporter: Reporter) -> bytes | None:
    """A card with its text changed; None, with a note, if the card stays as it is."""
    try:
        content = card.changed(path.read_bytes(), edit)
        why = "was edited since it was written"
    except NoSlot:
        content, why = None, "is of an older moemerge"
    if content is None:
        reporter.say(f"{path}: {why}, so it stays as it is")
    return content


def _rewrite(change: Change, edit: Callable[[str], str], reporter: Reporter) -> bool:
    """Change the card's text, if there is a card that may be changed; returns whether it was."""
    path = change.out / CARD_FILE
    content = rewritten(path, edit, reporter) if path.is_file() else None
    if content is not None:
        change.write(CARD_FILE, content)
    return content is not None


def _draw(
    change: Change, ready: Prepared, routing: RoutingSummary, reporter: Reporter, ours: bool
) -> bool:
    """Draw how texts are routed, or remove the picture of earlier routers."""
    path = change.out / PICTURE_FILE
    if path.exists() and not ours:
        reporter.say(f"{path}: is not moemerge's, so it stays and the card shows no picture")
        return False
    if routing.get("confusion") and importlib.util.find_spec("matplotlib"):
        new = change.path(PICTURE_FILE)
        try:
            heat_map.save(card.picture(ready, routing), new)
            return True
        except OSError:
            raise
        except Exception as error:  # a picture is not worth a merge
            new.unlink(missing_ok=True)
            reporter.say(f"{path}: not drawn, matplotlib failed ({error})")
    change.remove(PICTURE_FILE)
    return False
