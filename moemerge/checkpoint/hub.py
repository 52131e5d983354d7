"""The Hub's door: a model's small files and headers first, its weights when they are needed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moemerge.checkpoint.reference import Reference
from moemerge.errors import ReadError, nearest

_SMALL_FILES = [
    "config.json", "generation_config.json", "*.index.json", "tokenizer*", "chat_template*",
    "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "adapter_config.json", "README.md",
]  # fmt: skip
_TIMEOUT = 10  # seconds, as huggingface_hub's own for a file's metadata
_BLOCK = 1 << 16
_BUSY = (429, 500, 502, 503, 504)
_ASKED_AGAIN = 2
_TRIES, _WAIT, _LONGEST_WAIT = 6, 0.25, 30.0  # requests in vain, seconds, seconds


@dataclass(frozen=True)
class Remote:
    """A file on the Hub at one commit: its `size` in bytes, and `etag`, its content's digest."""

    repo: str
    commit: str
    file: str
    size: int
    etag: str


@dataclass(frozen=True)
class Snapshot:
    """A repository's cached folder at one commit; `files` is what the Hub lists, if it answered.

    `note` says why the cache had to serve where the Hub was asked.
    """

    directory: Path
    commit: str
    files: dict[str, Remote]
    note: str = ""


class HubError(Exception):
    """A repository that cannot be had: `what` is wrong and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def open_snapshot(reference: Reference, cache_dir: str | None) -> Snapshot:
    """The repository's cached folder, its small files downloaded, at the commit it stands at now.

    Offline (`HF_HUB_OFFLINE=1`, or the Hub does not answer) it is what the cache holds, however
    little that is; finding it loads no HTTP library.

    Raises:
        HubError: no such repository or revision, no access, or neither network nor cache.
    """
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set"
    failure: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        for attempt in range(_ASKED_AGAIN + 1):
            try:
                return _download_small_files(reference, cache_dir)
            except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
                if explained := _explain(error):
                    raise HubError(*_with_help(reference, error, explained)) from error
                reason, failure = f"the Hub cannot be reached ({shortened(error)})", error
                if _status(error) not in _BUSY or attempt == _ASKED_AGAIN:
                    break
                time.sleep(retry_after(error) or _WAIT * 2**attempt)
    cache = Path(os.path.expanduser(cache_dir or constants.HF_HUB_CACHE))  # noqa: PTH111
    folder = _cached(reference, cache)
    if folder is None:
        raise HubError(
            f"is neither a directory nor in the Hub's cache, and {reason}",
            "check the name, or download it where there is a network",
        ) from failure
    note = f"{reason}, so what the cache holds of it is used" if failure else ""
    return Snapshot(folder, folder.name, {}, note)


def open_remote(remote: Remote) -> BinaryIO:
    """A remote file to seek in and read; each read is a range request of `_BLOCK` bytes or more."""
    return io.BufferedReader(_RemoteFile(remote), _BLOCK)


class _RemoteFile(io.RawIOBase):
    def __init__(self, remote: Remote):
        self.remote, self.at = remote, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.remote.size}
        self.at = offset + starts[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self.remote.size - self.at))
        if size:
            read_range(self.remote, self.at, memoryview(buffer)[:size])
        self.at += size
        return size


def read_range(remote: Remote, start: int, view: memoryview) -> None:
    """Fill `view` with the remote file's bytes from `start`, over as many requests as it takes.

    What came before a connection broke is kept. A busy or failing Hub is asked again, after as long
    as it says or twice as long each time.

    Raises:
        HubError: it may not be read, is no longer what it was, or does not come.
    """
    done, failures = 0, 0
    while done < len(view):
        before = done
        try:
            for piece in _range(remote, start + done, start + len(view)):
                view[done : done + len(piece)] = piece
                done += len(piece)
            why, wait = f"it sent {done - before} bytes of a range", 0.0
        except HubError:
            raise
        except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
            why, wait = shortened(error), retry_after(error)
            if explained := _explain(error):
                raise HubError(*_of_file(remote.file, explained)) from error
        failures = 0 if done > before else failures + 1
        if done < len(view):
            if failures == _TRIES:
                raise HubError(
                    f"{remote.file} cannot be read from the Hub ({why})", "try again later"
                )
            time.sleep(wait or min(_WAIT * 2**failures, _LONGEST_WAIT))


def _range(remote: Remote, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end` as they come, once the answer is known to be about them."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(remote.repo, remote.file, revision=remote.commit)
    headers = {
        **build_hf_headers(),
        "Accept-Encoding": "identity",
        "Range": f"bytes={start}-{end - 1}",
    }
    with _get(url, headers) as (response, pieces):
        hf_raise_for_status(response)
        first = (*response.history, response)[0].headers  # the Hub's own; then its storage's
        etag = (first.get("x-linked-etag") or first.get("etag") or "").removeprefix("W/").strip('"')
        commit = first.get("x-repo-commit") or remote.commit
        if (etag or remote.etag) != remote.etag or commit != remote.commit:
            raise HubError(f"{remote.file}: is another file than the plan saw", "run it again")
        said = response.headers.get("content-range", "")
        if response.status_code != 206 or not said.startswith(f"bytes {start}-"):
            raise HubError(
                f"{remote.file}: the server does not send parts of files", "run without --stream"
            )
        left = end - start
        for piece in pieces:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return


@contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """An answer and its body in pieces, from httpx or from requests, whichever the library uses."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):  # httpx
        with session.stream(
            "GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
        ) as response:
            yield response, response.iter_raw(1 << 20)
    else:
        with session.get(url, headers=headers, timeout=_TIMEOUT, stream=True) as response:
            yield response, response.iter_content(1 << 20)


