"""Small untrained models, and an imitated GPU."""

from __future__ import annotations

import ctypes
import gc
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

from asymtrack_edge.runtime.backends.cuda import driver as cuda_driver
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.runtime.backends.tensorrt import backend as tensorrt
from tests.helpers import export_small
from tests.runtime.fakes import imitation


@pytest.fixture(scope="session")
def batch_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small untrained network, in batches of up to four."""
    return export_small(tmp_path_factory.mktemp("model"), max_batch=4)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    kinds = (("fp32", 3), ("fp16", 1))
    return {f"{p} {n}": export_small(tmp_path_factory.mktemp("export"), p, "orin", max_batch=n) for p, n in kinds}


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("the imitated driver needs g++")
    return imitation.build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def calls(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[imitation.Calls]:
    """The driver's counters. The driver is reset before the test, and the test must release everything."""
    gc.collect()
    driver.fake_gpu(0, 87, 16, 31)
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
    monkeypatch.setattr(kernel, "load_crop", lambda cuda: cuda.kernel(b"\x7fELF", kernel.KERNEL, kernel.TYPES))
    driver.fake_forget()
    yield imitation.Calls(driver)
    gc.collect()
    for name in ("upload", "download", "kernel", "begin capture", "end capture", "instantiate"):
        driver.fake_refuse(name.encode(), 0)
    driver.fake_largest(-1)
    assert driver.fake_contexts() == 0, "a context was left current"
    assert driver.fake_allocated() == 0, "device memory was not freed"
    assert driver.fake_pending() == 0, "work is still queued"
    assert driver.fake_retained() == 0, "the primary context was not released as often as it was retained"


@pytest.fixture(params=["fp32 3"])
def imitated(
    request: Any, exports: Dict[str, Path], calls: imitation.Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> imitation.Imitated:
    """An imitation in place of TensorRT; the parameter is precision, largest batch and version."""
    precision, batch, *version = request.param.split()
    trt = imitation.tensorrt(calls.driver, *version)
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: trt)
    folder = imitation.add_engines(exports[f"{precision} {batch}"], tmp_path / "export", trt)
    return imitation.Imitated(folder, calls, trt.module)
