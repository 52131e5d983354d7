"""A mixture in transformers as training wants it: every expert's matrices are linears of their own.

transformers 5 keeps a layer's experts in two tensors, which bitsandbytes leaves in full size and
whose gradients are as large as they are. Here an expert is three linears, as in the files: they are
quantised one by one while they are read, an adapter sits on each, and no gradient of a frozen
weight, nor a frozen weight in full size, outlives the product that it is for.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from moemerge.architectures import ROUTING
from moemerge.checkpoint import fetch
from moemerge.dense import Streamed, available_memory, pick_device
from moemerge.errors import Findings, InputError, Problem, RunError
from moemerge.families import HEAD
from moemerge.mixture.open import Moe, Part
from moemerge.options import RunOptions
from moemerge.plan import arithmetic
from moemerge.reporting import Reporter, size

if TYPE_CHECKING:
    import torch


_WHOLE = ROUTING | {"lm_head"}
"""The linears that are neither quantised nor adapted: the head, and what routes."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's mallopt(3)."""

_FOUR_BITS = 4.13 / 8
"""Bytes a parameter in NF4 with doubly quantised statistics: 4 bits, 8/64 and 32/256/64."""


def is_plain(name: str) -> bool:
    """Whether a linear of that name is one to quantise and to adapt."""
    return name.rpartition(".")[2] not in _WHOLE


def check_memory(moe: Moe, options: RunOptions, findings: Findings) -> None:
    """Record a model too large for the memory at hand, where that can be told."""
    free = available_memory()
    needed = memory_of(moe, options.load_in_4bit)
    if free is not None and needed > free and pick_device(options.device) == "cpu":
        what = f"needs {size(needed)} of memory, {size(free)} are free"
        fix = "pass --load-in-4bit" if not options.load_in_4bit else "use a larger machine"
        findings.problem(moe.text, what, fix)


def memory_of(moe: Moe, four_bits: bool) -> int:
    """The bytes of its weights in memory; in NF4 all matrices but embeddings, head and routers."""
    total = 0.0
    for part in moe.parts:
        if _is_again(part, moe):
            continue
        count = 1
        for length in part.shape:
            count *= length
        small = four_bits and _is_quantised(part)
        total += count * (_FOUR_BITS if small else 4 if part.dtype == "F32" else 2)
    return round(total)


def _is_again(part: Part, moe: Moe) -> bool:
    """Whether it is the head that is the embeddings, which memory holds once."""
    return part.name == HEAD and bool(moe.dense["tie_word_embeddings"])


def _is_quantised(part: Part) -> bool:
    module = part.name.removesuffix(".weight")
    return bool(part.layer) and len(part.shape) == 2 and not part.made and is_plain(module)


def load(moe: Moe, options: RunOptions, reporter: Reporter, dtype: torch.dtype) -> Any:
    """The mixture on its device in `dtype`, all of it frozen; its experts are linears.

    With `options.load_in_4bit` every linear but the head is quantised (NF4, QLoRA: Dettmers et al.
    2023, https://arxiv.org/abs/2305.14314) as it is read: memory never holds more than that and
    one matrix. With `options.lazy` a decoder layer's weights are read each time it runs, and let go
    after it.

    Raises:
        InputError: the files hold other tensors than transformers' model has.
        RunError: transformers cannot build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    opened = moe.checkpoint
    if opened.absent:
        opened = fetch(opened, opened.tensors, options.cache_dir, reporter)
    config = AutoConfig.for_model(**copy.deepcopy(moe.config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    _part_experts(model, moe)
    _return_freed_memory()
    device = pick_device(options.device)
    sources = {moe.text: opened.tensors}
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unplaced, misfits = [], []
    places: dict[str, list[tuple[str, Part]]] = {}
    for part in moe.parts:
        if _is_again(part, moe):
            continue
        name = next((one for one in _names_in_memory(part, moe) if one in names), None)
        if name is None:
            unplaced.append(part.name)
        elif names.pop(name) != part.shape:
            misfits.append(part.name)
        else:
            places.setdefault(part.layer, []).append((name, part))
    if moe.dense["tie_word_embeddings"]:
        names.pop(HEAD, None)
    refuse_weights(moe.text, names, misfits, unplaced)

    def fill(layer: str, *_: object) -> None:
        for name, part in places[layer]:
            value = arithmetic.load(part.name, part.shape, part.recipe, sources)
            _place(model, name, value, dtype, device, options.load_in_4bit)

    with reporter.progress("loading the mixture", len(moe.parts), "tensor") as advance:
        for layer, there in places.items():
            if layer and options.lazy:
                module = model.get_submodule(layer.removesuffix("."))
                Streamed(module, partial(fill, layer))
            else:
                fill(layer)
            advance(len(there))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    if not options.load_in_4bit:  # else more than that saves would be full-size matrices' room
        _keep_freed_memory()
    model.model.rotary_emb.to(device)
    model.is_loaded_in_4bit = options.load_in_4bit  # by which PEFT knows what to put on its linears
    model.name_or_path = moe.text
    config.use_cache = False  # with a cache, texts packed in a row would see each other
    config.model_type = f"{moe.family}, experts apart"  # else PEFT looks for them where they were
    return model


def refuse_weights(
    where: str, missing: Iterable[str], misfits: Iterable[str], unplaced: Iterable[str]
) -> None:
    """Refuse a mixture some of whose weights transformers would draw at random, or leave out.

    Raises:
        InputError: there are some; the first of each kind are named.
    """
    repair = "`moemerge repair` gives a mixture the names that transformers knows"
    other = "use the weights and the config.json of one and the same model"
    problems = []
    for names, what, fix in (
        (missing, "lacks {}, which transformers would draw at random", repair),
        (misfits, "has {} in another shape than config.json says", other),
        (unplaced, "has {}, which transformers would leave out", repair),
    ):
        first = sorted(names)
        if first:
            more = f" and {len(first) - 2} more" if len(first) > 2 else ""
            problems.append(Problem(where, what.format(", ".join(first[:2]) + more), fix))
    if problems:
        raise InputError(problems)


def dtype_of(moe: Moe) -> torch.dtype:
    """The dtype to compute in: the weights' own; float32 for float16, which overflows."""
    import torch

    return torch.bfloat16 if any(p.dtype == "BF16" for p in moe.parts) else torch.float32


