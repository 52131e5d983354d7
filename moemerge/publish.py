"""To the Hub: who may write there, only what is new, shards that leave while others are made."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moemerge.checkpoint import hub
from moemerge.errors import InputError, MoemergeError, Problem, RunError, VerifyError
from moemerge.output import (
    CONFIG_FILE,
    MANIFEST_FILE,
    OWN_FILES,
    Manifest,
    read_manifest,
)
from moemerge.plan import INDEX_FILE, Plan, Shard, weight_index
from moemerge.reporting import Reporter, Silent, size
from moemerge.shareable import shareable
from moemerge.state import State, as_json, read_json, write_json
from moemerge.verify import is_whole, open_manifest, verify_checkpoint
from moemerge.version import __version__

T = TypeVar("T")
Content = Path | bytes
"""What a file on the Hub is to hold: that of a file here, or these bytes."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WEIGHTS = (".safetensors", ".bin")
_TRIES, _TRIES_BEFORE = 8, 3  # in vain, on the way and before it
_WAIT, _LONGEST_WAIT = 0.25, 30.0  # seconds
_STARTED = "push.json"


def push(
    out: str | Path, repo: str, private: bool = False, reporter: Reporter | None = None
) -> str:
    """Upload a finished directory to the model repository `repo` on the Hub; return its address.

    Its manifest's files go up and no others, in one commit, and only those that are new. The pushed
    manifest tells no paths of this machine. Cut off, the same call again sends the rest.

    Args:
        out: what a merge finished.
        repo: `user/name`; made if it does not exist.
        private: whether it is made private.
        reporter: who hears notes and progress; nobody by default.

    Raises:
        InputError: whoever is logged in may not write there, or `out` is not finished.
        VerifyError: `out` is not what its manifest says.
        RunError: the Hub or the network failed.
    """
    out, reporter = Path(out), reporter or Silent()
    open_manifest(out)
    if not State(out).is_free(shared=True):
        fix = "wait until it ends"
        raise InputError([Problem(str(out), "another moemerge is writing there", fix)])
    if problems := list(refusals(repo, private)):
        raise InputError(problems)
    verify_checkpoint(out, reporter)
    manifest = read_manifest(out)
    content: dict[str, Content] = {
        name: out / name for name in dict.fromkeys([*manifest.files, *OWN_FILES])
    }
    content[MANIFEST_FILE] = _manifest_bytes(manifest)
    target = _Target(repo, bars=True)
    target.create(private)
    there = target.files()
    new = {name: what for name, what in content.items() if not _is(what, there.get(name))}
    gone = _stale(there, manifest.plan)
    if not new and not gone:
        reporter.say(f"{repo}: nothing has changed, so nothing was sent")
        return target.url
    total = sum(map(_size, new.values()))
    reporter.say(f"{repo}: {len(new)} of {len(content)} files are new, {size(total)}")
    with reporter.progress("uploading", total, "B") as advance:
        target.commit(new, gone, f"A mixture made with moemerge {__version__}", advance)
    target.check(content)
    return target.url


def refusals(repo: str, private: bool, fresh: bool = False) -> Iterator[Problem]:
    """Each reason why whoever is logged in cannot push to `repo`; the Hub is asked, not changed.

    With `fresh`, a repository that holds a finished model is one.
    """
    try:
        yield from _refusals(repo, private, fresh)
    except RunError as error:
        what = str(error).removeprefix(f"{repo}: ").partition("; run the same")[0]
        yield Problem(repo, what, "try again, or push later with `moemerge push`")


