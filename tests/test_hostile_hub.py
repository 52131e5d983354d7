"""Repositories that lie: each refused by name, and nothing written outside the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from babies import make_model
from fake_hub import FakeHub
from test_hostile_files import HEADERS, safetensors

ROOT = Path(__file__).parents[1]
OPEN = """
import json, sys
from moemerge.checkpoint.not_a_model import SourceProblem
from moemerge.checkpoint import open_checkpoint
from moemerge.checkpoint.reference import Reference
for repo in sys.argv[1:]:
    try:
        open_checkpoint(Reference(repo, repo=repo))
        print(json.dumps([repo, "opened"]))
    except SourceProblem as error:
        print(json.dumps([repo, error.what]))
"""
INDEXES = {
    "a file above": "../model.safetensors",
    "a file far above": "../../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "a drive": "C:\\\\model.safetensors",
    "a share": "\\\\\\\\host\\\\share\\\\model.safetensors",
    "a folder": "sub/model.safetensors",
    "itself": ".",
    "nothing": "",
}
LISTED = ("tokenizer/../../../evil.json", "tokenizer_../../evil.json", "../config.json")


def opened(hub: FakeHub, home: Path, repos: list[str]) -> dict[str, str]:
    """What opening each repository says."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *repos],
        env={**os.environ, **hub.environment(home / "hf"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


def strangers(home: Path) -> list[Path]:
    """What stands outside the cache."""
    return [path for path in home.parent.rglob("*") if path.name.startswith("evil")]


def test_hostile_headers_are_refused_from_afar(tmp_path: Path) -> None:
    good = make_model(tmp_path / "good")
    with FakeHub() as hub:
        reasons = {}
        for number, (header, reason) in enumerate(HEADERS.values()):
            directory = tmp_path / str(number)
            shutil.copytree(good, directory)
            safetensors(directory / "model.safetensors", header)
            hub.publish(f"user/header{number}", directory)
            reasons[f"user/header{number}"] = reason
        said = opened(hub, tmp_path, list(reasons))
    assert said.keys() == reasons.keys()
    for repo, reason in reasons.items():
        assert reason in said[repo] and "model.safetensors" in said[repo], (reason, said[repo])


def test_an_index_that_leaves_its_repository_is_refused(tmp_path: Path) -> None:
    good = make_model(tmp_path / "good", shards=2)
    with FakeHub() as hub:
        repos = {}
        for number, (what, name) in enumerate(INDEXES.items()):
            directory = tmp_path / str(number)
            shutil.copytree(good, directory)
            path = directory / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            index["weight_map"]["model.norm.weight"] = json.loads(f'"{name}"')
            path.write_text(json.dumps(index))
            hub.publish(f"user/index{number}", directory)
            repos[f"user/index{number}"] = what
        said = opened(hub, tmp_path, list(repos))
    for repo, what in repos.items():
        assert "which leaves its directory" in said[repo], what


def test_names_that_a_repository_lists_stay_inside_the_cache(tmp_path: Path) -> None:
    good = make_model(tmp_path / "models" / "good")
    evil = tmp_path / "models" / "content"
    evil.write_text("{}")
    with FakeHub() as hub:
        for number, name in enumerate(LISTED):
            hub.publish(f"user/listed{number}", good)
            hub.repositories[f"user/listed{number}"].find("main").files[name] = evil  # type: ignore[union-attr]
        (tmp_path / "work").mkdir()
        said = opened(hub, tmp_path / "work", [f"user/listed{n}" for n in range(len(LISTED))])
    assert len(said) == len(LISTED)
    assert not strangers(tmp_path / "work")
