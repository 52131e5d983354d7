"""To the Hub: who may write there, only what is new, shards that leave while others are made."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moemerge.change import Change, held
from moemerge.errors import InputError, Problem, RunError, VerifyError
from moemerge.hub_repository import SHARD, Repository, holds, size_of
from moemerge.leaving import leaving, stays
from moemerge.output import BEFORE_TUNING, CONFIG_FILE, MANIFEST_FILE, Manifest, read_manifest
from moemerge.plan import INDEX_FILE, Plan, Shard
from moemerge.reporting import Reporter, listener, size
from moemerge.state import State, read_json, write_json
from moemerge.verify import check_shards, is_whole, open_manifest, verify_checkpoint
from moemerge.version import __version__

_WEIGHTS = (".safetensors", ".bin")
_TRIES_BEFORE = 3  # in vain, before a merge begins
_STARTED = "push.json"


def push(
    out: str | Path,
    repo: str,
    private: bool = False,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> str:
    """Upload a finished directory to the model repository `repo` on the Hub; return its address.

    Of its manifest's files those go up that are a model's (see `leaving`), in one commit, and only
    what is new. Nothing that is pushed tells a path of this machine. Cut off, the same call again
    sends the rest.

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
    out, reporter = Path(out), listener(reporter, progress)
    check_shards(out, open_manifest(out).plan, "push")
    if not State(out).is_free(shared=True):
        fix = "wait until it ends"
        raise InputError([Problem(str(out), "another moemerge is writing there", fix)])
    if problems := list(refusals(repo, private)):
        raise InputError(problems)
    with held(out) if os.access(out, os.W_OK) else nullcontext():
        return _push(out, repo, private, reporter)


def _push(out: Path, repo: str, private: bool, reporter: Reporter) -> str:
    verify_checkpoint(out, reporter)
    manifest = read_manifest(out)
    content = leaving(manifest, lambda name: out / name)
    written = (INDEX_FILE, CONFIG_FILE, MANIFEST_FILE)
    for name in [n for n, what in content.items() if isinstance(what, bytes) and n not in written]:
        reporter.say(f"{out / name}: is pushed without the paths of this machine in it")
    if others := stays(out, content):
        reporter.say(f"{out}: {', '.join(others)} stays here, for it is no part of the model")
    target = Repository(repo, bars=True)
    target.create(private)
    there = target.files()
    new = {name: what for name, what in content.items() if not holds(what, there.get(name))}
    gone = _stale(there, manifest.plan)
    if not new and not gone:
        reporter.say(f"{repo}: nothing has changed, so nothing was sent")
        return target.url
    total = sum(map(size_of, new.values()))
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
        what = error.typed.removeprefix(f"{repo}: ").partition("; run the same")[0]
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
    target = Repository(repo, tries=_TRIES_BEFORE)
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
    strangers = [n for n in there if n.endswith(_WEIGHTS) and not SHARD.fullmatch(n)]
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
        self.target = Repository(self.repo)
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

    def finish(self, manifest: Manifest, change: Change) -> str:
        """Everything but shards, in the commit that makes the repository a model; its address."""
        shards = {shard.file: shard.nbytes for shard in manifest.plan.shards}
        content = {
            name: what
            for name, what in leaving(manifest, change.after).items()
            if name not in shards
        }
        there = self.target.files()
        new = {name: what for name, what in content.items() if not holds(what, there.get(name))}
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


def _stale(there: Collection[str], plan: Plan) -> list[str]:
    """Shards of an earlier mixture, which some programs would read, and what never should leave."""
    ours = {shard.file for shard in plan.shards}
    kept = f"{BEFORE_TUNING}/"
    return [n for n in there if (SHARD.fullmatch(n) and n not in ours) or n.startswith(kept)]
