"""The same promises on a real GPU; nothing here can run without one."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np
import pytest

from asymtrack_edge.errors import BackendError
from asymtrack_edge.export.pipeline import ExportOptions, write_models
from asymtrack_edge.geometry import Cropper, CropWindow, iou
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.backends.cuda import compile as cuda_compile
from asymtrack_edge.runtime.backends.cuda import crop as cuda_crop
from asymtrack_edge.runtime.backends.cuda.device import open_cuda
from asymtrack_edge.runtime.backends.cuda.gpu import find_gpu
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from asymtrack_edge.runtime.backends.tensorrt.backend import TensorRTBackend
from asymtrack_edge.runtime.backends.tensorrt.build import build_in_place
from asymtrack_edge.runtime.backends.tensorrt.library import TENSORRT, load_tensorrt
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests.helpers import SMALL, filled_model


def _target() -> str:
    """What to export for here; empty without a GPU."""
    try:
        find_gpu(0)
    except BackendError:
        return ""
    try:
        load_tensorrt(TENSORRT)
    except BackendError:
        return "rtx"
    return "xavier"


TARGET = _target()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not TARGET, reason="there is no GPU")]

CLIP = list(synthetic_clip(12))
FRAMES, BOX = [frame for frame, _ in CLIP], CLIP[0][1]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_models(filled_model(SMALL), ExportOptions(request.param, TARGET, max_batch=3), folder).save(folder)
    build_in_place(folder)
    return folder


@pytest.fixture(params=[True, False], ids=["graph", "no graph"])
def engine(request: pytest.FixtureRequest, exported: Path) -> Iterator[TensorRTBackend]:
    engine = TensorRTBackend(exported, load_manifest(exported), graph=request.param)
    yield engine
    engine.close()


def test_tracks_as_onnxruntime_does(engine: TensorRTBackend, exported: Path) -> None:
    trackers = [Tracker(engine), Tracker(OnnxRuntimeBackend(exported, engine.manifest))]
    for tracker in trackers:
        tracker.init(FRAMES[0], BOX)
    for frame in FRAMES[1:]:
        ours, reference = (tracker.update(frame).box for tracker in trackers)
        assert iou(ours, reference) > 0.97
    assert engine.graphs == engine.use_graph, "the step could not be captured"


def test_a_batch_is_its_targets(engine: TensorRTBackend, exported: Path) -> None:
    many = MultiTracker(engine)
    starts = [BOX, (20, 20, 60, 50), (150, 100, 40, 70), (30, 150, 90, 60)]
    numbers = [many.add(FRAMES[0], box) for box in starts]
    tracks = many.update(FRAMES[1])
    for number, box in zip(numbers, starts):
        single = Tracker(OnnxRuntimeBackend(exported, engine.manifest))
        single.init(FRAMES[0], box)
        assert iou(tracks[number].box, single.update(FRAMES[1]).box) > 0.97


@pytest.mark.parametrize("side", [100, 128, 256, 257])
def test_the_kernel_equals_opencv(side: int) -> None:
    cuda = open_cuda(0)
    window, size = CropWindow(-20, 30, side, (0.0, 0.0)), 128
    frame = FRAMES[0]
    records, planes = np.zeros(1, cuda_crop.WINDOW), np.zeros((3, size, size), np.float32)
    with cuda.current():
        module = cuda_compile.compile_kernel(cuda_crop.SOURCE, cuda.gpu.compute_capability)
        kernel = cuda.kernel(module, cuda_crop.KERNEL, "PPiffffff")
        there, windows, out = (cuda.allocate(n) for n in (frame.nbytes, records.nbytes, planes.nbytes))
        cuda.upload(there, frame)
        cuda_crop.write_windows(records, (window,), there, frame.strides[0], frame.shape)
        cuda.upload(windows, records)
        kernel(cuda_crop.grid(size, 1), cuda_crop.BLOCK, (windows, out, size, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0))
        cuda.download(planes, out)
        cuda.synchronise()
    cuda.close()
    crop = np.zeros((size, size, 3), np.uint8)
    Cropper().crop(frame, window, crop)
    np.testing.assert_array_equal(planes, crop[..., ::-1].transpose(2, 0, 1))


def test_lives_beside_pytorch(engine: TensorRTBackend) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch here has no CUDA")
    tracker = Tracker(engine)
    tracker.init(FRAMES[0], BOX)
    wanted = tracker.update(FRAMES[1]).box
    there = [torch.from_numpy(frame).cuda() for frame in FRAMES[:2]]
    tracker.init(there[0], BOX)
    assert tracker.update(there[1]).box == wanted
    assert float((torch.ones(4, device="cuda") * 2).sum()) == 8
