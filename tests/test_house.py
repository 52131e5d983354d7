"""The house: imports run one way, the docs are what the code says, the public names stay."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import moemerge

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moemerge"
ROOMS = [
    "version", "errors", "reporting", "options", "files", "report", "hub", "families",
    "architectures", "tokenizer", "config", "checkpoint", "plan", "text", "dense", "split", "gates",
    "fit", "output", "prepare", "card", "publish", "merging", "mixture", "gguf", "evaluation",
    "training", "chat",
    "public", "cli",
]  # fmt: skip
"""In the order of the flow: each imports only from rooms that stand before it."""
MOST = 12
"""Modules in a folder, but for those that are there to be added to."""
ADDED_TO = {
    "architectures/types", "gates/modes", "checkpoint/formats", "cli/commands", "families/types",
}  # fmt: skip


CLI_ONLY = {
    "print", "exit", "quit", "breakpoint", "SystemExit", "sys.exit", "os._exit", "os.abort",
    "sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer", "sys.stderr.buffer",
}  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Everything of this package that a file imports, anywhere in it: (module, name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("moemerge.") for alias in node.names), path
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moemerge":
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_imports_run_one_way() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem[0] != "_"]
    assert {room_of(path) for path in files} == set(ROOMS)
    for path in files:
        room = room_of(path)
        for module, name in imports(path):
            other = f"{module}.{name}".split(".")[1]
            before = ROOMS.index(other) <= ROOMS.index(room)
            assert before, f"{path.relative_to(ROOT)} imports {other}"


def test_from_outside_only_what_a_room_exports_is_imported() -> None:
    for path in PACKAGE.rglob("*.py"):
        for module, name in imports(path):
            parts = module.split(".")
            if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() and parts[1] != room_of(path):
                assert len(parts) == 2, f"{path.relative_to(ROOT)} imports {module}"
                assert name in import_module(module).__all__, (path, module, name)
            if parts == ["moemerge"] and (PACKAGE / name).is_dir():
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name:
                        exported = import_module(f"moemerge.{name}").__all__
                        assert node.attr in exported, (
                            f"{path.relative_to(ROOT)}: {name}.{node.attr}"
                        )


def test_no_circle_within_a_room() -> None:
    """Nor between modules of one room: each can be read after those that it imports."""
    below: dict[str, set[str]] = {}
    modules = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    for name, path in modules.items():
        used = {f"{m}.{n}" if f"{m}.{n}" in modules else m for m, n in imports(path)}
        rooms = {f"moemerge.{room}" for room in ROOMS} | {"moemerge"}
        below[name] = (used & modules.keys()) - rooms - {name}
    while below:
        ground = {name for name, others in below.items() if not others & below.keys()}
        assert ground, sorted(below)
        below = {name: others for name, others in below.items() if name not in ground}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_folder_is_crowded() -> None:
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        crowded = len(modules) > MOST and folder.relative_to(PACKAGE).as_posix() not in ADDED_TO
        assert not crowded, folder


def test_no_module_is_named_as_what_its_room_exports() -> None:
    for room in ROOMS:
        if (PACKAGE / room).is_dir():
            package = import_module(f"moemerge.{room}")
            for name in package.__all__:
                value = getattr(package, name, None)
                is_module = isinstance(value, ModuleType)
                assert is_module or not (PACKAGE / room / f"{name}.py").exists(), (room, name)


def test_only_the_command_line_prints_or_exits() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) in ("cli", "reporting"):  # whose Console prints where a caller asks for it
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            assert name not in CLI_ONLY, (path, name)


CHANGING = {
    "add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove",
    "setdefault", "update",
}  # fmt: skip


def changes(tree: ast.Module) -> Iterator[str]:
    """The names that a file's code changes in place: by a method, an item, or `|=` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in CHANGING:
                yield ast.unparse(node.func.value)
        elif isinstance(node, ast.AugAssign):
            yield ast.unparse(node.target)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield ast.unparse(node.value)
        elif isinstance(node, ast.Global):
            yield from node.names


def holds(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """What a module or a class assigns when it is imported: name and value."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value:
            yield ast.unparse(node.target), node.value


def test_nothing_is_kept_for_the_whole_process() -> None:
    """What one call leaves behind, the next does not see.

    What stands in a module or a class is never changed, no cache grows without a bound, and what
    a thread keeps is its own.
    """
    mutable = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kept = {name for name, _ in holds(tree.body)}
        kept |= {name for _, name in imports(path) if name.isupper()}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = [name for name, value in holds(node.body) if isinstance(value, mutable)]
                kept |= {f"{of}.{name}" for name in names for of in ("self", "cls", node.name)}
            elif isinstance(node, ast.FunctionDef):
                caches = [one for one in map(ast.unparse, node.decorator_list) if "cache" in one]
                bounded = r"cached_property|(functools\.)?lru_cache\(maxsize=\d\)"
                assert all(re.fullmatch(bounded, one) for one in caches), (path, node.name)
        assert not kept & {*changes(tree)}, path


def test_the_docs_are_what_the_code_says() -> None:
    from write_docs import documents

    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, "run python scripts/write_docs.py"


def test_the_public_names() -> None:
    assert set(moemerge.__all__) == {
        "Adapted", "Built", "Console", "EditResult", "EvalSpec", "Expert", "InputError", "Lora",
        "MergeConfig", "MergeResult", "Merged", "MoemergeError", "Options", "Plan",
        "PlannedTensor", "Prepared", "Problem", "ReadError",
        "Collision", "Evaluation", "EvaluationRow", "FitSummary", "FittedExpert",
        "PassageRouting", "RoutingReport", "RoutingSummary", "TextRouting",
        "Reporter", "RunError", "Shard", "Silent", "Source", "Trained", "Transfer", "Tuned",
        "Tuning", "Verified", "VerifyError", "Wanted", "WriteError", "__version__", "add",
        "Picture", "check_family", "Exported", "Head", "export",
        "drop", "evaluate", "extract", "finetune",
        "load_config", "make_plan", "merge", "merge_adapter", "parse_config", "push", "regate",
        "repair", "routing_page", "routing_report", "top_k", "tune", "undo_tune",
        "verify_checkpoint",
    }  # fmt: skip
    old = {"Built": "EditResult", "Merged": "MergeResult", "Wanted": "EvalSpec"}
    for name, now in old.items():
        assert getattr(moemerge, name) is getattr(moemerge, now)
    assert all(hasattr(moemerge, name) for name in moemerge.__all__)


def test_everything_public_has_a_docstring() -> None:
    kinds = ast.ClassDef | ast.FunctionDef
    for path in PACKAGE.rglob("*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        for holder in [module, *(c for c in classes if c.name[0] != "_")]:
            for node in holder.body:
                if isinstance(node, kinds) and node.name[0] != "_":
                    assert ast.get_docstring(node), (path, node.name)
