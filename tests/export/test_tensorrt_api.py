"""Every name of TensorRT's Python API that the code uses exists in every supported version.

``tests/data/tensorrt`` has the API of four versions, as listed by their bindings.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict

import pytest

from asymtrack_edge.runtime.backends.tensorrt import backend, build

SURFACES = sorted((Path(__file__).parents[1] / "data" / "tensorrt").glob("python-api-*.json"))

#: Variable -> the TensorRT class of its value; empty for variables that hold the module itself.
HOLDS: Dict[str, str] = {
    "builder": "Builder.",
    "config": "IBuilderConfig.",
    "network": "INetworkDefinition.",
    "parser": "OnnxParser.",
    "layer": "ILayer.",
    "profile": "IOptimizationProfile.",
    "engine": "ICudaEngine.",
    "context": "IExecutionContext.",
    "_runtime": "Runtime.",
    **{name: f"{name}." for name in ("BuilderFlag", "MemoryPoolType", "LayerType", "TensorIOMode")},
    **dict.fromkeys(("trt", "_trt", "module"), ""),
}

#: Names that are used only with TensorRT 8 or only with TensorRT-RTX.
ONLY_8 = {f"BuilderFlag.{name}" for name in ("FP16", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")}
ONLY_8 |= {"ILayer.precision", "ILayer.set_output_type", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"}
ONLY_RTX = {f"IBuilderConfig.{name}" for name in ("num_compute_capabilities", "set_compute_capability")}
ONLY_RTX |= {"ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "BuilderFlag.REQUIRE_USER_ALLOCATION"}
ONLY_RTX |= {"ICudaEngine.create_runtime_config"}


@pytest.mark.parametrize("path", SURFACES, ids=lambda path: path.stem)
def test_every_name_exists(path: Path) -> None:
    content = json.loads(path.read_text())
    there = {*content["top"], "float32", "__version__"}
    there |= {f"{owner}.{name}" for owner, names in content.items() if isinstance(names, list) for name in names}
    text = "".join(Path(str(module.__file__)).read_text() for module in (backend, build))
    pairs = re.findall(r"(?=\b(\w+)\.(\w+)(?![\w.]*`))", text.partition("import annotations")[2])
    # ``Class.attribute`` for attributes, ``Name`` for names in the module.
    used = {HOLDS[owner] + name for owner, name in pairs if owner in HOLDS}
    assert {"Builder.build_serialized_network", "IExecutionContext.execute_async_v3", "BuilderFlag.FP16"} <= used
    assert used - ONLY_RTX - (set() if content["version"].startswith("8") else ONLY_8) - there == set()
