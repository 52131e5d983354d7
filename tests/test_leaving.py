"""What leaves this machine: after every command, no byte that a push sends tells where models lay,
nor the prompts that the card must not show; and what arrives verifies.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from babies import make_adapter, make_model, simple_config, write_config
from fake_hub import FakeHub
from forks import Forks, Ran
from transformers import AutoModelForCausalLM

TOKEN = "hf_secretsecretsecret"
PLACE = "secretplace"
PROMPTS = (b"dragon castle", b"code python", b"function class", b"story scene")


class Desk:
    """A directory that nobody must hear of, a mixture in it, and a Hub that keeps what it hears."""

    def __init__(self, root: Path, hub: FakeHub, forks: Forks):
        self.root, self.hub, self.forks, self.pushes = root, hub, forks, 0
        models = [make_model(root / "models" / f"m{n}", seed=n) for n in range(3)]
        for model in models:
            path = model / "tokenizer_config.json"
            told = json.loads(path.read_text())
            told |= {"name_or_path": str(model), "special_tokens_map_file": f"{model}/map.json"}
            path.write_text(json.dumps(told))
        self.models, self.out = models, root / "out"
        head = "# what stands in /home/me/models\ngate_mode: cheap_embed"
        text = simple_config(models[0], models[1:], head)
        self.config = write_config(root / "c.yaml", text)
        self.text = root / "text.jsonl"
        words = ("code python javascript", "story scene dragon")
        lines = [json.dumps({"text": f"{words[at % 2]} " * 8}) for at in range(16)]
        self.text.write_text("\n".join(lines))
        self.do("merge", self.config, self.out, "--no-config-in-card")

    def do(self, *argv: object) -> Ran:
        ran = self.forks.run(*argv)
        assert ran.rc == 0, ran.said
        return ran

    def fresh(self) -> Path:
        """The mixture anew, in the same place."""
        out = self.root / "again"
        shutil.rmtree(out, ignore_errors=True)
        return Path(shutil.copytree(self.out, out))

    def tuned(self) -> Path:
        out = self.fresh()
        self.do("tune", "routers", out, "--data", self.text, "--steps", 2, "--batch", 8,
                "--length", 16, "--held-out", 0.5, "--device", "cpu")  # fmt: skip
        return out

    def made(self, *argv: object) -> Path:
        """What a command makes of the mixture."""
        new = self.root / "new"
        shutil.rmtree(new, ignore_errors=True)
        command, *more = argv
        self.do(command, self.out, *more, new)
        return new

    def repo(self) -> str:
        self.pushes += 1
        return f"user/mix{self.pushes}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    root = tmp_path_factory.mktemp(PLACE)
    with FakeHub() as hub:
        hub.account(TOKEN, "user")
        environment = hub.environment(root / "home", HF_TOKEN=TOKEN, HOME=str(root / "home"))
        with Forks(environment, root) as forks:
            yield Desk(root, hub, forks)


def regated(desk: Desk) -> Path:
    out, text = desk.fresh(), desk.config.read_text().replace("cheap_embed", "random")
    desk.do("regate", out, write_config(desk.root / "other.yaml", text))
    return out


def undone(desk: Desk) -> Path:
    out = desk.tuned()
    desk.do("tune", "undo", out)
    return out


def evaluated(desk: Desk) -> Path:
    out = desk.fresh()
    desk.do("eval", out, "--text", f"a={desk.text}", "--card")
    return out


def edited(desk: Desk) -> Path:
    """A card that its owner changed, with paths in it."""
    out = desk.fresh()
    card = out / "README.md"
    card.write_text(card.read_text() + f"\nMade from {desk.models[1]}, see `{desk.root}`.\n")
    (out / "notes.txt").write_text(f"{desk.root}: dragon castle")
    return out


def own_card(desk: Desk) -> Path:
    card = desk.root / "own.md"
    card.write_text(f"# Mine\n\nOn my disk it is {desk.root / 'out'}.\n")
    out, text = desk.root / "with-card", desk.config.read_text()
    text = text.replace(f"{desk.root}/", f"../{desk.root.name}/")  # and relative sources
    config = write_config(desk.root / "relative.yaml", text)
    desk.do("merge", config, out, "--no-config-in-card", "--card", card)
    return out


def chosen(desk: Desk) -> Path:
    out = desk.tuned()
    desk.do("top-k", out, 1)
    return out


def average(desk: Desk) -> Path:
    """A body that no weight of the base is read for, then one expert less."""
    config = write_config(desk.root / "a.yaml", f"{desk.config.read_text()}body: average\n")
    out, less = desk.root / "average", desk.root / "less"
    desk.do("merge", config, out, "--no-config-in-card")
    desk.do("drop", out, less, "--expert", "1")
    return less


def repaired(desk: Desk) -> Path:
    foreign, out = desk.root / "foreign", desk.root / "repaired"
    AutoModelForCausalLM.from_pretrained(desk.out).save_pretrained(foreign)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(desk.models[0] / name, foreign)
    config = json.loads((foreign / "config.json").read_text())
    config["_name_or_path"] = str(desk.root)
    (foreign / "config.json").write_text(json.dumps(config))
    desk.do("repair", foreign, out)
    return out


def split(desk: Desk) -> Path:
    text = f"base_model: {desk.models[0]}\nsplit: {{slices: 2, text: {desk.text}}}\n"
    out = desk.root / "split"
    desk.do("split", write_config(desk.root / "s.yaml", text), out, "--no-config-in-card")
    return out


def adapted(desk: Desk) -> Path:
    adapter = make_adapter(desk.root / "adapter", desk.out, target_modules=["q_proj", "v_proj"])
    return desk.made("merge-adapter", adapter)


AFTER: dict[str, Callable[[Desk], Path]] = {
    "merge": Desk.fresh,
    "merge --card": own_card,
    "regate": regated,
    "tune": Desk.tuned,
    "tune undo": undone,
    "eval --card": evaluated,
    "an edited card": edited,
    "top-k in place, tuned": chosen,
    "top-k": lambda desk: desk.made("top-k", "1"),
    "drop": average,
    "add": lambda desk: desk.made("add", desk.models[0]),
    "extract": lambda desk: desk.made("extract", "--expert", "1"),
    "repair": repaired,
    "split": split,
    "merge-adapter": adapted,
}


def heard_of(sent: bytes) -> bytes:
    """All that was sent, with what was packed in it: base64 in JSON, escapes in addresses."""
    told = [sent, unquote_to_bytes(sent)]
    for found in re.findall(rb'"([A-Za-z0-9+/]{16,}={0,2})"', sent):
        with suppress(ValueError):
            told.append(base64.b64decode(found, validate=True))
    return b"\n".join(told)


def check(desk: Desk, repo: str, prompts: bool = False) -> None:
    """Nothing of what the Hub heard tells; and what it holds verifies."""
    assert desk.hub.heard is not None
    told = heard_of(bytes(desk.hub.heard))
    assert b"mixtral" in told or b"llama" in told  # it was heard at all
    for word in (PLACE.encode(), b"/home/me", *(() if prompts else PROMPTS)):
        at = told.find(word)
        assert at < 0, told[max(0, at - 200) : at + 100]
    commit = desk.hub.repositories[repo].find("main")
    assert commit
    assert not [name for name in commit.files if "before-tuning" in name or "notes" in name]
    copy = desk.root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    for name, path in commit.files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / name)
    desk.do("verify", copy)


@pytest.mark.parametrize("name", AFTER)
def test_a_push_tells_nothing_of_this_machine(name: str, desk: Desk) -> None:
    out, repo = AFTER[name](desk), desk.repo()
    desk.hub.heard = bytearray()
    ran = desk.do("push", out, repo)
    check(desk, repo)
    if name == "an edited card":
        assert "not pushed, because not of the model: notes.txt" in ran.said
        assert "README.md: is pushed without the paths of this machine in it" in ran.said
        pushed = desk.hub.repositories[repo].find("main")
        assert pushed and "Made from ./m1, see" in pushed.files["README.md"].read_text()


@pytest.mark.parametrize("flags", [[], ["--push-as-you-go"]])
def test_a_merge_that_pushes_tells_nothing_either(flags: list[str], desk: Desk) -> None:
    for more in (["--no-config-in-card"], []):
        repo = desk.repo()
        desk.hub.heard = bytearray()
        out = desk.root / repo.partition("/")[2]
        desk.do("merge", desk.config, out, "--push", repo, *flags, *more)
        check(desk, repo, prompts=not more)


def test_what_an_older_push_leaked_goes(desk: Desk) -> None:
    out, repo = desk.fresh(), desk.repo()
    leaked = desk.root / "leaked"
    shutil.copytree(out, leaked / "before-tuning")
    shutil.copy(out / "moemerge.json", leaked)
    desk.hub.publish(repo, leaked)
    desk.hub.heard = bytearray()
    desk.do("push", out, repo)
    check(desk, repo)
