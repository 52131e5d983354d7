"""Tensor names with a program's additions, as the names that readers know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""Names that torch.compile, FSDP, activation checkpointing and DeepSpeed put around modules."""

_INSIDE = re.compile(r"(?:model\.)?language_model\.(model\.|lm_head\.)?")
"""The language part within a model that sees: as transformers 5 names it, and version 4."""

_BARE = ("layers.0.", "embed_tokens.")


def usual(
    names: Iterable[str], inside: bool = False, own: Mapping[str, str] | None = None
) -> tuple[dict[str, str], str]:
    """New names of a model's tensors by the names in its files, and a note for a person.

    Names of wrappers are removed, and so is one prefix that all names share; the head may lack the
    prefix. The names of a body without its head get the prefix `model.`. If two names would become
    equal, nothing is renamed. If the language part is `inside` a model that sees or hears, its
    names become those of a model of its own; the other names stay. `own` are what a family's names
    begin with in its files, by the usual beginnings.
    """
    listed = list(names)
    if own:
        return {
            name: start + name.removeprefix(begun)
            for name in listed
            for start, begun in [_begun(own, name)]
            if begun
        }, ""
    if inside:
        return {name: _INSIDE.sub(_of_text, name) for name in listed if _INSIDE.match(name)}, ""
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
    """The prefix of all names before their usual beginning."""
    found = (re.match(r"(?:\w+\.)*?(?=model\.(layers|embed_tokens)\.)", name) for name in names)
    prefixes = {one[0] for one in found if one}
    prefix = min(prefixes, default="")
    all_have = all(name.startswith((prefix, "lm_head.")) for name in names)
    return prefix if len(prefixes) == 1 and all_have else ""


def _begun(own: Mapping[str, str], name: str) -> tuple[str, str]:
    return next(((u, begun) for u, begun in own.items() if name.startswith(begun)), ("", ""))


def _of_text(found: re.Match[str]) -> str:
    return found[1] or "model."
