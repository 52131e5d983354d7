"""Pushing to the Hub: what goes up and what never does, who may, and what a crash costs.

Each law runs the real client in a process of its own, against a Hub on loopback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from babies import simple_config, write_config
from fake_hub import FakeHub, Request

from moemerge import InputError, Options, make_plan, merge
from moemerge.output import directory as output

ROOT = Path(__file__).parents[1]
SECRET = "hf_secretsecretsecret"
SMALL = "--shard-size=40KB"  # four shards of the baby mixture
REPO = "user/mix"
FULL = pytest.param("transformers4", marks=pytest.mark.full)


class WatchedHub(FakeHub):
    """A Hub that does `watch` with each request before it is answered."""

    watch: Callable[[Request], object] | None = None

    def record(self, request: Request) -> None:
        super().record(request)
        if self.watch:
            self.watch(request)

    def bytes_of(self, repo: str) -> dict[str, bytes]:
        commit = self.repositories[repo].find("main")
        assert commit
        return {file: path.read_bytes() for file, path in commit.files.items()}

    def puts(self) -> int:
        return sum(request.method == "PUT" for request in self.asked())


@pytest.fixture
def hub() -> Iterator[WatchedHub]:
    with WatchedHub() as hub:
        hub.account(SECRET, "user", orgs=["lab"])
        yield hub


@pytest.fixture(scope="module")
def config(babies: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, first, second = babies.values()
    text = simple_config(base, [first, second], "gate_mode: random  # no prompts")
    return write_config(tmp_path_factory.mktemp("config") / "c.yaml", text)


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    merge(config, out, Options(shard_size=SMALL.partition("=")[2]))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def python(request: pytest.FixtureRequest) -> str:
    version = getattr(request, "param", "this")
    return sys.executable if version == "this" else request.getfixturevalue(version)


both_versions = pytest.mark.parametrize("python", ["this", FULL], indirect=True)


def start(
    hub: FakeHub, home: Path, *arguments: object, python: str = sys.executable, **more: str
) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = hub.environment(home, HF_TOKEN=SECRET)
    return subprocess.Popen(
        [python, *map(str, arguments)],
        env={**kept, "PYTHONPATH": str(ROOT), **environment, **more}, cwd=home.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = process.communicate(timeout=60)
    assert SECRET not in stdout + stderr
    assert "Traceback" not in stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(hub: FakeHub, home: Path, *arguments: object, **more: Any) -> Any:
    return end(start(hub, home, "-m", "moemerge", *arguments, **more))


def published(out: Path) -> dict[str, bytes]:
    """What a push of `out` must give, but for the manifest."""
    files = [path for path in out.rglob("*") if path.is_file() and ".moemerge" not in path.parts]
    told = {str(path.relative_to(out)): path.read_bytes() for path in files}
    return {name: content for name, content in told.items() if name != "moemerge.json"}


def of_model(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in files if name not in (".gitattributes", "moemerge.json")}


@both_versions
def test_what_is_pushed_is_what_the_manifest_lists(
    hub: WatchedHub, out: Path, tmp_path: Path, python: str
) -> None:
    wanted = published(out)
    (out / "notes.txt").write_text("a stranger")
    (out / ".moemerge").mkdir()
    (out / ".moemerge" / "left.part").write_text("unfinished")
    done = run(hub, tmp_path / "home", "push", out, REPO, "--private", python=python)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: pushed to {hub.url}/{REPO}\n"
    assert of_model(hub.bytes_of(REPO)) == wanted
    assert hub.repositories[REPO].private
    assert len(hub.repositories[REPO].commits) == 2  # the Hub's own, and one
    files = [*tmp_path.rglob("*"), *out.rglob("*")]
    assert not [p for p in files if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_the_pushed_manifest_tells_no_path_and_verifies(
    hub: WatchedHub, out: Path, tmp_path: Path, babies: dict[str, Path]
) -> None:
    assert run(hub, tmp_path / "home", "push", out, REPO).returncode == 0
    pushed = hub.bytes_of(REPO)
    for content in pushed.values():
        assert str(babies["base"].parent).encode() not in content
    manifest = json.loads(pushed["moemerge.json"])
    assert manifest["folder"] is None
    assert [source["directory"] for source in manifest["sources"]] == [None] * 3
    assert {source["reference"] for source in manifest["sources"]} == {
        "./base", "./first", "./second"
    }  # fmt: skip
    copy = tmp_path / "copy"
    for name, content in pushed.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    hub.forget()
    verified = run(hub, tmp_path / "home", "verify", copy)
    assert verified.returncode == 0, verified.stderr
    assert verified.stderr.count("not compared") == 3
    assert hub.asked() == []
    hub.forget()
    again = run(hub, tmp_path / "home", "push", copy, REPO)
    assert (again.returncode, hub.received()) == (0, 0)
    shard = copy / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert run(hub, tmp_path / "home", "verify", copy).returncode == 1


def test_prompts_that_the_card_must_not_show_stay_here(
    hub: WatchedHub, config: Path, tmp_path: Path
) -> None:
    merge(config, tmp_path / "out", Options(card_config=False))
    assert b"dragon castle" in (tmp_path / "out" / "moemerge.json").read_bytes()
    assert run(hub, tmp_path / "home", "push", tmp_path / "out", REPO).returncode == 0
    assert not any(b"dragon castle" in content for content in hub.bytes_of(REPO).values())


@both_versions
def test_transformers_loads_it_from_there(
    hub: WatchedHub, out: Path, tmp_path: Path, python: str
) -> None:
    assert run(hub, tmp_path / "home", "push", out, REPO).returncode == 0
    script = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained("{REPO}")("code python", return_tensors="pt").input_ids
models = [AutoModelForCausalLM.from_pretrained(name) for name in {[REPO, str(out)]}]
with torch.no_grad():
    one, two = (model(ids).logits for model in models)
assert torch.equal(one, two)
"""
    done = end(start(hub, tmp_path / "home", "-c", script, python=python))
    assert done.returncode == 0, done.stderr


