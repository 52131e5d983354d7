"""The page and the heat map: what they show is what the report says, whatever its texts hold."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moemerge.errors import InputError
from moemerge.report import heat_map, page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

HOSTILE = [
    "</script><img src=x onerror=document.title='owned'>", "<!--", "<script>", "]]>", "&amp;",
    "\u2028\u2029", "{{script}}", "\ud800", "مرحبا", " בעולם", "\u202e", "\n", "\t", "  \n\n",
    "W" * 400, "0",
]  # fmt: skip
Show = Callable[..., "Page"]


def make_report(experts: int = 4, layers: int = 6, tokens: int = 40, seed: int = 0) -> Any:
    """A report of synthetic routers: an own text for each expert, one of nobody, hostile words."""
    rng = np.random.default_rng(seed)
    names = ["c", "</script>français", "legal", "sql" * 9, *(f"e{i}" for i in range(4, experts))]
    names, k = names[:experts], 2
    texts, passages = [], []
    for own in [*range(experts), None]:
        logits = rng.normal(0, 1, (layers, tokens, experts))
        if own is not None:
            logits[1:, :, own] += rng.uniform(0, 4, (layers - 1, 1))
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        data = np.round(255 * shares).astype(np.uint8)  # (L, T, E)
        top = np.argsort(-data.astype(int), axis=-1, kind="stable")[:, :, :k]
        chosen = (top[..., None] == np.arange(experts)).any(2)
        weight = np.where(chosen, shares, 0)
        name = "nobody's" if own is None else names[own]
        of_own = [None, None] if own is None else [(top[..., :n] == own).any(-1) for n in (1, 2)]
        t1, t2 = (None if hit is None else float(hit.mean()) for hit in of_own)
        texts.append(
            {
                "name": name, "expert": own, "tokens": tokens, "t1": t1, "t2": t2,
                "first": (top[..., :1] == np.arange(experts)).mean(1).tolist(),
                "load": (chosen.mean(1) / k).tolist(),
                "weight": (weight / weight.sum(-1, keepdims=True)).mean(1).tolist(),
                "perplexity": {"moe": 8.1 + rng.random(), "base": 11.0, "experts": {names[0]: 7.9}},
            }
        )  # fmt: skip
        words = rng.choice(["int", " the", " de", "(", ";", " SELECT", "\n"], tokens - len(HOSTILE))
        passages.append(
            {
                "text": len(texts) - 1, "tokens": [*map(str, words), *HOSTILE],
                "weights": base64.b64encode(data.tobytes()).decode(),
            }
        )  # fmt: skip
    load = np.mean([text["load"] for text in texts], axis=(0, 1))
    return {
        "model": "out <b>", "experts": names, "experts_per_token": k, "layers": layers,
        "held_out": True, "verdicts": ["c earns its place: -31% <i>perplexity</i>"],
        "texts": texts, "passages": passages,
        "summary": {
            "t1": 0.93, "t2": 0.97, "load": load.tolist(), "entropy": 0.98, "idle": [1],
            "collisions": [{"experts": [0, 3], "share": 0.21, "texts": ["struct <timespec>"]}],
            "blind_layers": [0], "layer_t1": rng.random(layers).tolist(),
        },
        "by_experts_per_token": {"1": 8.2, "2": 8.1, "4": 8.3},
    }  # fmt: skip


def weights_of(report: Any, passage: int) -> np.ndarray[Any, Any]:
    """A passage's weights as bytes, (L, T, E)."""
    held = report["passages"][passage]
    shape = (report["layers"], len(held["tokens"]), len(report["experts"]))
    return np.frombuffer(base64.b64decode(held["weights"]), np.uint8).reshape(shape)


def firsts(report: Any, passage: int, layer: int | None) -> list[int]:
    """Each token's first expert in a layer, or the one that is first in most layers."""
    first = weights_of(report, passage).argmax(-1)
    if layer is not None:
        return list(map(int, first[layer]))
    return [int(np.bincount(column).argmax()) for column in first.T]


def percent(share: float) -> str:
    return f"{int(np.floor(100 * share + 0.5))}%"


