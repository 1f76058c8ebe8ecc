"""Dependencies run one way, and no modules need each other to be imported."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator

from graphlib import TopologicalSorter

ROOT = Path(__file__).resolve().parent.parent
#: Rooms, lowest first: each imports those before it only.
ROOMS = ("asymtrack_edge", "runtime", "export", "benchmarks")
#: ``asymtrack_edge`` hands out the tracker and the commands, which it imports when they are asked for.
FRONT_DOOR = {"asymtrack_edge", "asymtrack_edge.__main__"}


def module(path: Path) -> str:
    """The name under which a file of the source tree is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == ROOMS[0] else (ROOMS[0], *parts))
    return name[: -len(".__init__")] if name.endswith(".__init__") else name


TREES = {
    module(path): ast.parse(path.read_text(encoding="utf-8"))
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imports(node: ast.AST, at_once: bool) -> Iterator[str]:
    """Names of modules that a module imports, for more than types; those in functions too unless ``at_once``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            names = (f"{child.module}.{alias.name}" for alias in child.names)
            yield from (name if name in TREES else str(child.module) for name in names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        elif not (at_once and isinstance(child, ast.FunctionDef)):
            yield from imports(child, at_once)


def test_imports_run_one_way() -> None:
    for name, tree in TREES.items():
        room = max((level for level, room in enumerate(ROOMS) if f".{room}." in f"{name}."), default=0)
        found = set(imports(tree, at_once=False))
        above = [f"asymtrack_edge.{other}." for other in ROOMS[room + 1 :]]
        assert name in FRONT_DOOR or not [i for i in found if f"{i}.".startswith(tuple(above or "-"))], name
        # What runs on a device needs neither.
        assert ROOMS[room] != "runtime" or not {"torch", "onnx"} & {i.split(".")[0] for i in found}, name


def test_no_modules_need_each_other() -> None:
    graph = {name: set(imports(tree, at_once=True)) & set(TREES) - {name} for name, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # its CycleError names them