def _refusals(repo: str, private: bool, fresh: bool) -> Iterator[Problem]:
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
        HFValidationError,
        validate_repo_id,
    )

    form = "write `user/name`: letters, digits, `-`, `_` and `.`, no more than 96 a part"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        yield Problem(repo, "is not the name of a model repository", form)
        return
    if repo.count("/") != 1:
        yield Problem(repo, "does not say whose repository it is", form)
        return
    if constants.HF_HUB_OFFLINE:
        yield Problem(repo, "HF_HUB_OFFLINE is set, so nothing can be pushed", "unset it")
        return
    if not get_token():
        fix = "run `hf auth login` with a token that may write, or set HF_TOKEN"
        yield Problem(repo, "you are not logged in to the Hub", fix)
        return
    target = _Target(repo, tries=_TRIES_BEFORE)
    account = target.whoami()
    if account is None:
        fix = "run `hf auth login` anew, or correct HF_TOKEN"
        yield Problem(repo, "the Hub does not know your token", fix)
        return
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        fix = "make one that may write at https://huggingface.co/settings/tokens and log in with it"
        yield Problem(repo, "your token may only read", fix)
        return
    info = target.info()
    if info is None:
        yield from _cannot_create(repo, account)
        return
    if not target.may_write():
        told = next(_cannot_create(repo, account), None)
        fix = told.fix if told else "name a repository of your own"
        yield Problem(repo, "exists, and your token may not write there", fix)
        return
    if private and not info.private:
        fix = "make it private on the Hub, or name a new one"
        yield Problem(repo, "exists and is public", fix)
    there = target.files()
    strangers = [n for n in there if n.endswith(_WEIGHTS) and not _SHARD.fullmatch(n)]
    strangers += [CONFIG_FILE] * (CONFIG_FILE in there)
    if strangers and MANIFEST_FILE not in there:
        what = f"holds {strangers[0]}, which moemerge did not make"
        yield Problem(repo, what, "name a new repository")
    elif fresh and CONFIG_FILE in there:
        fix = "pass --overwrite to replace it, or name a new repository"
        yield Problem(repo, "holds a finished model", fix)


def _cannot_create(repo: str, account: dict[str, Any]) -> Iterator[Problem]:
    """Why an account's token may not make or write to a repository, as far as it tells."""
    space, me = repo.partition("/")[0], str(account.get("name"))
    orgs = {str(org.get("name")).lower(): org for org in account.get("orgs") or ()}
    token = (account.get("auth") or {}).get("accessToken") or {}
    if space.lower() != me.lower() and space.lower() not in orgs:
        what = f"you are {me}, and no member of {space}"
        yield Problem(repo, what, f"name {me}/{repo.partition('/')[2]}, or log in as who may")
    elif space.lower() in orgs and orgs[space.lower()].get("roleInOrg") == "read":
        what = f"you ({me}) may only read what is {space}'s"
        yield Problem(repo, what, f"name {me}/{repo.partition('/')[2]}, or ask {space}'s admins")
    elif token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or ()
        granted = {
            str((scope.get("entity") or {}).get("name")).lower()
            for scope in scopes
            if any(re.fullmatch(r"repo\..*write", p) for p in scope.get("permissions") or ())
        }
        if space.lower() not in granted:
            what = f"your fine-grained token may not write to {space}'s repositories"
            fix = "let it at https://huggingface.co/settings/tokens, or log in with another"
            if repo.lower() in granted:
                what = "does not exist, and your fine-grained token may not make it"
                fix = "make it on the Hub first, or log in with another token"
            yield Problem(repo, what, fix)


@dataclass(frozen=True)
class _There:
    """A file on the Hub: its size in bytes, and its sha256 (`lfs`) or Git's id."""

    nbytes: int
    digest: str
    lfs: bool


