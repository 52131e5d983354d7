"""The Hub of the tests, driven by the real huggingface_hub, in both versions that moemerge runs on.

Each test of a client is one process of it: huggingface_hub reads its environment when imported.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import subprocess
import sys
import urllib.error
import urllib.request
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FAULTS, FakeHub

WEIGHTS = "model.safetensors"
CARD = "---\nlicense: mit\nbase_model:\n- lab/base\n---\n# A mixture\n"
BEGIN = """
import json, sys, time
waits = []
time.sleep = waits.append
from huggingface_hub import *
from huggingface_hub import constants
from huggingface_hub.utils import get_session
constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # otherwise only files above 10 MB are ever resumed
told, given = {}, json.loads(sys.argv[1])

def tell(name, what, *values, **named):
    waits.clear()
    try:
        told[name] = what(*values, **named)
    except Exception as error:
        cause = error.__cause__ if type(error) in (LookupError, RuntimeError) else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        told[name] = [type(error).__name__, status]
    told[f"waits of {name}"] = list(waits)
"""
END = """
print(json.dumps(told))
"""
ROUND_TRIP = """
folder, out = given
tell("whoami", whoami)
tell("create", lambda: str(create_repo("me/new", private=True)))
tell("create again", create_repo, "me/new")
tell("create, exist_ok", lambda: str(create_repo("me/new", exist_ok=True)))
tell("upload", lambda: upload_folder(repo_id="me/new", folder_path=folder).oid)
tell("upload again", lambda: upload_folder(repo_id="me/new", folder_path=folder).oid)
tell("list", list_repo_files, "me/new")
tell("download", snapshot_download, "me/new", local_dir=out)
add = CommitOperationAdd("more.bin", b"more")
steps = [CommitOperationDelete("sub/"), CommitOperationDelete("config.json")]
steps.append(CommitOperationCopy("model.safetensors", "copy.safetensors"))
tell("preupload", preupload_lfs_files, "me/new", [add])
tell("commit", lambda: create_commit("me/new", [add, *steps], commit_message="Other files").oid)
behind = dict(commit_message="Too late", parent_commit=told["upload"])
tell("behind", lambda: create_commit("me/new", [CommitOperationDelete("more.bin")], **behind).oid)
tell("file", lambda: upload_file(repo_id="me/new", path_or_fileobj=b"!", path_in_repo="a.txt").oid)
infos = HfApi().get_paths_info("me/new", ["a.txt", "more.bin", "gone"])
told["infos"] = {info.path: [info.size, info.lfs and info.lfs.sha256] for info in infos}
for token in ("hf_reads", "hf_stranger", "expired", False):
    for repo in ("me/new", "me/public"):
        one = dict(repo_id=repo, path_or_fileobj=b"one", path_in_repo="one.bin", token=token)
        tell(f"{token} {repo}", upload_file, **one)
    tell(f"{token} create", create_repo, "me/other", token=token)
tell("fine", lambda: create_repo("me/fine", token="hf_fine").repo_id)
tell("not so fine", lambda: create_repo("me/other", token="hf_fine").repo_id)
bad = b"---\\nbase_model: /not/a/repository\\n---\\n"
tell("bad card", upload_file, repo_id="me/new", path_or_fileobj=bad, path_in_repo="README.md")
"""
CARD_PUSH = """
card = ModelCard(given)
tell("validate", card.validate)
tell("push", lambda: str(card.push_to_hub("me/card")))
tell("bad", ModelCard("---\\nbase_model: /not/a/repository\\n---\\n").validate)
"""
READ = """
want = open(given["path"], "rb").read()

def fetch(repo):
    with open(hf_hub_download(repo, "model.safetensors"), "rb") as stream:
        return "same" if stream.read() == want else "other"

def fetch_range(repo):
    url = hf_hub_url(repo, "model.safetensors")
    got = get_session().get(url, headers={"Range": "bytes=100-199"})
    return [got.status_code, got.headers.get("Content-Range"), got.content == want[100:200]]

