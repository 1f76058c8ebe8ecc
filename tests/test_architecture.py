"""Dependencies run one way."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parent.parent
#: Rooms, lowest first: each imports those before it only.
ROOMS = ("asymtrack_edge", "runtime", "export", "benchmarks")
#: ``asymtrack_edge`` hands out the tracker and the commands, which it imports when they are asked for.
FRONT_DOOR = {"asymtrack_edge/__init__.py", "asymtrack_edge/commands.py"}


def imports(node: ast.AST) -> Iterator[str]:
    """Names of modules that a module imports, at any time but for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from imports(child)


def test_imports_run_one_way() -> None:
    for level, room in enumerate(ROOMS):
        for path in sorted((ROOT / room).rglob("*.py")):
            found = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
            name = str(path.relative_to(ROOT))
            above = () if name in FRONT_DOOR else ROOMS[level + 1 :]
            assert not [i for i in found for other in above if f"{i}.".startswith(f"asymtrack_edge.{other}.")], name
            # What runs on a device needs neither.
            assert room != "runtime" or not {"torch", "onnx"} & {i.split(".")[0] for i in found}, name
