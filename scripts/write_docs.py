"""Write what the code says of itself into the docs: README's tree and gate modes, the commands.

python scripts/write_docs.py

A test fails while the docs on disk are not what this would write.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    "", "merge", "split", "plan", "architectures", "verify", "push", "routing", "eval", "regate",
    "tune", "merge-adapter", "repair", "extract", "add", "drop", "top-k",
]  # fmt: skip
BESIDE = {
    "examples/configs/": "every file is a test",
    "examples/experts/": "four small LoRA experts, and how they were trained",
    "examples/heldout/": "text that no expert was trained on",
    "examples/tasks/": "a multiple-choice task of that text, for lm-eval",
    "scripts/": "quickstart, test, demo experts, benchmarks",
    "tests/": "one file per law or room, and the real readers",
    "docs/": "the commands in full, how to contribute",
}


def documents() -> dict[Path, str]:
    """Each generated file and what it should hold."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = _replace(text, "tree", f"```\n{_tree()}\n```")
    text = _replace(text, "gates", _gates())
    hosts = ROOT / "docs/architectures.md"
    return {
        readme: text,
        hosts: _replace(
            _replace(hosts.read_text(encoding="utf-8"), "architectures", _architectures()),
            "readers",
            _readers(),
        ),
        ROOT / "docs/commands.md": _commands(),
    }


def _replace(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)


def first_line(path: Path) -> str:
    """A module's docstring's first line, without the full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ").removesuffix(".")


def _tree() -> str:
    rows = [*_rooms(ROOT / "moemerge", ""), *BESIDE.items()]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{line}".rstrip() for name, line in rows)


def _rooms(folder: Path, indent: str) -> Iterator[tuple[str, str]]:
    """A package, its modules, and the packages in it."""
    yield f"{indent}{folder.name}/", first_line(folder / "__init__.py") if indent else ""
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield f"{indent}  {path.name}", first_line(path)
    for inner in sorted(folder.glob("*/__init__.py")):
        yield from _rooms(inner.parent, f"{indent}  ")


def _gates() -> str:
    rows = ["| gate_mode | routers are | needs |", "|---|---|---|"]
    words = {
        "split text": "a split's text", "prompts": "prompts",
        "any prompts": "prompts or nothing (seeded)",
        "experts": "the experts' own models run", "model": "a pass of the base model",
    }  # fmt: skip
    sys.path.insert(0, str(ROOT))
    from moemerge.gates import modes as gates

    for name in gates.names():
        line = first_line(ROOT / f"moemerge/gates/modes/{name}.py").partition(": ")[2]
        uses = gates.find(name).USES
        needs = ", ".join(words[use] for use in words if use in uses) or "nothing (seeded)"
        rows.append(f"| `{name}` | {line} | {needs} |")
    return "\n".join(rows)


def _architectures() -> str:
    sys.path.insert(0, str(ROOT))
    from moemerge.prepare.choose import listing

    rows = listing()
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _readers() -> str:
    """What each reader makes of each host; tests/test_readers_table.py holds the readers to it."""
    table = json.loads((ROOT / "tests/readers/table.json").read_text(encoding="utf-8"))
    columns = [
        f"{reader.partition(' ')[0]} {table['versions'][reader]}" for reader in table["versions"]
    ]
    lines, messages = [["host", "body", *columns], ["---"] * (len(columns) + 2)], list[str]()
    for host, kinds in table["hosts"].items():
        for kind, cells in kinds.items():
            if isinstance(cells, str):
                cells = dict.fromkeys(columns, f"moemerge: {cells}")
            row = []
            for cell in cells.values():
                if cell not in ("right", "wrong"):
                    messages += [cell] * (cell not in messages)
                    cell = f"refused ({messages.index(cell) + 1})"
                row.append("wrong, said" if cell == "wrong" else cell)
            lines.append([host, kind, *row])
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*rows, "", *(f"{n}. {one}" for n, one in enumerate(messages, start=1))])


def _commands() -> str:
    parts = ["# The commands", "", "Generated by `scripts/write_docs.py`.", ""]
    for command in COMMANDS:
        help_text = subprocess.run(
            [sys.executable, "-m", "moemerge", *command.split(), "--help"],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100"},
        ).stdout
        parts += [f"## moemerge {command}".rstrip(), "", "```", help_text.strip(), "```", ""]
    return "\n".join(parts)


def main() -> None:
    """Write every document."""
    for path, text in documents().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
