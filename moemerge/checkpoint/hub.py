"""The Hub's door: a model's small files and headers first, its weights when they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.checkpoint.reference import Reference
from moemerge.errors import ReadError

_SMALL_FILES = [
    "config.json", "generation_config.json", "*.index.json", "tokenizer*", "chat_template*",
    "additional_chat_templates/*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "adapter_config.json", "adapter_model.*",
]  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A repository's cached folder at one commit; `files` is what the Hub lists, if asked."""

    directory: Path
    commit: str
    files: tuple[str, ...]
    cache_dir: str | None


class HubError(Exception):
    """A repository that cannot be had: `what` is wrong and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


def open_snapshot(reference: Reference, cache_dir: str | None) -> Snapshot:
    """The repository's cached folder, its small files downloaded, at the commit it stands at now.

    Offline (`HF_HUB_OFFLINE=1`, or the Hub does not answer) it is what the cache holds.

    Raises:
        HubError: no such repository or revision, no access, or neither network nor cache.
    """
    from huggingface_hub import constants, snapshot_download

    where: dict[str, Any] = {
        "repo_id": reference.repo, "revision": reference.revision, "cache_dir": cache_dir
    }  # fmt: skip
    failure: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(reference.repo, revision=reference.revision, timeout=20)
            where["revision"] = info.sha
            folder = snapshot_download(allow_patterns=_SMALL_FILES, **where)
            names = tuple(sibling.rfilename for sibling in info.siblings or ())
            return Snapshot(Path(folder), str(info.sha), names, cache_dir)
        except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
            failure = error
            if _explain(error) is not None:
                raise HubError(*_explain(error)) from error  # type: ignore[misc]
    try:
        folder = Path(snapshot_download(local_files_only=True, **where))
    except Exception as error:
        reason = "the Hub cannot be reached" if failure else "HF_HUB_OFFLINE is set"
        raise HubError(
            f"{reference.text} is neither a directory nor in the Hub's cache, and {reason}",
            "check the name, or download it where there is a network",
        ) from (failure or error)
    return Snapshot(folder, folder.name, (), cache_dir)


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
        raise HubError(
            f"{file} cannot be read from the Hub ({error})", "try again later"
        ) from error
    return {
        name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
        for name, t in found.tensors.items()
    }


def fetch(repo: str, commit: str, files: Iterable[str], cache_dir: str | None) -> None:
    """Download `files` of the repository at `commit` into the cache.

    Raises:
        ReadError: the download failed; what came is kept, so a new run goes on from there.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repo, revision=commit, cache_dir=cache_dir, allow_patterns=sorted(files))
    except Exception as error:
        raise ReadError(f"{repo}: the download failed ({error}); run the same command again") from (
            error
        )


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
        return f"is not a Hub id ({error})", "write `user/name`"
    return None