class Scripts(HTMLParser):
    """The contents of a page's scripts, and its tags, as a browser would cut them."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"]:
            self.scripts[-1] += data


def test_the_report_is_in_the_page_as_it_is() -> None:
    report = make_report()
    parsed = Scripts(page.render(report))
    assert len(parsed.scripts) == 2 and "img" not in parsed.tags
    assert json.loads(parsed.scripts[0]) == report
    assert not set("<>&\u2028\u2029") & set(parsed.scripts[0])


def test_the_page_loads_nothing() -> None:
    report = {"texts": []}
    text = page.render(report)
    assert not re.search(r"https?:|@import|url\(|<link| src=|fetch\(|innerHTML|eval\(", text)
    assert "default-src 'none'" in text and "unsafe" not in text


def test_what_json_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        page.render({"share": float("nan")})


def test_colours_differ_to_colour_blind_eyes() -> None:
    source = Path(page.__file__).with_name("page.js").read_text(encoding="utf-8")
    found = re.search(r"PALETTE = \[(.*?)\];", source, re.DOTALL)
    assert found
    colours = [bytes.fromhex(c) for c in re.findall('"#(.{6})"', found[1])]
    linear = (np.array([list(c) for c in colours]) / 255) ** 2.2
    # Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
    eyes = {
        "all": np.eye(3),
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    # Ottosson's OKLab.
    cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    opponents = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    assert len(colours) == 8
    for eye, seen in eyes.items():
        lab = np.cbrt(np.clip(linear @ np.transpose(seen), 0, 1) @ np.transpose(cones))
        lab = lab @ np.transpose(opponents)
        for a, b in itertools.combinations(range(8), 2):
            assert np.linalg.norm(lab[a] - lab[b]) > 0.06, (eye, a, b)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on PATH; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        sandbox = os.geteuid() != 0  # Chromium's sandbox refuses root
        with playwright.chromium.launch(executable_path=path, chromium_sandbox=sandbox) as browser:
            yield browser


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Show]:
    """Opens a report's page from disk, tall enough to have all in view, with no network.

    Fails in the end if the page said anything, broke its policy or asked for another file.
    """
    file = tmp_path / "report.html"
    said: list[str] = []
    asked: set[str] = set()
    contexts = []

    def opened(report: Any, width: int = 1200, height: int = 9000, **options: Any) -> Page:
        file.write_text(page.render(report), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(20_000)
        context.set_offline(True)
        shown = context.new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: asked.add(request.url))
        shown.goto(file.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert asked == {file.as_uri()}


def cells(shown: Page, selector: str) -> list[str]:
    return [text.strip() for text in shown.locator(selector).all_inner_texts()]


def values(found: Locator, expression: str) -> Any:
    """A JavaScript expression of each `node` found."""
    return found.evaluate_all(f"nodes => nodes.map((node) => {expression})")


def check_shown(shown: Page, report: Any, layer: int | None) -> None:
    """Matrix, bars and tokens are the report's in this layer, or over all."""
    at = slice(None) if layer is None else slice(layer, layer + 1)
    first = np.array([np.mean(text["first"][at], axis=0) for text in report["texts"]])
    load = np.mean([np.mean(text["load"][at], axis=0) for text in report["texts"]], axis=0)
    expected = [percent(share) for share in first.flat]
    assert cells(shown, "#matrix tbody td") == expected
    assert cells(shown, "#load .share") == [percent(share) for share in load]
    widths = values(shown.locator("#load .bar"), "node.getBoundingClientRect().width")
    assert np.allclose(widths / np.max(widths), load / load.max(), atol=0.01)
    for index in range(len(report["passages"])):
        tokens = shown.locator("figure").nth(index).locator(".passage span")
        owners = firsts(report, index, layer)
        legend = values(shown.locator("#legend bdi"), COLOUR)
        assert values(tokens, COLOUR) == [legend[e] for e in owners]
        behind = dict(zip(owners, values(tokens, BACKGROUND), strict=True))
        assert values(tokens, BACKGROUND) == [behind[e] for e in owners]
        assert len(set(behind.values())) == len(behind)


COLOUR = "getComputedStyle(node).getPropertyValue('--c')"
BACKGROUND = "getComputedStyle(node).backgroundColor"


def ready(shown: Page, report: Any) -> None:
    """Wait until every passage came into view and was coloured."""
    from playwright.sync_api import expect

    count = sum(len(passage["tokens"]) for passage in report["passages"])
    expect(shown.locator(".passage span[data-e]")).to_have_count(count)


