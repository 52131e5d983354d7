"""A small Hugging Face Hub on loopback: serves directories to the real huggingface_hub client.

with FakeHub() as hub:
    hub.publish("user/name", directory)
    subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})
    assert hub.sent("user/name", "model.safetensors") == 0

What it answers is what huggingface_hub 0.36 and 2.4 ask and what the Hub said to them in November
2026: the routes under `/api/models`, `resolve` with ranges, and the errors by their `X-Error-Code`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 1 << 20


@dataclass
class Request:
    """One request and its answer: `sent` counts the body's bytes, `file` is set for `resolve`."""

    method: str
    path: str
    repo: str = ""
    file: str = ""
    status: int = 0
    sent: int = 0


@dataclass
class Commit:
    """A repository's content at one commit: each file's path on disk, by its name there."""

    sha: str
    files: dict[str, Path]


@dataclass
class Repository:
    """A repository: its commits, and the branches and tags that name them.

    `readers` are the tokens that may read a `gated` or `private` one.
    """

    name: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    readers: frozenset[str] = frozenset()

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, or a commit's full or short id names."""
        sha = self.refs.get(revision, revision)
        if sha in self.commits:
            return self.commits[sha]
        short = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return self.commits[short[0]] if len(short) == 1 else None


class FakeHub:
    """The server, the repositories it serves, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._digests: dict[Path, tuple[int, int, str]] = {}
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

        `refs` (default: main) move to the commit; `access` sets `gated`, `private`, `readers`.
        """
        repository = self.repositories.setdefault(name, Repository(name))
        for key, value in access.items():
            setattr(repository, key, value)
        files = {
            path.relative_to(directory).as_posix(): path
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        content = [(file, self.digest(path)) for file, path in files.items()]
        sha = hashlib.sha1(repr((name, len(repository.commits), content)).encode()).hexdigest()
        repository.commits[sha] = Commit(sha, files)
        repository.refs.update(dict.fromkeys(refs or ("main",), sha))
        return sha

    def sent(self, repo: str = "", file: str = "") -> int:
        """The bytes of files sent, of all or of one repository or file."""
        return sum(request.sent for request in self.asked(repo, file) if request.file)

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

    def digest(self, path: Path) -> str:
        """A file's sha256, which serves as its ETag; read once."""
        stat = path.stat()
        known = self._digests.get(path)
        if known is None or known[:2] != (stat.st_size, stat.st_mtime_ns):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            known = self._digests[path] = (stat.st_size, stat.st_mtime_ns, digest)
        return known[2]


class _Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    """One connection's requests, each handed to the first route that matches its path."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _answer(self, body: bool) -> None:
        self.body, self.asked_for = body, Request(self.command, self.path)
        self.hub.record(self.asked_for)
        try:
            for pattern, route in _ROUTES:
                if found := re.fullmatch(pattern, urlsplit(self.path).path):
                    parts = found.groupdict()
                    route(self, **{name: unquote(text) for name, text in parts.items() if text})
                    break
            else:
                raise _Refused(404, message="no such route")
        except _Refused as refused:
            self._refuse(refused)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _info(self, repo: str, revision: str = "main") -> None:
        """GET /api/models/R[/revision/REV]"""
        repository, commit = self._find(repo, revision)
        self._send_json(
            {
                "_id": "0", "id": repo, "modelId": repo, "sha": commit.sha, "tags": [],
                "private": repository.private, "gated": "auto" if repository.gated else False,
                "disabled": False, "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": name} for name in commit.files],
            }
        )  # fmt: skip

    def _tree(self, repo: str, revision: str, under: str = "") -> None:
        """GET /api/models/R/tree/REV[/DIR]?recursive=True"""
        _, commit = self._find(repo, revision)
        self._send_json(
            [
                {
                    "type": "file",
                    "path": name,
                    "size": path.stat().st_size,
                    "oid": self.hub.digest(path)[:40],
                }
                for name, path in commit.files.items()
                if name.startswith(f"{under}/" if under else "")
            ]
        )

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        """HEAD or GET /R/resolve/REV/FILE, whole or a range of it"""
        repository, commit = self._find(repo, revision)
        self.asked_for.file = file
        if repository.gated and self._token() not in repository.readers:
            raise _Refused(403 if self._token() else 401, "GatedRepo", f"{repo} is restricted")
        if file not in commit.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        path = commit.files[file]
        size = path.stat().st_size
        begin, end = self._range(size)
        self._start(
            206 if "Range" in self.headers else 200,
            {
                "Content-Length": str(end - begin),
                "Content-Type": "application/octet-stream",
                "Content-Range": f"bytes {begin}-{end - 1}/{size}",
                "Accept-Ranges": "bytes",
                "ETag": f'"{self.hub.digest(path)}"',
                "X-Repo-Commit": commit.sha,
            },
        )
        if self.body:
            with path.open("rb") as stream:
                stream.seek(begin)
                while begin < end:
                    block = stream.read(min(CHUNK, end - begin))
                    self._write(block)
                    begin += len(block)

    def _find(self, repo: str, revision: str) -> tuple[Repository, Commit]:
        """The repository and commit, or what the Hub says to whoever may not see them."""
        self.asked_for.repo = repo
        token, repository = self._token(), self.hub.repositories.get(repo)
        if repository is None or (repository.private and token not in repository.readers):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token.startswith("expired"):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return token

    def _range(self, size: int) -> tuple[int, int]:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-"))
        if asked is None or not any(asked.groups()):
            raise _Refused(416)
        if not asked[1]:
            return max(size - int(asked[2]), 0), size
        begin = int(asked[1])
        if begin >= size > 0:
            raise _Refused(416)
        return begin, min(int(asked[2]) + 1, size) if asked[2] else size

    def _refuse(self, refused: _Refused) -> None:
        text = json.dumps({"error": refused.message}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(text))}
        if refused.code:
            headers["X-Error-Code"] = refused.code
        if refused.message:
            headers["X-Error-Message"] = refused.message
        self._start(refused.status, headers)
        self._write(text)

    def _send_json(self, data: object) -> None:
        text = json.dumps(data).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(text))}
        self._start(200, headers)
        self._write(text)

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.asked_for.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _write(self, data: bytes) -> None:
        if self.body:
            self.asked_for.sent += len(data)
            self.wfile.write(data)


_REPO = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler._info),
    (rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<under>.+))?", _Handler._tree),
    (rf"/api/models/{_REPO}", _Handler._info),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler._resolve),
]
"""The first pattern that matches a path decides; what is named in it goes to the route."""
