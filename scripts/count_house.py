"""How the house stands, in numbers: rooms, arrows, lengths, and who names what others add.

    python scripts/count_house.py [ROOT]

Everything is read from the source, by AST; nothing of it is imported. A room is a folder of
`moemerge/`, or a module that stands beside the folders. A module names a family, class, mode,
format or command if one of its strings, docstrings aside, is that name.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ADDED = {
    "family": (
        "llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "olmo2", "seed_oss", "smollm3",
        "glm4", "helium", "arcee",
    ),
    "class": (
        "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared", "granitemoehybrid",
        "glm4_moe", "dots1", "flex_olmo",
    ),
    "mode": (
        "activation", "cheap_embed", "hidden", "hidden_avg", "hidden_last", "ridge", "self",
        "uniform_random", "zeros",
    ),
    "format": (".safetensors", ".bin"),
    "command": ("regate", "top-k", "merge-adapter", "architectures", "routing", "verify", "repair"),
}  # fmt: skip


def main() -> None:
    """Print the numbers as a table."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    package = root / "moemerge"
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))
    }
    folders = Counter(path.parent.relative_to(root).as_posix() for path in trees)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in trees}
    longest = max(lengths, key=lambda path: lengths[path])
    arrows = {pair for path, tree in trees.items() for pair in _arrows(path, tree, package)}
    rows = [
        ("modules", str(len(trees))),
        ("modules per folder", ", ".join(f"{name} {n}" for name, n in sorted(folders.items()))),
        ("rooms", str(len({room for pair in arrows for room in pair}))),
        ("arrows between rooms", str(len(arrows))),
        ("floors", str(_floors(arrows))),
        ("longest file", f"{longest.relative_to(root)} {lengths[longest]}"),
        ("files over 300 lines", str(sum(n > 300 for n in lengths.values()))),
        ("dict[str, Any]", str(sum(_anys(tree) for tree in trees.values()))),
        ("words in README.md", str(len((root / "README.md").read_text("utf-8").split()))),
    ]
    for kind, names in ADDED.items():
        naming = {name: _naming(name, trees) for name in names}
        found = {name: paths for name, paths in naming.items() if paths}
        most = ", ".join(f"{name} {len(paths)}" for name, paths in found.items())
        rows.append((f"modules that name a {kind}", most))
    for what, number in rows:
        print(f"{what:28} {number}")


def _room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def _arrows(path: Path, tree: ast.Module, package: Path) -> Iterator[tuple[str, str]]:
    room = _room(path.relative_to(package).parts)
    if room in ("__init__", "__main__"):
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "moemerge" and len(parts) > 1 and _room(parts[1:]) != room:
                yield room, _room(parts[1:])


def _floors(arrows: Iterable[tuple[str, str]]) -> int:
    """The rooms on the longest way down; 0 if there is a circle."""
    below: dict[str, set[str]] = {}
    for room, other in arrows:
        below.setdefault(room, set()).add(other)
        below.setdefault(other, set())
    floors = 0
    while below:
        ground = {room for room, others in below.items() if not others & below.keys()}
        if not ground:
            return 0
        below = {room: others for room, others in below.items() if room not in ground}
        floors += 1
    return floors


def _anys(tree: ast.Module) -> int:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    return sum(ast.unparse(node) == "dict[str, Any]" for node in nodes)


def _naming(name: str, trees: dict[Path, ast.Module]) -> list[Path]:
    return [path for path, tree in trees.items() if name in set(_strings(tree))]


def _strings(tree: ast.Module) -> Iterator[str]:
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


if __name__ == "__main__":
    main()