def test_one_slider_moves_everything(show: Show) -> None:
    report = make_report()
    shown = show(report)
    ready(shown, report)
    check_shown(shown, report, None)
    slider = shown.get_by_role("slider")
    slider.focus()
    for key, layer in [("ArrowRight", 0), ("ArrowRight", 1), ("End", 5), ("ArrowLeft", 4)]:
        shown.keyboard.press(key)
        assert slider.get_attribute("aria-valuetext") == f"layer {layer}"
        check_shown(shown, report, layer)
    shown.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "all layers"
    check_shown(shown, report, None)


def test_the_heat_map_is_the_report_and_chooses_a_layer(show: Show) -> None:
    report = make_report()
    shown = show(report)
    found = values(shown.locator(".heat td"), "+node.style.getPropertyValue('--v')")
    first = np.array([text["first"] for text in report["texts"]])  # (texts, L, E)
    assert np.allclose(found, first.transpose(0, 2, 1).ravel())
    shown.locator(".heat td").nth(3).click()
    assert shown.get_by_role("slider").get_attribute("aria-valuetext") == "layer 3"
    shown.locator(".heat td").nth(8).hover()
    told = shown.inner_text("#tip").splitlines()
    assert told[0].endswith(", layer 2")
    assert told[1] == f"tokens that find it first: {percent(first[0, 2, 1])}"


def test_a_token_tells_all_weights(show: Show) -> None:
    report = make_report()
    shown = show(report)
    ready(shown, report)
    tokens = shown.locator("figure").nth(1).locator(".passage span")
    shown.locator(".heat td").nth(4).click()
    weights = weights_of(report, 1)[4] / 255

    def told(token: int) -> None:
        order = np.argsort(-weights[token], kind="stable")
        assert cells(shown, "#tip .share") == [percent(weights[token, e]) for e in order]
        assert cells(shown, "#tip bdi") == [report["experts"][e] for e in order]
        assert shown.locator("#tip .chosen").count() == report["experts_per_token"]

    tokens.nth(2).hover()
    told(2)
    tokens.nth(5).focus()
    told(5)
    shown.keyboard.press("ArrowRight")
    told(6)
    shown.keyboard.press("End")
    told(39)
    shown.keyboard.press("Escape")
    assert shown.locator("#tip").is_hidden()
    shown.get_by_role("slider").press("Home")
    tokens.nth(3).hover()
    mean = weights_of(report, 1)[:, 3].mean(0) / 255
    assert cells(shown, "#tip .share") == [percent(share) for share in sorted(mean, reverse=True)]


def test_numbers_and_names_are_told(show: Show) -> None:
    report = make_report()
    shown = show(report)
    assert shown.inner_text("h1") == "out <b>"
    assert cells(shown, "#verdicts li") == report["verdicts"]
    numbers = shown.inner_text("#numbers")
    assert all(said in numbers for said in ["93%", "97%", "chance is 25%", "0.98", "tell experts"])
    collisions = shown.inner_text("#collisions")
    assert f"21% of c's tokens go to {report['experts'][3]} first\nstruct <timespec>" in collisions
    assert cells(shown, "#perplexities thead th") == ["MoE", "base", "c"]
    assert cells(shown, "#perplexities .best") == ["7.90"] * 5
    assert "+1.2%" in shown.inner_text("#costs") and "+2.5%" in shown.inner_text("#costs")


def test_what_is_null_is_not_shown(show: Show) -> None:
    report = make_report()
    for key in ["t1", "t2", "entropy", "idle", "collisions", "blind_layers", "layer_t1"]:
        report["summary"][key] = None
    for text in report["texts"]:
        text["perplexity"] = None
    report.update(by_experts_per_token=None, passages=[], verdicts=[])
    shown = show(report)
    shown.get_by_role("slider").press("End")
    assert not re.search("null|undefined|NaN", shown.inner_text("body"))
    assert shown.locator("#perplexity, #reading").evaluate_all("all => all.every((s) => s.hidden)")
    assert cells(shown, "#numbers dd") == []


def test_hostile_text_is_only_text(show: Show) -> None:
    report = make_report(experts=12, layers=3)
    shown = show(report)
    ready(shown, report)
    held = values(shown.locator("figure").nth(0).locator(".passage span"), "node.textContent")
    tokens = report["passages"][0]["tokens"]
    assert held == tokens
    assert shown.locator("img, body script:not([id]) ~ *").count() == 0
    assert shown.title() == "out <b>: routing"
    check_shown(shown, report, None)


