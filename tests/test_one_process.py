"""Two calls in one process leave what each leaves alone: no call remembers another's sources.

Run as a program (`python test_one_process.py WORK CALL...`), it is the process: forked for every
order of two inputs, once everything is imported and before anything is called. Of each fork the
first call is one that is made alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from babies import WORDS, make_adapter, make_model, simple_config
from fake_hub import FakeHub

import moemerge
from moemerge import Options, Tuning

ORDERS = ("ab", "ba")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call: with the model `own` as its base and the `other` as an expert, into `out`."""

    own: str
    other: str
    work: Path

    @property
    def out(self) -> str:
        return f"out-{self.own}"

    @property
    def options(self) -> Options:
        return Options(cache_dir="cache", device="cpu")

    @property
    def mixture(self) -> str:
        return f"lab/of-2-{self.own}"

    @property
    def larger(self) -> str:
        return f"lab/of-3-{self.own}"

    @property
    def text(self) -> Path:
        return self.work / f"text-{self.own}.jsonl"

    @property
    def tuning(self) -> Tuning:
        return Tuning((str(self.text),), steps=1, batch=2, length=16, held_out=0.3)

    def config(self, mode: str = "gate_mode: random") -> moemerge.MergeConfig:
        own, other = f"lab/{self.own}", f"lab/{self.other}"
        return moemerge.parse_config(simple_config(own, [own, other, "lab/c"], head=mode))

    def copied(self) -> str:
        """A copy of the mixture, to be changed in place."""
        shutil.copytree(self.work / f"of-2-{self.own}", self.out)
        return self.out


def regated(turn: Turn) -> moemerge.MergeResult:
    moemerge.merge(turn.config(), turn.out, turn.options)
    return moemerge.regate(turn.out, turn.config("gate_mode: cheap_embed"), turn.options)


def verified(turn: Turn) -> object:
    moemerge.merge(turn.config(), turn.out, turn.options)
    return moemerge.verify_checkpoint(turn.out, cache_dir="cache")


def void(_: object) -> None:
    """Drop a result that names the run."""


def undone(turn: Turn) -> None:
    moemerge.tune(turn.copied(), turn.tuning, turn.options)
    moemerge.undo_tune(turn.out)


def reported(turn: Turn) -> dict[str, Any]:
    texts = {"own": turn.text}
    return moemerge.routing_report(turn.copied(), texts, options=turn.options)


def refused(turn: Turn) -> str:
    """Their tokenizer has no name in llama.cpp."""
    with pytest.raises(moemerge.InputError) as error:
        moemerge.export(turn.mixture, Path(turn.out) / "made.gguf", turn.options)
    return str(error.value)


CALLS: dict[str, Callable[[Turn], object]] = {
    "add": lambda t: moemerge.add(t.mixture, f"lab/{t.other}", t.out, "more", t.options),
    "drop": lambda t: moemerge.drop(t.larger, "1", t.out, t.options),
    "evaluate": lambda t: moemerge.evaluate(
        t.copied(), moemerge.EvalSpec(texts={"own": t.text}), t.options
    ),
    "export": refused,
    "extract": lambda t: moemerge.extract(t.mixture, "1", t.out, t.options),
    "finetune": lambda t: moemerge.finetune(t.mixture, t.out, t.tuning, None, t.options),
    "load_config": lambda t: moemerge.load_config(t.work / f"config-{t.own}.yaml"),
    "check_family": lambda t: moemerge.check_family(moemerge.make_plan(t.config(), t.options)),
    "make_plan": lambda t: moemerge.make_plan(t.config(), t.options).plan,
    "merge": lambda t: moemerge.merge(t.config("gate_mode: hidden"), t.out, t.options).plan,
    "merge_adapter": lambda t: moemerge.merge_adapter(
        t.mixture, f"lab/adapter-{t.own}", t.out, t.options
    ),
    "parse_config": lambda t: t.config(),
    "push": lambda t: void(moemerge.push(t.copied(), f"me/{Path.cwd().name}-{t.own}")),
    "regate": lambda t: regated(t).plan,
    "repair": lambda t: moemerge.repair(t.mixture, t.out, t.options),
    "routing_page": lambda t: moemerge.routing_page(reported(t)),
    "routing_report": reported,
    "top_k": lambda t: moemerge.top_k(t.larger, 1, t.out, t.options),
    "tune": lambda t: moemerge.tune(t.copied(), t.tuning, t.options),
    "undo_tune": undone,
    "verify_checkpoint": verified,
}
"""Each public function, called for one of two inputs; what it reads is on the Hub, where it may."""


