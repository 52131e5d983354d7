"""The card and its picture as files of the output; those that somebody edited are left alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moemerge import card, evaluation_text, heat_map
from moemerge.card_text import Told
from moemerge.errors import RunError
from moemerge.output import CARD_FILE, PICTURE_FILE, writing
from moemerge.prepare import Prepared
from moemerge.reporting import Reporter
from moemerge.shard_file import file_checksum
from moemerge.state import PART_SUFFIX, State


def write(
    out: Path, ready: Prepared, routing: dict[str, Any], told: Told, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Write the card and, where routing is known and matplotlib there, the picture.

    Returns the picture's entry for the manifest, if there is one.

    Raises:
        WriteError: `out` cannot be written.
    """
    with writing(out):
        drawn = _draw(out, ready, routing, reporter)
        _write_card(out, card.render(ready, routing, told, PICTURE_FILE if drawn else ""), reporter)
        if not drawn:
            return {}
        path = out / PICTURE_FILE
        return {PICTURE_FILE: {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}}


def tell_evaluation(out: Path, found: dict[str, Any], reporter: Reporter) -> bool:
    """Tell results of `evaluate` in the card of a finished mixture; whether that could be.

    Raises:
        RunError: another run is at work there.
        WriteError: `out` cannot be written.
    """
    if not (out / CARD_FILE).is_file():
        reporter.say(f"{out / CARD_FILE}: is not there, so nothing tells the results")
        return False
    with writing(out), State(out).mine(shared=False) as mine:
        if not mine:
            raise RunError(f"{out}: another moemerge is at work there; wait for it")
        done = rewrite(out, lambda text: evaluation_text.told(text, found), reporter)
        State(out).remove()
        return done


def rewrite(out: Path, change: Callable[[str], str], reporter: Reporter) -> bool:
    """Change the card's text in one step; one that somebody edited stays, and that is said."""
    path = out / CARD_FILE
    content = card.changed(path.read_bytes(), change) if path.is_file() else b""
    if content is None:
        reporter.say(f"{path}: was edited since it was written, so it stays as it is")
    if content:
        part = State(out).directory / f"{CARD_FILE}{PART_SUFFIX}"
        part.write_bytes(content)
        part.replace(path)
    return bool(content)


def _draw(out: Path, ready: Prepared, routing: dict[str, Any], reporter: Reporter) -> bool:
    """Draw how texts are routed, or remove what was drawn of other routers."""
    state, path = State(out), out / PICTURE_FILE
    if path.exists() and PICTURE_FILE not in state.started().get("files", ()):
        reporter.say(f"{path}: is not moemerge's, so it stays and the card shows no picture")
        return False
    part = state.directory / f"{PICTURE_FILE}{PART_SUFFIX}"
    if routing.get("confusion") and importlib.util.find_spec("matplotlib"):
        try:
            heat_map.save(card.picture(ready, routing), part)
            part.replace(path)
            return True
        except OSError:
            raise
        except Exception as error:  # a picture is not worth a merge
            reporter.say(f"{path}: not drawn, matplotlib failed ({error})")
    path.unlink(missing_ok=True)
    return False


def _write_card(out: Path, text: str, reporter: Reporter) -> None:
    path = out / CARD_FILE
    if path.exists() and not card.is_untouched(path.read_bytes()):
        reporter.say(f"{path}: was edited since it was written, so it stays as it is")
        return
    part = State(out).directory / f"{CARD_FILE}{PART_SUFFIX}"
    part.write_bytes(text.encode())
    part.replace(path)