# Text colour and what is behind it, both as a screen's 8-bit RGB: the canvas knows every notation.
BEHIND = """nodes => {
  const dot = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    dot.clearRect(0, 0, 1, 1);
    dot.fillStyle = colour;
    dot.fillRect(0, 0, 1, 1);
    return [...dot.getImageData(0, 0, 1, 1).data];
  };
  return nodes.map((node) => {
    const ink = rgb(getComputedStyle(node).color);
    for (let at = node; at; at = at.parentElement) {
      const behind = rgb(getComputedStyle(at).backgroundColor);
      if (behind[3]) return [ink, behind];
    }
  });
}"""


def luminance(rgb: list[int]) -> float:
    """Relative luminance of 8-bit sRGB (WCAG 2.2)."""
    parts = np.array(rgb[:3]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("experts", [4, 12])
def test_text_is_readable_in_both_themes(show: Show, scheme: Any, experts: int) -> None:
    report = make_report(experts, layers=3)
    shown = show(report, color_scheme=scheme)
    ready(shown, report)
    ground = shown.locator("body").evaluate_all(BEHIND)[0][1]
    assert (luminance(ground) > 0.5) == (scheme == "light")
    text = "h1, h2, h3, p, li, dt, dd, th, bdi, #matrix td, #perplexities td, .passage span, .muted"
    for step in range(3):
        for ink, behind in shown.locator(text).evaluate_all(BEHIND):
            light, dark = sorted([luminance(ink), luminance(behind)], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (step, ink, behind)
        shown.get_by_role("slider").press("ArrowRight")


def test_the_theme_follows_the_reader(show: Show) -> None:
    report = make_report()
    shown = show(report, color_scheme="light")
    grounds = []
    for scheme in ["light", "dark"]:
        shown.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        grounds.append(luminance(shown.locator("body").evaluate_all(BEHIND)[0][1]))
    assert grounds[0] > 0.8 > 0.1 > grounds[1]


@pytest.mark.parametrize("experts", [4, 12])
def test_a_phone_scrolls_one_way(show: Show, experts: int) -> None:
    report = make_report(experts, layers=32)
    shown = show(report, width=375, height=700, has_touch=True)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 375
    token = shown.locator(".passage").nth(1)
    token.scroll_into_view_if_needed()
    token.locator("span[data-e]").nth(4).tap()
    box = shown.locator("#tip").bounding_box()
    assert box and box["x"] >= 0 and box["x"] + box["width"] <= 375
    assert shown.evaluate("document.documentElement.scrollWidth") <= 375


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def pixels(file: Path) -> np.ndarray[Any, Any]:
    from matplotlib.image import imread

    return np.asarray(imread(file))


@pytest.mark.usefixtures("drawn")
def test_the_heat_map_is_a_picture_of_the_report(tmp_path: Path) -> None:
    report = make_report()
    report["experts"][0] = "$x^2 \\frac{ \n 日本"  # neither mathematics nor more than a line
    other = copy.deepcopy(report)
    other["texts"][2]["first"] = [row[::-1] for row in other["texts"][2]["first"]]
    for name, what in [("one", report), ("again", report), ("other", other)]:
        heat_map.save(what, tmp_path / name)
    one, again, changed = ((tmp_path / name).read_bytes() for name in ["one", "again", "other"])
    width, height = size(one)
    assert 1000 < width < 2400 and 500 < height < 2400
    assert one == again
    differ = (pixels(tmp_path / "one") != pixels(tmp_path / "other")).any(-1)
    assert size(changed) == (width, height) and 0.001 < differ.mean() < 0.25  # one panel of five


@pytest.mark.usefixtures("drawn")
def test_many_experts_and_one_text_fit(tmp_path: Path) -> None:
    report = make_report(experts=12, layers=80)
    report["texts"] = report["texts"][:1]
    heat_map.save(report, tmp_path / "map.png")
    width, height = size((tmp_path / "map.png").read_bytes())
    assert 600 < width < 2400 and 300 < height < 2400


@pytest.mark.usefixtures("drawn")
def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"path: .*pip install 'moemerge\[report\]'"):
        heat_map.save(make_report(), tmp_path / "map.png")
