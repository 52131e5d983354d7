"""The model card: true, whole, understood by the Hub; neither a path nor markup gets into it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from babies import make_adapter, make_model, simple_config, write_config
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from moemerge import (
    InputError,
    Options,
    VerifyError,
    make_plan,
    merge,
    parse_config,
    regate,
    verify_checkpoint,
)
from moemerge.card import card
from moemerge.card.text import CardOptions
from moemerge.cli import app
from moemerge.output.manifest import read_manifest
from moemerge.prepare.source_cards import Claims, claims_of

ROOT = Path(__file__).resolve().parent.parent
RANDOM = "gate_mode: random"
DRAWS = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")


def rendered(config: str) -> str:
    return card.render(make_plan(parse_config(config)), {}, CardOptions())


def metadata(text: str) -> dict[str, Any]:
    return dict(ModelCard(text).data.to_dict())


def shown_config(text: str) -> str:
    return text.partition("## How it was made")[2].partition("yaml\n")[2].partition("\n```")[0]


def links(root: Path, babies: dict[str, Path], **heads: str) -> list[Path]:
    """The babies' files in other directories, each with a README.md of its own."""
    found = []
    for name, head in heads.items():
        found.append(root / name)
        found[-1].mkdir(parents=True)
        for file in babies["base"].iterdir():
            (found[-1] / file.name).symlink_to(file)
        (found[-1] / "README.md").write_text(head)
    return found


