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


def test_a_container_takes_a_changed_export_and_the_command_line_and_ends_during_a_build(tmp_path: Path) -> None:
    build = "echo engine >> $1/manifest.json; [ ! -e slow ] || { echo slow; exec sleep 60; }"
    for name, script in (("build", build), ("track", "echo $*")):
        (tmp_path / f"asymtrack-{name}").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / f"asymtrack-{name}").chmod(0o755)
    for folder, file in (("model", "search.onnx"), ("model", "template.onnx"), ("engines", ".keep")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).touch()
    start = ["env", "ASYMTRACK_MODEL=model", "ASYMTRACK_ENGINES=engines", "ASYMTRACK_BACKEND=auto"]
    start += [f"PATH={tmp_path}:/usr/bin:/bin", "sh", str(ROOT / "docker/entry.sh"), "0", "--backend", "onnxruntime"]
    for exported, used in (("2\n", "2\nengine\n"), ("8\n", "8\nengine\n"), ("8\n", "8\nengine\nengine\n")):
        (tmp_path / "model/manifest.json").write_text(exported)  # the networks are the same
        told = subprocess.check_output(start, cwd=tmp_path, text=True)
        assert told == "--backend auto --model engines/model 0 --backend onnxruntime\n"
        assert (tmp_path / "engines/model/manifest.json").read_text() == used
    (tmp_path / "slow").touch()
    with subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE) as ending:
        assert ending.stdout and ending.stdout.readline() == b"slow\n"
        ending.terminate()
    assert ending.returncode == 143  # as process 1, a shell that does not handle the signal would go on
