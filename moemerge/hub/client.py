"""What every question to the Hub has in common: errors in words, waits, bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 10  # seconds, as huggingface_hub's own for a file's metadata
FIRST_WAIT = 0.25  # seconds, doubled after each request in vain
LONGEST_WAIT = 30.0  # seconds

NOWHERE = "is neither a directory nor"
"""How the errors begin that tell of a source that is not to be found."""


class HubError(Exception):
    """A repository that cannot be had: `what` is wrong and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def retry_after(error: Exception) -> float:
    """How long the Hub asks to wait, in seconds; 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("retry-after", "")
    return min(float(value), LONGEST_WAIT) if value.isdigit() else 0.0


def explain(error: Exception) -> tuple[str, str] | None:
    """What and fix for an answer that the Hub gave; None where it gave none."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is gated", "accept its licence on the Hub and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{NOWHERE} a repository on the Hub that you can see",
            "check the name, or log in with `hf auth login` if it is private",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision", "name a branch, tag or commit that exists"
    if isinstance(error, errors.HFValidationError):
        return f"is not a Hub id ({shortened(error)})", "write `user/name`"
    refused = status(error)
    if refused in (401, 403):
        return (
            f"is refused by the Hub (HTTP {refused})",
            "log in anew with `hf auth login`, or correct HF_TOKEN",
        )
    return None


def status(error: Exception) -> int | None:
    """The HTTP status that an error is about, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def shortened(error: Exception) -> str:
    """An HTTP library's message, which can be a page, as the beginning of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."


@contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """huggingface_hub's progress bars, only where `wanted`; it draws them into log files too."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
