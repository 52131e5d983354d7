"""Mixtures under names that transformers does not know: refused where they run, and repaired."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config, write_config
from test_cli import run
from test_take_apart import SMALL, files, logits, same, weights

from moemerge import merge
from moemerge.mixture.repairing import repair

State = dict[str, torch.Tensor]
HOSTS = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2",
    "granitemoehybrid": "granite",
    "glm4_moe": "llama",
}
MLX = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("mixtures"), {}
    for host, family in HOSTS.items():
        one, two = (make_model(root / f"{host}-{n}", family, seed=n) for n in range(2))
        text = simple_config(one, [two, one], f"architecture: {host}\ngate_mode: random")
        made[host] = root / host
        merge(write_config(root / "c.yaml", text), made[host], SMALL)
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("code python function class return story scene " * 20)
    return file


def as_mlx_saves(state: State) -> State:
    """Each kind of matrix of all experts in one tensor, as mlx-lm converts them."""
    made, stacks = {}, {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"(.+\.)experts\.(\d+)\.(\w+)\.weight", name):
            kind = MLX.get(found[3], found[3])
            stacks.setdefault(f"{found[1]}switch_mlp.{kind}.weight", {})[int(found[2])] = tensor
        elif name.endswith("block_sparse_moe.input_linear.weight"):
            for kind, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                made[name.replace("input_linear", f"switch_mlp.{kind}")] = half.contiguous()
        elif name.endswith("block_sparse_moe.output_linear.weight"):
            made[name.replace("output_linear", "switch_mlp.down_proj")] = tensor
        else:
            made[name] = tensor
    joined = {name: torch.stack([of[n] for n in range(len(of))]) for name, of in stacks.items()}
    return made | joined


def with_prefix(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def rewritten(moe: Path, change: Callable[[State], State], to: Path) -> Path:
    """A copy of a mixture with other tensors, and without its manifest."""
    shutil.copytree(moe, to, ignore=shutil.ignore_patterns("*.safetensors*", "moemerge.json"))
    save_weights(to, change(weights(moe)))
    return to


FORMS = {
    "as mlx-lm saves": as_mlx_saves,
    "as PEFT names": with_prefix("base_model.model."),
    "as a compiled model names": with_prefix("_orig_mod."),
    "both": lambda state: with_prefix("module.")(as_mlx_saves(state)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("host", HOSTS)
def test_such_a_mixture_does_not_run_until_it_is_repaired(
    host: str, form: str, mixtures: dict[str, Path], text: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    moe = rewritten(mixtures[host], FORMS[form], tmp_path / "moe")
    before = files(moe)
    command = "eval" if form == "both" else "routing"
    assert run(command, moe, "--text", f"a={text}") == 2
    said = capfd.readouterr().err
    assert re.search(r"lacks (lm_head|model\.layers\.0\.)", said) and "`moemerge repair`" in said
    assert files(moe) == before
    assert repair(str(moe), tmp_path / "out")
    assert same(weights(tmp_path / "out"), weights(mixtures[host]))
    assert torch.equal(logits(tmp_path / "out"), logits(mixtures[host]))


def without(ending: str) -> Callable[[State], State]:
    return lambda state: {name: one for name, one in state.items() if not name.endswith(ending)}


def with_another(name: str, *shape: int) -> Callable[[State], State]:
    return lambda state: state | {name: torch.zeros(*shape)}


LOSSES: dict[str, tuple[Callable[[State], State], str]] = {
    "no queries": (without("layers.1.self_attn.q_proj.weight"), "layers.1.self_attn.q_proj.weight"),
    "no norm": (without("model.norm.weight"), "model.norm.weight"),
    "no head": (without("lm_head.weight"), "lm_head.weight"),
    "a matrix less": (without("experts.1.w3.weight"), "5 matrices of experts"),
    "narrow keys": (
        with_another("model.layers.0.self_attn.k_proj.weight", 8, 32), "layers.0.self_attn.k_proj"
    ),
}  # fmt: skip
COMMANDS = {
    "routing": ["routing", "{moe}", "--text", "a={text}"],
    "eval": ["eval", "{moe}", "--text", "a={text}"],
    "eval --lazy": ["eval", "{moe}", "--text", "a={text}", "--lazy"],
    "tune": ["tune", "lora", "{moe}", "{out}", "--data", "{text}"],
    "merge-adapter": ["merge-adapter", "{moe}", "{adapter}", "{out}"],
    "repair": ["repair", "{moe}", "{out}"],
    "extract": ["extract", "{moe}", "{out}", "--expert", "0"],
    "add": ["add", "{moe}", "{dense}", "{out}"],
    "drop": ["drop", "{moe}", "{out}", "--expert", "0"],
    "top-k": ["top-k", "{moe}", "1", "{out}"],
    "top-k in place": ["top-k", "{moe}", "1"],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mixture_that_lacks_weights_is_refused_by_whoever_reads_it(
    loss: str, mixtures: dict[str, Path], text: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change, told = LOSSES[loss]
    moe = rewritten(mixtures["mixtral"], change, tmp_path / "moe")
    dense = mixtures["mixtral"].parent / "mixtral-0"
    adapter = make_adapter(tmp_path / "adapter", dense, target_modules=["o_proj"])
    places = {"moe": moe, "text": text, "dense": dense, "out": tmp_path / "out", "adapter": adapter}
    before = files(moe)
    for name, command in COMMANDS.items():
        assert run(*(part.format(**places) for part in command)) == 2, name
        said = capfd.readouterr().err
        in_memory = loss == "a matrix less" and name in ("routing", "eval")
        assert ("lacks" if in_memory else told) in said, (name, said)
        assert files(moe) == before and not (tmp_path / "out").exists(), name


def test_what_has_no_place_in_the_model_is_no_part_of_what_is_measured(
    mixtures: dict[str, Path], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sinks = "model.layers.0.self_attn.sinks"
    moe = rewritten(mixtures["mixtral"], with_another(sinks, 4), tmp_path / "moe")
    for command in ([], ["--lazy"]):
        assert run("eval", moe, "--text", f"a={text}", *command) == 2
        assert f"has {sinks}, which transformers would leave out" in capfd.readouterr().err
