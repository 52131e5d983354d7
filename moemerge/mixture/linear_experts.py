"""A layer's experts in memory as linears, in the place of transformers' stacked tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moemerge.errors import RunError
from moemerge.mixture.open import Moe

if TYPE_CHECKING:
    import torch


def experts_of(model: Any) -> list[Any]:
    """Every layer's experts module; set its `only` to send all tokens through one expert."""
    return [module for module in model.modules() if type(module).__name__ == "ExpertsApart"]


def part_experts(model: Any, moe: Moe) -> None:
    """Replace stacked experts by linears on the meta device."""
    import torch

    stacked = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter)
    ]
    for name, module in stacked:
        parent = model.get_submodule(name.rpartition(".")[0])
        count, rows, _ = module.gate_up_proj.shape
        apart = _experts_class()(count, module.down_proj.shape[1], rows // 2, moe, module.act_fn)
        setattr(parent, name.rpartition(".")[2], apart)
    if not stacked:
        raise RunError(f"{moe.text}: its experts are not where transformers 5 keeps them")


@lru_cache(maxsize=1)
def _experts_class() -> Any:
    import torch

    class Expert(torch.nn.Module):
        """One expert: act(x W_gate) * (x W_up), times W_down, for x (T, D)."""

        def __init__(self, hidden: int, inner: int, moe: Moe, act: Any):
            super().__init__()
            sizes = ((hidden, inner), (hidden, inner), (inner, hidden))
            with torch.device("meta"):
                for name, (wide, high) in zip(moe.tensors.matrices, sizes, strict=True):
                    self.add_module(name, torch.nn.Linear(wide, high, bias=False))
            self.act, self.own_names = act, moe.tensors.matrices

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            gate, up, down = (getattr(self, name) for name in self.own_names)
            made: torch.Tensor = down(self.act(gate(inputs)) * up(inputs))
            return made

    class ExpertsApart(torch.nn.ModuleList):
        """A layer's experts; called as transformers calls its own."""

        only: int | None = None

        def __init__(self, count: int, hidden: int, inner: int, moe: Moe, act: Any):
            super().__init__(Expert(hidden, inner, moe, act) for _ in range(count))

        def forward(
            self, inputs: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            if self.only is not None:
                alone: torch.Tensor = self[self.only](inputs)
                return alone
            total = torch.zeros_like(inputs)
            for number, expert in enumerate(self):
                tokens, place = torch.where(chosen == number)
                if len(tokens):
                    made = expert(inputs[tokens]) * weights[tokens, place, None]
                    total = total.index_add(0, tokens, made.to(total.dtype))
            return total

    return ExpertsApart