def retry_after(error: Exception) -> float:
    """How long the Hub asks to wait, in seconds; 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("retry-after", "")
    return min(float(value), _LONGEST_WAIT) if value.isdigit() else 0.0


def fetch(remotes: Iterable[Remote], cache_dir: str | None) -> None:
    """Download files of one repository at one commit into the cache.

    Their sizes and digests are checked, which huggingface_hub does not do: a resumed download may
    have been given other bytes than it asked for.

    Raises:
        ReadError: the download failed; what came is kept, so a new run goes on from there. Or it
            came damaged; then it is removed.
    """
    from huggingface_hub import snapshot_download

    files = {remote.file: remote for remote in remotes}
    wanted, (repo, commit) = sorted(files), next((r.repo, r.commit) for r in files.values())
    try:
        with progress_bars(sys.stderr.isatty()):
            folder = snapshot_download(
                repo, revision=commit, cache_dir=cache_dir, allow_patterns=wanted
            )
    except Exception as error:
        raise _failed(repo, shortened(error)) from error
    for file in wanted:  # without a network, some versions return what the cache holds
        path = Path(folder) / file
        if not path.exists():
            raise _failed(repo, f"{file} did not come")
        if not _is_whole(path, files[file]):
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise _failed(repo, f"{file} came damaged, or changed on the way")


def _is_whole(path: Path, remote: Remote) -> bool:
    """Whether a download has its size and, for large files, whose etag that is, its sha256."""
    if remote.size and path.stat().st_size != remote.size:
        return False
    if len(remote.etag) != 64:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == remote.etag


def _failed(repo: str, why: str) -> ReadError:
    return ReadError(f"{repo}: the download failed ({why}); run the same command again")


def _download_small_files(reference: Reference, cache_dir: str | None) -> Snapshot:
    """Ask the Hub for the commit and its files, and download the small ones.

    The download is by the revision's name, not the commit's: so the cache learns what the name
    stands for, and a run without a network finds it.
    """
    from huggingface_hub import HfApi, snapshot_download

    def ask(revision: str | None) -> Any:
        return HfApi().model_info(
            reference.repo, revision=revision, timeout=_TIMEOUT, files_metadata=True
        )

    info = ask(reference.revision)
    with progress_bars(False):
        folder = Path(
            snapshot_download(
                reference.repo,
                revision=reference.revision,
                cache_dir=cache_dir,
                allow_patterns=_SMALL_FILES,
                ignore_patterns=[
                    one.file for one in _listed(reference, info) if one.etag in _vocabularies
                ],
            )
        )
    if folder.name != info.sha:  # pushed to between the two questions
        info = ask(folder.name)
    files = {one.file: one for one in _listed(reference, info)}
    _vocabularies.update(one.etag for one in files.values() if one.file in VOCABULARIES)
    return Snapshot(folder, folder.name, files)


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_vocabularies: set[str] = set()
"""The etags of those that this process has had: megabytes each, and the fine-tunes of one base have
the same. The base is opened first, so it is its own that are there."""


def _listed(reference: Reference, info: Any) -> list[Remote]:
    """The files that the Hub lists at a commit."""
    return [
        Remote(
            reference.repo,
            info.sha,
            one.rfilename,
            one.size or 0,
            (one.lfs.sha256 if one.lfs else one.blob_id) or "",
        )
        for one in info.siblings or ()
    ]


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


def _cached(reference: Reference, cache: Path) -> Path | None:
    """The snapshot that the cache holds, complete or not, by the cache's documented layout
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).

    `snapshot_download(local_files_only=True)` refuses one with a file missing, and a merge
    downloads only the shards that it reads.
    """
    repository = cache / f"models--{reference.repo.replace('/', '--')}"
    commit = revision = reference.revision or "main"
    with suppress(OSError, UnicodeDecodeError):  # else it is a commit, or the cache has nothing
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    folder = repository / "snapshots" / commit
    return folder if re.fullmatch("[0-9a-f]{40}", commit) and folder.is_dir() else None


def _explain(error: Exception) -> tuple[str, str] | None:
    """What and fix for an answer that the Hub gave; None where it gave none."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is gated", "accept its licence on the Hub and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "is neither a directory nor a repository on the Hub that you can see",
            "check the name, or log in with `hf auth login` if it is private",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision", "name a branch, tag or commit that exists"
    if isinstance(error, errors.HFValidationError):
        return f"is not a Hub id ({shortened(error)})", "write `user/name`"
    status = _status(error)
    if status in (401, 403):
        return (
            f"is refused by the Hub (HTTP {status})",
            "log in anew with `hf auth login`, or correct HF_TOKEN",
        )
    return None


def _with_help(
    reference: Reference, error: Exception, explained: tuple[str, str]
) -> tuple[str, str]:
    """What `_explain` said, with the page to go to, or the revision that was probably meant."""
    from huggingface_hub import HfApi, constants, errors

    what, fix = explained
    if isinstance(error, errors.GatedRepoError):
        return what, f"{fix}: {constants.ENDPOINT}/{reference.repo}"
    if isinstance(error, errors.RevisionNotFoundError):
        with suppress(Exception):  # an answer less is no reason to fail otherwise
            refs = HfApi().list_repo_refs(reference.repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            return what, nearest(str(reference.revision), names)
    return what, fix


def _status(error: Exception) -> int | None:
    """The HTTP status that an error is about, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _of_file(file: str, explained: tuple[str, str]) -> tuple[str, str]:
    """What `_explain` said of a repository, of one file of it."""
    return f"{file}: {explained[0]}", explained[1]


def shortened(error: Exception) -> str:
    """An HTTP library's message, which can be a page, as the beginning of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."
