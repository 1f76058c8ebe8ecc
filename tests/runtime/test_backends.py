"""Which backend opens, how many threads it uses, and that it leaves nothing on the machine."""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Dict, Optional

import pytest

from asymtrack_edge.errors import BackendError, ManifestError, UsageError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends import loading
from asymtrack_edge.runtime.backends.cuda import driver
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.backends.threads import cpu_quota, processors
from tests.datasets.miniature import write_tree
from tests.runtime.simulated import ColourBackend


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Dict[str, Optional[str]]:
    """Backend name -> why it cannot open; all other backends open. There is a GPU."""
    reasons: Dict[str, Optional[str]] = {}

    def open_(folder: Path, manifest: Any, name: str, *_: Any) -> Any:
        if name in reasons:
            raise BackendError(reasons[name])
        backend = ColourBackend()
        backend.name, backend.description, backend.on_cpu = name, name, name == "onnxruntime"
        return backend

    monkeypatch.setattr(loading, "_open", open_)
    monkeypatch.setattr(driver, "find_gpu", lambda index: None)
    return reasons


def test_auto_takes_the_best_backend_that_runs_and_says_why_not_a_better_one(opened: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "asymtrack_edge")
    assert open_backend("T").name == "tensorrt"
    opened["tensorrt"] = "no engine for this GPU"
    assert open_backend("T", device="cuda:1").name == "onnxruntime-cuda"
    opened["onnxruntime-cuda"] = "install onnxruntime-gpu"
    assert open_backend("T").name == "onnxruntime"
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"], "an unused GPU is a warning"
    last = caplog.records[-1].getMessage()
    assert last.startswith("T in fp32 runs on onnxruntime")
    assert "not tensorrt: no engine" in last and "not onnxruntime-cuda: install onnxruntime-gpu" in last


def test_a_requested_gpu_is_used_or_an_error(opened: Any) -> None:
    opened.update({"tensorrt": "no engine", "onnxruntime-cuda": "install onnxruntime-gpu"})
    with pytest.raises(BackendError, match="on cuda; not tensorrt: no engine; not onnxruntime-cuda: install"):
        open_backend("T", device="cuda")
    assert open_backend("T", device="cpu").name == "onnxruntime"


@pytest.mark.parametrize(("jetson", "words"), [("/no/device", "finds no GPU"), ("/dev/null", "groups video and")])
def test_auto_warns_of_an_unusable_gpu_on_a_jetson(monkeypatch: Any, caplog: Any, jetson: str, words: str) -> None:
    monkeypatch.setattr(driver, "_JETSON", jetson)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: 100))
    assert open_backend("T").on_cpu and (words in caplog.text) == (jetson == "/dev/null")
    with pytest.raises(BackendError, match=words):
        open_backend("T", device="cuda:0")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "magic"}, "unknown backend 'magic'"),
        ({"device": "gpu"}, "unknown device 'gpu': choose auto, cuda or cuda:N"),
        ({"device": 0}, "unknown device '0'"),
        ({"threads": "2"}, "threads must be an int from 1 to 1024, not '2'"),
        ({"threads": 100_000}, "threads must be an int from 1 to 1024"),
        ({"backend": "onnxruntime", "device": "cuda"}, "runs on the CPU, not on cuda"),
        ({"precision": "bf16", "device": "cuda"}, "the backend openvino runs on the CPU, not on cuda"),
        ({"backend": "tensorrt", "device": "cpu"}, "runs on a GPU, not on the CPU"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "cannot compute it in bf16: use the backend openvino"),
        ({"precision": "fp16"}, "cannot compute it in fp16: give a model that was exported in fp16"),
    ],
)
def test_invalid_and_contradictory_arguments_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_backend("T", **arguments)


CGROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        # The smallest quota among a group and its parents.
        ("0::/user/job\n", {"user/job/cpu.max": "max 100000", "user/cpu.max": "200000 100000"}, 2),
        # With cgroup v1, a container sees the host's path, but its own group at the mount point.
        (
            "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/docker/ab\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ],
)
def test_a_containers_quota_is_found(cgroup: str, files: Dict[str, str], quota: float, tmp_path: Path) -> None:
    there = {f"{CGROUP}/{name}": text for name, text in files.items()}
    assert cpu_quota(write_tree(tmp_path, {"proc/self/cgroup": cgroup, **there})) == quota


def test_default_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert processors(tmp_path) == 8
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    assert processors(write_tree(tmp_path, {name.format(n): f"{n % 4},{n % 4 + 4}" for n in range(8)})) == 4
    assert processors(write_tree(tmp_path, {"proc/self/cgroup": "0::/", f"{CGROUP}/cpu.max": "290000 100000"})) == 2
    assert processors(write_tree(tmp_path, {f"{CGROUP}/cpu.max": "10000 100000"})) == 1


_TRACK = """
import os, sys
from asymtrack_edge import Tracker
import numpy as np
frame = np.random.RandomState(0).randint(0, 256, (120, 160, 3)).astype(np.uint8)
def track():
    with Tracker.load(sys.argv[1], sys.argv[2], threads=1) as tracker:
        tracker.init(frame, (40, 40, 30, 30))
        return tracker.update(frame)
track()  # imports everything now: another user may not be able to read the modules
if os.geteuid() == 0:
    os.setuid(54321)
print(track().state.value, os.environ["ORT_DISABLE_TELEMETRY"])
"""


@pytest.mark.parametrize("home", [None, "/proc/nowhere", "here"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_no_home_or_user_is_needed_and_nothing_is_written_or_sent(backend: str, home: Optional[str]) -> None:
    pytest.importorskip(backend)
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    with TemporaryDirectory() as folder:
        shutil.copytree(loading.model_folder("T"), Path(folder, "T"))
        place = Path(folder, "home")
        place.mkdir()
        os.chmod(folder, 0o755)
        os.chmod(place, 0o777)
        if home is not None:
            environment["HOME"] = str(place) if home == "here" else home
        command = [sys.executable, "-c", _TRACK, str(Path(folder, "T")), backend]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr, done.stdout.split()[1:]) == (0, "", ["1"])
        assert not list(place.iterdir()), f"{backend} left usage data"


def test_networks_that_contradict_the_manifest_are_refused(batch_model: Path, tmp_path: Path) -> None:
    model, manifest = shutil.copytree(batch_model, tmp_path / "m"), load_manifest(batch_model)
    half = tuple(replace(spec, dtype="float16") for spec in manifest.state)
    for change in ({"state": manifest.state[1:]}, {"state": half}, {"output": replace(manifest.output, shape=(6,))}):
        replace(manifest, **change).save(Path(model))
        for backend in ("onnxruntime", *["openvino"] * (find_spec("openvino") is not None)):
            with pytest.raises(ManifestError, match=r"\.onnx does not match the manifest"):
                open_backend(model, backend, "auto", 1, None)
    with pytest.raises(ValueError, match="tensor"):
        replace(manifest.output, shape=(1 << 20, 1 << 20))
