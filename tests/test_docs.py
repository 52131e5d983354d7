"""The docs: links lead somewhere, commands and names exist, and the site is whole by itself."""

from __future__ import annotations

import ast
import functools
import http.server
import importlib
import os
import re
import shlex
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import moemerge
from moemerge.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTES = [*ROOT.glob("examples/*/*.md"), *ROOT.glob(".github/**/*.md"), ROOT / "CHANGELOG.md"]
BY_NAME = {"argvalues": PAGES, "ids": lambda path: path.name}


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language, as they are in the source."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def prose(path: Path) -> str:
    """A page without its code blocks."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, *NOTES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not link.startswith(("https://", "mailto:")):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", **BY_NAME)
def test_commands_and_their_options_exist(path: Path) -> None:
    program: Any = get_command(app)
    told = prose(path).replace("\n", " ")
    lines = re.findall(r"`([^`]+)`", told) + [
        line for code in blocks(path, "sh") for line in code.replace("\\\n", " ").splitlines()
    ]
    for line in lines:
        for said in re.findall(r"(?:^|[\s'])moemerge ([^'&;|]+)", line):
            words = shlex.split(said, comments=True)
            name = words[0] if words and words[0] in program.commands else ""
            begins = bool(words) and bool(re.match(r"-|CONFIG$|.+\.yaml$", words[0]))
            assert name or begins, line
            only_options = words and words[0].startswith("-")
            command = program if only_options else program.commands[name or "merge"]
            if commands := getattr(command, "commands", None) if len(words) > 1 else None:
                assert words[1] in commands, line
                command = commands[words[1]]
            known = {"--help", "-h"}
            for parameter in command.params:
                known |= {*parameter.opts, *parameter.secondary_opts}
            assert {w.partition("=")[0] for w in words if w.startswith("-")} <= known, line


@pytest.mark.parametrize("path", **BY_NAME)
def test_python_compiles_and_imports_what_there_is(path: Path) -> None:
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moemerge"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), code


@pytest.mark.parametrize("path", **BY_NAME)
def test_configs_are_configs(path: Path) -> None:
    for code in blocks(path, "yaml"):
        data = yaml.safe_load(code)
        known = {f.name for f in moemerge.MergeConfig.__dataclass_fields__.values()}
        assert data.keys() <= known, code
        if "base_model" in data:
            moemerge.parse_config(code)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


@pytest.fixture(scope="module")
def tools() -> Path:
    """Where the programs are that make the site and check the workflows."""
    made = subprocess.run(
        [ROOT / "scripts/environment", "docs"], capture_output=True, text=True, check=True
    )
    return Path(made.stdout.strip()) / "bin"


def test_the_workflows_are_right(tools: Path) -> None:
    files = sorted(ROOT.glob(".github/workflows/*.yml"))
    linter = [tools / "actionlint", "-shellcheck=", "-pyflakes="]  # whatever is installed
    done = subprocess.run([*linter, *files], capture_output=True, text=True)
    assert files and done.returncode == 0, done.stdout


def test_ruff_before_a_commit_is_the_one_of_the_tests() -> None:
    (pinned,) = re.findall(r"^ruff==(.+)$", (ROOT / "scripts/constraints.txt").read_text(), re.M)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [f"v{pinned}"] == [
        one["rev"] for one in hooks if one["repo"].endswith("ruff-pre-commit")
    ]


@pytest.fixture(scope="module")
def site(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, made without a warning: mkdocs.yml is strict about links and anchors, too."""
    made = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [tools / "mkdocs", "build", "--quiet", "--site-dir", made],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PATH": f"{tools}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
    return made


class Loaded(HTMLParser):
    """What a page loads by itself; links that a person may follow are not among it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.urls: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what is loaded, and every anchor."""
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        self.urls += [given["src"]] if "src" in given else []
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.urls.append(given["href"])


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        urls = Loaded(page).urls
        assert urls and not [url for url in urls if re.match("[a-z]+:|//", url)], page
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?(?:https?:|//)|@import", styles)


def test_a_browser_asks_no_other_host(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on PATH; on Debian: apt-get install chromium")
    with served(site) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, chromium_sandbox=os.geteuid() != 0
        )
        page, asked, said = browser.new_page(), list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        for name in ("", "api/", "routing/"):
            page.goto(f"{url}{name}", wait_until="networkidle")
        browser.close()
    assert f"{url}search/search_index.json" in asked
    assert all(one.startswith((url, "data:", "blob:")) for one in asked)
    assert not said


def test_the_site_has_every_public_name(site: Path) -> None:
    names = {f"moemerge.public.{name}" for name in moemerge.__all__}
    assert names - {"moemerge.public.__version__"} <= Loaded(site / "api/index.html").ids


class served:
    """A directory served on this machine while the block runs."""

    def __init__(self, directory: Path) -> None:
        handler = functools.partial(Quiet, directory=str(directory))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing of it."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""