def test_names_prompts_and_text_are_no_markup(babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    config = parse_config(simple_config(base, [base, first], "gate_mode: cheap_embed"))
    prompts = (
        "```\n````\n# head",
        "`x` | y \\|",
        "[l](u)",
        "![i](u)",
        "http://a.b www.c.d",
        "\u202e",
    )
    expert = replace(config.experts[0], name="a|b<script>\nc", positive_prompts=prompts)
    ready = make_plan(replace(config, experts=(expert, config.experts[1])))
    text = card.render(ready, {}, CardOptions())
    assert "28.96K, of which 28.96K work on any one token" in text
    row = next(line for line in text.splitlines() if line.startswith("| 0 |"))
    assert row == (
        r"| 0 | a\|b\<script> c | base | \`\`\` \`\`\`\` # head<br>\`x\` \| y \\\|<br>\[l](u)<br>"
        r"!\[i](u)<br>http:\//a.b www\.c.d<br>and 1 more |"
    )
    fenced = text.partition("## How it was made")[2].split("\n`````yaml\n")[1]
    again = parse_config(fenced.partition("\n`````\n")[0])
    assert again.experts[0] == replace(expert, source_model="./base")


def test_whoever_reads_it_can_run_the_model(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    plain = make_model(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    for number, model in enumerate([base, plain]):
        out = tmp_path / f"out{number}"
        merge(write_config(tmp_path / "c.yaml", simple_config(model, [model, first], RANDOM)), out)
        text = (out / "README.md").read_text()
        assert ("apply_chat_template" in text) == (model is base)
        script = text.partition("```python\n")[2].partition("```")[0]
        done = subprocess.run([sys.executable, "-c", script], cwd=out, capture_output=True)
        if model is plain:
            assert done.returncode == 0, done.stderr.decode()
    bare = tmp_path / "bare"
    merge(tmp_path / "c.yaml", bare, Options(copy_tokenizer=False))
    assert "without a tokenizer" in (bare / "README.md").read_text()


def test_it_tells_gate_options_limits_and_scales(babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    head = "gate: { mode: ridge, kappa: 9 }"
    text = rendered(simple_config(base, [base, first], head, "noise_scale: 0.5"))
    assert "`ridge`: ridge regression" in text and "kappa 9" in text
    assert "| first, noise 0.5 |" in text and "negative" not in text
    assert "transformers " in text and "was not measured" in text
    text = rendered(simple_config(base, [base, base], RANDOM))
    assert "routers are random (`random`): train it" in text and "transformers 5" not in text
    assert "All its experts are the same model" in text and "seed 0" in text


# licences


LICENCES: dict[str, tuple[list[str], Any, Any, str]] = {
    "agree": (["license: mit", "license: [mit]"], "mit", None, "name the same licence, mit."),
    "differ": (["license: mit", "license: apache-2.0"], "other", None, "the strictest may bind"),
    "one unknown": (["license: mit", "language: en"], "other", None, "licence is unknown"),
    "unknown": (["tags: [x]", ""], "unknown", None, "licence is unknown"),
    "of one name": (
        ["license: other\nlicense_name: my-terms\nlicense_link: https://a.b/c"] * 2,
        "other",
        "my-terms",
        "name the same licence, [my-terms](https://a.b/c).",
    ),
    "of two names": (
        ["license: other\nlicense_name: mine", "license: other\nlicense_name: yours"],
        "other",
        None,
        "licences differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LICENCES)
def test_the_licence_is_the_sources(tmp_path: Path, babies: dict[str, Path], kind: str) -> None:
    heads, license, name, words = LICENCES[kind]
    one, two = links(tmp_path, babies, one=f"---\n{heads[0]}\n---\n", two=f"---\n{heads[1]}\n---\n")
    text = rendered(simple_config(one, [one, two], RANDOM))
    found = metadata(text)
    assert (found["license"], found.get("license_name")) == (license, name)
    assert words in text
    assert ("differ" in words) == ("**The sources' licences differ.**" in text) or kind == "differ"


def test_languages_and_datasets_are_the_sources(tmp_path: Path, babies: dict[str, Path]) -> None:
    heads = ["language: [en, no]\ndatasets: a/b", "language: fr\ndatasets:\n- c\n- a/b"]
    one, two = links(tmp_path, babies, one=f"---\n{heads[0]}\n---\n", two=f"---\n{heads[1]}\n---\n")
    found = metadata(rendered(simple_config(one, [one, two], RANDOM)))
    assert found["language"] == ["en", "fr", "no"]
    assert found["datasets"] == ["a/b", "c"]
    assert "base_model" not in found and "base_model_relation" not in found


BOMB = "a: &a {k: v}\n" + "".join(
    f"{new}: &{new}\n  <<: [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
HOSTILE = {
    "no YAML": "license: [", "not a mapping": "- mit", "markup": "license: '<script>'",
    "long": f"license: {'a' * 5000}",
    "kinds": "license: {a: b}\nlanguage: 3\ndatasets: [[a/b], {}]",
    "lines": 'license: "mit\\n---\\nx: y"', "paths": "datasets: [../../etc, a/../b, /etc/passwd]",
    "links": "license_link: 'https://a.b/)](javascript:x)'\nlicense_name: '](x)'",
    "bomb": BOMB, "deep": "a: " + "[" * 20000, "object": "a: !!python/object/apply:os.getpid []",
    "null": "license:\nlanguage: ~\ndatasets: null", "twice": "license: [mit, apache-2.0]",
    "recursive": "license: &a [*a]", "binary": "license: \x00",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_of_a_hostile_source_card_nothing_is_taken(tmp_path: Path, kind: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{HOSTILE[kind]}\n---\ntext", errors="replace")
    assert claims_of(tmp_path) == Claims()


def test_what_is_no_file_claims_nothing(tmp_path: Path) -> None:
    assert claims_of(tmp_path) == Claims()
    (tmp_path / "README.md").mkdir()
    assert claims_of(tmp_path) == Claims()
    (tmp_path / "README.md").rmdir()
    os.mkfifo(tmp_path / "README.md")
    assert claims_of(tmp_path) == Claims()
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n" + b"\xff" * 10**6)
    assert claims_of(tmp_path) == Claims(license="mit")


# what is not told


PATHS = ["alice smith/m (1) [x]+.*", "alice smith/m (1) [x]+.*er/two", "al.ce/$HOME/~x", "a'b/q\"r"]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_of_this_disk_is_told(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    home = tmp_path / "homes"
    monkeypatch.setenv("HOME", str(home))
    one, two = links(home, babies, **{path: "", f"{path}er": ""})
    adapter = make_adapter(home / "Bob" / "lora", babies["base"])
    (home / "Eve").mkdir()
    (home / "Eve/private notes.jsonl").write_text('{"text": "story scene dragon"}')
    (home / "Eve/tokens.txt").write_text("eta\n")
    data = {
        "base_model": str(one),
        "tokenizer": f"~/{two.relative_to(home)}",
        "extra_tokens": str(home / "Eve/tokens.txt"),
        "gate_mode": "cheap_embed",
        "experts": [
            {"source_model": f"~/{two.relative_to(home)}", "positive_prompts": ["code"]},
            {"source_model": f"{one}+{adapter}", "positive_prompts": ["story"],
             "calibration": str(home / "Eve/private notes.jsonl")},
        ],
    }  # fmt: skip
    written = f"# lies in {home}\n{yaml.safe_dump(data)}"
    text = rendered(written)
    for secret in (str(tmp_path), "homes", "alice", "al.ce", "a'b", "Bob", "Eve", "~/"):
        assert secret not in text.replace(f"{one.name}", "").replace(two.name, ""), secret
    assert "private notes.jsonl" in text and "only the last part of the path" in text
    again = yaml.safe_load(shown_config(text))
    assert again["base_model"] == f"./{one.name}"
    assert (
        [e["source_model"] for e in again["experts"]]
        == [again["tokenizer"], f"./{one.name}+./lora"]
        == [f"./{two.name}", f"./{one.name}+./lora"]
    )
    assert again["experts"][1]["calibration"] == "./private notes.jsonl"
    assert again["extra_tokens"] == "./tokens.txt"


def test_the_home_directory_is_a_name_too(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    [home, other] = links(tmp_path, babies, alice="", other="")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    for named in (str(home), "'~'", "."):
        text = rendered(simple_config(named, [named, other], RANDOM))
        assert "alice" not in text and "| 0 | model | model |" in text


def test_without_config_no_prompt_is_told(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    config = simple_config(base, [base, first], per_expert="negative_prompts: [castle]")
    ready = make_plan(parse_config(config))
    routing = {
        "t1": 0.5, "tokens": 9, "confusion": [[0.5, 0.5], [0.5, 0.5]], "idle": [],
        "blind_layers": [],
        "collisions": [{"experts": [0, 1], "share": 0.5, "texts": ["code python"]}],
    }  # fmt: skip
    assert card.render(ready, routing, CardOptions()).count("code python") == 3
    text = card.render(ready, routing, CardOptions(config=False))
    assert "base and first collide" in text and "50%" in text
    for word in ("code python", "dragon", "castle", "positive_prompts", "yaml"):
        assert word not in text
    (tmp_path / "d.txt").write_text("chat hello")
    config = simple_config(base, [base, first], per_expert=f"calibration: {tmp_path}/d.txt")
    routing["collisions"][0]["texts"] = ["chat hello"]
    assert "chat hello" not in card.render(make_plan(parse_config(config)), routing, CardOptions())


# a card of one's own


def test_own_text_comes_first_and_its_keys_win(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    config = write_config(tmp_path / "c.yaml", simple_config(base, [base, first], RANDOM))
    own = tmp_path / "own.md"
    own.write_bytes("\ufeff---\r\nlicense: mit\r\nnew: 1\r\n---\r\n# Mine ß\r\n\r\nText.".encode())
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [str(config), str(out), "--card", str(own)])
    assert result.exit_code == 0, result.stderr
    text = (out / "README.md").read_text()
    found = metadata(text)
    assert (found["license"], found["new"], found["library_name"]) == ("mit", 1, "transformers")
    assert text.index("# Mine ß\n\nText.") < text.index("\n## A mixture of 2 experts\n")
    own.unlink()
    regate(out, write_config(tmp_path / "d.yaml", config.read_text() + "experts_per_token: 1\n"))
    assert "# Mine ß\n\nText." in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"\xff", "is not UTF-8 text"), (b"---\n- a\n---\n", "not a map"),
     (b"---\na: [\n---\n", "is not YAML")],
)  # fmt: skip
def test_a_card_that_is_none_is_refused(
    tmp_path: Path, babies: dict[str, Path], content: bytes | None, words: str
) -> None:
    config = simple_config(babies["base"], [babies["first"]], "dtype: float7")
    config_file, own = write_config(tmp_path / "c.yaml", config), tmp_path / "own.md"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        merge(config_file, tmp_path / "out", Options(card=str(own)))
    assert len(refused.value.problems) == 2 and not (tmp_path / "out").exists()


# its files


@DRAWS
@pytest.mark.usefixtures("drawn")
def test_the_picture_is_a_file_of_the_output(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    out, text = tmp_path / "out", simple_config(base, [first, second])
    merge(write_config(tmp_path / "c.yaml", text), out)
    picture = out / "routing.png"
    content = picture.read_bytes()
    assert content[:4] == b"\x89PNG" and "](routing.png)" in (out / "README.md").read_text()
    assert read_manifest(out).files["routing.png"]["bytes"] == len(content)
    verify_checkpoint(out)
    picture.write_bytes(content[:-1])
    with pytest.raises(VerifyError, match=r"routing\.png"):
        verify_checkpoint(out)
    random = write_config(tmp_path / "r.yaml", f"{RANDOM}\n{text}")
    regate(out, random)
    verify_checkpoint(out)
    assert not picture.exists() and "routing.png" not in (out / "README.md").read_text()
    picture.write_text("mine")
    said = CliRunner().invoke(app, ["regate", str(out), str(tmp_path / "c.yaml")])
    assert "routing.png: is not moemerge's" in said.stderr and said.exit_code == 0
    assert picture.read_text() == "mine" and "](routing.png)" not in (out / "README.md").read_text()
    refused = CliRunner().invoke(app, [str(random), str(out), "--overwrite"])
    assert refused.exit_code == 2 and "routing.png, which moemerge did not write" in refused.stderr
    picture.unlink()
    regate(out, tmp_path / "c.yaml")
    assert picture.read_bytes() == content
    merge(random, out, Options(overwrite=True))
    assert not picture.exists()


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_without_matplotlib_there_is_no_picture(
    tmp_path: Path, babies: dict[str, Path], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    base, first, second = babies.values()
    find = importlib.util.find_spec

    def found(name: str, *more: Any) -> Any:
        return (
            find("json" if how == "broken" else "nothing") if name == "matplotlib" else find(name)
        )

    def fail(*args: Any) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("moemerge.card.files.importlib.util.find_spec", found)
    monkeypatch.setattr("moemerge.report.heat_map.save", fail)
    out = tmp_path / "out"
    config = write_config(tmp_path / "c.yaml", simple_config(base, [first, second]))
    result = CliRunner().invoke(app, [str(config), str(out)])
    assert result.exit_code == 0 and ("not drawn" in result.stderr) == (how == "broken")
    assert not (out / "routing.png").exists() and "## Routing" in (out / "README.md").read_text()
    verify_checkpoint(out)


def test_an_edited_card_stays_and_that_is_said(tmp_path: Path, babies: dict[str, Path]) -> None:
    base, first, second = babies.values()
    out, text = tmp_path / "out", simple_config(base, [first, second], RANDOM)
    config = write_config(tmp_path / "c.yaml", text)
    other = write_config(tmp_path / "d.yaml", text.replace("random", "cheap_embed"))
    merge(config, out, Options(card_config=False))
    path = out / "README.md"
    assert card.is_untouched(path.read_bytes())
    regate(out, other)
    assert "`cheap_embed`" in path.read_text() and "dragon" not in path.read_text()
    regate(out, other, Options(card_config=True))
    assert "dragon" in path.read_text()
    mine = path.read_bytes().replace(b"mixture", b"mix", 1)
    path.write_bytes(mine)
    said = CliRunner().invoke(app, ["regate", str(out), str(config)])
    assert said.exit_code == 0 and "README.md: was edited since it was written" in said.stderr
    assert path.read_bytes() == mine
    path.unlink()
    verify_checkpoint(out)  # a card is its owner's to remove
    regate(out, config)
    assert "`random`" in path.read_text()


# sources on the Hub


ASKS = """
import sys
from huggingface_hub import ModelCard
from moemerge import Options, merge
merge(sys.argv[1], sys.argv[2], Options(cache_dir=sys.argv[3]))
ModelCard.load(f"{sys.argv[2]}/README.md").validate()
"""


def test_sources_on_the_hub_are_linked_and_validated(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    one, two = links(
        tmp_path, babies, one="---\nlicense: mit\n---\n", two="---\nlicense: mit\n---\n"
    )
    head = "# mine\n" + RANDOM
    text = simple_config("me/one@main", ["me/one", "me/two"], head)
    config, out = write_config(tmp_path / "c.yaml", text), tmp_path / "out"
    with FakeHub() as hub:
        commit = hub.publish("me/one", one)
        hub.publish("me/two", two)
        environment = hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT))
        done = subprocess.run(
            [sys.executable, "-c", ASKS, str(config), str(out), str(tmp_path / "cache")],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    found = metadata(card)
    assert found["base_model"] == ["me/one", "me/two"] and found["license"] == "mit"
    assert found["base_model_relation"] == "merge"
    assert f"[me/one@main](https://huggingface.co/me/one/tree/{commit})" in card
    assert shown_config(card) == text.strip() and str(tmp_path) not in card
    assert json.loads((out / "moemerge.json").read_text())["card"] == {"own": "", "config": True}
