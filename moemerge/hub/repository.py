"""A model repository on the Hub, with the rights of the user who is logged in."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moemerge.errors import MoemergeError, RunError
from moemerge.files import CONFIG_FILE, GGUF_SUFFIX, WEIGHTS_SUFFIX
from moemerge.hub.client import TRIES, Patience, progress_bars, status, why

T = TypeVar("T")
Content = Path | bytes
"""The content of a file for the Hub: the path of a local file, or bytes."""

SHARD = re.compile(rf"model-\d{{5}}-of-\d{{5}}{re.escape(WEIGHTS_SUFFIX)}")


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: its size in bytes, and its sha256 (`lfs`) or its Git id."""

    nbytes: int
    digest: str
    lfs: bool


class Repository:
    """A model repository, with the rights of the user who is logged in.

    Each request is repeated while the Hub is busy or the network fails. If that does not help,
    every method raises RunError with one line.
    """

    def __init__(self, repo: str, bars: bool = False, tries: int = TRIES):
        from huggingface_hub import HfApi, constants, get_token

        self.tries = tries
        self.bars = bars  # huggingface_hub's own, on a terminal: bytes of the file on its way
        self.repo, self.url = repo, f"{constants.ENDPOINT}/{repo}"
        self.api = HfApi(token=get_token())

    def whoami(self) -> dict[str, Any] | None:
        """The Hub's entry of the token's user; None if it does not know the token."""
        return self._ask("asking who you are", self.api.whoami, missing=(401,))

    def info(self) -> Any:
        """The repository's entry on the Hub; None if there is none, or it is hidden."""
        return self._ask(
            "looking at it",
            lambda: self.api.model_info(self.repo, files_metadata=True),
            missing=(401, 404),
        )

    def files(self) -> dict[str, RemoteFile]:
        """The repository's files; empty if it does not exist."""
        info = self.info()
        return {
            one.rfilename: RemoteFile(
                one.size or 0, (one.lfs.sha256 if one.lfs else one.blob_id) or "", bool(one.lfs)
            )
            for one in (info.siblings if info else None) or ()
        }

    def may_write(self) -> bool:
        """Whether the Hub would accept a commit: this sends the request before a commit, and no
        commit.

        A successful `create_repo` proves nothing: it succeeds for every repository that exists.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        def ask() -> bool:
            answer = get_session().post(
                f"{constants.ENDPOINT}/api/models/{self.repo}/preupload/main",
                json={"files": [{"path": CONFIG_FILE, "sample": "e30=", "size": 2}]},
                headers=build_hf_headers(token=self.api.token),
                timeout=30,
            )
            hf_raise_for_status(answer)
            return True

        return bool(self._ask("asking for permission to write", ask, missing=(401, 403)))

    def create(self, private: bool) -> None:
        """Make the repository, unless it exists."""
        if self.info() is None:
            self._ask(
                "making the repository",
                lambda: self.api.create_repo(self.repo, private=private, exist_ok=True),
            )

    def commit(
        self,
        new: Mapping[str, Content],
        gone: Collection[str],
        title: str,
        advance: Callable[[int], object] = lambda nbytes: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, str]:
        """Upload files, delete others, and commit; returns each uploaded file's sha256.

        Objects that the Hub has already are not sent again. `advance` is called with each file's
        size. After `stopped` is set, nothing is committed.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        large = [name for name in new if SHARD.fullmatch(name) or name.endswith(GGUF_SUFFIX)]
        alone = [[name] for name in large]
        together = [name for name in new if name not in large]
        additions = []
        for names in filter(None, [*alone, together]):
            batch = [CommitOperationAdd(name, new[name]) for name in names]
            with progress_bars(self.bars and sys.stderr.isatty()):
                self._ask(
                    f"the upload of {names[0]}",
                    partial(self.api.preupload_lfs_files, self.repo, batch, free_memory=False),
                )
            additions += batch
            advance(sum(size_of(new[name]) for name in names))
        tried = False

        def ask() -> None:
            nonlocal tried
            if tried:  # it may have been done, and the answer lost
                there = self.files()
                done = all(holds(content, there.get(name)) for name, content in new.items())
                if done and not set(gone) & there.keys():
                    return
            tried = True
            deletions = [CommitOperationDelete(name) for name in gone]
            self.api.create_commit(self.repo, [*additions, *deletions], commit_message=title)

        if not stopped():
            self._ask("the commit", ask)
        return {one.path_in_repo: one.upload_info.sha256.hex() for one in additions}

    def check(self, content: Mapping[str, Content | int]) -> None:
        """Check that every file is there, because a `.gitignore` keeps files out without an error.

        Raises:
            RunError: a file is not there.
        """
        there = self.files()
        for name, what in content.items():
            nbytes = what if isinstance(what, int) else size_of(what)
            if name not in there or there[name].nbytes != nbytes:
                raise RunError(
                    f"{self.repo}: {name} did not arrive there; see whether the repository has a "
                    ".gitignore, then run the same command again"
                )

    def _ask(self, what: str, ask: Callable[[], T], missing: Collection[int] = ()) -> T | None:
        """The Hub's answer, with retries while they may help; None for a status in `missing`.

        Raises:
            RunError: retries do not help.
        """
        patience = Patience(self.tries)
        while True:
            try:
                with _quiet():
                    return ask()
            except MoemergeError:
                raise
            except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
                refused = status(error)
                if refused in missing:
                    return None
                if not patience.again(error):
                    told = ": your token may not write there" if refused in (401, 403) else ""
                    raise RunError(
                        f"{self.repo}: {what} failed ({why(error)}{told}); "
                        "run the same command again to go on"
                    ) from error


def holds(content: Content, there: RemoteFile | None) -> bool:
    """Whether a file on the Hub has this content."""
    if there is None or there.nbytes != size_of(content):
        return False
    if there.lfs:
        return _sha256(content) == there.digest
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == there.digest


def _sha256(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest, view = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with content.open("rb", buffering=0) as file:
        while got := file.readinto(view):
            digest.update(view[:got])
    return digest.hexdigest()


def size_of(content: Content) -> int:
    """The size of a content in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide huggingface_hub's log of failed tries: their addresses carry signatures."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
