"""A mixture in transformers for training: every matrix of an expert is a linear of its own.

transformers 5 keeps the experts of a layer in two tensors. bitsandbytes does not quantise them, and
their gradients are as large as the tensors. Here an expert is three linears, as in the files. Each
is quantised while it is read, and each takes a LoRA. A frozen weight has no gradient, and is in
full size only during its own product.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from moemerge.architectures import ROUTING
from moemerge.checkpoint import fetch
from moemerge.dense import Streamed, available_memory, make_buffers, pick_device, place_buffers
from moemerge.errors import Findings, InputError, Problem
from moemerge.families import HEAD
from moemerge.mixture.linear_experts import part_experts
from moemerge.mixture.open import Moe
from moemerge.mixture.parts import Part
from moemerge.options import RunOptions
from moemerge.plan import arithmetic
from moemerge.reporting import Reporter, size

if TYPE_CHECKING:
    import torch


_WHOLE = ROUTING | {"lm_head"}
"""The linears that are neither quantised nor given a LoRA: the head, routers and gates."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's mallopt(3)."""

_FOUR_BITS = 4.13 / 8
"""Bytes per parameter in NF4 with double quantisation: 4 bits, plus 8/64 and 32/(256 * 64)."""


def is_plain(name: str) -> bool:
    """Whether a linear of that name is quantised and takes a LoRA."""
    return name.rpartition(".")[2] not in _WHOLE


def check_memory(moe: Moe, options: RunOptions, findings: Findings) -> None:
    """Record a model that is larger than the free memory, if that is known."""
    free = available_memory()
    needed = memory_of(moe, options.load_in_4bit)
    if free is not None and needed > free and pick_device(options.device) == "cpu":
        what = f"needs {size(needed)} of memory, {size(free)} are free"
        fix = "pass --load-in-4bit" if not options.load_in_4bit else "use a larger machine"
        findings.problem(moe.text, what, fix)


def memory_of(moe: Moe, four_bits: bool) -> int:
    """The bytes of the weights in memory. With `four_bits`, all matrices but embeddings, head and
    routers are in NF4."""
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
    """Whether the part is a tied head, which shares the embeddings' memory."""
    return part.name == HEAD and bool(moe.dense["tie_word_embeddings"])


def _is_quantised(part: Part) -> bool:
    module = part.name.removesuffix(".weight")
    return bool(part.layer) and len(part.shape) == 2 and not part.made and is_plain(module)


def load(moe: Moe, options: RunOptions, reporter: Reporter, dtype: torch.dtype) -> Any:
    """Load the mixture to its device in `dtype`, all of it frozen; its experts are linears.

    With `options.load_in_4bit` every linear but the head is quantised (NF4, QLoRA: Dettmers et al.
    2023, https://arxiv.org/abs/2305.14314) as it is read: memory holds the quantised
    model and one matrix at most. With `options.lazy` the weights of a decoder layer are read each
    time the layer runs, and dropped after it.

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
    make_buffers(model, config)
    part_experts(model, moe)
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
    if not options.load_in_4bit:  # with it, the kept memory would be that of full-size matrices
        _keep_freed_memory()
    place_buffers(model, device)
    model.is_loaded_in_4bit = options.load_in_4bit  # PEFT chooses its kind of LoRA layer by this
    model.name_or_path = moe.text
    config.use_cache = False  # with a cache, packed texts would see each other
    config.model_type = f"{moe.family}, experts apart"  # otherwise PEFT looks for fused experts
    return model


def refuse_weights(
    where: str, missing: Iterable[str], misfits: Iterable[str], unplaced: Iterable[str]
) -> None:
    """Refuse a mixture if transformers would draw weights at random, or leave some out.

    Raises:
        InputError: names the first of each kind.
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
    """Let glibc return large freed blocks to the system at once.

    Otherwise a quantised matrix takes a part of the space that its full-size matrix freed. The next
    full-size matrix does not fit there, and the heap grows as if nothing were quantised.
    """
    _allocate(1 << 20, 1 << 20)


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor.

    Otherwise large tensors are remapped every step, which took a third of a step with 135M
    parameters on two cores.
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
    """The name in the files of a module or tensor of the model in memory."""
    own, ours = moe.tensors.expert, f"{_experts(moe)}."
    return name.replace(f".{ours}", f".{own}") if ours != own else name


def _experts(moe: Moe) -> str:
    """The name of the module of a layer's experts in memory."""
    module, _, leaf = moe.tensors.uppers[0].rpartition(".")
    return module if leaf == "gate_up_proj" else f"{module.partition('.')[0]}.experts"


def _names_in_memory(part: Part, moe: Moe) -> Iterator[str]:
    names = moe.tensors
    if part.expert is not None:
        matrix = f"{_experts(moe)}.{part.expert}.{names.matrices[part.which]}.weight"
        yield part.layer + matrix
    elif part.made == "router":
        for router in (names.router, *names.routers):
            yield part.layer + router
    else:
        yield part.name
        yield part.name.replace(".block_sparse_moe.", ".mlp.")


def _place(
    model: Any, name: str, value: torch.Tensor, dtype: torch.dtype, device: str, four_bits: bool
) -> None:
    """Set a tensor of the model; with `four_bits`, the weight of a linear is quantised first."""
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
    made.support_avx512bf16_for_cpu = (
        False  # otherwise evaluation packs the weight, and training cannot read it
    )
    made.weight = bnb.nn.Params4bit(
        value, requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(device)
    model.set_submodule(path, made)
