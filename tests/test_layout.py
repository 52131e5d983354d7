"""What a plan says of dtypes and adapters before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from babies import make_adapter, make_model, save_weights, simple_config
from safetensors.torch import load_file

from moemerge import make_plan
from moemerge.config.schema import parse_config
from moemerge.prepare.stages import Prepared


def plan_of(base: Path | str, experts: list[Path | str], head: str = "") -> Prepared:
    return make_plan(parse_config(simple_config(base, experts, head)))


def with_dtypes(model: Path, few: torch.dtype, many: torch.dtype) -> Path:
    """The model with `few` in its norms and its embeddings, and `many` in all else."""
    state = load_file(model / "model.safetensors")
    thin = ("norm.weight", "embed_tokens.weight")
    save_weights(model, {n: t.to(few if n.endswith(thin) else many) for n, t in state.items()})
    return model


@pytest.mark.parametrize(
    ("few", "many", "written"),
    [
        (torch.float32, torch.bfloat16, "bfloat16"),
        (torch.bfloat16, torch.float32, "float32"),
        (torch.float32, torch.float64, "float32"),
    ],
)
def test_the_dtype_is_the_one_of_most_bytes(
    tmp_path: Path, few: torch.dtype, many: torch.dtype, written: str
) -> None:
    base = with_dtypes(make_model(tmp_path / "base"), few, many)
    assert plan_of(base, [base, base]).plan.config["dtype"] == written


def test_what_is_narrowed_is_said_once_of_all_donors(tmp_path: Path) -> None:
    base = with_dtypes(make_model(tmp_path / "base"), torch.float32, torch.bfloat16)
    expert = make_model(tmp_path / "expert", seed=1)
    lost = [note for note in plan_of(base, [base, expert]).notes if "written as" in note]
    tail = "float32 tensors are written as bfloat16; set dtype: float32 to keep them"
    assert lost == [f"base, expert: {tail}"]
    kept = plan_of(base, [base, expert], "dtype: float32").notes
    assert not [note for note in kept if "written as" in note]


def test_float64_is_said_to_be_narrowed(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", dtype=torch.float64)
    notes = plan_of(base, [base, base]).notes
    assert "base, base-2: float64 tensors are written as float32; the widest there is" in notes


def test_what_widens_is_no_loss(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    expert = make_model(tmp_path / "expert", dtype=torch.bfloat16)
    assert not [note for note in plan_of(base, [expert, base]).notes if "written as" in note]


def test_a_bases_adapter_on_mlps_that_no_expert_uses_is_said(
    tmp_path: Path, babies: dict[str, Path]
) -> None:
    base, first, _ = babies.values()
    adapter = make_adapter(tmp_path / "adapter", base)
    line = "base: 6 of the adapter's 14 changes are not used (MLPs): those parts are the experts'"
    assert line in plan_of(f"{base}+{adapter}", [base, first]).notes
    both = plan_of(f"{base}+{adapter}", [f"{base}+{adapter}", first]).notes
    assert not [note for note in both if "not used" in note]


def test_an_architecture_is_known_by_its_own_name(babies: dict[str, Path]) -> None:
    base = babies["base"]
    assert plan_of(base, [base, base], "architecture: Mixtral").plan.architecture == "mixtral"
