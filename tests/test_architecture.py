"""Dependencies run one way, and no modules need each other to be imported."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Set

ROOT = Path(__file__).resolve().parent.parent
#: Rooms, lowest first: each imports those before it only.
ROOMS = ("asymtrack_edge", "runtime", "export", "benchmarks")
#: ``asymtrack_edge`` hands out the tracker and the commands, which it imports when they are asked for.
FRONT_DOOR = {"asymtrack_edge", "asymtrack_edge.commands"}


def _name(path: Path) -> str:
    parts = ("asymtrack_edge", *path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[1] == "asymtrack_edge" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def _imports(tree: ast.AST, at_import_time: bool) -> Iterator[str]:
    """Names of modules that a module imports; those inside functions only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module or "" for name in inner)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _imports(ast.Module(node.orelse, []), at_import_time)
        elif not (at_import_time and isinstance(node, (ast.FunctionDef, ast.Lambda))):
            yield from _imports(node, at_import_time)


def _room(name: str) -> int:
    part = name.split(".")[1] if "." in name else ""
    return ROOMS.index(part) if part in ROOMS else 0


def test_imports_run_one_way() -> None:
    climbing = {
        (name, other)
        for name, tree in TREES.items()
        for other in _imports(tree, False)
        if other in FILES and _room(other) > _room(name) and name not in FRONT_DOOR
    }
    assert not climbing


def test_no_modules_import_each_other() -> None:
    graph: Dict[str, Set[str]] = {name: set(_imports(tree, True)) & set(FILES) - {name} for name, tree in TREES.items()}
    done: Set[str] = set()

    def visit(name: str, path: List[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_device_needs_neither_torch_nor_onnx() -> None:
    for name, tree in TREES.items():
        if _room(name) == ROOMS.index("runtime"):
            assert not {"torch", "onnx"} & {imported.split(".")[0] for imported in _imports(tree, False)}, name
