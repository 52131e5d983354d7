"""The docs site's own part: README.md is its first page, and links to other files lead to GitHub.

MkDocs calls these functions; mkdocs.yml names this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/moemerge/moemerge/blob/main/"


def on_files(files: Files, config: Any) -> Files:
    """Add the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_relinked(text, "docs/", "")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page of docs/, whose links to what is not in there begin with `../`."""
    return _relinked(markdown, "", "../")


def _relinked(text: str, inside: str, outside: str) -> str:
    """Links to `inside` lose that beginning, links to `outside` lead to the repository."""

    def target(found: re.Match[str]) -> str:
        link = found[1]
        if inside and link.startswith(inside):
            return f"]({link.removeprefix(inside)})"
        if link.startswith(outside):
            return f"]({REPOSITORY}{link.removeprefix(outside)})"
        return found[0]

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", target, text)
