"""Tied models whose file holds a head too: equal to the embeddings it is tied, else it is a head.

transformers 5 decides so by the values, whatever config.json says; its logits are the law.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config, write_config
from fake_hub import FakeHub
from test_laws import all_tensors, logits

from moemerge import InputError, make_plan, merge
from moemerge.checkpoint import location as tensors
from moemerge.checkpoint.claims import TIED, UNTIED
from moemerge.config.schema import parse_config
from moemerge.families.names import EMBEDDING, HEAD
from moemerge.mixture.edit import drop
from moemerge.mixture.extraction import extract
from moemerge.mixture.repairing import repair

ROOT = Path(__file__).parents[1]


def nudged(head: torch.Tensor) -> torch.Tensor:
    """The head with one value changed, in a row that no sample meets."""
    head = head.clone()
    head.view(-1)[head.numel() // 2 + 5] += 1
    return head


HEADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "equal": torch.clone,
    "one value": nudged,
    "another": lambda embeddings: torch.randn_like(embeddings) * 0.2,
}


def with_head(directory: Path, head: str, **settings: Any) -> Path:
    """A tied model that holds a head of that kind."""
    model = make_model(directory, tie_word_embeddings=True, **{"vocab_size": 256, **settings})
    state = all_tensors(model)
    save_weights(model, {**state, HEAD: HEADS[head](state[EMBEDDING])})
    return model


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "granite"])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_its_own_is_kept_and_said(tmp_path: Path, family: str, head: str) -> None:
    more = {"pad_token_id": 0} if family == "phi3" else {}
    base = with_head(tmp_path / "base", head, family=family, **more)
    text = simple_config(base, [base, base], "gate_mode: random")
    notes = make_plan(parse_config(text)).notes
    merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    assert (logits(base) - logits(tmp_path / "out")).abs().max() <= 1e-5
    tied = config_of(tmp_path / "out")[TIED]
    assert tied == (head == "equal") and tied != any(note.endswith(UNTIED) for note in notes)
    if not tied:
        own, made = all_tensors(base)[HEAD], all_tensors(tmp_path / "out")[HEAD]
        assert own.numpy().tobytes() == made.numpy().tobytes()


def test_routers_are_fitted_to_the_model_that_it_is(tmp_path: Path) -> None:
    """The head that it has says what a model would write, and so does an adapter on it."""
    base = with_head(tmp_path / "base", "another")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["down_proj"])
    plain = make_model(tmp_path / "plain", vocab_size=256)
    save_weights(plain, all_tensors(base))
    for name, source in (("one", base), ("two", plain)):
        head = "gate_mode: self\ngate: { tokens: 4 }"
        text = simple_config(source, [source, f"{source}+{adapter}"], head)
        merge(write_config(tmp_path / f"{name}.yaml", text), tmp_path / name)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")


def weights_of(out: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in all_tensors(out).items()}


@pytest.mark.parametrize("head", ["equal", "another"])
def test_a_mixture_with_a_head_of_its_own_stays_what_it_is(tmp_path: Path, head: str) -> None:
    """Taken apart, or given other names, it has the logits that transformers 5 reads in it."""
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    text = simple_config(base, [base, base], "gate_mode: random")
    out = tmp_path / "moe"
    merge(write_config(tmp_path / "c.yaml", text), out)
    state = all_tensors(out)
    (out / "moemerge.json").unlink()
    for file in out.glob("*.safetensors*"):
        file.unlink()
    save_weights(out, {**state, HEAD: HEADS[head](state[EMBEDDING])})
    (out / "tokenizer_config.json").write_text("{}")
    seen = logits(out)
    repaired = repair(str(out), tmp_path / "repaired")
    assert (repaired is None) == (head == "equal")
    extract(str(out), "0", tmp_path / "dense")
    drop(str(out), "1", tmp_path / "dropped")
    made = ["dense", "dropped", *(["repaired"] if repaired else [])]
    for name in made:
        assert (logits(tmp_path / name) - seen).abs().max() <= 1e-5, name
        assert config_of(tmp_path / name)[TIED] == (head == "equal"), name


@pytest.mark.parametrize("bins", [False, True])
def test_it_is_read_to_the_first_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bins: bool
) -> None:
    """A model without a second head, or with one of the same bytes of a file, is not read."""
    read = 0
    own = tensors.read_into

    def counting(location: Any, start: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        own(location, start, view)

    sizes = {"vocab_size": 4096, "hidden_size": 256}
    models = {name: with_head(tmp_path / name, name, **sizes) for name in ("another", "one value")}
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True, bins=bins, **sizes)
    if bins:
        state = torch.load(tied / "pytorch_model.bin")
        torch.save({**state, HEAD: state[EMBEDDING]}, tied / "pytorch_model.bin")
    monkeypatch.setattr(tensors, "read_into", counting)
    costs = {}
    for name, model in {**models, "tied": tied}.items():
        read = 0
        plan = make_plan(parse_config(simple_config(model, [model], "gate_mode: random"))).plan
        costs[name] = read
        assert plan.config[TIED] == (name == "tied")
    assert costs["tied"] == 0 and costs["another"] == 2 * 4096 < costs["one value"]


def test_a_model_without_any_head_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    path = model / "config.json"
    path.write_text(json.dumps({**config_of(model), TIED: False}))
    with pytest.raises(InputError) as caught:
        make_plan(parse_config(simple_config(model, [model, model])))
    [problem] = map(str, caught.value.problems)
    assert HEAD in problem and f"config.json does not say {TIED}: true" in problem


ON_THE_HUB = """
import json, sys
from moemerge import Options, ReadError, make_plan, merge
from moemerge.checkpoint.claims import TIED
from moemerge.config import parse_config

def tried(head, **options):
    experts = f"experts: [{{source_model: lab/{head}}}]"
    text = f"base_model: lab/{head}\\ngate_mode: random\\n{experts}\\n"
    try:
        config = parse_config(text)
        flag = make_plan(config, Options(**options)).plan.config[TIED]
        merge(config, f"{sys.argv[1]}/{head}{len(said)}", Options(**options))
        return flag
    except ReadError as error:
        return str(error)

said = []
for head, stream in [(h, s) for h in sys.argv[2:] for s in (True, False, False)]:
    said.append(tried(head, stream=stream))
print(json.dumps(said))
"""


def test_on_the_hub_samples_tell_and_nothing_is_built_on_them_alone(tmp_path: Path) -> None:
    names = {"equal": "equal", "one value": "one-value", "another": "another"}
    with FakeHub() as hub:
        for head, name in names.items():
            model = with_head(tmp_path / name, head, vocab_size=2048, hidden_size=64)
            hub.publish(f"lab/{name}", model)
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, str(tmp_path), *names.values()],
            env={**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        equal, nudge, other = [json.loads(done.stdout)[at : at + 3] for at in (0, 3, 6)]
    assert equal == [True] * 3 and other == [False] * 3
    streamed, fetched, again = nudge
    assert streamed.endswith(f"{UNTIED}; run it again without stream=True")
    assert fetched.endswith(f"{UNTIED}; run it again") and again is False
    made = [(tmp_path / f"one-value{number}" / "config.json").exists() for number in (3, 4, 5)]
    assert made == [False, False, True]
