"""GGUF files pushed to the Hub: the file, its card, and what verifies a downloaded copy."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from babies import simple_config, write_config
from fake_hub import FakeHub, Request
from gguf_files import as_dense_file, make_wide
from test_publish import REPO, SECRET, WatchedHub, end, hub, run, start

from moemerge import InputError, Options, export, merge, verify_checkpoint
from moemerge.reporting import size

__all__ = ["hub"]

FILE = "mix.gguf"
BESIDE = f"{FILE}.moemerge"


@pytest.fixture(scope="module")
def config(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two small files."""
    root = tmp_path_factory.mktemp("sources")
    files = []
    for number in range(2):
        model = make_wide(root / f"m{number}", number)
        files.append(root / f"m{number}.gguf")
        as_dense_file(model, files[-1], "llama")
    text = simple_config(files[0], files, "gate_mode: random")
    return write_config(root / "c.yaml", text)


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    merge(config, out / FILE)
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "there")) / FILE


def push(hub: FakeHub, home: Path, out: Path, *more: str) -> Any:
    return run(hub, home, "push", out, REPO, *more)


def test_the_file_its_card_and_its_manifest_go_up(
    hub: WatchedHub, out: Path, config: Path, tmp_path: Path
) -> None:
    beside = out.parent / BESIDE
    (beside / "notes.txt").write_text("a stranger")
    done = push(hub, tmp_path / "home", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: pushed to {hub.url}/{REPO}\n"
    assert "not pushed, because not of the model: notes.txt" in done.stderr
    there = hub.bytes_of(REPO)
    told = {FILE, "README.md", f"{BESIDE}/moemerge.json", f"{BESIDE}/config.json"}
    assert there.keys() - {".gitattributes"} == told
    assert there[FILE] == out.read_bytes()
    assert there["README.md"] == (beside / "README.md").read_bytes()
    for content in there.values():
        assert str(config.parent).encode() not in content
        assert str(tmp_path).encode() not in content
        assert SECRET.encode() not in content
    assert len(hub.repositories[REPO].commits) == 2  # the Hub's own, and one
    assert verify_checkpoint(out).compared

    head = yaml.safe_load(there["README.md"].decode().split("---\n")[1])
    assert head["library_name"] == "gguf"
    assert {"gguf", "llama.cpp", "moe", "merge", "moemerge"} <= {*head["tags"]}

    copy = tmp_path / "copy"
    for name, content in there.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    verified = run(hub, tmp_path / "home", "verify", copy / FILE)
    assert verified.returncode == 0, verified.stderr
    hub.forget()
    again = push(hub, tmp_path / "home", out)
    assert "nothing has changed, so nothing was sent" in again.stderr
    assert (again.returncode, hub.received()) == (0, 0)
    (beside / "README.md").write_text("# Mine\n")
    assert push(hub, tmp_path / "home", out).returncode == 0
    assert hub.received() == len("# Mine\n")


def test_a_merge_pushes_parts_and_a_killed_push_goes_on(
    hub: WatchedHub, config: Path, tmp_path: Path
) -> None:
    """The same command sends the rest; other parts of an earlier file go."""

    def kill(request: Request) -> None:
        if hub.puts() == 2:
            process.kill()

    out = tmp_path / FILE
    command = ["-m", "moemerge", config, out, "--shard-size=4MB", "--push", REPO]
    process = start(hub, tmp_path / "home", *command)
    hub.watch = kill
    assert end(process).returncode == -signal.SIGKILL
    hub.watch = None
    parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    hub.forget()
    done = run(hub, tmp_path / "home", *command[2:])
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.url}/{REPO}" in done.stdout
    assert 0 < hub.puts() < len(parts)
    there = hub.bytes_of(REPO)
    assert sorted(name for name in there if name.endswith(".gguf")) == parts
    assert all(there[name] == (tmp_path / name).read_bytes() for name in parts)

    merge(config, tmp_path / "one" / FILE)
    assert push(hub, tmp_path / "home", tmp_path / "one" / FILE).returncode == 0
    assert [name for name in hub.bytes_of(REPO) if name.endswith(".gguf")] == [FILE]
    merge(config, tmp_path / "other.gguf")
    assert push(hub, tmp_path / "home", tmp_path / "other.gguf").returncode == 0
    assert {FILE, "other.gguf"} <= hub.bytes_of(REPO).keys()