for repo in given["files"]:
    tell(repo, fetch, repo)
for repo in given["ranges"]:
    tell(repo, fetch_range, repo)
"""
WRITE = """
for repo in given["repos"]:
    tell(repo, lambda: upload_folder(repo_id=repo, folder_path=given["folder"]).oid and "done")
"""


@pytest.fixture(scope="module", params=["2.4", "0.36"])
def python(request: pytest.FixtureRequest) -> str:
    """The Python of an environment with this version of huggingface_hub, or of about it."""
    if request.param == "2.4":
        return sys.executable
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("MOEMERGE_CACHE") or caches / "moemerge")
    made = sorted(cache.glob("envs/transformers4-*/bin/python"), key=lambda p: p.stat().st_mtime)
    if not made:
        pytest.skip("no environment with huggingface_hub 0.36: run scripts/environment")
    return str(made[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is uploaded: a file of 3 MB and small ones."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "sub").mkdir()
    (folder / WEIGHTS).write_bytes(random.Random(0).randbytes(3 << 20))
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").write_text("")
    (folder / "sub" / "a name.txt").write_text("text")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is read and written with faults: one file of 200 kB."""
    folder = tmp_path_factory.mktemp("small")
    (folder / WEIGHTS).write_bytes(random.Random(1).randbytes(200_000))
    return folder


