"""Every command that writes to an output, killed before any change that it makes there.

What is then there is the old state, the new one, or what the next call resolves: the same command
again, `verify`, or `tune undo`. And again where that is killed too.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from babies import make_model, simple_config, write_config
from forks import Forks, Ran

from moemerge.output.state import COMMITTED


def content(out: Path) -> dict[str, bytes]:
    """What is there, but for what moemerge notes for itself."""
    files = [path for path in out.rglob("*") if path.is_file()]
    told = {path.relative_to(out).as_posix(): path.read_bytes() for path in files}
    return {name: told[name] for name in told if not name.startswith(".moemerge/")}


@dataclass
class Command:
    """What is killed: what it begins with (None: nothing), its arguments, and what it ends with.

    `begun` are the changes that it makes when nobody kills it.
    """

    name: str
    before: Path | None
    argv: list[object]
    out: Path
    forks: Forks
    after: dict[str, bytes] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)

    def run(self, kill_at: int | None = None) -> Ran:
        return self.forks.run(*self.argv, under=self.out, kill_at=kill_at)

    def do(self, *argv: object) -> Ran:
        return self.forks.run(*argv)

    def put(self, what: Path | None) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if what:
            shutil.copytree(what, self.out)

    @property
    def old(self) -> dict[str, bytes]:
        return content(self.before) if self.before else {}

    def learn(self) -> None:
        """Run it whole, once."""
        self.put(self.before)
        ran = self.run()
        assert ran.rc == 0, ran.said
        self.after, self.begun = content(self.out), ran.begun
        assert not (self.out / ".moemerge").exists()

    @property
    def commit_point(self) -> int:
        return next(
            at for at, what in enumerate(self.begun) if what.endswith(f".moemerge/{COMMITTED}")
        )


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Command]]:
    root = tmp_path_factory.mktemp("kills")
    models = [make_model(root / f"m{n}", seed=n) for n in range(3)]
    text = root / "text.jsonl"
    words = ("code python javascript", "story scene dragon")
    lines = [json.dumps({"text": f"{words[at % 2]} " * 8}) for at in range(16)]
    text.write_text("\n".join(lines))

    def config(mode: str) -> Path:
        made = simple_config(models[0], [*models[1:]], f"gate_mode: {mode}")
        return write_config(root / f"{mode}.yaml", made)

    merging = ["--shard-size", "40KB", "--jobs", "1", "--quiet"]
    out, merged, tuned = root / "out", root / "merged", root / "tuned"

    def tuning(*more: object) -> list[object]:
        return [
            "tune", "routers", out, "--data", text, "--steps", 2, "--batch", 8,
            "--length", 16, "--held-out", 0.5, "--device", "cpu", *more,
        ]  # fmt: skip

    with Forks() as forks:
        made = {
            "merge": (None, ["merge", config("random"), out, *merging]),
            "merge --overwrite": (
                tuned, ["merge", config("cheap_embed"), out, "--overwrite", *merging],
            ),
            "regate": (tuned, ["regate", out, config("cheap_embed")]),
            "tune": (merged, tuning()),
            "tune, tuned already": (tuned, tuning("--learning-rate", 0.05)),
            "undo": (tuned, ["tune", "undo", out]),
            "top-k": (merged, ["top-k", out, 1]),
            "eval --card": (merged, ["eval", out, "--text", f"a={text}", "--card"]),
        }  # fmt: skip
        all = {name: Command(name, *one, out, forks) for name, one in made.items()}
        all["merge"].learn()
        shutil.copytree(out, merged)
        all["tune"].learn()
        shutil.copytree(out, tuned)
        for name, one in all.items():
            if name not in ("merge", "tune"):
                one.learn()
            assert one.after != one.old, name
        yield all


WAYS = ("again", "verify", "undo", "killed again")


def check(one: Command, at: int, way: str, tmp: Path) -> str:
    """Kill it before change `at`, look at what is there, and resolve it one way; what was there."""
    one.put(one.before)
    killed = one.run(kill_at=at)
    where = f"{one.name}, killed before {one.begun[at]}, then {way}"
    assert killed.rc == -9, f"{where}: {killed}"
    found, decided = content(one.out), at > one.commit_point
    kind = "old" if found == one.old else "new" if found == one.after else "resumable"
    if one.name.startswith("merge") and kind == "resumable" and not decided:
        assert "config.json" not in found, where  # no model for anybody
        verified = one.do("verify", one.out)
        assert verified.rc in (1, 2) and "Traceback" not in verified.said, f"{where}: {verified}"
    elif way == "verify" and (one.before or decided):
        verified = one.do("verify", one.out)
        assert verified.rc == 0, f"{where}: {verified.said}"
        assert content(one.out) == (one.after if decided else one.old), where
    elif way == "undo" and one.before:
        undone = one.do("tune", "undo", one.out)
        assert undone.rc in (0, 2) and "Traceback" not in undone.said, f"{where}: {undone.said}"
        if undone.rc == 2:
            assert "nothing to undo" in undone.said, f"{where}: {undone.said}"
        verified = one.do("verify", one.out)
        assert verified.rc == 0, f"{where}: {verified.said}"
        return kind
    elif way == "killed again":
        left = tmp / "left"
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(one.out, left)
        begun = one.run().begun
        if begun:
            one.put(left)
            assert one.run(kill_at=at % len(begun)).rc == -9, where
        else:
            one.put(left)
    resolve(one, where)
    return kind


def resolve(one: Command, where: str) -> None:
    """The same command again, until what it wanted is there."""
    ran = one.run()
    tolerable = {
        "merge": "holds a finished model",
        "undo": "nothing to undo",
    }  # it was done already
    if ran.rc != 0:
        assert ran.rc == 2 and tolerable.get(one.name, "\0") in ran.said, f"{where}: {ran.said}"
    verified = one.do("verify", one.out)
    assert verified.rc == 0, f"{where}: {verified.said}"
    if not one.name.startswith("tune"):  # which goes on from where it is
        assert content(one.out) == one.after, where
    if ran.rc == 0:
        assert not (one.out / ".moemerge").exists(), where


NAMES = [
    "merge", "merge --overwrite", "regate", "tune", "tune, tuned already", "undo", "top-k",
    "eval --card",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_killed_here_and_there(name: str, commands: dict[str, Command], tmp_path: Path) -> None:
    one = commands[name]
    point, count = one.commit_point, len(one.begun)
    for number, at in enumerate((point, point + 1, (point + count) // 2)):
        check(one, at, WAYS[(number + len(name)) % len(WAYS)], tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_killed_anywhere(name: str, commands: dict[str, Command], tmp_path: Path) -> None:
    """At every change, two ways from where it is decided on; what was there is printed."""
    one = commands[name]
    found: dict[int, str] = {}
    for at in range(len(one.begun)):
        for step in range(1 + (at >= one.commit_point)):
            found[at] = check(one, at, WAYS[(at + step) % len(WAYS)], tmp_path)
    print(f"{name}: {len(found)} changes, {dict(Counter(found.values()))}")