def test_an_exported_file_has_the_card_of_its_directory(
    hub: WatchedHub, config: Path, tmp_path: Path
) -> None:
    text = config.read_text().replace("random", "ridge")
    directory, out = tmp_path / "dir", tmp_path / FILE
    merge(write_config(config.parent / "d.yaml", text), directory)
    export(directory, out)
    told = (directory / "README.md").read_text()
    assert "library_name: transformers" in told and "hf download" in told
    card = (tmp_path / BESIDE / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["library_name"], head["tags"][0]) == ("gguf", "gguf")
    assert f"llama-cli -m {FILE}" in card and "transformers" not in card.partition("How it")[0]
    assert "## Routing" in card and card.count("## ") == told.count("## ")
    assert f"| Size | {size(out.stat().st_size)}" in card
    pictured = [(folder / "routing.png").is_file() for folder in (directory, tmp_path / BESIDE)]
    assert pictured == [("routing.png" in card)] * 2
    verify_checkpoint(out)
    assert push(hub, tmp_path / "home", out).returncode == 0
    assert hub.bytes_of(REPO)["README.md"] == card.encode()
    assert str(config.parent) not in card

    (directory / "README.md").write_text(told.replace("language model", "model"))
    export(directory, tmp_path / "second.gguf")
    assert not (tmp_path / "second.gguf.moemerge" / "README.md").exists()


def test_what_may_not_be_beside_each_other(
    hub: WatchedHub, out: Path, babies: dict[str, Path], tmp_path: Path
) -> None:
    base, *experts = babies.values()
    directory = tmp_path / "directory"
    text = simple_config(base, experts, "gate_mode: random")
    merge(write_config(tmp_path / "c.yaml", text), directory)
    strange = tmp_path / "strange"
    strange.mkdir()
    shutil.copy(out, strange / "else.gguf")
    for folder, what in (
        (directory, "holds a mixture in a directory, which has a card of its own"),
        (strange, "holds else.gguf, which moemerge did not make"),
    ):
        name = f"user/{folder.name}"
        hub.publish(name, folder, writers={SECRET})
        done = run(hub, tmp_path / "home", "push", out, name)
        assert (done.returncode, what in done.stderr) == (2, True), done.stderr
    assert push(hub, tmp_path / "home", out).returncode == 0
    done = run(hub, tmp_path / "home", "push", directory, REPO)
    assert (done.returncode, f"holds {FILE}, a mixture with a card" in done.stderr) == (2, True)


def test_what_is_refused_before_anything_is_sent(
    hub: WatchedHub, out: Path, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="push_as_you_go: does not take GGUF files"):
        merge(config, tmp_path / "x.gguf", Options(push=REPO, push_as_you_go=True))
    manifest = out.parent / BESIDE / "moemerge.json"
    with out.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x55")
    done = push(hub, tmp_path / "home", out)
    assert done.returncode == 1 and hub.repositories == {}
    manifest.unlink()
    done = push(hub, tmp_path / "home", out)
    assert (done.returncode, f"no {BESIDE} beside it" in done.stderr) == (2, True)


def test_a_field_that_names_a_path_is_not_pushed(
    hub: WatchedHub, config: Path, tmp_path: Path
) -> None:
    """A GGUF file's fields are the base's, and its experts' names."""
    name = f"- name: {tmp_path}/secret/one\n    source_model"
    named = config.read_text().replace("- source_model", name, 1)
    merge(write_config(tmp_path / "c.yaml", named), tmp_path / "x.gguf")
    done = run(hub, tmp_path / "home", "push", tmp_path / "x.gguf", REPO)
    assert done.returncode == 2
    assert "x.gguf: names a path of this machine" in done.stderr
    assert not hub.puts()


def test_a_repository_of_files_alone_gives_no_warning(
    hub: WatchedHub, config: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for path in config.parent.glob("m*.gguf"):
        shutil.copy(path, files)
    hub.publish("lab/a", files)
    text = simple_config("lab/a:m0.gguf", ["lab/a:m0.gguf", "lab/a:m1.gguf"], "gate_mode: random")
    done = run(hub, tmp_path / "home", "plan", write_config(tmp_path / "c.yaml", text))
    assert done.returncode == 0, done.stderr
    assert "matched" not in done.stderr
