"""Which reader computes which host right, of a tied body and of one with biases: the docs' table.

`readers/table.json` holds it. A cell is `right` (the greedy text of the tests' own transformers,
which has the dense model's logits where every expert is the base), `wrong`, or of a refusal what
the reader says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from babies import make_model, simple_config, write_config
from smollm2 import model_dir
from test_readers import OLDEST, READERS, ROOT, WIDE, asked, config_of, differ, fits, read_all

from moemerge import merge
from moemerge.architectures import types
from moemerge.architectures.slots import Mixture
from moemerge.prepare import choose as hosts

__all__ = ["asked"]

TABLE: dict[str, Any] = json.loads((ROOT / "tests/readers/table.json").read_text())
KINDS = ("tied", "biased")
OURS = "transformers 5"


def body(host: str, kind: str) -> dict[str, Any]:
    """The settings of a wide model that the host holds, of another family where one has none."""
    families = types.find(host).HOLDS.families
    family = next(name for name in ("llama", "qwen3", *families) if name in families)
    if kind == "biased" and "qwen2" in families:
        family = "qwen2"
    own = {"head_dim": 64} if family == "qwen3" else {}
    told = {"tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True}}[kind]
    return {"family": family, **WIDE, **own, **({} if family == "qwen2" else told)}


MIXTURE = Mixture(3, 2, WIDE["intermediate_size"])
ALL = [(host, kind) for host in TABLE["hosts"] for kind in KINDS]


def refusal(host: str, kind: str) -> str:
    """Why moemerge makes no such mixture, if it makes none."""
    found = hosts.refusals(types.find(host), host, config_of(body(host, kind)), MIXTURE)
    return next((what for what, _ in found), "")


MADE = [(host, kind) for host, kind in ALL if not refusal(host, kind)]


@pytest.mark.parametrize(("host", "kind"), ALL)
def test_the_table_is_whole_and_says_what_plan_says(host: str, kind: str) -> None:
    cells, module = TABLE["hosts"][host][kind], types.find(host)
    if why := refusal(host, kind):
        assert cells == why
        return
    caveats = dict(module.caveats(config_of(body(host, kind)), MIXTURE))
    assert cells.keys() == READERS.keys() == TABLE["versions"].keys()
    for reader, cell in cells.items():
        named = {"transformers newest": OURS}.get(reader, reader)
        said = caveats.get(named, "")
        reads = named in module.READERS or (reader == OLDEST and host == "mixtral")
        wanted = "refused" if not reads or "cannot" in said else "wrong" if said else "right"
        assert cell and (cell if cell in ("right", "wrong") else "refused") == wanted, reader


@pytest.fixture(scope="module")
def mixtures(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of each host and kind: a dense model, a mixture of it alone, and one of three models."""
    root = tmp_path_factory.mktemp("table")
    made = {}
    for host, kind in MADE:
        settings = body(host, kind)
        models = [root / f"{settings['family']}-{kind}-{seed}" for seed in range(3)]
        for seed, model in enumerate(models):
            if not model.exists():
                make_model(model, seed=seed, **settings)
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(model_dir() / name, model / name)
                (model / "chat_template.jinja").unlink()
        head = f"architecture: {host}\nexperts_per_token: 2\ngate_mode: cheap_embed"
        found = [models[0]]
        for which, experts in (("same", models[:1] * 3), ("other", models)):
            text = simple_config(models[0], list(experts), head)
            found.append(root / f"{host}-{kind}-{which}")
            merge(write_config(root / "c.yaml", text), found[-1])
        made[host, kind] = found
    yield made
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def expected(
    mixtures: dict[Any, list[Path]], asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, list[list[int]]]:
    """The greedy text of each mixture of three models, in the tests' own transformers."""
    root = tmp_path_factory.mktemp("ours")
    paths = [path for three in mixtures.values() for path in three]
    found = iter(read_all(OURS, paths, root / "w", **asked, logits=True))
    said = {}
    for key in mixtures:
        dense, same, other = (next(found) for _ in range(3))
        assert all(map(fits, (dense, same, other))), key
        largest = max(np.abs(one).max() for one in np.load(dense["logits_npy"]).values())
        assert differ(dense, same) <= 1e-5 * largest, key
        said[key] = other["generated"]
    return said


@pytest.mark.full
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_does_what_the_table_says(
    reader: str,
    mixtures: dict[Any, list[Path]],
    expected: dict[Any, list[list[int]]],
    asked: dict[str, Any],
    tmp_path: Path,
) -> None:
    found = read_all(reader, [mixtures[key][2] for key in MADE], tmp_path / "w", **asked)
    measured: dict[Any, str] = {}
    for key, one in zip(MADE, found, strict=True):
        if "error" in one:
            measured[key] = one["error"]
            continue
        assert one["reader"].endswith(f" {TABLE['versions'][reader]}"), one["reader"]
        odd = [f"{kind}: {name}" for kind in ("missing", "unexpected") for name in one[kind]]
        same = "right" if one["generated"] == expected[key] else "wrong"
        measured[key] = same if fits(one) else "\n".join(odd)
    told = {key: TABLE["hosts"][key[0]][key[1]][reader] for key in MADE}
    off = {key: (told[key], made) for key, made in measured.items() if told[key] not in made}
    assert not off