def left_by(outcome: object, turn: Turn) -> dict[str, str]:
    """What a call left: its result but for times, and every file, by digest."""
    left = {"its result": re.sub(r"seconds=[\d.e-]+", "", repr(outcome))}
    for path in sorted(Path(turn.out).rglob("*")):
        if path.is_file():
            content = path.read_bytes().replace(str(Path.cwd()).encode(), b"here")
            left[str(path.relative_to(turn.out))] = hashlib.sha256(content).hexdigest()
    return left


def program(work: Path, names: list[str]) -> None:
    """Fork for each call and order; each child writes what its calls left."""
    for name in names:
        children = []
        for order in ORDERS:
            here = work / "runs" / name / order
            here.mkdir(parents=True)
            if child := os.fork():
                children.append(child)
                continue
            try:
                os.chdir(here)
                for own in order:
                    turn = Turn(own, "ab".replace(own, ""), work)
                    left = left_by(CALLS[name](turn), turn)
                    Path(f"{own}.json").write_text(json.dumps(left))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)


def run(hub: FakeHub, work: Path, names: list[str]) -> None:
    """The program, with a Hub, a home of its own, and the mixtures that its calls begin with."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    paths = os.pathsep.join(map(str, (Path(moemerge.__file__).parents[1], Path(__file__).parent)))
    environment = hub.environment(work / "home", HF_TOKEN="hf_me", PYTHONPATH=paths)
    done = subprocess.run(
        [sys.executable, __file__, str(work), *names],
        env={**kept, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.account("hf_me", "me")
        yield hub


@pytest.fixture(scope="module")
def work(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    for name in "abc":  # the first two have one tokenizer
        make_model(work / name, seed=ord(name), post_processor=name != "c")
        hub.publish(f"lab/{name}", work / name)
    for name in "ab":
        make_adapter(work / f"adapter-{name}", work / name, target_modules=["q_proj", "o_proj"])
        hub.publish(f"lab/adapter-{name}", work / f"adapter-{name}")
    for own, other in ("ab", "ba"):
        config = work / f"config-{own}.yaml"
        names = [work / own, work / other, work / own]
        for count in (2, 3):
            config.write_text(simple_config(work / own, [*names[:count]], "gate_mode: random"))
            moemerge.merge(config, work / f"of-{count}-{own}", Options())
            hub.publish(f"lab/of-{count}-{own}", work / f"of-{count}-{own}")
        lines = [" ".join((WORDS[5 * n :] + WORDS)[:16]) for n in range(8)]
        text = lines if own == "a" else lines[::-1]
        (work / f"text-{own}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in text)
        )
    run(hub, work, [name for name in CALLS if name != "finetune"])
    return work


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n == "finetune")) for n in CALLS]
)
def test_what_a_call_leaves_does_not_depend_on_the_calls_before_it(
    name: str, work: Path, hub: FakeHub
) -> None:
    if name == "finetune":
        run(hub, work, [name])
    runs = {order: work / "runs" / name / order for order in ORDERS}
    for own in "ab":
        one, other = (json.loads((runs[order] / f"{own}.json").read_text()) for order in ORDERS)
        assert one == other
    if name == "push":
        pushed = {}
        for order in ORDERS:
            for own in "ab":
                repository = hub.repositories[f"me/{order}-{own}"]
                found = repository.find("main")
                assert found
                pushed[order, own] = {n: hub.digest(path) for n, path in found.files.items()}
        assert all(pushed["ab", own] == pushed["ba", own] for own in "ab")


def test_every_public_function_is_among_the_calls() -> None:
    public = {n for n in moemerge.__all__ if inspect.isfunction(getattr(moemerge, n))}
    assert public == CALLS.keys()


if __name__ == "__main__":
    import peft  # noqa: F401  (imported once, for all forks)
    import transformers  # noqa: F401

    program(Path(sys.argv[1]), sys.argv[2:])
