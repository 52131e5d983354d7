"""A small Hugging Face Hub on loopback, to read from and write to with the real huggingface_hub.

with FakeHub() as hub:
    hub.publish("user/name", directory)
    hub.account("hf_user", "user", role="write")
    hub.fault("503", times=2, file="*.safetensors")
    subprocess.run([...], env={**os.environ, **hub.environment(tmp_path, HF_TOKEN="hf_user")})
    assert hub.sent("user/name", "model.safetensors") == 0
    assert hub.received("user/name", "README.md") == 12
    assert [kind for kind, request in hub.fired()] == ["503", "503"]

What it answers is what huggingface_hub 0.36 and 2.4 ask and what the Hub said to them in November
2026: the routes under `/api`, `resolve` with ranges, uploads over Git LFS, commits, and the errors
by their `X-Error-Code`. `FAULTS` lists what can be made to go wrong. Xet is not spoken, nor are
multipart uploads. One thing cannot be asked of it: `ModelCard.validate` of huggingface_hub 0.36,
and so `ModelCard.push_to_hub`, goes to huggingface.co whatever HF_ENDPOINT says.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

CHUNK = 1 << 20
SAMPLE = 512
"""How much of a file's beginning the client shows before it uploads."""
LFS_BYTES = 10 << 20
LFS_SUFFIXES = (
    ".bin", ".ckpt", ".gguf", ".gz", ".h5", ".model", ".msgpack", ".npy", ".npz", ".onnx",
    ".parquet", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".zip", ".zst",
)  # fmt: skip
"""What the `.gitattributes` of a new repository give to Git LFS."""


@dataclass
class Request:
    """One request and its answer: `sent` counts the answer's bytes, `received` the body's.

    `file` is set for `resolve` and for the upload of an LFS file; `uploads` are the sizes of the
    files within a commit; `fault` is the kind of the fault that it met; `authorized` is whether a
    token came with it.
    """

    method: str
    path: str
    repo: str = ""
    file: str = ""
    status: int = 0
    sent: int = 0
    received: int = 0
    range: str = ""
    fault: str = ""
    uploads: dict[str, int] = field(default_factory=dict)
    authorized: bool = False


@dataclass
class Commit:
    """A repository's content at one commit: each file's path on disk, by its name there.

    `lfs` are the names of the files that are kept in Git LFS.
    """

    sha: str
    files: dict[str, Path]
    lfs: frozenset[str] = frozenset()
    parent: str = ""
    title: str = ""
    description: str = ""