def drive(python: str, hub: FakeHub, home: Path, script: str, given: Any) -> dict[str, Any]:
    """What a script tells that runs with the real client, with what it is given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    more = {"HF_TOKEN": "hf_me", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [python, "-c", BEGIN + script + END, json.dumps(given)],
        env={**kept, **hub.environment(home, **more)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_uploaded_is_served(python: str, folder: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        hub.account("hf_me", "me")
        hub.account("hf_reads", "me", role="read")
        hub.account("hf_stranger", "stranger")
        hub.account("hf_fine", "me", role="fineGrained", scopes={"me/fine": ("repo.write",)})
        hub.publish("me/public", folder)
        told = drive(python, hub, tmp_path / "home", ROUND_TRIP, [str(folder), str(tmp_path / "o")])
        repository = hub.repositories["me/new"]

        assert told["whoami"]["auth"]["accessToken"]["role"] == "write"
        assert told["create"] == told["create, exist_ok"] == f"{hub.url}/me/new"
        assert told["create again"] == ["HfHubHTTPError", 409]
        assert repository.private

        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        assert told["upload"] == told["upload again"]
        assert set(told["list"]) == {*files, ".gitattributes"}
        for name, content in files.items():
            assert (tmp_path / "o" / name).read_bytes() == content
            assert hub.received("me/new", name) == len(content)
            assert hub.sent("me/new", name) == len(content)
        assert hub.sent("me/public") == 0

        titles = [commit.title for commit in repository.commits.values()]
        assert titles[0] == "initial commit"
        assert titles[2] == "Other files"
        assert told["behind"] == ["HfHubHTTPError", 412]
        assert repository.refs["main"] == told["file"]
        assert repository.commits[told["commit"]].parent == told["upload"]
        left = {".gitattributes", "README.md", "empty.txt", WEIGHTS, "copy.safetensors", "more.bin"}
        assert set(repository.commits[told["file"]].files) == {*left, "a.txt"}
        assert told["infos"] == {"a.txt": [1, None], "more.bin": [4, sha256(b"more").hexdigest()]}

        assert told["hf_reads me/new"] == told["hf_reads me/public"] == ["HfHubHTTPError", 403]
        assert told["hf_stranger me/new"] == ["RepositoryNotFoundError", 404]
        assert told["hf_stranger me/public"] == ["HfHubHTTPError", 403]
        assert told["expired me/new"] == told["expired me/public"] == ["HfHubHTTPError", 401]
        assert told["False me/new"] == told["False me/public"] == ["RepositoryNotFoundError", 401]
        assert told["hf_reads create"] == told["hf_stranger create"] == ["HfHubHTTPError", 403]
        assert told["expired create"] == told["False create"] == ["HfHubHTTPError", 401]
        assert told["fine"] == "me/fine"
        assert told["not so fine"] == ["HfHubHTTPError", 403]
        assert told["bad card"] == ["ValueError", None]
        assert set(hub.repositories) == {"me/new", "me/public", "me/fine"}


def test_a_model_card_is_validated_and_pushed(tmp_path: Path) -> None:
    """By version 2.4: `ModelCard.validate` of 0.36 knows no other Hub than huggingface.co."""
    with FakeHub() as hub:
        hub.create("me/card", writers={"hf_me"})
        told = drive(sys.executable, hub, tmp_path, CARD_PUSH, CARD)
        assert told["validate"] is None
        assert told["push"].startswith(f"{hub.url}/me/card/commit/")
        assert told["bad"] == ["ValueError", None]
        assert hub.received("me/card", "README.md") == len(CARD)


SAME, REFUSED = "same", "HfHubHTTPError"
READS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "401": ({"method": "GET"}, [REFUSED, 401], [REFUSED, 401]),
    "403": ({"method": "GET"}, [REFUSED, 403], [REFUSED, 403]),
    "404": ({}, ["RemoteEntryNotFoundError", 404], ["EntryNotFoundError", 404]),
    "429": ({"method": "GET", "retry_after": 7}, SAME, [REFUSED, 429]),
    "500": ({"method": "GET"}, [REFUSED, 500], SAME),
    "503": ({"method": "HEAD", "times": 2}, SAME, SAME),
    "cut": ({"after": 70_000}, SAME, ["ChunkedEncodingError", None]),
    "reset": ({}, ["ReadError", None], ["ChunkedEncodingError", None]),
    "slow": ({"seconds": 0.1}, SAME, SAME),
    "wrong-etag": ({}, SAME, SAME),
    "changed": ({}, "other", "other"),
}
"""What a download says of each fault: in version 2.4, in version 0.36."""
WAITS = {
    "2.4": {"429": [8], "503": [1], "cut": [1]},
    "0.36": {"429": [], "500": [1], "503": [1, 2], "cut": []},
}
RANGES = {
    "whole-file": [200, None, False],
    "wrong-range": [206, "bytes 99-198/200000", False],
    "short-range": [206, "bytes 100-149/200000", False],
}
RESUMED = {"whole-file": SAME, "wrong-range": "other", "short-range": ["OSError", None]}
"""What version 2.4, the only one that resumes, makes of a resumed download."""


def test_each_fault_of_reading_shows_in_the_client(
    python: str, small: Path, tmp_path: Path
) -> None:
    version = "2.4" if python == sys.executable else "0.36"
    with FakeHub() as hub:
        for kind, (how, _, _) in READS.items():
            hub.publish(f"lab/{kind}", small)
            hub.fault(kind, repo=f"lab/{kind}", **how)
        for kind in RANGES:
            for name in (f"lab/{kind}", f"lab/cut-{kind}"):
                hub.publish(name, small)
                hub.fault(kind, repo=name)
            hub.fault("cut", repo=f"lab/cut-{kind}", after=70_000)
        files = [*(f"lab/{kind}" for kind in READS), *(f"lab/cut-{kind}" for kind in RANGES)]
        ranges = [f"lab/{kind}" for kind in RANGES]
        given = {"path": str(small / WEIGHTS), "files": files, "ranges": ranges}
        told = drive(python, hub, tmp_path, READ, given)

        for kind, (_, new, old) in READS.items():
            assert told[f"lab/{kind}"] == (new if version == "2.4" else old), kind
        for kind, waits in WAITS[version].items():
            assert told[f"waits of lab/{kind}"] == waits, kind
        for kind, answer in RANGES.items():
            assert told[f"lab/{kind}"] == answer
            resumed = RESUMED[kind] if version == "2.4" else ["ChunkedEncodingError", None]
            assert told[f"lab/cut-{kind}"] == resumed, kind

        fired = [(request.repo, kind) for kind, request in hub.fired()]
        for kind in {**READS, **RANGES}:
            assert fired.count((f"lab/{kind}", kind)) == (2 if kind == "503" else 1)
        blobs = {path.name for path in tmp_path.glob("hub/models--lab--wrong-etag/blobs/*")}
        assert blobs == {sha256((small / WEIGHTS).read_bytes()).hexdigest()[::-1]}
        assert len(hub.repositories["lab/changed"].commits) == 2


def test_each_fault_of_writing_shows_in_the_client(
    python: str, small: Path, tmp_path: Path
) -> None:
    size = (small / WEIGHTS).stat().st_size
    with FakeHub() as hub:
        faults: dict[str, dict[str, Any]] = {
            "put-cut": {"after": 1000},
            "commit-lost": {},
            "commit-unheard": {},
            "503": {"path": "/put/", "times": 2},
            "403": {"method": "PUT", "file": "*.safetensors"},
        }
        for kind, how in faults.items():
            hub.create(f"lab/{kind}", writers={"hf_me"})
            hub.fault(kind, repo=f"lab/{kind}", **how)
        given = {"repos": [f"lab/{kind}" for kind in faults], "folder": str(small)}
        told = drive(python, hub, tmp_path, WRITE, given)

        assert told["lab/put-cut"] == told["lab/503"] == "done"
        assert told["waits of lab/put-cut"] == [1]
        assert told["waits of lab/503"] == [1, 2]
        assert told["lab/commit-lost"] == told["lab/commit-unheard"] == [REFUSED, 500]
        assert told["lab/403"] == ["RuntimeError", 403]
        done = {kind for kind in faults if len(hub.repositories[f"lab/{kind}"].commits) == 2}
        assert done == {"put-cut", "503", "commit-unheard"}
        assert hub.received("lab/put-cut", WEIGHTS) == size + 1000
        assert hub.received("lab/503", WEIGHTS) == 3 * size
        assert hub.received("lab/commit-lost", WEIGHTS) == size
        kinds = sorted(kind for kind, _ in hub.fired())
        assert kinds == sorted([*faults, "503"])


def test_random_faults_are_the_same_for_the_same_seed(small: Path) -> None:
    def fired(seed: int) -> list[str]:
        with FakeHub() as hub:
            hub.publish("lab/base", small)
            hub.fault(*FAULTS, rate=0.5, seed=seed, times=None, seconds=0.01)
            for _ in range(20):
                try:
                    with urllib.request.urlopen(
                        f"{hub.url}/lab/base/resolve/main/{WEIGHTS}"
                    ) as got:
                        got.read()
                except (urllib.error.HTTPError, http.client.IncompleteRead, ConnectionError):
                    pass
            return [request.fault for request in hub.asked()]

    first = fired(1)
    assert first == fired(1) != fired(2)
    assert 4 < len([kind for kind in first if kind]) < 16


def test_a_body_may_come_in_chunks_and_must_be_what_it_says(small: Path) -> None:
    content = (small / WEIGHTS).read_bytes()
    oid = sha256(content).hexdigest()
    with FakeHub() as hub:
        repository = hub.create("me/new")
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
        for body, status in ((content, 200), (content[1:], 400)):
            pieces = (body[at : at + 65_536] for at in range(0, len(body), 65_536))
            connection.request("PUT", f"/lfs/me/new/put/{oid}", pieces, encode_chunked=True)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()
        assert repository.objects[oid].read_bytes() == content
        assert hub.received("me/new", oid) == 2 * len(content) - 1
