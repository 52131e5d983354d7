"""The Hub's door: a model's small files and headers first, its weights when they are needed."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moemerge.checkpoint.reference import Reference
from moemerge.errors import ReadError

_SMALL_FILES = [
    "config.json", "generation_config.json", "*.index.json", "tokenizer*", "chat_template*",
    "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "adapter_config.json",
]  # fmt: skip
_TIMEOUT = 10  # seconds, as huggingface_hub's own for a file's metadata
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Snapshot:
    """A repository's cached folder at one commit; `files` is what the Hub lists, if it answered.

    `note` says why the cache had to serve where the Hub was asked.
    """

    directory: Path
    commit: str
    files: tuple[str, ...]
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
        try:
            return _download_small_files(reference, cache_dir)
        except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
            if explained := _explain(error):
                raise HubError(*explained) from error
            reason, failure = f"the Hub cannot be reached ({_one_line(error)})", error
    folder = _cached(reference, Path(cache_dir or constants.HF_HUB_CACHE).expanduser())
    if folder is None:
        raise HubError(
            f"is neither a directory nor in the Hub's cache, and {reason}",
            "check the name, or download it where there is a network",
        ) from failure
    note = f"{reason}, so what the cache holds of it is used" if failure else ""
    return Snapshot(folder, folder.name, (), note)


def read_remote_header(snapshot: Snapshot, reference: Reference, file: str) -> dict[str, Any]:
    """A remote safetensors file's header as JSON, by range requests (no weight is read).

    Raises:
        HubError: the file cannot be read.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().parse_safetensors_file_metadata(
            reference.repo, file, revision=snapshot.commit
        )
    except Exception as error:
        raise HubError(*_unreadable(file, error)) from error
    return {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
        for name, t in found.tensors.items()
    }


def open_remote(snapshot: Snapshot, reference: Reference, file: str) -> BinaryIO:
    """A remote file to seek in and read; each read is a range request of `_BLOCK` bytes or more.

    Raises:
        HubError: the file cannot be read.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(reference.repo, file, revision=snapshot.commit)
        size = get_hf_file_metadata(url, timeout=_TIMEOUT).size
    except Exception as error:
        raise HubError(*_unreadable(file, error)) from error
    return io.BufferedReader(_RemoteFile(url, size or 0, file), _BLOCK)


class _RemoteFile(io.RawIOBase):
    def __init__(self, url: str, size: int, name: str):
        self.url, self.size, self.name, self.at = url, size, name, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        headers = {
            **build_hf_headers(),
            "Accept-Encoding": "identity",
            "Range": f"bytes={self.at}-{end - 1}",
        }
        try:
            response = get_session().get(self.url, headers=headers, timeout=_TIMEOUT)
            hf_raise_for_status(response)
        except Exception as error:
            raise HubError(*_unreadable(self.name, error)) from error
        data: bytes = response.content
        if len(data) != end - self.at:
            raise HubError(f"{self.name}: the Hub sent {len(data)} bytes of a range", "try again")
        buffer[: len(data)] = data
        self.at = end
        return len(data)


def fetch(repo: str, commit: str, files: Iterable[str], cache_dir: str | None) -> None:
    """Download `files` of the repository at `commit` into the cache.

    Raises:
        ReadError: the download failed; what came is kept, so a new run goes on from there.
    """
    from huggingface_hub import snapshot_download

    wanted = sorted(files)
    try:
        with _bars(sys.stderr.isatty()):
            folder = snapshot_download(
                repo, revision=commit, cache_dir=cache_dir, allow_patterns=wanted
            )
    except Exception as error:
        raise _failed(repo, _one_line(error)) from error
    for file in wanted:  # without a network, some versions return what the cache holds
        if not (Path(folder) / file).exists():
            raise _failed(repo, f"{file} did not come")


def _failed(repo: str, why: str) -> ReadError:
    return ReadError(f"{repo}: the download failed ({why}); run the same command again")


def _download_small_files(reference: Reference, cache_dir: str | None) -> Snapshot:
    """Ask the Hub for the commit and its files, and download the small ones.

    The download is by the revision's name, not the commit's: so the cache learns what the name
    stands for, and a run without a network finds it.
    """
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(reference.repo, revision=reference.revision, timeout=_TIMEOUT)
    with _bars(False):
        folder = Path(
            snapshot_download(
                reference.repo,
                revision=reference.revision,
                cache_dir=cache_dir,
                allow_patterns=_SMALL_FILES,
            )
        )
    if folder.name != info.sha:  # pushed to between the two questions
        info = HfApi().model_info(reference.repo, revision=folder.name, timeout=_TIMEOUT)
    names = tuple(sibling.rfilename for sibling in info.siblings or ())
    return Snapshot(folder, folder.name, names)


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
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
        return f"is not a Hub id ({_one_line(error)})", "write `user/name`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"is refused by the Hub (HTTP {status})",
            "log in anew with `hf auth login`, or correct HF_TOKEN",
        )
    return None


def _unreadable(file: str, error: Exception) -> tuple[str, str]:
    """What and fix for a file of which no part can be read."""
    told = f"{file} cannot be read from the Hub ({_one_line(error)})", "try again later"
    return _explain(error) or told


def _one_line(error: Exception) -> str:
    """An HTTP library's message, which can be a page, as the beginning of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."
