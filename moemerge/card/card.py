"""The model card: its metadata for the Hub, its text, and a digest that shows edits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import yaml

from moemerge.card.running import sees
from moemerge.card.slots import without_slots
from moemerge.card.text import CardOptions, sections
from moemerge.prepare import Claims, Prepared, claims_of, split_own
from moemerge.report import FitSummary, RoutingPicture, RoutingSummary

GGUF_TAGS = ("gguf", "llama.cpp")
"""The tags by which the Hub's readers find GGUF files; the first is also the library's name."""

_HEAD = re.compile(r"\A---\n.*?^---$", re.DOTALL | re.MULTILINE)
_SEAL = re.compile(r"(.*)<!-- moemerge:card ([0-9a-f]{16}) -->\n?", re.DOTALL)


def render(
    ready: Prepared,
    routing: RoutingSummary,
    told: CardOptions,
    picture: str = "",
    fitted: FitSummary | None = None,
) -> str:
    """The card's text, with its digest at the end.

    `routing` is a summary of the routers (see `RoutingSummary`), `picture` the file that shows it,
    and `fitted` what the fit of body and experts did.
    The card has no path of this disk, and nothing from a config or a source can be markup in it.
    """
    claims = {text: claims_of(c.directory) for text, c in ready.checkpoints.items()}
    keys, own = split_own(without_slots(told.own))
    parts = [
        _dumped({**_metadata(ready, claims), **keys}),
        own,
        f"#{'#' * bool(own)} A mixture of {len(ready.plan.experts)} experts",
        *sections(ready, claims, routing, told, picture, fitted or {}),
    ]
    return seal("\n\n".join(filter(None, parts)) + "\n\n")


def changed(content: bytes, change: Callable[[str], str]) -> bytes | None:
    """A card with its text changed and a new digest; None if the card was edited.

    Raises:
        NoSlot: an older moemerge wrote it, and it has no place for the change.
    """
    if not is_untouched(content):
        return None
    text = content.decode().replace("\r\n", "\n").rpartition("<!-- moemerge:card")[0]
    return seal(change(text)).encode()


def head_of(text: str) -> dict[str, Any]:
    """The keys of a card's YAML head."""
    return split_own(text)[0]


def with_head(text: str, keys: dict[str, Any]) -> str:
    """A card's text with another head."""
    return _HEAD.sub(lambda _: _dumped(keys), text, count=1)


def seal(text: str) -> str:
    """The text with its digest at the end, by which `is_untouched` knows it."""
    return f"{text}<!-- moemerge:card {_digest(text)} -->\n"


def is_untouched(card: bytes) -> bool:
    """Whether a card is exactly as moemerge wrote it."""
    found = _SEAL.fullmatch(card.decode("utf-8", errors="replace").replace("\r\n", "\n"))
    return found is not None and _digest(found[1]) == found[2]


def picture(ready: Prepared, routing: RoutingSummary) -> RoutingPicture:
    """The heat map of the routers, as `heat_map.save` draws it."""
    names = ready.plan.experts
    texts = routing["texts"]
    return {"model": "Prompts, each held out", "experts": list(names), "texts": texts}


def _dumped(keys: dict[str, Any]) -> str:
    head = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


def _metadata(ready: Prepared, claims: dict[str, Claims]) -> dict[str, Any]:
    """The card's metadata for the Hub."""
    from huggingface_hub import ModelCardData

    opened = ready.checkpoints.values()
    models = [c.reference.repo for c in opened if not c.is_adapter and c.reference.repo]
    known = [claim for claim in claims.values() if claim.license]
    shared = known[0] if len(known) == len(claims) and len({c.terms for c in known}) == 1 else None
    terms = shared or Claims(license="other" if known else "unknown")
    data = ModelCardData(
        base_model=list(dict.fromkeys(models)) or None,
        base_model_relation="merge" if models else None,
        library_name=GGUF_TAGS[0] if ready.plan.is_gguf else "transformers",
        pipeline_tag="image-text-to-text" if sees(ready.plan) else "text-generation",
        tags=[
            *(GGUF_TAGS if ready.plan.is_gguf else ()),
            *("moe", "merge", "moemerge", ready.plan.architecture),
        ],
        license=terms.license,
        license_name=terms.license_name or None,
        license_link=terms.license_link or None,
        language=sorted({one for claim in claims.values() for one in claim.language}) or None,
        datasets=sorted({one for claim in claims.values() for one in claim.datasets}) or None,
    )
    return dict(data.to_dict())  # type: ignore[no-untyped-call]