def _return_freed_memory() -> None:
    """Have the C library give large blocks back at once, where it is glibc.

    Else what is quantised settles in the room that its full-size matrix left, no next one fits
    there, and the heap grows as large as if nothing had been quantised.
    """
    _allocate(1 << 20, 1 << 20)


def _keep_freed_memory() -> None:
    """Have it use freed memory again.

    A step's large tensors are else mapped, faulted in and unmapped every time, which took a third
    of a step with 135M parameters on two cores.
    """
    _allocate(1 << 30, (1 << 31) - 1)


def _allocate(mmap_threshold: int, trim_threshold: int) -> None:
    """Set glibc's sizes, in bytes: mallopt(3)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, mmap_threshold)
    mallopt(_TRIM_THRESHOLD, trim_threshold)


def routers_of(model: Any, moe: Moe) -> dict[str, torch.nn.Parameter]:
    """The routers' weights (E, D) by their names in the files."""
    parameters = dict(model.named_parameters())
    return {
        part.name: next(parameters[one] for one in _names_in_memory(part, moe) if one in parameters)
        for part in moe.parts
        if part.made == "router"
    }


def name_in_files(name: str, moe: Moe) -> str:
    """What a module or tensor of the model in memory is called in the files of its family."""
    own, ours = moe.tensors.expert, f"{_block(moe)}.experts."
    return name.replace(f".{ours}", f".{own}") if ours != own else name


def experts_of(model: Any) -> list[Any]:
    """Every layer's experts; `only` may name the one that all tokens are to go through."""
    return [module for module in model.modules() if type(module).__name__ == "ExpertsApart"]


def _block(moe: Moe) -> str:
    """A layer's module in memory that holds the experts."""
    return moe.tensors.uppers[0].partition(".")[0]


def _names_in_memory(part: Part, moe: Moe) -> Iterator[str]:
    names = moe.tensors
    if part.expert is not None:
        matrix = f"{_block(moe)}.experts.{part.expert}.{names.matrices[part.which]}.weight"
        yield part.layer + matrix
    elif part.made == "router":
        for router in (names.router, *names.routers):
            yield part.layer + router
    else:
        yield part.name
        yield part.name.replace(".block_sparse_moe.", ".mlp.")


def _part_experts(model: Any, moe: Moe) -> None:
    """Put linears in the place of stacked experts, without memory."""
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


def _place(
    model: Any, name: str, value: torch.Tensor, dtype: torch.dtype, device: str, four_bits: bool
) -> None:
    """Give a tensor its place; a linear's weight is quantised on its way if that is wanted."""
    import torch

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    value = value.to(device, dtype if module.state_dict()[leaf].dtype == dtype else None)
    if not (four_bits and isinstance(module, torch.nn.Linear) and is_plain(path)):
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
        return
    import bitsandbytes as bnb

    if leaf == "bias":
        module.bias = torch.nn.Parameter(value, requires_grad=False)
        return
    made = bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.bias = module.bias
    made.support_avx512bf16_for_cpu = False  # else evaluation packs it as training cannot read it
    made.weight = bnb.nn.Params4bit(
        value, requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(device)
    model.set_submodule(path, made)