@both_versions
def test_pushed_again_only_what_changed_is_sent(
    hub: WatchedHub, out: Path, tmp_path: Path, python: str
) -> None:
    home = tmp_path / "home"
    assert run(hub, home, "push", out, REPO, python=python).returncode == 0
    hub.forget()
    again = run(hub, home, "push", out, REPO, python=python)
    assert "nothing has changed, so nothing was sent" in again.stderr
    assert (again.returncode, hub.received()) == (0, 0)
    assert len(hub.repositories[REPO].commits) == 2
    (out / "README.md").write_text("# Mine\n")
    assert run(hub, home, "push", out, REPO, python=python).returncode == 0
    assert hub.received() == len("# Mine\n")
    assert hub.bytes_of(REPO)["README.md"] == b"# Mine\n"


def test_shards_of_an_earlier_mixture_go(
    hub: WatchedHub, config: Path, out: Path, tmp_path: Path
) -> None:
    merge(config, tmp_path / "other")
    hub.publish(REPO, tmp_path / "other")
    assert run(hub, tmp_path / "home", "push", out, REPO).returncode == 0
    assert of_model(hub.bytes_of(REPO)) == published(out)


@both_versions
def test_killed_on_the_way_only_the_rest_is_sent(
    hub: WatchedHub, out: Path, tmp_path: Path, python: str
) -> None:
    def kill(request: Request) -> None:
        if hub.puts() == 3:
            process.kill()

    process = start(hub, tmp_path / "home", "-m", "moemerge", "push", out, REPO, python=python)
    hub.watch = kill
    assert end(process).returncode == -signal.SIGKILL
    hub.watch = None
    hub.forget()
    assert run(hub, tmp_path / "home", "push", out, REPO, python=python).returncode == 0
    assert hub.puts() <= 2
    assert of_model(hub.bytes_of(REPO)) == published(out)


@pytest.mark.parametrize(
    "fault",
    [{"kinds": ["503"], "method": "PUT"}, {"kinds": ["429"], "path": "preupload", "retry_after": 0},
     {"kinds": ["put-cut"]}, {"kinds": ["commit-lost"]}, {"kinds": ["commit-unheard"]}],
    ids=lambda fault: fault["kinds"][0],
)  # fmt: skip
def test_what_passes_does_not_hurt(
    fault: dict[str, Any], hub: WatchedHub, out: Path, tmp_path: Path
) -> None:
    hub.fault(*fault.pop("kinds"), **fault)
    done = run(hub, tmp_path / "home", "push", out, REPO)
    assert done.returncode == 0, done.stderr
    assert len(hub.fired()) == 1
    assert of_model(hub.bytes_of(REPO)) == published(out)
    assert len(hub.repositories[REPO].commits) == 2


