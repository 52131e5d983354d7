"""What all requests to the Hub share: errors in words, retries, and progress bars."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 10  # seconds, as huggingface_hub's own for a file's metadata
TRIES = 8
FEW_TRIES = 3
"""Seconds to wait if a person waits for the answer, or if something else can serve."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_PASSING = (408, 409, 412, 429)
"""HTTP statuses for which another try may help, beside those from 500 on."""

NOWHERE = "is neither a directory nor"
"""The beginnings of errors that tell that a source was not found."""


class HubError(Exception):
    """A repository that cannot be used: `what` is wrong, and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


class Patience:
    """How often one request is repeated: `tries` times, each after a longer wait.

    A try that brought a part of the answer does not count: see `began_anew`.
    """

    def __init__(self, tries: int = TRIES):
        self.tries, self.failures = tries, 0

    def began_anew(self) -> None:
        """Count from 0 again."""
        self.failures = 0

    def again(self, error: Exception) -> bool:
        """Whether to try again after this error; True is returned after the wait.

        The wait is what the Hub asks for, otherwise twice the wait before.
        """
        self.failures += 1
        if self.failures >= self.tries or not _is_passing(error):
            return False
        time.sleep(
            _retry_after(error) or min(_FIRST_WAIT * 2 ** (self.failures - 1), _LONGEST_WAIT)
        )
        return True


def explain(error: Exception) -> tuple[str, str] | None:
    """(what is wrong, the fix) for an error that the Hub answered with; None if it did not
    answer."""
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
    """The HTTP status of an error, if it has one."""
    return getattr(getattr(_cause(error), "response", None), "status_code", None)


def why(error: Exception) -> str:
    """The error in one line, without addresses, because these may carry signatures."""
    cause, refused = _cause(error), status(error)
    if refused is None:
        return re.sub(r"https?://\S+", "the Hub", shortened(cause))
    said = " ".join(str(getattr(cause, "server_message", None) or "").split())[:160]
    return f"HTTP {refused}{': ' if said else ''}{said}"


def shortened(error: Exception) -> str:
    """The beginning of an HTTP library's message, on one line; the message may be a whole page."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."


def _is_passing(error: Exception) -> bool:
    """Whether the Hub is busy or the network failed.

    Connection errors of requests are OSErrors without a file; httpx has its own class.
    """
    refused = status(error)
    if refused is not None:
        return refused in _PASSING or refused >= 500
    cause = _cause(error)
    names = {kind.__name__ for kind in type(cause).__mro__}
    return "TransportError" in names or (isinstance(cause, OSError) and cause.filename is None)


def _retry_after(error: Exception) -> float:
    """The seconds that the Hub asks to wait; 0 if it does not say."""
    headers = getattr(getattr(_cause(error), "response", None), "headers", {})
    value = headers.get("retry-after", "")
    return min(float(value), _LONGEST_WAIT) if value.isdigit() else 0.0


def _cause(error: Exception) -> Exception:
    """The error with the most information: the first with an answer, otherwise the innermost."""
    while getattr(error, "response", None) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


@contextmanager
def progress_bars(wanted: bool) -> Iterator[None]:
    """Show huggingface_hub's progress bars only if `wanted`; it draws them into log files too."""
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


@contextmanager
def no_match_is_fine() -> Iterator[None]:
    """Hide huggingface_hub's warning that a repository has none of the small files: one of GGUF
    files needs none."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No files matched")

    logger = logging.getLogger("huggingface_hub._snapshot_download")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
