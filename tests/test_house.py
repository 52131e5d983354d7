"""The house: imports run one way, the docs are what the code says, the public names stay."""

from __future__ import annotations

import ast
from pathlib import Path

import moemerge

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moemerge"
FLOORS = [
    ["version", "errors"],
    ["reporting", "yaml_reader", "options", "disk", "slots", "tokens", "neurons"],
    ["harness"],
    ["config", "tokenizer_files"],
    ["checkpoint"],
    ["recipe", "calibration", "source_cards"],
    ["vocabulary", "arithmetic"],
    ["plan", "body", "dense", "vocabulary_choice", "same_tokens"],
    ["prompts", "compare", "state", "shard_file"],
    ["router_inputs", "own_text", "output", "reading"],
    ["split", "change", "estimate"],
    ["fitting", "moe"],
    ["architectures", "gates", "routing_stats", "selection", "experts_apart"],
    ["gate_setup", "hosts", "hub_repository", "loading", "runnable"],
    ["members"],
    ["layout"],
    ["prepare", "shareable"],
    ["card_text"],
    ["write", "verify", "card", "costs", "routers", "page", "heat_map"],
    ["evaluation_text", "on_ray", "leaving", "sources"],
    ["card_files", "publish"],
    ["pipeline", "routing"],
    ["new_routers", "rebuild"],
    ["take_apart", "training", "evaluation"],
    ["cli", "public"],
]
"""Rooms from the ground up; each imports only from floors below its own."""


CLI_ONLY = {
    "print", "exit", "quit", "breakpoint", "SystemExit", "sys.exit", "os._exit", "os.abort",
    "sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer", "sys.stderr.buffer",
}  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "moemerge" and len(parts) > 1:
                found.add(parts[1])
    return found


def test_imports_run_one_way() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    files = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem[0] != "_"]
    assert {room_of(path) for path in files} == floor.keys()
    for path in files:
        room = room_of(path)
        for other in imports(path) - {room}:
            assert floor[other] < floor[room], f"{path.name} of {room} imports {other}"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) in ("cli", "reporting"):  # whose Console prints where a caller asks for it
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            assert name not in CLI_ONLY, (path, name)


def test_the_docs_are_what_the_code_says() -> None:
    from write_docs import documents

    for path, text in documents().items():
        assert path.read_text(encoding="utf-8") == text, "run python scripts/write_docs.py"


def test_the_public_names() -> None:
    assert set(moemerge.__all__) == {
        "Adapted", "Built", "Console", "Expert", "InputError", "Lora", "MergeConfig", "Merged",
        "MoemergeError", "Options", "Plan", "PlannedTensor", "Prepared", "Problem", "ReadError",
        "Reporter", "RunError", "Shard", "Silent", "Source", "Trained", "Transfer", "Tuned",
        "Tuning", "Verified", "VerifyError", "Wanted", "WriteError", "__version__", "add",
        "drop", "evaluate", "extract", "finetune",
        "load_config", "make_plan", "merge", "merge_adapter", "parse_config", "push", "regate",
        "repair", "routing_page", "routing_report", "top_k", "tune", "undo_tune",
        "verify_checkpoint",
    }  # fmt: skip
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
