"""Tensor names that a program put something before, or into, as the names that readers know."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""What torch.compile, FSDP, activation checkpointing and DeepSpeed put around modules."""

_BARE = ("layers.0.", "embed_tokens.")


def usual(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Other names of a model's tensors by those in its files, and what was done for a person.

    A wrapper's name is left out wherever it stands, and so is one prefix that all names share; the
    head may lack it.
    Names of a body without its head begin with what that is called in the whole model. Where two
    would then be one, nothing is done.
    """
    listed = list(names)
    made = [_WRAPPERS.sub("", name) for name in listed]
    wrapped = sorted({found[1] for name in listed for found in _WRAPPERS.finditer(name)})
    told = [f"without {wrapper}." for wrapper in wrapped]
    if prefix := _shared(made):
        made = [name.removeprefix(prefix) for name in made]
        told.append(f"without {prefix}")
    elif made and all(any(name.startswith(bare) for name in made) for bare in _BARE):
        made = [name if name.startswith("lm_head.") else f"model.{name}" for name in made]
        told.append("with model. before them")
    if not told or len(set(made)) < len(listed):
        return {}, ""
    renamed = {name: other for name, other in zip(listed, made, strict=True) if name != other}
    return renamed, f"its tensors' names are read {' and '.join(told)}"


def _shared(names: list[str]) -> str:
    """What stands before the usual names in all of them."""
    found = (re.match(r"(?:\w+\.)*?(?=model\.(layers|embed_tokens)\.)", name) for name in names)
    prefixes = {one[0] for one in found if one}
    prefix = min(prefixes, default="")
    all_have = all(name.startswith((prefix, "lm_head.")) for name in names)
    return prefix if len(prefixes) == 1 and all_have else ""
