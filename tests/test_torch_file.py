"""What torch.save writes is read as torch.load(weights_only=True) reads it, or refused."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from babies import simple_config
from safetensors.torch import load_file
from test_laws import all_tensors, same_bytes
from test_refusals import invoke

from moemerge import Options, merge, parse_config
from moemerge.checkpoint.formats import torch_zip as torch_file
from moemerge.checkpoint.location import read_bytes

Make = Callable[[torch.Tensor], Any]


def tagged(tensor: torch.Tensor, **attributes: Any) -> torch.Tensor:
    made = tensor.clone()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def parameter(tensor: torch.Tensor, **attributes: Any) -> torch.nn.Parameter:
    made = torch.nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point())
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Called:
    """Pickles as a call of one of torch's functions."""

    def __init__(self, function: Any, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def in_one_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(7), tensor.flatten(), torch.ones(5)])[7:-5].view(tensor.shape)


def old(tensor: torch.Tensor) -> Called:
    storage = torch.storage.TypedStorage(
        wrap_storage=tensor.clone().untyped_storage(), dtype=tensor.dtype, _internal=True
    )
    return Called(torch._utils._rebuild_tensor, storage, 0, tuple(tensor.shape), tensor.stride())


VALUES = {
    "a flag": True, "a number": 3, "a fraction": 0.5, "text": "sharded", "nothing": None,
    "a list": [1, [2, "x"]], "a tuple": (1, ()), "a dict": {"a": {1: 2, None: 3}},
    "a tensor": torch.arange(3), "a negated tensor": torch.arange(3.0)._neg_view(),
    "a shape": torch.Size([1, 2]), "a dtype": torch.bfloat16, "a device": torch.device("cpu"),
    "a set": {1, 2}, "bytes": b"\0\xff", "a complex number": 1j, "a dict's kind": OrderedDict(a=1),
    "a parameter": torch.nn.Parameter(torch.zeros(2)), "an array of bytes": bytearray(b"ab"),
}  # fmt: skip
READ: dict[str, Make] = {
    "plain": lambda t: t,
    "parameters": parameter,
    "with attributes": lambda t: tagged(t, tag=1),
    "parameters with attributes": lambda t: parameter(t, _is_hf_initialized=True),
    "with many attributes": lambda t: tagged(
        t, **{k.replace(" ", "_"): v for k, v in VALUES.items()}
    ),
    "negated": lambda t: t.neg()._neg_view(),
    "negated, in part": lambda t: t._neg_view(),
    "negated parameters": lambda t: parameter(t)._neg_view().detach(),
    "negated, with attributes": lambda t: setattr(n := t._neg_view(), "tag", 1) or n,
    "in one storage": in_one_storage,
    "in one storage, negated": lambda t: in_one_storage(t)._neg_view(),
    "of half precision, negated": lambda t: t.half()._neg_view(),
    "of bfloat16, negated": lambda t: t.bfloat16()._neg_view(),
    "of double precision, negated": lambda t: t.double()._neg_view(),
    "by torch's first function": old,
    "of an accelerator without storages": lambda t: Called(
        torch._utils._rebuild_device_tensor_from_cpu_tensor, t.clone(), t.dtype, "cpu", False
    ),
    "of 8-bit floats": lambda t: t.to(torch.float8_e4m3fn),
    "of 8-bit floats, with attributes": lambda t: tagged(t.to(torch.float8_e5m2), tag=1),
    "of unsigned numbers": lambda t: (t * 9).to(torch.uint8).to(torch.uint16),
    "of whole numbers": lambda t: (t * 9).to(torch.int64),
    "of truths": lambda t: t > 0,
    "scalars": lambda t: t.flatten()[0].clone(),
    "empty": lambda t: t[:0].clone(),
    "expanded by one": lambda t: t[None].expand(1, *t.shape),
}
REFUSED: dict[str, Make] = {
    "transposed": lambda t: t.T,
    "every second row": lambda t: t[::2],
    "complex": lambda t: torch.complex(t, t),
    "conjugated": lambda t: torch.complex(t, t).conj(),
    "sparse": lambda t: t.to_sparse(),
    "sparse by rows": lambda t: t.to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "without data": lambda t: t.to("meta"),
    "of an accelerator, in another dtype": lambda t: Called(
        torch._utils._rebuild_device_tensor_from_cpu_tensor, t.clone(), torch.float16, "cpu", False
    ),
    "nested": lambda t: torch.nested.nested_tensor([t, t[:2]]),
    "numbers": lambda _: 5,
    "lists": lambda t: [t, t],
    "with other data": lambda t: Called(
        torch._utils._rebuild_parameter_with_state, t.clone(), False, OrderedDict(), {"data": -t}
    ),
}  # fmt: skip
ORIGIN = torch.linspace(-2, 3, 24).reshape(4, 6)


@pytest.mark.parametrize("how", READ)
def test_tensors_are_read_as_torch_reads_them(how: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(OrderedDict(a=READ[how](ORIGIN), b=READ[how](ORIGIN[:2] + 1)), path)
    theirs = torch.load(path, weights_only=True)
    ours = torch_file.read_header(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        same = tensor.detach().resolve_neg().contiguous()
        assert ours[name].shape == same.shape
        assert read_bytes(ours[name]) == same.flatten().view(torch.uint8).numpy().tobytes()
        for start in range(min(ours[name].nbytes, 7)):  # any stretch of it
            assert read_bytes(ours[name], start) == read_bytes(ours[name])[start:]


@pytest.mark.filterwarnings("ignore")  # torch's, of what is new or old there
@pytest.mark.parametrize("how", REFUSED)
def test_what_is_no_plain_tensor_is_refused(how: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": REFUSED[how](ORIGIN)}, path)
    with pytest.raises(ValueError):
        torch_file.read_header(path)


def test_a_model_that_is_refused_is_told_how_to_become_safetensors(
    babies: dict[str, Path], tmp_path: Path
) -> None:
    state = load_file(babies["base"] / "model.safetensors")
    shutil.copytree(babies["base"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(
        {n: t.repeat(2, *[1] * (t.dim() - 1))[::2] for n, t in state.items()},
        tmp_path / "m/pytorch_model.bin",
    )
    config = tmp_path / "config.yaml"
    config.write_text(simple_config(tmp_path / "m", [babies["base"]] * 2, "gate_mode: random"))
    result = invoke("plan", config)
    assert result.exit_code == 2
    assert "not contiguous" in result.stderr and "safe_serialization=True" in result.stderr


@pytest.mark.parametrize("checksums", [True, False])
def test_a_merge_of_negated_tensors_is_that_of_plain_ones(
    checksums: bool, babies: dict[str, Path], tmp_path: Path
) -> None:
    """By chunks and, without checksums, by the kernel's copies."""
    state = load_file(babies["base"] / "model.safetensors")
    shutil.copytree(babies["base"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({n: t.neg()._neg_view() for n, t in state.items()}, tmp_path / "m/pytorch_model.bin")
    made = []
    for source in (babies["base"], tmp_path / "m"):
        text = simple_config(source, [source, babies["first"]], "gate_mode: random")
        out = tmp_path / f"out-{source.name}"
        merge(parse_config(text), out, Options(checksums=checksums))
        made.append(all_tensors(out))
    assert same_bytes(*made)
