"""What every question to the Hub has in common: errors in words, waits, bars."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 10  # seconds, as huggingface_hub's own for a file's metadata
TRIES = 8
FEW_TRIES = 3
"""Where somebody waits for the answer, or something else can serve."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_PASSING = (408, 409, 412, 429)
"""Statuses that another try may change, beside those from 500 on."""

NOWHERE = "is neither a directory nor"
"""How the errors begin that tell of a source that is not to be found."""


class HubError(Exception):
    """A repository that cannot be had: `what` is wrong and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


class Patience:
    """How often one question is asked in vain: `tries` times, each after a longer wait.

    An answer that brought something, if not all, is not in vain: see `began_anew`.
    """

    def __init__(self, tries: int = TRIES):
        self.tries, self.failures = tries, 0

    def began_anew(self) -> None:
        """Count from 0 again."""
        self.failures = 0

    def again(self, error: Exception) -> bool:
        """Whether to ask once more after this error; True comes after the wait.

        The wait is as long as the Hub says, or twice as long each time.
        """
        self.failures += 1
        if self.failures >= self.tries or not _is_passing(error):
            return False
        time.sleep(
            _retry_after(error) or min(_FIRST_WAIT * 2 ** (self.failures - 1), _LONGEST_WAIT)
        )
        return True


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
    return getattr(getattr(_cause(error), "response", None), "status_code", None)


def why(error: Exception) -> str:
    """What went wrong, in one line without addresses, which may carry signatures."""
    cause, refused = _cause(error), status(error)
    if refused is None:
        return re.sub(r"https?://\S+", "the Hub", shortened(cause))
    said = " ".join(str(getattr(cause, "server_message", None) or "").split())[:160]
    return f"HTTP {refused}{': ' if said else ''}{said}"


def shortened(error: Exception) -> str:
    """An HTTP library's message, which can be a page, as the beginning of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."


def _is_passing(error: Exception) -> bool:
    """Whether the Hub is busy or the network failed.

    requests' errors of connections are OSErrors of no file; httpx has its own.
    """
    refused = status(error)
    if refused is not None:
        return refused in _PASSING or refused >= 500
    cause = _cause(error)
    names = {kind.__name__ for kind in type(cause).__mro__}
    return "TransportError" in names or (isinstance(cause, OSError) and cause.filename is None)


def _retry_after(error: Exception) -> float:
    """How long the Hub asks to wait, in seconds; 0 where it does not say."""
    headers = getattr(getattr(_cause(error), "response", None), "headers", {})
    value = headers.get("retry-after", "")
    return min(float(value), _LONGEST_WAIT) if value.isdigit() else 0.0


def _cause(error: Exception) -> Exception:
    """The error that tells: the first with an answer, otherwise the innermost."""
    while getattr(error, "response", None) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


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
