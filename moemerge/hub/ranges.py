"""A file on the Hub: its bytes, read range by range."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from moemerge.hub.client import TIMEOUT, HubError, Patience, explain, why

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Remote:
    """A file on the Hub at one commit: its `size` in bytes, and its `etag`, a digest of its
    content.

    An endpoint other than the Hub's own may tell neither: then they are 0 and empty.
    """

    repo: str
    commit: str
    file: str
    size: int
    etag: str


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
    """Fill `view` with the remote file's bytes from `start`, with as many requests as needed.

    Bytes that came before a connection broke are kept. A busy or failing Hub is asked again, after
    the wait that it asks for, otherwise twice the wait before.

    Raises:
        HubError: the file may not be read, has changed, or does not come.
    """
    done, patience = 0, Patience()
    while done < len(view):
        before = done
        try:
            for piece in _range(remote, start + done, start + len(view)):
                view[done : done + len(piece)] = piece
                done += len(piece)
            if done < len(view):
                raise ConnectionError(f"it sent {done - before} bytes of a range")
        except HubError:
            raise
        except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
            if explained := explain(error):
                raise HubError(f"{remote.file}: {explained[0]}", explained[1]) from error
            if done > before:
                patience.began_anew()
            if not patience.again(error):
                what = f"{remote.file} cannot be read from the Hub ({why(error)})"
                raise HubError(what, "try again later") from error


def _range(remote: Remote, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end` as they come, after a check that the answer is about them."""
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
        if (etag and remote.etag and etag != remote.etag) or commit != remote.commit:
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
    """An answer and its body in pieces, from httpx or requests, whichever huggingface_hub uses."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):  # httpx
        with session.stream(
            "GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            yield response, response.iter_raw(1 << 20)
    else:
        with session.get(url, headers=headers, timeout=TIMEOUT, stream=True) as response:
            yield response, response.iter_content(1 << 20)
