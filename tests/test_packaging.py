"""The package as it is shipped."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.test_architecture import ROOMS, ROOT, module


def test_every_package_is_listed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {module(init) for room in ROOMS for init in (ROOT / room).rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == found


@pytest.mark.slow
def test_wheel_made_from_the_sdist_is_whole(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"export/fold.py", "runtime/tracker.py", "setup.cfg", "LICENSE"} <= names
    packed = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "asymtrack_edge/export/fold.py",
        "asymtrack_edge/runtime/tracker.py",
        "asymtrack_edge/runtime/backends/cuda/crop.cu",
        "asymtrack_edge/benchmarks/paper.md",
        "asymtrack_edge/datasets/splits.json",
        "asymtrack_edge/weights/T.safetensors",
        "asymtrack_edge/weights/T/search.onnx",
        "asymtrack_edge/weights/T/manifest.json",
        "asymtrack_edge/py.typed",
    ):
        assert wanted in packed, wanted
    assert not any(name.split("/")[0] in ("export", "runtime", "benchmarks", "tests") for name in packed)
