"""The files of a finished directory that are pushed, without any path of this machine in them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moemerge.card import card, shareable
from moemerge.checkpoint import is_hub_id, last_part, read_gguf_header
from moemerge.errors import InputError, Problem
from moemerge.files import CONFIG_FILE, GGUF_SUFFIX, as_json, place_of, shown
from moemerge.hub import Content
from moemerge.output import (
    CARD_FILE,
    MANIFEST_FILE,
    OWN_FILES,
    PICTURE_FILE,
    TOKENIZER_FILES,
    Manifest,
    checksum,
    chunk_digest,
)
from moemerge.plan import INDEX_FILE, weight_index
from moemerge.tokenizer import GENERATION_FILE

_LISTED = {*OWN_FILES, PICTURE_FILE, GENERATION_FILE, *TOKENIZER_FILES}
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_NO_TEXT = {PICTURE_FILE, "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"}
"""Files without text of a person. They stay as they are: a token may look like a path."""

_NAMES_A_PLACE = re.compile(r".*(?:path|file|dir|directory)")


def leaving(manifest: Manifest, place: Callable[[str], Path]) -> dict[str, Content]:
    """Return each file that is pushed, by its name: a path, or changed content as bytes.

    `place` gives the path of a file. In pushed texts, `./name` replaces each path of this machine;
    the pushed manifest has the checksums of the changed texts.

    Raises:
        InputError: a text names a path of this machine that cannot be replaced.
    """
    shards = {shard.file for shard in manifest.plan.shards}
    said = dict.fromkeys([*manifest.files, *OWN_FILES])
    made = {*shards, CONFIG_FILE, MANIFEST_FILE}
    made |= set() if manifest.plan.is_gguf else {INDEX_FILE}
    listed = [name for name in said if name in _LISTED or _TEMPLATES.fullmatch(name)]
    names = [name for name in said if name in shards]
    names += [name for name in listed if name in made or place(name).is_file()]
    public, roots = shareable(manifest), _roots(manifest, place(CONFIG_FILE).parent)
    config = _json_without(public.plan.config, roots)
    public = dataclasses.replace(public, plan=dataclasses.replace(public.plan, config=config))
    content: dict[str, Content] = {name: place(name) for name in names if name != MANIFEST_FILE}
    if not manifest.plan.is_gguf:
        content[INDEX_FILE] = as_json(weight_index(public.plan)).encode()
    content[CONFIG_FILE] = as_json(config).encode()
    files = {name: manifest.files.get(name, {}) for name in names}
    for name in content.keys() - made - _NO_TEXT:
        before = place(name).read_bytes()
        after = _without(name, before, roots)
        if after != before:
            content[name] = after
            digest = checksum([chunk_digest(memoryview(after))])
            files[name] = {"bytes": len(after), "xxh3": digest} if files[name] else {}
    if manifest.plan.is_gguf:  # it is not in the folder there, see `on_the_hub`
        files.pop(PICTURE_FILE, None)
    told = dataclasses.replace(public, files=files).to_json()
    for key in ("config", "routing", "card", "tuned", "fitted"):
        if key in told:
            told[key] = _mapped(told[key], lambda text: _replaced(text, roots))
    content[MANIFEST_FILE] = as_json(told).encode()
    _check(content, shards, roots)
    return content


def on_the_hub(content: dict[str, Content], out: Path) -> dict[str, Content]:
    """The content of `leaving` by the names that it gets in the repository.

    Of a GGUF file, card and picture are at the top, where the Hub shows them. The rest of its
    folder is in that folder, so that a downloaded copy can be verified.
    """
    if shown(out) == out:
        return content
    top = {CARD_FILE, PICTURE_FILE}
    inside = {name for name in content if name not in top and place_of(out, name) == out / name}
    return {f"{out.name}/{n}" if n in inside else n: what for n, what in content.items()}


def stays(out: Path, content: dict[str, Content]) -> list[str]:
    """Names in `out` that are not pushed, sorted; hidden files do not count."""
    folders = {name.partition("/")[0] for name in content}
    return sorted(p.name for p in out.iterdir() if p.name not in folders and p.name[0] != ".")


def _roots(manifest: Manifest, out: Path) -> dict[str, str]:
    """Directories of this machine that a text may name, the longest first, each with the text that
    replaces it: `./name` for a source, `.` for any other."""
    from huggingface_hub import constants

    known = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), out]
    known += [Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE)]
    known += [Path(manifest.folder)] if manifest.folder else []
    sources = [Path(one.directory) for one in manifest.plan.sources if one.directory]
    known += [source.parent for source in sources]
    said = {spelt: "." for path in known for spelt in _spelt(path)}
    said |= {spelt: f"./{last_part(path)}" for path in sources for spelt in _spelt(path)}
    return {path: said[path] for path in sorted(said, key=len, reverse=True) if path != os.path.sep}


def _spelt(path: Path) -> set[str]:
    """The absolute path, once with symbolic links and once with them resolved."""
    return {os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100


def _without(name: str, content: bytes, roots: dict[str, str]) -> bytes:
    """A text file's content with paths of this machine replaced."""
    text = content.decode("utf-8", errors="surrogateescape")
    if name == CARD_FILE:
        changed = _replaced(text, roots)
        if changed == text:
            return content
        kept = card.changed(content, lambda body: _replaced(body, roots))
        return kept or changed.encode("utf-8", errors="surrogateescape")
    if not name.endswith(".json"):
        return content
    try:
        data = json.loads(text)
        changed = _json_without(data, roots)
    except (ValueError, RecursionError):
        return content
    return content if changed == data else as_json(changed).encode()