@both_versions
def test_what_does_not_pass_is_one_line_and_the_same_command_goes_on(
    hub: WatchedHub, out: Path, tmp_path: Path, python: str
) -> None:
    fault = hub.fault("403", times=None, path="info/lfs")
    refused = run(hub, tmp_path / "home", "push", out, REPO, python=python)
    assert refused.returncode == 1
    line = refused.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"error: {REPO}: the upload of model-\S+ failed \(.*\); run the same .*", line
    )
    assert "HTTP 403" in line
    hub.faults.remove(fault)
    assert run(hub, tmp_path / "home", "push", out, REPO, python=python).returncode == 0


def test_a_gitignore_that_keeps_files_out_is_found(
    hub: WatchedHub, out: Path, tmp_path: Path
) -> None:
    repository = hub.create(REPO, writers={SECRET})
    hub.commit(repository, {".gitignore": hub.store(b"*.safetensors\n")}, ())
    done = run(hub, tmp_path / "home", "push", out, REPO)
    assert done.returncode == 1
    assert "did not arrive there; see whether the repository has a .gitignore" in done.stderr


def test_a_token_goes_to_the_endpoint_and_nowhere_else(
    hub: WatchedHub, out: Path, tmp_path: Path
) -> None:
    with FakeHub() as storage:
        hub.storage, storage.repositories = storage.url, hub.repositories
        done = run(hub, tmp_path / "home", "push", out, REPO)
        assert done.returncode == 0, done.stderr
        assert len(storage.asked()) == 4
        assert not any(request.authorized for request in storage.asked())
        assert hub.puts() == 0


def test_what_does_not_verify_is_not_pushed(hub: WatchedHub, out: Path, tmp_path: Path) -> None:
    shard = out / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    done = run(hub, tmp_path / "home", "push", out, REPO)
    assert done.returncode == 1
    assert "is not what its sources give" in done.stderr
    assert hub.repositories == {}
    empty = run(hub, tmp_path / "home", "push", tmp_path, REPO)
    assert empty.returncode == 2
    assert "holds no moemerge.json" in empty.stderr


REFUSALS = {
    "malformed name": (SECRET, "user/mix/one", "is not the name of a model repository"),
    "no owner": (SECRET, "mix", "lacks the user or organization"),
    "not logged in": ("", REPO, "you are not logged in to the Hub; run `hf auth login`"),
    "unknown token": ("hf_unknown", REPO, "the Hub does not know your token"),
    "read-only": ("hf_read", REPO, "your token may only read"),
    "other namespace": (
        SECRET,
        "other/mix",
        "you are user, and not a member of other; name user/mix",
    ),
    "fine-grained": ("hf_fine", REPO, "fine-grained token may not write to user's repositories"),
    "fine-grained, new": ("hf_one", "user/one", "does not exist, and your fine-grained token"),
    "another's": (SECRET, "other/theirs", "exists, and your token may not write there"),
    "fine-grained, old": ("hf_fine", "user/old", "exists, and your token may not write there"),
    "a model": (SECRET, "user/old", "holds model.safetensors, which moemerge did not make"),
}


@pytest.mark.parametrize("python", ["this", "transformers4"], indirect=True)
def test_who_may_not_push_is_told_before_the_merge(
    hub: WatchedHub, config: Path, babies: dict[str, Path], tmp_path: Path, python: str
) -> None:
    hub.account("hf_read", "user", role="read")
    hub.account("hf_fine", "user", role="fineGrained", scopes={"user": ("repo.content.read",)})
    hub.account("hf_one", "user", role="fineGrained", scopes={"user/one": ("repo.write",)})
    hub.account("hf_all", "user", role="fineGrained", scopes={"user": ("repo.write",)})
    hub.publish("other/theirs", babies["base"])
    hub.publish("user/old", babies["base"])
    before = set(hub.repositories)
    script = """
import json, os, sys
from moemerge import InputError, Options, merge
from moemerge.publish import refusals
config, asked = sys.argv[1], json.loads(sys.argv[2])
for name, (token, repo, _) in asked.items():
    os.environ["HF_TOKEN"] = token
    try:
        merge(config, "out", Options(push=repo))
    except InputError as error:
        print(error)
for token, repo in (("hf_all", "user/new"), (sys.argv[3], "lab/new")):
    os.environ["HF_TOKEN"] = token
    assert list(refusals(repo, False)) == []
"""
    asked = json.dumps(REFUSALS)
    done = end(start(hub, tmp_path / "home", "-c", script, config, asked, SECRET, python=python))
    assert done.returncode == 0, done.stderr
    for line, (_, repo, what) in zip(done.stdout.splitlines(), REFUSALS.values(), strict=True):
        assert line.startswith(f"{repo}: ")
        assert what in line
    assert set(hub.repositories) == before
    assert not (tmp_path / "out").exists()


