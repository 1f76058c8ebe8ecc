"""Dependencies run one way, and no modules need each other to be imported."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

ROOT = Path(__file__).resolve().parent.parent
#: Rooms, lowest first: each imports those before it only.
ROOMS = ("asymtrack_edge", "runtime", "export", "benchmarks")
#: ``asymtrack_edge`` hands out the tracker and the commands, which it imports when they are asked for.
FRONT_DOOR = {"asymtrack_edge", "asymtrack_edge.commands"}
#: Imports that still climb, as (module, room). Keep it empty.
CLIMB: Set[Tuple[str, str]] = set()


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "asymtrack_edge":
        parts = ("asymtrack_edge", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


def _imports(tree: ast.AST, at_import_time: bool) -> Iterator[str]:
    """Names of this package's modules that a module imports; those inside functions only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in inner)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _imports(ast.Module(node.orelse, []), at_import_time)
        elif not (at_import_time and isinstance(node, (ast.FunctionDef, ast.Lambda))):
            yield from _imports(node, at_import_time)


def _graph(at_import_time: bool) -> Dict[str, Set[str]]:
    return {
        name: set(_imports(ast.parse(path.read_text(encoding="utf-8")), at_import_time)) - {name}
        for name, path in FILES.items()
    }


def _room(name: str) -> str:
    part = name.split(".")[1] if "." in name else ""
    return part if part in ROOMS else "asymtrack_edge"


def test_imports_run_one_way() -> None:
    climbing = {
        (name, _room(other))
        for name, others in _graph(False).items()
        for other in others
        if ROOMS.index(_room(other)) > ROOMS.index(_room(name)) and name not in FRONT_DOOR
    }
    assert climbing == CLIMB


def test_training_needs_the_shared_room_only() -> None:
    """Labels take any object with ``init`` and ``update``; the command makes the tracker."""
    for name, others in _graph(True).items():
        if name.startswith("asymtrack_edge.training"):
            assert not [other for other in others if _room(other) != "asymtrack_edge"], name


def test_no_modules_import_each_other() -> None:
    graph = _graph(True)
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
    for name, path in FILES.items():
        if _room(name) == "runtime":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {"torch", "onnx"} & {imported.split(".")[0] for imported in names}, name
