"""Whether the Hub would accept a push, checked before anything is merged."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from moemerge.checkpoint import weight_suffixes
from moemerge.errors import Problem, RunError
from moemerge.files import BESIDE, CONFIG_FILE, GGUF_SUFFIX, shown
from moemerge.hub import FEW_TRIES, SHARD, Repository
from moemerge.output import MANIFEST_FILE


def refusals(
    repo: str, private: bool, fresh: bool = False, out: Path | None = None
) -> Iterator[Problem]:
    """Yield each reason why the logged-in account cannot push to `repo`; nothing is changed there.

    With `fresh`, a repository that already holds a finished model is refused too. `out` is the
    output's directory, or the folder beside a GGUF file.
    """
    try:
        yield from _refusals(repo, private, fresh, out is not None and shown(out) != out)
    except RunError as error:
        what = error.typed.removeprefix(f"{repo}: ").partition("; run the same")[0]
        yield Problem(repo, what, "try again, or push later with `moemerge push`")


def _refusals(repo: str, private: bool, fresh: bool, gguf: bool) -> Iterator[Problem]:
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
        yield Problem(repo, "lacks the user or organization", form)
        return
    if constants.HF_HUB_OFFLINE:
        yield Problem(repo, "HF_HUB_OFFLINE is set, so nothing can be pushed", "unset it")
        return
    if not get_token():
        fix = "run `hf auth login` with a token that may write, or set HF_TOKEN"
        yield Problem(repo, "you are not logged in to the Hub", fix)
        return
    target = Repository(repo, tries=FEW_TRIES)
    account = target.whoami()
    if account is None:
        fix = "run `hf auth login` anew, or correct HF_TOKEN"
        yield Problem(repo, "the Hub does not know your token", fix)
        return
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        fix = (
            "log in with a token that may write; make it at https://huggingface.co/settings/tokens"
        )
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
        fix = "make it private on the Hub, or name a new repository"
        yield Problem(repo, "exists and is public", fix)
    there = target.files()
    if stranger := (_beside_files if gguf else _beside_shards)(there):
        yield Problem(repo, f"holds {stranger}", "name a new repository")
    elif fresh and CONFIG_FILE in there:
        fix = "pass --overwrite to replace it, or name a new repository"
        yield Problem(repo, "holds a finished model", fix)


def _beside_shards(there: Collection[str]) -> str:
    """What a repository holds that a directory must not be put beside; empty if nothing."""
    if MANIFEST_FILE in there:
        return ""
    strangers = [n for n in there if n.endswith(weight_suffixes()) and not SHARD.fullmatch(n)]
    strangers += [CONFIG_FILE] * (CONFIG_FILE in there)
    if strangers:
        return f"{strangers[0]}, which moemerge did not make"
    files = [name for name in there if name.endswith(GGUF_SUFFIX) and _is_pushed(name, there)]
    return f"{files[0]}, a mixture with a card of its own" if files else ""


def _beside_files(there: Collection[str]) -> str:
    """What a repository holds that a GGUF file must not be put beside; empty if nothing.

    Several mixtures in GGUF files may be in one.
    """
    weights = [n for n in there if n.endswith((*weight_suffixes(), GGUF_SUFFIX))]
    strangers = [n for n in [*weights, CONFIG_FILE] if n in there and not _is_pushed(n, there)]
    if strangers and MANIFEST_FILE in there:
        return "a mixture in a directory, which has a card of its own"
    return f"{strangers[0]}, which moemerge did not make" if strangers else ""


def _is_pushed(name: str, there: Collection[str]) -> bool:
    """Whether a file is a GGUF file that a push put there: its manifest is beside it."""
    whole = re.sub(rf"-\d{{5}}-of-\d{{5}}(?={re.escape(GGUF_SUFFIX)}$)", "", name)
    return f"{whole}{BESIDE}/{MANIFEST_FILE}" in there


def _cannot_create(repo: str, account: dict[str, Any]) -> Iterator[Problem]:
    """Why an account's token cannot create or write a repository, as far as the account says."""
    space, me = repo.partition("/")[0], str(account.get("name"))
    orgs = {str(org.get("name")).lower(): org for org in account.get("orgs") or ()}
    token = (account.get("auth") or {}).get("accessToken") or {}
    if space.lower() != me.lower() and space.lower() not in orgs:
        what = f"you are {me}, and not a member of {space}"
        yield Problem(repo, what, f"name {me}/{repo.partition('/')[2]}, or log in as a member")
    elif space.lower() in orgs and orgs[space.lower()].get("roleInOrg") == "read":
        what = f"you ({me}) may only read {space}'s repositories"
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
            fix = "allow it at https://huggingface.co/settings/tokens, or log in with another token"
            if repo.lower() in granted:
                what = "does not exist, and your fine-grained token may not make it"
                fix = "make it on the Hub first, or log in with another token"
            yield Problem(repo, what, fix)