def test_offline_or_down_nothing_begins(hub: WatchedHub, config: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    offline = run(hub, home, config, tmp_path / "out", "--push", REPO, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it" in offline.stderr
    hub.fault("503", times=None)
    down = run(hub, home, config, tmp_path / "out", "--push", REPO)
    assert down.returncode == 2
    assert f"\n  {REPO}: asking who you are failed (HTTP 503" in down.stderr
    assert "run the same command" not in down.stderr
    assert not (tmp_path / "out").exists()


def test_a_merge_whose_push_fails_is_finished_and_goes_on_with_it(
    hub: WatchedHub, config: Path, out: Path, tmp_path: Path
) -> None:
    fault = hub.fault("403", times=None, path="/commit/")
    line = [config, tmp_path / "new", "--push", REPO, SMALL]
    failed = run(hub, tmp_path / "home", *line)
    assert failed.returncode == 1
    assert f"`moemerge push {tmp_path / 'new'} {REPO}` goes on too" in failed.stderr
    assert published(tmp_path / "new") == published(out)
    hub.faults.remove(fault)
    hub.forget()
    again = run(hub, tmp_path / "home", *line)
    assert again.returncode == 0, again.stderr
    assert f"pushed to {hub.url}/{REPO}" in again.stdout
    assert hub.puts() == 0
    assert of_model(hub.bytes_of(REPO)) == published(out)


@pytest.mark.parametrize("how", ["push", "as you go"])
def test_ctrl_c_ends_it_while_the_hub_sleeps(
    how: str, hub: WatchedHub, config: Path, out: Path, tmp_path: Path
) -> None:
    awake = threading.Event()

    def interrupt(request: Request) -> None:
        if request.method == "PUT":
            process.send_signal(signal.SIGINT)
            awake.wait(30)

    line = ["push", out, REPO]
    if how == "as you go":
        line = [config, tmp_path / "new", "--push", REPO, "--push-as-you-go", SMALL]
    begun = time.monotonic()
    process = start(hub, tmp_path / "home", "-m", "moemerge", *line)
    hub.watch = interrupt
    ended = end(process)
    awake.set()
    assert time.monotonic() - begun < 20
    assert ended.returncode == 130
    assert "interrupted; run the same command again to go on" in ended.stderr


@pytest.mark.parametrize(
    ("options", "what"),
    [({"private": True}, "private: says nothing without push"),
     ({"push_as_you_go": True}, "push_as_you_go: says nothing without push"),
     ({"push": REPO, "shards": "0/2"}, "push: and shards cannot both be"),
     ({"push": REPO, "push_as_you_go": True, "ray": "local"}, "and ray cannot both be")],
)  # fmt: skip
def test_what_makes_no_sense_together_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=re.escape(what)):
        Options(**options)


def shards_in(out: Path) -> int:
    parts = out.glob(".moemerge/model-*.safetensors.????????.part")
    return len([*out.glob("model-*.safetensors"), *parts])


@both_versions
def test_as_you_go_two_shards_are_here_at_most_and_the_same_arrives(
    hub: WatchedHub, config: Path, out: Path, tmp_path: Path, python: str
) -> None:
    assert run(hub, tmp_path / "home", "push", out, "user/whole").returncode == 0
    new, seen, models = tmp_path / "new", [], []

    def watch(request: Request) -> None:
        seen.append(shards_in(new))
        models.append("config.json" in hub.bytes_of(REPO) if REPO in hub.repositories else False)

    hub.watch = watch
    line = [config, new, "--push", REPO, "--push-as-you-go", "--shard-size=16KB"]
    done = run(hub, tmp_path / "home", *line, python=python)
    assert done.returncode == 0, done.stderr
    assert max(seen) == 2  # one on its way, one being written
    assert sum(models) == 1  # when it looks whether all has come
    line = [config, new, "--push", REPO, "--push-as-you-go", SMALL, "--overwrite"]
    assert run(hub, tmp_path / "home", *line, python=python).returncode == 0
    assert hub.bytes_of(REPO) == hub.bytes_of("user/whole")
    assert (new / "moemerge.json").read_bytes() == (out / "moemerge.json").read_bytes()
    left = {path.name for path in new.iterdir()}
    assert not left & {"config.json", "model.safetensors.index.json", ".moemerge"}
    assert not list(new.glob("*.safetensors"))
    for what in (["routing", new], ["push", new, REPO]):
        refused = run(hub, tmp_path / "home", *what)
        assert refused.returncode == 2 and "holds no shards" in refused.stderr
    again = run(hub, tmp_path / "home", config, new, "--push", "user/other", "--push-as-you-go")
    assert again.returncode == 2 and "shards were pushed during the merge" in again.stderr
    verified = run(hub, tmp_path / "home", "verify", new)
    assert (verified.returncode, "holds no shards; if they were pushed" in verified.stderr) == (
        2,
        1,
    )


KILLS: dict[str, Callable[[Request, WatchedHub], bool]] = {
    "the second upload": lambda request, hub: hub.puts() == 2,
    "the second commit": lambda request, hub: _commits(hub) == 2,
    "after the second commit": lambda request, hub: _commits(hub) == 2 and "preup" in request.path,
    "the last commit": lambda request, hub: _commits(hub) == 5,
    "after the last commit": lambda request, hub: "config.json" in hub.bytes_of(REPO),
}


def _commits(hub: WatchedHub) -> int:
    return sum("/commit/" in request.path for request in hub.asked())


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=[pytest.mark.full] * (" second c" in p)) for p in KILLS]
)
def test_as_you_go_killed_and_run_again_it_ends_with_the_same_bytes(
    point: str, hub: WatchedHub, config: Path, finished: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"

    def watch(request: Request) -> None:
        seen.append(shards_in(new))
        if not killed and REPO in hub.repositories and KILLS[point](request, hub):
            killed.append(request)
            process.kill()

    seen: list[int] = []
    killed: list[Request] = []
    line = ["-m", "moemerge", config, new, "--push", REPO, "--push-as-you-go", SMALL]
    process = start(hub, tmp_path / "home", *line)
    hub.watch = watch
    assert end(process).returncode == -signal.SIGKILL
    assert not (new / "config.json").exists()
    there = hub.bytes_of(REPO)
    sent = {name for name in there if name.endswith(".safetensors")}
    hub.forget()
    again = end(start(hub, tmp_path / "home", *line))
    assert again.returncode == 0, again.stderr
    assert max(seen) <= 2
    assert of_model(hub.bytes_of(REPO)) == published(finished)
    assert hub.puts() <= 4 - len(sent)
    assert not (new / ".moemerge").exists()


def test_as_you_go_a_shard_that_is_not_on_the_hub_is_made_again(
    hub: WatchedHub, config: Path, finished: Path, tmp_path: Path
) -> None:
    line = [config, tmp_path / "new", "--push", REPO, "--push-as-you-go", SMALL]
    fault = hub.fault("403", times=None, file="model-00003*")
    failed = run(hub, tmp_path / "home", *line)
    assert failed.returncode == 1
    assert "run the same command again to go on" in failed.stderr
    hub.faults.remove(fault)
    hub.change(REPO, "model-00002-of-00004.safetensors")
    assert run(hub, tmp_path / "home", *line).returncode == 0
    assert of_model(hub.bytes_of(REPO)) == published(finished)


def test_as_you_go_a_finished_model_is_replaced_only_when_told_to(
    hub: WatchedHub, config: Path, finished: Path, tmp_path: Path
) -> None:
    hub.publish(REPO, finished)
    line = [config, tmp_path / "new", "--push", REPO, "--push-as-you-go", SMALL]
    refused = run(hub, tmp_path / "home", *line)
    assert refused.returncode == 2
    assert f"{REPO}: holds a finished model; pass --overwrite" in refused.stderr
    assert not (tmp_path / "new").exists()
    steps: list[str] = []
    hub.watch = lambda request: steps.append("-x"["config.json" in hub.bytes_of(REPO)])
    done = run(hub, tmp_path / "home", *line, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("x+-+x+", "".join(steps))
    assert of_model(hub.bytes_of(REPO)) == published(finished)


def test_as_you_go_asks_for_the_room_of_two_shards(
    config: Path,
) -> None:
    plan = make_plan(config, Options(shard_size="16KB")).plan
    largest = sorted(shard.nbytes for shard in plan.shards)[-2:]
    assert output.nbytes_at_once(plan, Options()) == plan.nbytes
    options = Options(push=REPO, push_as_you_go=True)
    assert output.nbytes_at_once(plan, options) == sum(largest) < plan.nbytes