class _Target:
    """A model repository as whoever is logged in may use it. All questions are asked again while
    the Hub is busy or the network fails.

    Every method raises RunError with one line where that does not help.
    """

    def __init__(self, repo: str, bars: bool = False, tries: int = _TRIES):
        from huggingface_hub import HfApi, constants, get_token

        self.tries = tries
        self.bars = bars  # huggingface_hub's own, on a terminal: bytes of the file on its way
        self.repo, self.url = repo, f"{constants.ENDPOINT}/{repo}"
        self.api = HfApi(token=get_token())

    def whoami(self) -> dict[str, Any] | None:
        """What the Hub says of the token's holder; None if it does not know the token."""
        return self._ask("asking who you are", self.api.whoami, missing=(401,))

    def info(self) -> Any:
        """The repository's entry on the Hub; None if it is not there, or hidden."""
        return self._ask(
            "looking at it",
            lambda: self.api.model_info(self.repo, files_metadata=True),
            missing=(401, 404),
        )

    def files(self) -> dict[str, _There]:
        """What the repository holds; nothing if it does not exist."""
        info = self.info()
        return {
            one.rfilename: _There(
                one.size or 0, (one.lfs.sha256 if one.lfs else one.blob_id) or "", bool(one.lfs)
            )
            for one in (info.siblings if info else None) or ()
        }

    def may_write(self) -> bool:
        """Whether a commit would be taken: the question that comes before one, and no more.

        That `create_repo` succeeds would say nothing: it does for whatever exists.
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

        return bool(self._ask("asking for leave to write", ask, missing=(401, 403)))

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
        """Upload files and commit them, with what is to be deleted; return each one's sha256.

        Objects that the Hub has already are not sent again. `advance` is called with each file's
        size; once `stopped`, nothing is committed.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        alone = [[name] for name in new if _SHARD.fullmatch(name)]
        together = [name for name in new if not _SHARD.fullmatch(name)]
        additions = []
        for names in filter(None, [*alone, together]):
            batch = [CommitOperationAdd(name, new[name]) for name in names]
            with hub.progress_bars(self.bars and sys.stderr.isatty()):
                self._ask(
                    f"the upload of {names[0]}",
                    partial(self.api.preupload_lfs_files, self.repo, batch, free_memory=False),
                )
            additions += batch
            advance(sum(_size(new[name]) for name in names))
        tried = False

        def ask() -> None:
            nonlocal tried
            if tried:  # it may have been done, and the answer lost
                there = self.files()
                done = all(_is(content, there.get(name)) for name, content in new.items())
                if done and not set(gone) & there.keys():
                    return
            tried = True
            deletions = [CommitOperationDelete(name) for name in gone]
            self.api.create_commit(self.repo, [*additions, *deletions], commit_message=title)

        if not stopped():
            self._ask("the commit", ask)
        return {one.path_in_repo: one.upload_info.sha256.hex() for one in additions}

    def check(self, content: Mapping[str, Content | int]) -> None:
        """See that everything is there; a `.gitignore` keeps files out without a word.

        Raises:
            RunError: a file is not.
        """
        there = self.files()
        for name, what in content.items():
            nbytes = what if isinstance(what, int) else _size(what)
            if name not in there or there[name].nbytes != nbytes:
                raise RunError(
                    f"{self.repo}: {name} did not arrive there; see whether the repository has a "
                    ".gitignore, then run the same command again"
                )

    def _ask(self, what: str, ask: Callable[[], T], missing: Collection[int] = ()) -> T | None:
        """An answer of the Hub, asked for again while that may help; None for `missing` statuses.

        Raises:
            RunError: it does not help.
        """
        for failures in range(1, self.tries + 1):
            try:
                with _quiet():
                    return ask()
            except MoemergeError:
                raise
            except Exception as error:  # two HTTP libraries' errors, by huggingface_hub's version
                cause = _cause(error)
                status = getattr(getattr(cause, "response", None), "status_code", None)
                if status in missing:
                    return None
                again = status in (408, 409, 412, 429) or (status or 0) >= 500
                again = again or (status is None and _is_network(cause))
                if not again or failures == self.tries:
                    raise RunError(
                        f"{self.repo}: {what} failed ({_why(cause, status)}); "
                        "run the same command again to go on"
                    ) from error
                wait = hub.retry_after(cause) or _WAIT * 2**failures
                time.sleep(min(wait, _LONGEST_WAIT))
        raise AssertionError("unreachable")


