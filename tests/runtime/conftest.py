"""What is made once per session: a model to run, small, untrained; and the driver of a GPU that is not there."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from asymtrack_edge.errors import ManifestError
from asymtrack_edge.runtime.backends.loading import model_folder


@pytest.fixture(scope="session")
def batch_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small untrained network, in batches of up to four."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from asymtrack_edge.export.pipeline import Export, ExportOptions
    from tests.helpers import SMALL, filled_model

    folder = tmp_path_factory.mktemp("models") / "small"
    Export(filled_model(SMALL), ExportOptions(max_batch=4)).run(folder)
    return folder


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Path:
    """The bundled T; where there is none, the small untrained one."""
    try:
        return model_folder("T")
    except ManifestError:
        return request.getfixturevalue("batch_model")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("the imitated driver needs g++")
    from tests.runtime.fakes.imitation import build_driver

    return build_driver(tmp_path_factory.mktemp("driver"))
