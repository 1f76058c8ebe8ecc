"""Every name of TensorRT's Python interface that the code uses exists in every version it claims.

``tests/data/tensorrt`` holds the interfaces of four versions, as their bindings list them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, Dict, Iterator, Set, Tuple

import pytest

from asymtrack_edge.runtime.backends.tensorrt import backend as tensorrt
from asymtrack_edge.runtime.backends.tensorrt import build as builder

SURFACES = sorted((Path(__file__).parents[1] / "data" / "tensorrt").glob("python-api-*.json"))

#: Variables by the class of TensorRT that they hold, per module.
HOLDS: Dict[Any, Dict[str, str]] = {
    builder: {
        "builder": "Builder",
        "config": "IBuilderConfig",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "layer": "ILayer",
        "profile": "IOptimizationProfile",
    },
    tensorrt: {"engine": "ICudaEngine", "context": "IExecutionContext", "_runtime": "Runtime"},
}

#: Used only where they exist, or only with the flavour or version named.
ONLY_8 = {f"BuilderFlag.{name}" for name in ("FP16", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")}
ONLY_8 |= {"ILayer.precision", "ILayer.set_output_type", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"}
ONLY_RTX = {
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "ICudaEngine.create_runtime_config",
}


def names_used() -> Iterator[str]:
    """``Class.attribute`` for attributes, ``Name`` for names of the module itself."""
    for module, holds in HOLDS.items():
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value
            last = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if last in ("trt", "module") and not (isinstance(owner, ast.Attribute) and last == "trt"):
                yield node.attr
            elif last in holds:
                yield f"{holds[last]}.{node.attr}"
            elif last in ("BuilderFlag", "MemoryPoolType", "LayerType", "TensorIOMode"):
                yield f"{last}.{node.attr}"


def surface(path: Path) -> Tuple[str, Set[str]]:
    content = json.loads(path.read_text())
    names = set(content["top"]) | {"float32", "__version__"}
    for owner, attributes in content.items():
        if isinstance(attributes, list) and owner != "top":
            names |= {f"{owner}.{attribute}" for attribute in attributes}
    return content["version"], names


@pytest.mark.parametrize("path", SURFACES, ids=lambda path: path.stem)
def test_every_name_exists(path: Path) -> None:
    version, there = surface(path)
    used = set(names_used())
    assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3", "BuilderFlag.FP16"} <= used
    assert used - ONLY_RTX - (set() if version.startswith("8") else ONLY_8) - there == set()


@pytest.mark.tensorrt
def test_every_name_exists_in_rtx() -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    for name in set(names_used()) - ONLY_8:
        owner: Any = trt
        for part in name.split("."):
            assert hasattr(owner, part), name
            owner = getattr(owner, part)
