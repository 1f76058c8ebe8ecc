"""Dependencies run one way, and there are no import cycles."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator

from graphlib import TopologicalSorter

ROOT = Path(__file__).resolve().parent.parent
#: Layers of the source tree, lowest first: each imports only from itself and those before it.
LAYERS = ("asymtrack_edge", "runtime", "export", "benchmarks")
#: These modules give access to the tracker and the commands, which they import on demand.
ENTRY_POINTS = {"asymtrack_edge", "asymtrack_edge.__main__"}


def module(path: Path) -> str:
    """The name under which a file of the source tree is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == LAYERS[0] else (LAYERS[0], *parts))
    return name[: -len(".__init__")] if name.endswith(".__init__") else name


TREES = {
    module(path): ast.parse(path.read_text(encoding="utf-8"))
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}


def imports(node: ast.AST, at_once: bool) -> Iterator[str]:
    """Modules that a module imports, except for type checking only; with ``at_once``, not those inside functions."""
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
        level = max((i for i, layer in enumerate(LAYERS) if f".{layer}." in f"{name}."), default=0)
        found = set(imports(tree, at_once=False))
        above = [f"asymtrack_edge.{other}." for other in LAYERS[level + 1 :]]
        assert name in ENTRY_POINTS or not [i for i in found if f"{i}.".startswith(tuple(above or "-"))], name
        # The runtime works on devices without torch and onnx.
        assert LAYERS[level] != "runtime" or not {"torch", "onnx"} & {i.split(".")[0] for i in found}, name


def test_there_are_no_import_cycles() -> None:
    graph = {name: set(imports(tree, at_once=True)) & set(TREES) - {name} for name, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