@dataclass
class Repository:
    """A repository: its commits, and the branches and tags that name them.

    `readers` are the tokens that may read a `gated` or `private` one, `writers` those that may
    commit. `objects` are the LFS objects that it has, by sha256, committed or not; `announced` are
    the names of files by size and beginning, from when the client asked how to upload them.
    """

    name: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    readers: Collection[str] = frozenset()
    writers: Collection[str] = frozenset()
    objects: dict[str, Path] = field(default_factory=dict)
    announced: dict[tuple[int, bytes], str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, or a commit's full or short id names."""
        sha = self.refs.get(revision, revision)
        if sha in self.commits:
            return self.commits[sha]
        short = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return self.commits[short[0]] if len(short) == 1 else None


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and its `role`: read, write or fineGrained.

    A fine-grained token has `scopes`: permissions such as `repo.write` by user, organisation or
    repository.
    """

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()
    scopes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def owns(self, repo: str) -> bool:
        """Whether a repository is in one of the account's namespaces."""
        return repo.partition("/")[0] in (self.name, *self.orgs)

    def may_write(self, repo: str) -> bool:
        """Whether the token's role, and its scopes if it has them, let it write there."""
        if self.role == "fineGrained":
            holders = (repo, repo.partition("/")[0])
            return any("repo.write" in self.scopes.get(holder, ()) for holder in holders)
        return self.role == "write" and self.owns(repo)

    def whoami(self) -> dict[str, Any]:
        """What the Hub tells the token's holder."""
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        token["createdAt"] = "2026-11-01T00:00:00.000Z"
        if self.role == "fineGrained":
            token["fineGrained"] = {
                "canReadGatedRepos": False,
                "global": [],
                "scoped": [
                    {
                        "entity": {"_id": "0", "name": name, "type": self._kind(name)},
                        "permissions": list(permissions),
                    }
                    for name, permissions in self.scopes.items()
                ],
            }
        return {
            "type": "user", "id": "0", "name": self.name, "fullname": self.name, "isPro": False,
            "email": f"{self.name}@example.com", "emailVerified": True, "canPay": False,
            "avatarUrl": "/avatars/0.svg",
            "orgs": [
                {"type": "org", "id": "0", "name": org, "fullname": org, "roleInOrg": "write"}
                for org in self.orgs
            ],
            "auth": {"type": "access_token", "accessToken": token},
        }  # fmt: skip

    def _kind(self, entity: str) -> str:
        return "model" if "/" in entity else "org" if entity in self.orgs else "user"


@dataclass
class Fault:
    """What goes wrong: one of `kinds`, in requests that fit, until it fired `times`."""

    kinds: tuple[str, ...]
    times: int | None = 1
    method: str = ""
    repo: str = ""
    file: str = ""
    path: str = ""
    rate: float = 1.0
    seed: int = 0
    after: int | None = None
    retry_after: int | None = None
    seconds: float = 0.3

    def choose(self, request: Request, nth: int) -> str:
        """The kind of fault that a request meets, or none: seeded by what it asks, not by when."""
        fits = [kind for kind in self.kinds if FAULTS[kind](request)]
        if (
            not fits
            or self.times == 0
            or self.method not in ("", request.method)
            or self.repo not in ("", request.repo)
            or not (self.file == "" or fnmatch(request.file, self.file))
            or not re.search(self.path, request.path)
        ):
            return ""
        asked = f"{self.seed} {nth} {request.method} {request.path} {request.range}"
        chance = random.Random(asked)
        return chance.choice(fits) if chance.random() < self.rate else ""


def _any(request: Request) -> bool:
    return True


def _reads(request: Request) -> bool:
    return request.method == "GET"


def _asks_file(request: Request) -> bool:
    return request.file != "" and request.method in ("GET", "HEAD")


def _asks_range(request: Request) -> bool:
    return _asks_file(request) and _reads(request) and request.range != ""


def _puts(request: Request) -> bool:
    return request.method == "PUT"


def _commits(request: Request) -> bool:
    return request.method == "POST" and "/commit/" in request.path


FAULTS: dict[str, Callable[[Request], bool]] = {
    "401": _any,  # the token is no longer good
    "403": _any,
    "404": _any,
    "429": _any,  # with `Retry-After` where `retry_after` is given
    "500": _any,
    "503": _any,  # from a gateway: its body is HTML
    "cut": _reads,  # the connection ends in mid-body, after `after` bytes or half of it
    "reset": _reads,  # likewise, and without a goodbye (RST)
    "slow": _reads,  # the body dribbles, for `seconds` in all
    "wrong-etag": _asks_file,
    "changed": _asks_file,  # answered as it was; from then on the branch has other content
    "whole-file": _asks_range,  # 200 and the whole file
    "wrong-range": _asks_range,  # 206 and as many bytes, from one byte earlier or later
    "short-range": _asks_range,  # 206 and half of the bytes
    "put-cut": _puts,  # the connection ends after half, or `after` bytes, of what is uploaded
    "commit-lost": _commits,  # 500, and nothing was done
    "commit-unheard": _commits,  # 500, and yet it was done
}
"""The kinds of fault, and which requests each can befall."""


class FakeHub:
    """The server, the repositories it serves, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, Account] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.listed = {"size", "blobId", "lfs"}  # what it tells of each file; some endpoints less
        self.storage = ""  # the address of another that takes the uploads, as the Hub's does
        self.heard: bytearray | None = None  # make it one to keep every byte that comes in
        self._lock = threading.RLock()
        self._asked: Counter[tuple[str, str, str]] = Counter()
        self._digests: dict[Path, tuple[int, int, str]] = {}
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self.close()

    def close(self) -> None:
        """Let go of the port: from here on, connections to `url` are refused."""
        self._server.server_close()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must say."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a process must find in its environment, from its start, to use this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            **more,
        }

    def publish(self, name: str, directory: Path, *refs: str, **access: Any) -> str:
        """Serve a directory as a new commit of the repository `name`; return the commit's id.

        `refs` (default: main) move to the commit; `access` sets `gated`, `private`, `readers`,
        `writers`.
        """
        repository = self.repositories.setdefault(name, Repository(name))
        for key, value in access.items():
            setattr(repository, key, value)
        files = {
            path.relative_to(directory).as_posix(): path
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        lfs = {file for file, path in files.items() if is_lfs(file, path)}
        repository.objects.update((self.digest(files[file]), files[file]) for file in lfs)
        return self.commit(repository, files, lfs, refs or ("main",))

    def commit(
        self,
        repository: Repository,
        files: dict[str, Path],
        lfs: Collection[str],
        refs: Collection[str] = ("main",),
        title: str = "",
        description: str = "",
    ) -> str:
        """Make a new commit of these files that `refs` move to; return its id."""
        with self._lock:
            content = [(file, self.digest(path)) for file, path in files.items()]
            text = repr((repository.name, len(repository.commits), content))
            sha = hashlib.sha1(text.encode()).hexdigest()
            parent = next((repository.refs[ref] for ref in refs if ref in repository.refs), "")
            repository.commits[sha] = Commit(
                sha, files, frozenset(lfs) & files.keys(), parent, title, description
            )
            repository.refs.update(dict.fromkeys(refs, sha))
            return sha

    def change(self, name: str, file: str, content: bytes | None = None, ref: str = "main") -> str:
        """Commit other content for a file: every byte of it another, unless `content` is given."""
        repository = self.repositories[name]
        commit = repository.commits[repository.refs[ref]]
        if content is None:
            content = bytes(byte ^ 1 for byte in commit.files[file].read_bytes())
        path = self.store(content)
        if file in commit.lfs:
            repository.objects[self.digest(path)] = path
        return self.commit(repository, {**commit.files, file: path}, commit.lfs, (ref,))

    def create(self, name: str, private: bool = False, writers: Collection[str] = ()) -> Repository:
        """A new repository with its first commit, as the Hub makes it."""
        repository = Repository(name, private=private, readers={*writers}, writers={*writers})
        lines = [f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES]
        attributes = self.store("".join(lines).encode())
        self.commit(repository, {".gitattributes": attributes}, (), title="initial commit")
        self.repositories[name] = repository
        return repository

    def account(
        self,
        token: str,
        name: str,
        role: str = "write",
        orgs: Collection[str] = (),
        scopes: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Let a token be known as belonging to a user: `whoami` answers, and creating works."""
        self.accounts[token] = Account(name, role, tuple(orgs), scopes or {})

    def may_read(self, token: str, repository: Repository) -> bool:
        """Whether a token opens a private or gated repository."""
        account = self.accounts.get(token)
        known = token in repository.readers or token in repository.writers
        return known or (account is not None and account.owns(repository.name))

    def may_write(self, token: str, repository: Repository) -> bool:
        """Whether a token may commit to a repository: as a writer, or as who owns it."""
        account = self.accounts.get(token)
        if account is None or (account.role == "write" and token in repository.writers):
            return token in repository.writers
        return account.may_write(repository.name)

    def fault(self, *kinds: str, **how: Any) -> Fault:
        """Let requests meet a fault of these kinds (see `FAULTS`); the first declared comes first.

        `times` (1; None: always) says how often, `rate` and `seed` to how many of the requests that
        fit: by `method`, `repo`, `file` (a pattern) and `path` (a regular expression). `after`,
        `retry_after` and `seconds` say how bad it is.
        """
        assert kinds and set(kinds) <= FAULTS.keys(), kinds
        fault = Fault(kinds, **how)
        self.faults.append(fault)
        return fault

    def fired(self) -> list[tuple[str, Request]]:
        """Each fault that fired: its kind and the request that met it."""
        return [(request.fault, request) for request in self.asked() if request.fault]

    def sent(self, repo: str = "", file: str = "") -> int:
        """The bytes of files sent, of all or of one repository or file."""
        return sum(request.sent for request in self.asked(repo, file) if _asks_file(request))

    def received(self, repo: str = "", file: str = "") -> int:
        """The bytes of files received, of all or of one repository or file, as often as they came.

        An LFS file is known by the name under which its upload was announced last, else by its
        sha256.
        """
        total = 0
        for request in self.asked(repo):
            if request.method == "PUT" and file in ("", request.file):
                total += request.received
            total += sum(n for name, n in request.uploads.items() if file in ("", name))
        return total

    def asked(self, repo: str = "", file: str = "") -> list[Request]:
        """The requests, all of them or those about one repository or file."""
        with self._lock:
            return [
                request
                for request in self.requests
                if repo in ("", request.repo) and file in ("", request.file)
            ]

    def forget(self) -> None:
        """Count from here on."""
        with self._lock:
            self.requests.clear()

    def record(self, request: Request) -> None:
        """Remember a request; its answer is filled in while it is sent."""
        with self._lock:
            self.requests.append(request)

    def hear(self, data: bytes) -> None:
        """Keep what came in, if that is wanted: request lines, headers, bodies."""
        if self.heard is not None:
            with self._lock:
                self.heard += data

    def meet(self, request: Request) -> Fault | None:
        """The fault that a request meets; `request.fault` is set to its kind."""
        with self._lock:
            key = (request.method, request.path, request.range)
            self._asked[key] += 1
            for fault in self.faults:
                if kind := fault.choose(request, self._asked[key]):
                    request.fault = kind
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def store(self, content: bytes) -> Path:
        """Keep content as a file of the Hub's own."""
        path = Path(self._folder.name) / hashlib.sha256(content).hexdigest()
        if not path.exists():
            part = path.with_name(f"{path.name}.{threading.get_ident()}")
            part.write_bytes(content)
            part.replace(path)
        return path

    def receive(self, incoming: _Incoming, oid: str, limit: int | None) -> Path | None:
        """Keep an LFS object as it comes in; None if it is not what `oid` says it is."""
        descriptor, name = tempfile.mkstemp(dir=self._folder.name)
        digest, part = hashlib.sha256(), Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                most = CHUNK
                while data := incoming.read(most):
                    stream.write(data)
                    digest.update(data)
                    if limit is not None and incoming.taken >= limit:
                        raise _Cut
                    most = CHUNK if limit is None else min(CHUNK, limit - incoming.taken)
            return part.replace(part.with_name(oid)) if digest.hexdigest() == oid else None
        finally:
            part.unlink(missing_ok=True)

    def digest(self, path: Path) -> str:
        """A file's sha256, which serves as its ETag if it is in Git LFS; read once."""
        stat = path.stat()
        known = self._digests.get(path)
        if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            known = self._digests[path] = (stat.st_size, stat.st_mtime_ns, digest)
        return known[2]

    def know(self, path: Path, digest: str) -> None:
        """Take a file's digest for known, for one too large to be read."""
        stat = path.stat()
        self._digests[path] = (stat.st_size, stat.st_mtime_ns, digest)

    def pointer(self, path: Path) -> bytes:
        """What Git keeps of a file that is in Git LFS."""
        version = "https://git-lfs.github.com/spec/v1"
        oid, size = self.digest(path), path.stat().st_size
        return f"version {version}\noid sha256:{oid}\nsize {size}\n".encode()

    def etag(self, commit: Commit, file: str) -> str:
        """A file's ETag, which is also what an upload is compared with."""
        path = commit.files[file]
        return self.digest(path) if file in commit.lfs else git_hash(path.read_bytes())

    def entry(self, commit: Commit, file: str) -> dict[str, Any]:
        """A file as a listing of the tree shows it."""
        path = commit.files[file]
        size, oid = path.stat().st_size, self.etag(commit, file)
        entry = {"type": "file", "path": file, "size": size, "oid": oid}
        if file in commit.lfs:
            pointer = self.pointer(path)
            entry["oid"] = git_hash(pointer)
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": len(pointer)}
        return entry


def is_lfs(file: str, path: Path) -> bool:
    """Whether the Hub keeps a file in Git LFS."""
    with path.open("rb") as stream:
        return _goes_to_lfs(file, path.stat().st_size, stream.read(SAMPLE))


def git_hash(content: bytes) -> str:
    """The id that Git gives to content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _goes_to_lfs(file: str, size: int, sample: bytes) -> bool:
    return file.endswith(LFS_SUFFIXES) or size > LFS_BYTES or b"\0" in sample


def _ignored(file: str, gitignore: str) -> bool:
    """Whether one of the patterns fits the file or a folder that it is in; no negations."""
    patterns = [line.strip().rstrip("/") for line in gitignore.splitlines()]
    parts = file.split("/")
    names = [*parts, *("/".join(parts[: n + 1]) for n in range(len(parts)))]
    patterns = [pattern for pattern in patterns if pattern and pattern[0] != "#"]
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


class _Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers
        self.json: dict[str, Any] = {"error": message}


class _Cut(Exception):
    """The connection ends here."""


class _Incoming:
    """A request's body, whole by `Content-Length` or in chunks; `taken` of it has been read."""

    def __init__(
        self,
        stream: BinaryIO,
        headers: Any,
        request: Request,
        hear: Callable[[bytes], object] = lambda data: None,
    ):
        self.stream, self.request, self.hear = stream, request, hear
        self.chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.size = self.left = 0 if self.chunked else int(headers.get("Content-Length") or 0)
        self.taken, self.kept = 0, b""

    def read(self, most: int = CHUNK) -> bytes:
        """The next bytes; none at the end."""
        if self.kept:
            data, self.kept = self.kept, b""
            return data
        if self.chunked and not self.left:
            self.left = int(self._line().partition(b";")[0], 16)
            if not self.left:
                self.chunked = False
                while self._line().strip():
                    pass
        data = self.stream.read(min(most, self.left))
        if self.left and not data:
            raise ConnectionResetError
        self.left -= len(data)
        self.taken += len(data)
        self.request.received += len(data)
        self.hear(data)
        if self.chunked and not self.left:
            self._line()
        return data

    def begin(self, size: int) -> bytes:
        """The body's first bytes, which the next `read` gives again."""
        begun = b""
        while len(begun) < size and (data := self.read(size - len(begun))):
            begun += data
        self.kept = begun
        return begun

    def rest(self) -> bytes:
        """All that is left."""
        return b"".join(iter(self.read, b""))

    def _line(self) -> bytes:
        line = self.stream.readline()
        if not line:
            raise ConnectionResetError
        return line


class _Handler(BaseHTTPRequestHandler):
    """One connection's requests, each handed to the first route that matches its path."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait 40 ms for the head's acknowledgement

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        self.asked_for = Request(
            self.command,
            self.path,
            range=self.headers.get("Range", ""),
            authorized="Authorization" in self.headers,
        )
        self.incoming = _Incoming(self.rfile, self.headers, self.asked_for, self.hub.hear)
        self.fault: Fault | None = None
        self.limit: int | None = None
        self.hub.record(self.asked_for)
        self.hub.hear(f"{self.requestline}\n{self.headers}".encode())
        try:
            try:
                self._follow_route()
            except _Refused as refused:
                self._refuse(refused)
        except _Cut:
            self._hang_up()
        except ConnectionError:
            self.close_connection = True

    def _follow_route(self) -> None:
        path = urlsplit(self.path).path
        matches = [
            (found, route)
            for methods, pattern, route in _ROUTES
            if self.command in methods.split() and (found := re.fullmatch(pattern, path))
        ]
        if not matches:
            raise _Refused(404, message="no such route")
        found, route = matches[0]
        parts = {name: unquote(text) for name, text in found.groupdict().items() if text}
        self.asked_for.repo, self.asked_for.file = parts.get("repo", ""), parts.get("file", "")
        if self.command == "PUT":
            self._name_upload(**parts)
        self.fault = self.hub.meet(self.asked_for)
        if self.asked_for.fault.isdigit():
            raise self._failure(int(self.asked_for.fault))
        route(self, **parts)

    def _met(self, kind: str) -> bool:
        return self.asked_for.fault == kind

    def _failure(self, status: int) -> _Refused:
        """The answer of a fault that is a status."""
        missing = "EntryNotFound" if self.asked_for.file else "RepoNotFound"
        said = {
            401: "Invalid credentials in Authorization header",
            403: "Authorization error.",
            404: "Entry not found" if self.asked_for.file else "Repository not found",
            429: "We had to rate limit you",
            500: "Internal Error - We're working hard to fix this as soon as possible!",
            503: "Service Temporarily Unavailable",
        }
        wait = self.fault.retry_after if self.fault else None
        headers = {} if status != 429 or wait is None else {"Retry_After": str(wait)}
        return _Refused(status, missing if status == 404 else "", said[status], **headers)

    # What is read

    def _info(self, repo: str, revision: str = "main") -> None:
        """GET /api/models/R[/revision/REV]"""
        repository, commit = self._find(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in commit.files]
        if self._query("blobs"):
            for sibling in siblings:
                entry = self.hub.entry(commit, sibling["rfilename"])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
        siblings = [
            {key: sibling[key] for key in sibling if key in {"rfilename", *self.hub.listed}}
            for sibling in siblings
        ]
        self._send_json(
            {
                "_id": "0", "id": repo, "modelId": repo, "sha": commit.sha, "tags": [],
                "private": repository.private, "gated": "auto" if repository.gated else False,
                "disabled": False, "downloads": 0, "likes": 0, "siblings": siblings,
            }
        )  # fmt: skip

    def _tree(self, repo: str, revision: str, under: str = "") -> None:
        """GET /api/models/R/tree/REV[/DIR][?recursive=True]: files, and the folders they are in"""
        _, commit = self._find(repo, revision)
        prefix, entries = f"{under}/" if under else "", {}
        for file in commit.files:
            if not file.startswith(prefix):
                continue
            inner = file[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                folder = prefix + "/".join(inner[:depth])
                oid = git_hash(f"{commit.sha} {folder}".encode())
                if depth == 1 or self._query("recursive"):
                    entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
            if len(inner) == 1 or self._query("recursive"):
                entries[file] = self.hub.entry(commit, file)
        if under and not entries:
            raise _Refused(404, "EntryNotFound", f"{under} does not exist on {revision!r}")
        self._send_json(list(entries.values()))

    def _paths_info(self, repo: str, revision: str) -> None:
        """POST /api/models/R/paths-info/REV: those of the paths that are there"""
        _, commit = self._find(repo, revision)
        paths = self._json()["paths"]
        self._send_json([self.hub.entry(commit, path) for path in paths if path in commit.files])

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        """HEAD or GET /R/resolve/REV/FILE, whole or a range of it"""
        repository, commit = self._find(repo, revision)
        token = self._token()
        if repository.gated and not self.hub.may_read(token, repository):
            raise _Refused(403 if token else 401, "GatedRepo", f"{repo} is restricted")
        if file not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        path, etag = commit.files[file], self.hub.etag(commit, file)
        size = path.stat().st_size
        begin, end = self._range(size)
        partial = "Range" in self.headers and not self._met("whole-file")
        if self._met("wrong-etag"):
            etag = etag[::-1]
        if self._met("changed"):
            self.hub.change(repo, file, ref=revision if revision in repository.refs else "main")
        headers = {
            "Content-Length": str(end - begin),
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{etag}"',
            "X-Repo-Commit": commit.sha,
        }
        if partial:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        self._start(206 if partial else 200, headers)
        if self.command != "HEAD":
            with path.open("rb") as stream:
                stream.seek(begin)
                while begin < end:
                    block = stream.read(min(CHUNK, end - begin))
                    self._write(block)
                    begin += len(block)

    def _whoami(self) -> None:
        """GET /api/whoami-v2"""
        self._send_json(self._account().whoami())

    # What is written

    def _create(self) -> None:
        """POST /api/repos/create"""
        account, asked = self._account(), self._json()
        name = f"{asked.get('organization') or account.name}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        if asked.get("type") not in (None, "model"):
            raise _Refused(400, message="this Hub has models only")
        self.asked_for.repo = name
        if not account.may_write(name):
            namespace = name.partition("/")[0]
            right = f'the rights to create a model under the namespace "{namespace}"'
            raise _Refused(403, message=f"You don't have {right}")
        if name in self.hub.repositories:
            refused = _Refused(409, message="You already created this model repo")
            refused.json["url"] = f"{self.hub.url}/{name}"
            raise refused
        self.hub.create(name, bool(private), {self._token()})
        self._send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": "0"})

    def _preupload(self, repo: str, revision: str) -> None:
        """POST /api/models/R/preupload/REV: how each file is to be uploaded"""
        repository, commit = self._writable(repo, revision)
        asked, told = self._json(), []
        gitignore = asked.get("gitIgnore")
        if gitignore is None and ".gitignore" in commit.files:
            gitignore = commit.files[".gitignore"].read_text()
        for asked_file in asked["files"]:
            path, size = asked_file["path"], asked_file["size"]
            sample = base64.b64decode(asked_file["sample"])
            repository.announced[size, sample] = path
            told.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if _goes_to_lfs(path, size, sample) else "regular",
                    "shouldIgnore": _ignored(path, gitignore or ""),
                    "oid": self.hub.etag(commit, path) if path in commit.files else None,
                }
            )
        self._send_json({"files": told, "commitOid": commit.sha})

    def _batch(self, repo: str) -> None:
        """POST /R.git/info/lfs/objects/batch: where to put which object"""
        asked = self._json()
        revision = asked.get("ref", {}).get("name", "main").removeprefix("refs/heads/")
        repository, _ = self._writable(repo, revision)
        told = []
        for wanted in asked["objects"]:
            oid = wanted["oid"]
            actions = {
                "upload": {"href": f"{self.hub.storage or self.hub.url}/lfs/{repo}/put/{oid}"},
                "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"},
            }
            answer = {"oid": oid, "size": wanted["size"], "authenticated": True}
            told.append(answer if oid in repository.objects else {**answer, "actions": actions})
        self._send_json({"transfer": "basic", "hash_algo": "sha256", "objects": told})

    def _name_upload(self, repo: str = "", oid: str = "") -> None:
        """Find by its size and beginning which file is being uploaded."""
        begun, repository = self.incoming.begin(SAMPLE), self.hub.repositories.get(repo)
        announced = repository.announced if repository else {}
        sizes = {self.incoming.size} if self.incoming.size else {size for size, _ in announced}
        names = [announced[size, begun] for size in sizes if (size, begun) in announced]
        self.asked_for.file = names[-1] if names else oid

    def _put(self, repo: str, oid: str) -> None:
        """PUT /lfs/R/put/OID: the address given by the batch, which asks for no token"""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            raise _Refused(403, message="no such bucket")
        cut = None
        if self._met("put-cut") and self.fault:
            half = max(self.incoming.size // 2, 1)
            cut = half if self.fault.after is None else self.fault.after
        path = self.hub.receive(self.incoming, oid, cut)
        if path is None:
            raise _Refused(400, message="BadDigest: the content is not what the address says")
        repository.objects[oid] = path
        self._start(200, {"Content-Length": "0", "ETag": f'"{oid}"'})

    def _verify(self, repo: str) -> None:
        """POST /R.git/info/lfs/verify"""
        repository, _ = self._writable(repo)
        asked = self._json()
        path = repository.objects.get(asked["oid"])
        if path is None or path.stat().st_size != asked["size"]:
            raise _Refused(404, message="the object is not there, or of another size")
        self._send_json({"message": "ok"})

    def _commit(self, repo: str, revision: str) -> None:
        """POST /api/models/R/commit/REV: lines of JSON, a header and what is to be done"""
        repository, commit = self._writable(repo, revision)
        if revision not in repository.refs:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        lines = [json.loads(line) for line in self.incoming.rest().splitlines() if line]
        steps = [(line["key"], line["value"]) for line in lines]
        for key, value in steps:
            if key == "file":
                value["content"] = base64.b64decode(value["content"])
                self.asked_for.uploads[value["path"]] = len(value["content"])
        if self._met("commit-lost"):
            raise self._failure(500)
        header = dict(steps).get("header", {})
        parent = header.get("parentCommit") or commit.sha
        if not commit.sha.startswith(parent):
            said = "A commit has happened since. Please refresh and try again."
            raise _Refused(412, message=said)
        files, lfs = dict(commit.files), set(commit.lfs)
        for key, value in steps:
            if key != "header":
                self._take_step(repository, files, lfs, key, value)
        title, description = header.get("summary", ""), header.get("description", "")
        sha = self.hub.commit(repository, files, lfs, (revision,), title, description)
        if self._met("commit-unheard"):
            raise self._failure(500)
        self._send_json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}",
                "hookOutput": "",
            }
        )

    def _take_step(
        self, repository: Repository, files: dict[str, Path], lfs: set[str], key: str, value: Any
    ) -> None:
        """Do what one line of a commit says to the files."""
        name = value["path"]
        if key == "file":
            files[name] = self.hub.store(value["content"])
            lfs.discard(name)
        elif key == "lfsFile":
            if value["oid"] not in repository.objects:
                said = "Your push was rejected because an LFS pointer pointed to a file that"
                raise _Refused(400, message=f"{said} does not exist: {name}")
            files[name] = repository.objects[value["oid"]]
            lfs.add(name)
        elif key in ("deletedFile", "deletedFolder"):
            inside = name.rstrip("/") + "/"
            gone = [n for n in files if n.startswith(inside)] if key[7:] == "Folder" else [name]
            if not gone or not set(gone) <= files.keys():
                raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            for file in gone:
                del files[file]
        else:
            raise _Refused(400, message=f"unknown step: {key}")

    def _validate(self) -> None:
        """POST /api/validate-yaml: the metadata at the head of a model card"""
        head = re.match(r"\s*---\r?\n(.*?)\r?\n?---", self._json()["content"], re.DOTALL)
        errors, warnings = [], []
        try:
            data = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError as error:
            data = {}
            errors.append(f"YAML Metadata Error: {error}")
        if not isinstance(data, dict):
            data = {}
            warnings.append("empty or missing yaml metadata in repo card")
        for key in ("base_model", "license", "tags"):
            values = data.get(key, [])
            values = values if isinstance(values, list) else [values]
            if not all(isinstance(value, str) for value in values):
                errors.append(f'"{key}" must be a string or an array of strings')
            elif key == "base_model":
                wrong = [value for value in values if not re.fullmatch(_NAME, value)]
                errors += [f'"base_model" with value "{value}" is not valid' for value in wrong]
        told = {
            "errors": [{"message": error} for error in errors],
            "warnings": [{"message": warning} for warning in warnings],
        }
        if errors:
            refused = _Refused(400)
            refused.json = told
            raise refused
        self._send_json(told)

    # Who asks, and what for

    def _find(self, repo: str, revision: str) -> tuple[Repository, Commit]:
        """The repository and commit, or what the Hub says to whoever may not see them."""
        token, repository = self._token(), self.hub.repositories.get(repo)
        hidden = repository and repository.private and not self.hub.may_read(token, repository)
        if repository is None or hidden:
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _writable(self, repo: str, revision: str = "main") -> tuple[Repository, Commit]:
        """Likewise, or what the Hub says to whoever may not write.

        The code comes with the 401 because the client knows the case by its address, if it begins
        with https.
        """
        repository, commit = self._find(repo, revision)
        token = self._token()
        if not token:
            raise _Refused(401, "RepoNotFound", "Invalid username or password.")
        if not self.hub.may_write(token, repository):
            account = self.hub.accounts.get(token)
            said = "pass `create_pr=1` as a query parameter to create a Pull Request"
            if account and account.role == "read":
                said = "you must use a write token to upload to a repository"
            raise _Refused(403, message=f"Forbidden: {said}.")
        return repository, commit

    def _account(self) -> Account:
        token = self._token()
        if token not in self.hub.accounts:
            said = "Invalid credentials in Authorization header"
            raise _Refused(401, message=said if token else "Invalid username or password.")
        return self.hub.accounts[token]

    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token.startswith("expired"):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return token

    def _query(self, name: str) -> bool:
        values = parse_qs(urlsplit(self.path).query).get(name, [""])
        return values[-1].lower() in ("true", "1")

    def _json(self) -> dict[str, Any]:
        """The body, be it JSON or a form."""
        text = self.incoming.rest()
        if "form" not in self.headers.get("Content-Type", ""):
            return json.loads(text)
        fields = parse_qs(text.decode())
        return {name: got if name == "paths" else got[0] for name, got in fields.items()}

    def _range(self, size: int) -> tuple[int, int]:
        begin, end = self._range_asked_for(size)
        length = end - begin
        if self._met("whole-file"):
            return 0, size
        if self._met("short-range"):
            return begin, begin + max(length // 2, 1)
        if self._met("wrong-range"):
            moved = begin - 1 if begin else min(1, size - 1)
            return moved, min(moved + length, size)
        return begin, end

    def _range_asked_for(self, size: int) -> tuple[int, int]:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-"))
        if asked is None or not any(asked.groups()):
            raise _Refused(416)
        if not asked[1]:
            return max(size - int(asked[2]), 0), size
        begin = int(asked[1])
        if begin >= size > 0:
            raise _Refused(416)
        return begin, min(int(asked[2]) + 1, size) if asked[2] else size

    # How it is said

    def _refuse(self, refused: _Refused) -> None:
        text, kind = json.dumps(refused.json).encode(), "application/json"
        if refused.status == 503:
            text, kind = f"<html><body>{refused.message}</body></html>".encode(), "text/html"
        headers = {"Content-Type": kind, "Content-Length": str(len(text))}
        if refused.code:
            headers["X-Error-Code"] = refused.code
        if refused.message and refused.status != 503:
            headers["X-Error-Message"] = refused.message
        headers |= {name.replace("_", "-"): value for name, value in refused.headers.items()}
        self._start(refused.status, headers)
        self._write(text)

    def _send_json(self, data: object) -> None:
        text = json.dumps(data).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(text))}
        self._start(200, headers)
        self._write(text)

    def _start(self, status: int, headers: dict[str, str]) -> None:
        """Begin an answer, after the last of the request."""
        while self.incoming.read():
            pass
        self.asked_for.status = status
        if self.fault and (self._met("cut") or self._met("reset")):
            half = int(headers["Content-Length"]) // 2
            self.limit = half if self.fault.after is None else self.fault.after
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _write(self, data: bytes) -> None:
        if self.command == "HEAD":
            return
        if self.limit is not None:
            data = data[: self.limit - self.asked_for.sent]
        pieces = [data]
        if self.fault and self._met("slow") and not self.asked_for.sent:
            step = max(len(data) // 10, 1)
            pieces = [data[at : at + step] for at in range(0, len(data), step)]
        for piece in pieces:
            self.asked_for.sent += len(piece)
            self.wfile.write(piece)
            if self.fault and len(pieces) > 1:
                time.sleep(self.fault.seconds / len(pieces))
        if self.limit is not None and self.asked_for.sent >= self.limit:
            raise _Cut

    def _hang_up(self) -> None:
        """End the connection, for `reset` at once and without a goodbye."""
        self.close_connection = True
        with suppress(OSError):
            if self._met("reset"):
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                os.close(self.connection.detach())
            else:
                self.connection.shutdown(socket.SHUT_RDWR)


_NAME = r"[\w.-]+(?:/[\w.-]+)?"
_REPO = rf"(?P<repo>{_NAME})"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler._whoami),
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", _Handler._validate),
    ("GET HEAD", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler._info),
    ("GET HEAD", rf"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<under>.+))?", _Handler._tree),
    ("POST", rf"/api/models/{_REPO}/paths-info/{_REVISION}", _Handler._paths_info),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler._preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler._commit),
    ("GET HEAD", rf"/api/models/{_REPO}", _Handler._info),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", _Handler._resolve),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/verify", _Handler._verify),
    ("PUT", rf"/lfs/{_REPO}/put/(?P<oid>[0-9a-f]{{64}})", _Handler._put),
]
"""The first pattern that matches a path decides; what is named in it goes to the route."""
