"""Where a mixture comes from: its sources and their licences, and the config that made it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

from moemerge.card.markdown import checkpoints, linked, shown, table
from moemerge.card.sharing import shareable_config
from moemerge.prepare import Claims, Prepared
from moemerge.version import __version__


def sources(ready: Prepared, claims: dict[str, Claims]) -> Iterator[str]:
    """The section on the mixture's sources and their licences."""
    used: dict[str, list[str]] = {text: [] for text in ready.checkpoints}
    whole = [("body", ready.base)] if ready.config.body == "base" else []
    shared = [("a shared expert", donor) for donor in ready.shared]
    for name, donor in [*whole, *zip(ready.plan.experts, ready.donors, strict=True), *shared]:
        for opened in checkpoints(donor):
            used[opened.reference.text].append(shown(name))
    rows = [
        (
            linked(opened.reference, opened.commit)
            + " (a directory of its maker)" * (not opened.reference.repo),
            ", ".join(dict.fromkeys(used[text])) or "tokenizer and configuration",
            f"`{opened.commit}`" if opened.commit else "-",
            _terms(claims[text]),
        )
        for text, opened in ready.checkpoints.items()
    ]
    yield "## Sources and licences"
    yield table(["source", "used for", "commit", "licence"], rows)
    terms = {claim.terms for claim in claims.values()}
    if len(terms) == 1 and "" not in terms:
        yield f"All sources name the same licence, {_terms(next(iter(claims.values())))}."
    if len(terms - {""}) > 1:
        yield (
            "**The sources' licences differ.** The terms of all of them hold together, and the "
            "strictest may bind: read each before you use or pass on this model."
        )
    if "" in terms:
        yield (
            "Where the licence is unknown, the source's card names none that could be read: ask "
            "its makers before you use or pass on this model."
        )


def making(ready: Prepared, with_config: bool) -> Iterator[str]:
    """The section on the programs that made it, with the config to make it again."""
    tools = [f"moemerge {__version__}"]
    if ready.gate.needs.body_pass:
        used = ("torch", "transformers")
        tools += [f"{name} {importlib.metadata.version(name)}" for name in used]
    seed = f", seed {ready.plan.seed}" if ready.gate.needs.seed else ""
    yield "## How it was made"
    yield f"With {', '.join(tools)}{seed}" + (", by this config:" if with_config else ".")
    if with_config:
        public = shareable_config(ready.config, ready.plan)
        text = public.as_yaml().strip()
        if public != ready.config:
            yield "(Of what lies on its maker's disk, only the last part of the path is shown.)"
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
        yield f"{fence}yaml\n{text}\n{fence}"


def _terms(claims: Claims) -> str:
    text = shown(claims.terms or claims.license or "unknown")
    return f"[{text}]({claims.license_link})" if claims.license_link else text
