"""A checkpoint of computed tensors, written tensor by tensor while they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge.checkpoint import Location, read_header
from moemerge.errors import RunError
from moemerge.plan import PlannedTensor, file_header, torch_dtype

if TYPE_CHECKING:
    import torch


class Computed:
    """The file at `path`, under another name until it is `finished`.

    `tensors` are all that will be in it; `places` is where each lies.
    """

    def __init__(self, path: Path, tensors: Sequence[PlannedTensor]):
        self.path, self.part = path, path.with_name(f"unfinished-{path.name}")
        self.tensors = {tensor.name: tensor for tensor in tensors}
        header = file_header(tensors, {"format": "pt"})
        with self.part.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
        self.places: dict[str, Location] = read_header(self.part)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Write a tensor's values.

        Raises:
            RunError: they are not finite in the file's dtype.
        """
        import torch

        tensor = self.tensors[name]
        made = value.to(torch_dtype(tensor.dtype)).contiguous()
        if not made.isfinite().all():
            raise RunError(f"{name}: came out as NaN or Inf; use other prompts or dtype: float32")
        with self.part.open("r+b") as file:
            file.seek(self.places[name].offset)
            file.write(made.view(torch.uint8).numpy().tobytes())

    def clear(self, name: str) -> None:
        """Write zeros."""
        with self.part.open("r+b") as file:
            file.seek(self.places[name].offset)
            file.write(bytes(self.tensors[name].nbytes))

    def finish(self) -> None:
        """Give the file its name."""
        self.part.replace(self.path)
