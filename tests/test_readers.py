"""What is written runs everywhere: the real readers, each in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import SIZES, make_adapter, make_model, simple_config, write_config
from smollm2 import model_dir
from test_laws import BODIES, HOSTED, USUAL
from transformers import AutoModelForCausalLM, AutoTokenizer

from moemerge import merge, verify_checkpoint
from moemerge.architectures import types
from moemerge.architectures.slots import Mixture
from moemerge.families.dense_config import normalise
from moemerge.prepare import choose as hosts

ROOT = Path(__file__).resolve().parent.parent
READERS = {
    "transformers 5": ("test", "read_transformers.py"),
    "transformers 4.57": ("transformers4", "read_transformers.py"),
    "llama.cpp": ("readers", "read_llamacpp.py"),
    "mlx-lm": ("readers", "read_mlx.py"),
    "transformers 4.36": ("transformers4_36", "read_transformers.py"),
    "transformers newest": ("transformers_newest", "read_transformers.py"),
    "vLLM": ("vllm", "read_vllm.py"),
    "mistral.rs": ("mistralrs", "read_mistralrs.py"),
}
OLDEST = "transformers 4.36"
"""It cannot read the tokenizer, so it is asked with ids alone."""

IN_FULL = [*READERS][4:]
"""Those whose environments `scripts/test --full` alone makes."""
EACH = [pytest.param(one, marks=[pytest.mark.full] * (one in IN_FULL)) for one in READERS]
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
]


@cache
def python_of(environment: str) -> str:
    """The environment's Python; this one where it is the tests' own."""
    if environment == "test":
        return sys.executable
    script = ROOT / "scripts/environment"
    made = subprocess.run([script, environment], check=True, capture_output=True, text=True)
    return f"{made.stdout.strip()}/bin/python"


def read(reader: str, model: Path, work: Path, **request: Any) -> dict[str, Any]:
    """Run a reader on a model; nothing may be missing, unexpected or of another shape."""
    [response] = read_all(reader, [model], work, **request)
    assert fits(response), (reader, response)
    return response


def read_all(reader: str, models: list[Path], work: Path, **request: Any) -> list[dict[str, Any]]:
    """Run a reader on some models, whatever comes of it."""
    environment, program = READERS[reader]
    work.mkdir()
    (work / "request.json").write_text(json.dumps(request))
    files = [work / "request.json", work / "response.json"]
    command = [python_of(environment), ROOT / "tests/readers" / program, *models, *files]
    done = subprocess.run([*command, "--work", work], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    responses: list[dict[str, Any]] = json.loads((work / "response.json").read_text())
    return responses


def fits(response: dict[str, Any]) -> bool:
    """Whether a reader could read a model, and every tensor had its place."""
    kinds = ("missing", "unexpected", "mismatched")
    return "error" not in response and not any(response[kind] for kind in kinds)


@pytest.fixture(scope="module")
def real_identity(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a mixture of itself, three times."""
    root = tmp_path_factory.mktemp("identity")
    head = "experts_per_token: 2\ngate_mode: cheap_embed"
    config = write_config(root / "c.yaml", simple_config(smollm2, [smollm2] * 3, head))
    merge(config, root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> dict[str, Any]:
    """What the dense model says: logits, and 16 greedy tokens a prompt, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    said: dict[str, Any] = {"logits": [], "generated": []}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            said["logits"].append(model(ids).logits[0].numpy())
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=16,
                max_new_tokens=16,
                do_sample=False,
            )
        said["generated"].append(made[0, ids.shape[1] :].tolist())
    return said


@pytest.mark.parametrize("reader", [one for one in EACH if one.values[0] != OLDEST])
def test_a_real_model_says_what_the_dense_one_says(
    reader: str, real_identity: Path, dense: dict[str, Any], tmp_path: Path
) -> None:
    found = read(reader, real_identity, tmp_path / "w", prompts=PROMPTS, new_tokens=16, logits=True)
    assert found["generated"] == dense["generated"]
    tolerance = 1e-5 if "transformers" in reader else 5e-5  # other libraries round otherwise
    if found["logits_npy"]:
        arrays = np.load(found["logits_npy"])
        for number, expected in enumerate(dense["logits"]):
            difference = np.abs(arrays[f"arr_{number}"] - expected).max()
            assert difference <= tolerance * np.abs(expected).max()


def of_llama() -> list[str]:
    """The architectures beside mixtral that hold a Llama."""
    names = types.names()
    return [n for n in names if "llama" in types.find(n).HOLDS.families and n != "mixtral"]


@pytest.fixture(scope="module")
def real_hosted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SmolLM2 as a mixture of itself in each of them, as the two transformers read it."""
    root, models = tmp_path_factory.mktemp("hosted"), []
    for architecture in of_llama():
        head = f"architecture: {architecture}\nexperts_per_token: 2\ngate_mode: random"
        config = write_config(root / "c.yaml", simple_config(smollm2, [smollm2] * 2, head))
        merge(config, root / architecture)
        models.append(root / architecture)
    asked = {"prompts": PROMPTS[:1], "new_tokens": 4, "logits": True}
    found = [
        read_all(f"transformers {version}", models, root / version, **asked)
        for version in ("5", "4.57")
    ]
    for model in models:
        shutil.rmtree(model)
    return dict(zip(of_llama(), zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("architecture", of_llama())
def test_a_real_model_says_the_same_in_every_architecture(
    architecture: str, real_hosted: dict[str, Any], dense: dict[str, Any]
) -> None:
    for found in real_hosted[architecture]:
        assert fits(found), found
        assert found["generated"] == [dense["generated"][0][:4]]
        expected = dense["logits"][0]
        difference = np.abs(np.load(found["logits_npy"])["arr_0"] - expected).max()
        assert difference <= 1e-5 * np.abs(expected).max()


def differ(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest difference of the logits."""
    arrays = [np.load(each["logits_npy"]) for each in (one, two)]
    return max(float(np.abs(arrays[0][name] - arrays[1][name]).max()) for name in arrays[0])


@pytest.fixture(scope="module")
def in_transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[dict[str, Any]]]:
    """Of each architecture and body, the dense model, mixtures of it alone and of others too, as
    the two transformers read them. A process reads them all: to start it takes longest."""
    root = tmp_path_factory.mktemp("all")
    models: dict[Any, Path] = {}
    for architecture, body in HOSTED:
        for seed in (0, 1):
            if (body, seed) not in models:
                name = f"{body.replace(' ', '-')}-{seed}"
                models[body, seed] = make_model(root / name, seed=seed, **BODIES[body])
        base, other = models[body, 0], models[body, 1]
        head = f"architecture: {architecture}\nexperts_per_token: 2\ngate_mode: cheap_embed"
        for kind, experts in (("same", [base] * 3), ("other", [base, other, base])):
            text = simple_config(base, list(experts), head)
            out = root / f"{architecture}-{body.replace(' ', '-')}-{kind}"
            merge(write_config(root / "c.yaml", text), out)
            models[architecture, body, kind] = out
    asked = {"token_ids": [[1, *range(3, 40)]], "new_tokens": 8, "logits": True}
    found = [
        read_all(f"transformers {version}", list(models.values()), root / version, **asked)
        for version in ("5", "4.57")
    ]
    return {key: list(both) for key, both in zip(models, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize(("architecture", "body"), HOSTED)
def test_transformers_4_computes_what_5_computes(
    in_transformers: dict[Any, list[dict[str, Any]]], architecture: str, body: str
) -> None:
    """The config is written in both dialects, and both know the tensors' names."""
    mixture = Mixture(3, 2, SIZES["intermediate_size"])
    caveats = dict(types.find(architecture).caveats(config_of(BODIES[body]), mixture))
    for kind in ("same", "other"):
        five, four = in_transformers[architecture, body, kind]
        assert fits(five) and fits(four)
        assert differ(five, four) <= 1e-5
        told = "transformers 4.57" in caveats
        assert (five["generated"] == four["generated"]) != told
    dense, _ = in_transformers[body, 0]
    same, _ = in_transformers[architecture, body, "same"]
    assert (
        differ(dense, same) <= 1e-5 < differ(same, in_transformers[architecture, body, "other"][0])
    )


def config_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The dense model's config, everything said."""
    settings = {"family": "llama", **SIZES, **settings}
    return normalise({"model_type": settings.pop("family"), **settings})


def test_the_real_model_verifies_and_its_adapters_merge(smollm2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", smollm2)
    text = simple_config(smollm2, [smollm2, f"{smollm2}+{adapter}"])
    merged = merge(write_config(tmp_path / "c.yaml", text), tmp_path / "out")
    checked = verify_checkpoint(tmp_path / "out")
    assert checked.compared == checked.tensors - merged.plan.config["num_hidden_layers"]


WIDE = {
    "vocab_size": 49152, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 96, "eos_token_id": 2,
}  # fmt: skip
"""Babies that every reader takes: they have SmolLM2's tokenizer, which llama.cpp's converter knows,
and heads of 64, the least that vLLM knows."""

SHORT, LONG = ([1.0 + i / step for i in range(32)] for step in (16, 4))

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
    "original_max_position_embeddings": 16,
}  # fmt: skip
WIDER: dict[str, dict[str, Any]] = {
    "llama yarn": {"rope_scaling": YARN},
    "qwen3 yarn": {"family": "qwen3", "head_dim": 64, "rope_scaling": YARN},
    "qwen3 longrope": {"family": "qwen3", "head_dim": 64, "rope_scaling": LONGROPE},
    "phi3 longrope": {**BODIES["phi3 longrope"], "rope_scaling": LONGROPE},
}
TEXTS = [
    "The capital of France is a city that lies on a river, and of it they say that whoever has "
    "seen it once will come again, for nowhere else are bridges so old and evenings so long.",
    "def fibonacci(n):",
]
FEATURES = [
    "llama tied", "llama llama3 rope", "llama linear rope", "llama yarn", "llama head_dim",
    "phi3 longrope", "mistral window", "qwen2", "qwen2 window", "qwen3 head_dim", "qwen3 biases",
    "qwen3 window", "qwen3 yarn", "qwen3 longrope", "granite biases", "ernie4_5",
]  # fmt: skip


def wide(body: str) -> dict[str, Any]:
    """The settings of a wide model of that body."""
    settings = {**WIDE, **{**BODIES, **WIDER}[body]}
    if body not in WIDER and "head_dim" in settings:
        settings["head_dim"] *= 8
    return settings


@dataclass(frozen=True)
class Case:
    """A mixture of three wide models; `always` has a shared expert that is always on."""

    architecture: str
    body: str
    per_token: int = 2
    always: bool = False

    @property
    def name(self) -> str:
        """llama.cpp takes a model for another by `phi3` in its name."""
        body = self.body.replace(" ", "-").replace("phi3", "phi")
        return f"{self.architecture}-{body}-{self.per_token}-{self.always}"

    @property
    def caveats(self) -> dict[str, str] | None:
        """What the architecture says of readers; None if it does not take the model."""
        host, config = types.find(self.architecture), config_of(wide(self.body))
        mixture = Mixture(3, self.per_token, WIDE["intermediate_size"], int(self.always))
        refused = any(hosts.refusals(host, self.architecture, config, mixture))
        return None if refused else dict(host.caveats(config, mixture))

    def write(self, root: Path) -> Path:
        """Merge it, of models that are made if need be."""
        models = [root / f"{self.body.replace(' ', '-')}-{seed}" for seed in range(3)]
        for seed, model in enumerate(models):
            if not model.exists():
                make_model(model, seed=seed, **wide(self.body))
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(model_dir() / name, model / name)
                (model / "chat_template.jinja").unlink()
        head = f"architecture: {self.architecture}\nexperts_per_token: {self.per_token}"
        text = simple_config(models[0], list(models), f"{head}\ngate_mode: cheap_embed")
        if self.always:
            text += f"shared_experts: [{{ source_model: {models[1]} }}]\n"
        merge(write_config(root / "c.yaml", text), root / self.name)
        return root / self.name


def cases() -> list[Case]:
    """What readers may differ in. With all its experts active, a qwen2_moe shows what else than
    their weights they take otherwise."""
    found = []
    for name in USUAL:
        if not ELSEWHERE & set(types.find(name).READERS):
            continue
        count = 3 if name == "qwen2_moe" else 2
        fitting = [Case(name, body, count) for body in FEATURES]
        fitting = [case for case in fitting if case.caveats is not None]
        body = fitting[0].body
        routing = [Case(name, body, 1), Case(name, body, 2), Case(name, body, count, True)]
        found += [*fitting, *(case for case in routing if case.caveats is not None)]
    return list(dict.fromkeys(found))


ELSEWHERE = {"llama.cpp", "mlx-lm"}
CASES = cases()
Found = dict[tuple[Case, str], dict[str, Any]]


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, Path]]:
    """Every case's mixture; they are large."""
    root = tmp_path_factory.mktemp("wide")
    yield {case: case.write(root) for case in CASES}
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def asked(smollm2: Path) -> dict[str, Any]:
    """What is asked of each: ids of texts, for mistral.rs takes none but those that it reads so."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return {"token_ids": [tokenizer(text).input_ids for text in TEXTS], "new_tokens": 16}


def found_by(
    reader: str, models: dict[Case, Path], asked: dict[str, Any], work: Path
) -> dict[tuple[Case, str], dict[str, Any]]:
    """What a reader makes of each case whose architecture names it."""
    takes = [case for case in CASES if reader in types.find(case.architecture).READERS]
    made = read_all(reader, [models[case] for case in takes], work, **asked)
    return {(case, reader): one for case, one in zip(takes, made, strict=True)}


@pytest.fixture(scope="module")
def elsewhere(
    wide_models: dict[Case, Path], asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Found:
    """What each reader makes of them."""
    root, found = tmp_path_factory.mktemp("elsewhere"), Found()
    for number, reader in enumerate(("transformers 5", *sorted(ELSEWHERE))):
        found |= found_by(reader, wide_models, asked, root / str(number))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_reader_says_the_same_or_plan_says_that_it_does_not(elsewhere: Found, case: Case) -> None:
    for reader in ELSEWHERE:
        says_the_same_or_is_said(elsewhere, case, reader)


@pytest.mark.full
@pytest.mark.parametrize("reader", ["mistral.rs", "vLLM"])
def test_so_does_a_reader_of_an_environment_of_its_own(
    reader: str,
    elsewhere: Found,
    wide_models: dict[Case, Path],
    asked: dict[str, Any],
    tmp_path: Path,
) -> None:
    found = elsewhere | found_by(reader, wide_models, asked, tmp_path / "w")
    for case in CASES:
        says_the_same_or_is_said(found, case, reader)


def says_the_same_or_is_said(found: Found, case: Case, reader: str) -> None:
    """Hold a reader, if the case's architecture names it, to transformers 5 and the caveats."""
    expected, one = found[case, "transformers 5"], found.get((case, reader))
    assert fits(expected)
    assert case.caveats is not None
    if one is None:
        return
    same = fits(one) and one["generated"] == expected["generated"]
    assert same != (reader in case.caveats), (case.name, reader, case.caveats, one)
    if "cannot" in case.caveats.get(reader, ""):
        assert not fits(one)
