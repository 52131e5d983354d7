"""Computed tensors: the same bytes in any order of summation, with any number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from babies import make_adapter, make_model, simple_config, write_config

from moemerge import ReadError, merge, verify_checkpoint
from moemerge.checkpoint.location import PLAIN, Location, numpy_dtype
from moemerge.output.verify import _is_made
from moemerge.plan import arithmetic
from moemerge.plan.plan import PlannedTensor
from moemerge.plan.recipe import LowRank, Mean, Read, Recipe, Renew, Sources
from moemerge.reporting import Silent

ROWS = 21


class Files:
    """Tensors in files, as sources have them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[str, Location] = {}

    def put(self, name: str, values: torch.Tensor, dtype: str) -> Read:
        path = self.folder / f"{sum(1 for _ in self.folder.iterdir())}"
        path.write_bytes(values.float().numpy().astype(numpy_dtype(dtype)).tobytes())
        self.found[name] = Location(path, 0, PLAIN[dtype], tuple(values.shape))
        return Read("source", name)

    @property
    def sources(self) -> Sources:
        return {"source": self.found}

    def made(self, recipe: Recipe, shape: tuple[int, ...], dtype: str) -> bytes:
        size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
        view = memoryview(bytearray(size))
        arithmetic.fill(view, 0, "tensor", shape, dtype, recipe, self.sources)
        return bytes(view)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def lora(files: Files, width: int, rank: int, dtype: str, scale: float = 2.0) -> LowRank:
    torch.manual_seed(0)
    of = files.put("of", torch.randn(ROWS, width), dtype)
    down = files.put("down", torch.randn(rank, width) * 0.1, dtype)
    return LowRank(of, down, files.put("up", torch.randn(ROWS, rank) * 0.1, dtype), scale)


@pytest.mark.parametrize(("width", "rank"), [(14336, 64), (25600, 8), (28672, 16)])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_no_order_of_summation_shows(files: Files, width: int, rank: int, dtype: str) -> None:
    recipe = lora(files, width, rank, dtype)
    expected = files.made(recipe, (ROWS, width), dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 16):
            torch.set_num_threads(threads)
            assert files.made(recipe, (ROWS, width), dtype) == expected, threads
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(rank)
    torch.manual_seed(0)
    torch.randn(ROWS, width)
    down, up = torch.randn(rank, width) * 0.1, torch.randn(ROWS, rank) * 0.1
    files.put("down", down[order], dtype)
    files.put("up", up[:, order], dtype)
    assert files.made(recipe, (ROWS, width), dtype) == expected
    if dtype == "F32":
        found = np.frombuffer(expected, np.float32).reshape(ROWS, width)
        torch.manual_seed(0)
        exact = torch.randn(ROWS, width).double() + 2 * up.double() @ down.double()
        assert np.abs(found - exact.numpy()).max() < 1e-6


def test_a_value_alone_and_in_its_tensor_is_the_same(files: Files) -> None:
    recipe = lora(files, 64, 5, "F32")
    whole = np.frombuffer(files.made(recipe, (ROWS, 64), "F32"), np.float32).reshape(ROWS, 64)
    for row, found in enumerate(arithmetic.load_rows(recipe, [*range(ROWS)], files.sources)):
        assert (found == whole[row]).all()


def test_a_mean_is_two_roundings_everywhere(files: Files) -> None:
    parts = [torch.randn(3, 1001) for _ in range(3)]
    weights = (0.1, 0.2, 0.7)
    reads = tuple(files.put(str(n), part, "F32") for n, part in enumerate(parts))
    found = np.frombuffer(files.made(Mean(reads, weights), (3, 1001), "F32"), np.float32)
    total = np.zeros((3, 1001), np.float32)
    for part, weight in zip(parts, weights, strict=True):
        product = part.numpy() * np.float32(weight)
        total = total + product
    assert (found.reshape(3, 1001) == total).all()


def test_what_is_drawn_anew_does_not_depend_on_threads(files: Files) -> None:
    of = files.put("of", torch.randn(600, 1000), "F32")
    recipe = Renew(of, 0, 0.5, 1, "mlp")
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.add(files.made(recipe, (600, 1000), "F32"))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["up", "down"])
def test_what_is_not_finite_in_an_adapter_is_refused(
    files: Files, value: float, which: str
) -> None:
    recipe = lora(files, 64, 4, "F32")
    broken = torch.zeros(4, 64) if which == "down" else torch.zeros(ROWS, 4)
    broken[1, 1] = value
    files.put(which, broken, "F32")
    with pytest.raises(ReadError, match="NaN or Inf"):
        files.made(recipe, (ROWS, 64), "F32")


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_roundings_are_no_fault_but_other_values_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    model = make_model(tmp_path / "m", hidden_size=64, intermediate_size=2048)
    adapter = make_adapter(tmp_path / "a", model, rank=16)
    text = simple_config(model, [model, f"{model}+{adapter}"], f"gate_mode: random\ndtype: {dtype}")
    config = write_config(tmp_path / "c.yaml", text)

    def as_before(matrix: torch.Tensor, axis: int) -> torch.Tensor:
        return matrix.float()

    monkeypatch.setattr("moemerge.plan.blocks._grid", as_before)
    merge(config, tmp_path / "old")
    monkeypatch.undo()
    merge(config, tmp_path / "new")
    for out, said in (("old", 1), ("new", 0)):
        heard = Heard()
        verify_checkpoint(tmp_path / out, heard)
        assert sum("in the last bits only" in line for line in heard.lines) == said


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_wrong_tensor_is_found_beyond_its_roundings(files: Files, dtype: str) -> None:
    recipe = lora(files, 512, 8, dtype)
    shape = (ROWS, 512)
    right = files.made(recipe, shape, dtype)
    planned = PlannedTensor("tensor", shape, dtype, recipe)

    def is_made(other: Any) -> bool:
        return _is_made(memoryview(files.made(other, shape, dtype)), memoryview(right), planned)

    assert is_made(recipe)
    without, twice = recipe.of, LowRank(recipe.of, recipe.down, recipe.up, 2.02)
    assert not is_made(without)
    assert not is_made(twice)
