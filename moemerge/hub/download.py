"""Downloads from the Hub: small files and headers first, weights when they are needed."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moemerge.errors import ReadError, nearest
from moemerge.hub.client import (
    FEW_TRIES,
    NOWHERE,
    TIMEOUT,
    HubError,
    Patience,
    explain,
    no_match_is_fine,
    progress_bars,
    status,
    why,
)
from moemerge.hub.ranges import Remote
from moemerge.reporting import Reporter, listener

SMALL_FILES = [
    "config.json", "generation_config.json", "*.index.json", "tokenizer*", "chat_template*",
    "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "adapter_config.json", "README.md", "*processor_config.json",
]  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A repository's cached folder at one commit.

    `files` are what the Hub lists, if it answered. `note` says why the cache was used although the
    Hub was asked.
    """

    directory: Path
    commit: str
    files: dict[str, Remote]
    note: str = ""


def open_snapshot(
    repo: str, revision: str | None, cache_dir: str | Path | None, known: dict[str, Path]
) -> Snapshot:
    """The repository's cached folder at its present commit, with its small files downloaded.

    Files of `VOCABULARIES` whose etag is in `known` are taken from there, and new ones are added to
    `known`. Without a network (`HF_HUB_OFFLINE=1`, or the Hub does not answer), it is what the
    cache holds, however little; then no HTTP library is loaded.

    Raises:
        HubError: no such repository or revision, no access, or neither network nor cache.
    """
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set"
    failure: Exception | None = None
    patience = Patience(FEW_TRIES)
    while not constants.HF_HUB_OFFLINE:
        try:
            return _download_small_files(repo, revision, cache_dir, known)
        except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
            if explained := explain(error):
                raise HubError(*_with_help(repo, revision, error, explained)) from error
            reason, failure = f"the Hub cannot be reached ({why(error)})", error
            if status(error) is None or not patience.again(error):  # no network: the cache serves
                break
    folder = _cached(repo, revision, cache_dir)
    if folder is None:
        raise HubError(
            f"{NOWHERE} in the Hub's cache, and {reason}",
            "check the name, or download it where there is a network",
        ) from failure
    note = f"{reason}, so the files in the cache are used" if failure else ""
    return Snapshot(folder, folder.name, {}, note)


def fetch(
    remotes: Iterable[Remote], cache_dir: str | Path | None, reporter: Reporter | None = None
) -> None:
    """Download files of one repository at one commit into the cache.

    Their sizes and digests are checked. huggingface_hub does not do that, and a server may resume a
    download with other bytes.

    Raises:
        ReadError: the download failed; what came is kept, so that a new run continues it. Or a file
            came damaged; it is removed.
    """
    from huggingface_hub import snapshot_download

    files = {remote.file: remote for remote in remotes}
    reporter, total = listener(reporter, False), sum(one.size for one in files.values())
    wanted, (repo, commit) = sorted(files), next((r.repo, r.commit) for r in files.values())
    try:
        with (
            progress_bars(False),
            reporter.progress(f"downloading {repo}", total, "B") as advance,
            _watched(_repository(repo, cache_dir) / "blobs", advance),
        ):
            folder = snapshot_download(
                repo, revision=commit, cache_dir=cache_dir, allow_patterns=wanted
            )
    except Exception as error:
        raise _failed(repo, why(error)) from error
    with reporter.progress(f"checking the download of {repo}", total, "B") as advance:
        for file in wanted:  # without a network, some versions return what the cache holds
            path = Path(folder) / file
            if not path.exists():
                raise _failed(repo, f"{file} did not come")
            if not _is_whole(path, files[file]):
                path.resolve().unlink()
                path.unlink(missing_ok=True)
                raise _failed(repo, f"{file} came damaged, or changed on the way")
            advance(files[file].size)


@contextmanager
def _watched(folder: Path, advance: Callable[[int], object]) -> Iterator[None]:
    """Report the growth of the files in a folder now and then, until the block ends.

    This counts the bytes whichever way a version of huggingface_hub downloads them.
    """

    def held() -> int:
        with suppress(OSError):  # a file may have its last name meanwhile
            return sum(path.stat().st_size for path in folder.iterdir())
        return 0

    before, ended = held(), threading.Event()

    def watch() -> None:
        told, over = before, False
        while not over:
            over = ended.wait(0.5)
            if (now := held()) > told:
                advance(now - told)
                told = now

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _is_whole(path: Path, remote: Remote) -> bool:
    """Whether a download has its size and, for a large file, its sha256 (its etag)."""
    if remote.size and path.stat().st_size != remote.size:
        return False
    if len(remote.etag) != 64:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == remote.etag


