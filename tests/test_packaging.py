"""The package as it is distributed."""

from __future__ import annotations

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_architecture import LAYERS, ROOT, module


def test_every_package_is_listed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {module(init) for layer in LAYERS for init in (ROOT / layer).rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == found


@pytest.mark.slow
def test_wheel_made_from_the_sdist_is_complete(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")  # made from the sdist
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = ["runtime/tracker.py", "runtime/backends/cuda/crop.cu", "benchmarks/paper.md", "py.typed"]
    wanted += ["datasets/splits.json", "weights/T.safetensors", "weights/T/search.onnx", "weights/T/manifest.json"]
    assert not [name for name in wanted if f"asymtrack_edge/{name}" not in packed]
    assert not any(name.split("/")[0] in ("export", "runtime", "benchmarks", "tests") for name in packed)