def _json_without(data: Any, roots: dict[str, str]) -> Any:
    """JSON data without keys that hold a path, and with paths of this machine in texts replaced."""
    if isinstance(data, list):
        return [_json_without(one, roots) for one in data]
    if isinstance(data, dict):
        return {
            key: _json_without(value, roots)
            for key, value in data.items()
            if not (_NAMES_A_PLACE.fullmatch(key) and _is_a_place(value))
        }
    return _replaced(data, roots) if isinstance(data, str) else data


def _is_a_place(value: Any) -> bool:
    """Whether the value is a path, and not a Hub id or a file name alone."""
    if not isinstance(value, str) or not re.search(r"[/\\]", value):
        return False
    return not is_hub_id(value) or Path(value).exists()


def _mapped(data: Any, change: Callable[[str], str]) -> Any:
    if isinstance(data, list):
        return [_mapped(one, change) for one in data]
    if isinstance(data, dict):
        return {key: _mapped(value, change) for key, value in data.items()}
    return change(data) if isinstance(data, str) else data


def _replaced(text: str, roots: dict[str, str]) -> str:
    """The text with `./name` in place of each path below one of the directories."""
    for root, instead in roots.items():
        if root in text:
            path = rf"(?<![\w.:/~-]){re.escape(root)}((?:/[\w.+@=~-]*)*)(?![\w-])"

            def said(found: re.Match[str], instead: str = instead) -> str:
                below = found[1].strip("/.")
                return f"./{last_part(below)}" if below else instead

            text = re.sub(path, said, text)
    return text


def _check(content: dict[str, Content], shards: set[str], roots: dict[str, str]) -> None:
    """Refuse a text that still names a directory of this machine.

    Directories of one part, such as `/data`, are not looked for: they may be ordinary words.
    """
    deep = [root for root in roots if len(Path(root).parts) > 2]
    problems = []
    for name in content.keys() - _NO_TEXT:
        data = _text(content[name], name in shards)
        found = next((root for root in deep if root.encode() in data), None)
        if found:
            told = f"names a path of this machine ({found})"
            fix = "merge again without it" if name in shards else "remove the path, then push again"
            problems.append(Problem(name, told, fix))
    if problems:
        raise InputError(sorted(problems, key=lambda one: one.where))


def _text(what: Content, is_shard: bool) -> bytes:
    """What a person may have written in a file; of a GGUF file, its fields, but for its tokens."""
    if isinstance(what, bytes):
        return what
    if not is_shard:
        return what.read_bytes()
    if what.suffix != GGUF_SUFFIX:
        return b""
    fields = read_gguf_header(what).fields.items()
    return b"".join(one.raw for name, one in fields if not name.startswith("tokenizer.ggml."))