@dataclass
class Shipment:
    """Shards that go to the Hub one by one, as they are finished, and are then deleted here.

    `stopped` ends it from another thread. `State.pushed` is what the Hub holds.
    """

    out: Path
    repo: str
    private: bool
    state: State
    stopped: threading.Event
    _thread: threading.Thread | None = None
    _failure: list[BaseException] = field(default_factory=list)

    def goes_on(self, run: str) -> bool:
        """Whether the run of this digest has begun to push to this repository."""
        found = read_json(self.state.directory / _STARTED)
        return found == {"repo": self.repo, "run": run}

    def begin(self, plan: Plan) -> None:
        """Make the repository no model and learn which shards it has."""
        self.target = _Target(self.repo)
        self.target.create(self.private)
        there = self.target.files()
        if not self.goes_on(plan.run_digest):
            gone = [name for name in (CONFIG_FILE, INDEX_FILE) if name in there]
            if gone:
                self.target.commit({}, gone, "Make way for another mixture")
            data = {"repo": self.repo, "run": plan.run_digest}
            write_json(self.state.directory / _STARTED, data)
        lfs = {name: one for name, one in there.items() if one.lfs}
        self.state.pushed.update({name: (one.nbytes, one.digest) for name, one in lfs.items()})

    def send(self, shard: Shard, advance: Callable[[int], object]) -> None:
        """Let a finished shard leave once the one before it has; wait for that, not for this.

        Raises:
            RunError, VerifyError: the one before it did not arrive.
        """
        self.wait()

        def ship() -> None:
            try:
                self._ship(shard)
                advance(shard.nbytes)
            except BaseException as error:
                self._failure.append(error)

        # Not a pool's thread: Python would wait for its end after Ctrl-C.
        self._thread = threading.Thread(target=ship, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the shard on its way has arrived.

        Raises:
            RunError, VerifyError: it did not.
        """
        while self._thread and self._thread.is_alive():
            self._thread.join(0.2)
            if self.stopped.is_set():
                raise RunError(f"{self.repo}: stopped")
        if self._failure:
            raise self._failure.pop()

    def finish(self, manifest: Manifest) -> str:
        """Everything but shards, in the commit that makes the repository a model; its address."""
        shards = {shard.file: shard.nbytes for shard in manifest.plan.shards}
        content: dict[str, Content] = {
            name: self.out / name for name in manifest.files if name not in shards
        }
        content[MANIFEST_FILE] = _manifest_bytes(manifest)
        content[INDEX_FILE] = as_json(weight_index(manifest.plan)).encode()
        content[CONFIG_FILE] = as_json(manifest.plan.config).encode()
        there = self.target.files()
        new = {name: what for name, what in content.items() if not _is(what, there.get(name))}
        gone = _stale(there, manifest.plan)
        if new or gone:
            self.target.commit(new, gone, f"A mixture made with moemerge {__version__}")
        self.target.check({**content, **shards})
        return self.target.url

    def _ship(self, shard: Shard) -> None:
        path, entry = self.out / shard.file, self.state.entry(shard)
        if not is_whole(shard, self.out, entry):
            self.state.forget(shard)
            raise VerifyError(f"{path}: is not what was written; run the same command again")
        title = f"{shard.file}, of a mixture that is not whole yet"
        sha256 = self.target.commit({shard.file: path}, (), title, stopped=self.stopped.is_set)
        if not self.stopped.is_set():
            self.state.pushed[shard.file] = (shard.nbytes, sha256[shard.file])
            self.state.finished(shard, {**entry, "sha256": sha256[shard.file]})
            path.unlink()


def _manifest_bytes(manifest: Manifest) -> bytes:
    return as_json(shareable(manifest).to_json()).encode()


def _stale(there: Collection[str], plan: Plan) -> list[str]:
    """Shards of an earlier mixture, which some programs would read."""
    ours = {shard.file for shard in plan.shards}
    return [name for name in there if _SHARD.fullmatch(name) and name not in ours]


def _is(content: Content, there: _There | None) -> bool:
    """Whether a file on the Hub holds this content."""
    if there is None or there.nbytes != _size(content):
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


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what huggingface_hub logs of each failed try: addresses that carry signatures."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _cause(error: Exception) -> Exception:
    """The error that tells: the first with an answer, else the innermost."""
    while getattr(error, "response", None) is None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _is_network(error: BaseException) -> bool:
    """Whether a connection failed: requests' errors are OSErrors of no file, httpx has its own."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "TransportError" in names or (isinstance(error, OSError) and error.filename is None)


def _why(error: BaseException, status: int | None) -> str:
    """One line without addresses, which may carry signatures."""
    if status in (401, 403):
        return f"HTTP {status}: your token may not write there"
    if status is not None:
        said = " ".join(str(getattr(error, "server_message", None) or "").split())[:160]
        return f"HTTP {status}{': ' if said else ''}{said}"
    return re.sub(r"https?://\S+", "the Hub", hub.shortened(Exception(str(error) or repr(error))))