def _failed(repo: str, reason: str) -> ReadError:
    return ReadError(f"{repo}: the download failed ({reason}); run the same command again")


def _download_small_files(
    repo: str, revision: str | None, cache_dir: str | Path | None, known: dict[str, Path]
) -> Snapshot:
    """Ask the Hub for the commit and its files, and download the small ones.

    The download names the revision, not the commit. So the cache keeps which commit the revision
    is, and a run without a network finds it.
    """
    from huggingface_hub import HfApi, snapshot_download

    def ask(revision: str | None) -> Any:
        return HfApi().model_info(repo, revision=revision, timeout=TIMEOUT, files_metadata=True)

    info = ask(revision)
    blobs = _repository(repo, cache_dir) / "blobs"
    for one in _listed(repo, info):
        if one.file in VOCABULARIES and one.etag in known:
            with suppress(OSError):  # it is there, or cannot be linked: then it is downloaded
                blobs.mkdir(parents=True, exist_ok=True)
                os.link(known[one.etag].resolve(), blobs / one.etag)
    with progress_bars(False), no_match_is_fine():
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=SMALL_FILES,
            )
        )
    if folder.name != info.sha:  # pushed to between the two questions
        info = ask(folder.name)
    files = {one.file: one for one in _listed(repo, info)}
    here = {files[name].etag: folder / name for name in VOCABULARIES if name in files}
    known.update({etag: path for etag, path in here.items() if etag and path.exists()})
    return Snapshot(folder, folder.name, files)


VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Files of some megabytes that all fine-tunes of one base share: the cache has them once."""


def _listed(repo: str, info: Any) -> list[Remote]:
    """The files that the Hub lists at a commit."""
    return [
        Remote(
            repo,
            info.sha,
            one.rfilename,
            one.size or 0,
            (one.lfs.sha256 if one.lfs else one.blob_id) or "",
        )
        for one in info.siblings or ()
    ]


def measured(snapshot: Snapshot, files: Iterable[str]) -> Snapshot:
    """The snapshot with the sizes of `files`, for an endpoint that lists only names.

    Raises:
        HubError: the endpoint does not tell the size of a file either.
    """
    found = dict(snapshot.files)
    for file in files:
        one = found.get(file)
        if one is None or one.size or (snapshot.directory / file).exists():
            continue
        from huggingface_hub import get_hf_file_metadata, hf_hub_url  # an HTTP library with them

        try:
            said = get_hf_file_metadata(hf_hub_url(one.repo, file, revision=one.commit))
        except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
            what, fix = explain(error) or (why(error), "try again later")
            raise HubError(f"{file}: {what}", fix) from error
        found[file] = replace(one, size=said.size or 0, etag=one.etag or said.etag or "")
    return replace(snapshot, files=found)


def _repository(repo: str, cache_dir: str | Path | None) -> Path:
    """The repository's folder in the cache.

    The layout is documented (https://huggingface.co/docs/huggingface_hub/guides/manage-cache):
    `refs` has the commit of each revision, `blobs` each content by its etag, `snapshots` links to
    these by file name.
    """
    from huggingface_hub import constants

    cache = Path(os.path.expanduser(cache_dir or constants.HF_HUB_CACHE))  # noqa: PTH111
    return cache / f"models--{repo.replace('/', '--')}"


def _cached(repo: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """The snapshot that the cache holds, complete or not.

    `snapshot_download(local_files_only=True)` refuses a snapshot with a missing file, but a merge
    downloads only the shards that it reads.
    """
    repository = _repository(repo, cache_dir)
    commit = revision = revision or "main"
    with suppress(
        OSError, UnicodeDecodeError
    ):  # otherwise it is a commit, or the cache has nothing
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    folder = repository / "snapshots" / commit
    return folder if re.fullmatch("[0-9a-f]{40}", commit) and folder.is_dir() else None


def _with_help(
    repo: str, revision: str | None, error: Exception, explained: tuple[str, str]
) -> tuple[str, str]:
    """The result of `explain` with the page to open, or the revision that was probably meant."""
    from huggingface_hub import HfApi, constants, errors

    what, fix = explained
    if isinstance(error, errors.GatedRepoError):
        return what, f"{fix}: {constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.RevisionNotFoundError):
        with suppress(Exception):  # an answer less is no reason to fail otherwise
            refs = HfApi().list_repo_refs(repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            return what, nearest(str(revision), names)
    return what, fix
