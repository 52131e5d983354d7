"""A routing report as one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from moemerge.report.data import RoutingReport

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}
"""Characters that could end the script element or begin markup, as JSON escapes; all else is ASCII.
"""


def render(report: RoutingReport) -> str:
    """The page of a report of `routing`; nothing in the report is taken for markup.

    The page's policy allows its own script and style, by digest, and forbids all else.

    Raises:
        ValueError: a number of the report is not finite, which JSON cannot hold.
    """
    style, script = _beside("page.css"), _beside("page.js")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(report, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    page = _beside("page.html")
    parts = {"policy": policy, "style": style, "script": script, "report": data}
    for name, text in parts.items():  # the report last: what it holds is never a hole
        page = page.replace("{{" + name + "}}", text)
    return page


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    """The digest of a content in the words of a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
