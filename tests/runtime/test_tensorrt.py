"""The TensorRT backend on an imitated GPU: the same tracks, and not a call more than promised."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import numpy as np
import pytest

from asymtrack_edge.errors import BackendError, FrameError, ManifestError
from asymtrack_edge.export.pipeline import ExportOptions, write_models
from asymtrack_edge.geometry import CropWindow, crop_window
from asymtrack_edge.runtime import MultiTracker, Tracker, open_backend
from asymtrack_edge.runtime.backends.cuda import device as cuda_module
from asymtrack_edge.runtime.backends.cuda import driver as cuda_driver
from asymtrack_edge.runtime.backends.cuda import gpu as gpu_module
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from asymtrack_edge.runtime.backends.tensorrt import backend as tensorrt
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests.helpers import SMALL, filled_model
from tests.runtime.fakes import imitation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the imitated driver needs g++")

CLIP = list(synthetic_clip(10))
FRAMES = [frame for frame, _ in CLIP]
BOX = CLIP[0][1]


class Imitated(NamedTuple):
    """An export with engines, and what the driver counts."""

    folder: Path
    calls: imitation.Calls


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(imitation.build_driver(tmp_path_factory.mktemp("driver"))))


@pytest.fixture(scope="session", params=["fp32-1", "fp16-1", "fp32-3", "fp16-3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    precision, batch = request.param.split("-")
    folder = tmp_path_factory.mktemp("export")
    write_models(filled_model(SMALL), ExportOptions(precision, "orin", max_batch=int(batch)), folder).save(folder)
    return folder


@pytest.fixture
def imitated(
    exported: Path, driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Imitated]:
    trt = imitation.imitated(driver)
    monkeypatch.setattr(gpu_module, "load_driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: trt)
    monkeypatch.setattr(tensorrt, "compile_kernel", lambda source, capability: b"\x7fELF")
    monkeypatch.setattr(tensorrt, "open_cuda", lambda device: cuda_driver.DriverDevice(gpu_module.find_gpu(device)))
    driver.fake_integrated(0)
    driver.fake_refuse_capture(0)
    driver.fake_largest(-1)
    calls = imitation.Calls(driver)
    calls.reset()
    yield Imitated(imitation.add_engines(exported, tmp_path / "export", trt), calls)
    driver.fake_largest(-1)
    assert driver.fake_contexts() == 0, "a context was left current"
    assert driver.fake_allocated() == 0, "device memory was not given back"


def boxes(tracker: Tracker) -> np.ndarray:
    tracker.init(FRAMES[0], BOX)
    return np.array([tracker.update(frame).box for frame in FRAMES[1:]])


@pytest.mark.parametrize("integrated", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_tracks_as_onnxruntime_does(imitated: Imitated, integrated: bool, graphs: bool) -> None:
    imitated.calls.driver.fake_integrated(integrated)
    imitated.calls.driver.fake_refuse_capture(not graphs)
    engine = open_backend(imitated.folder, "tensorrt")
    assert "Imitation" in engine.description
    tracked = boxes(Tracker(engine))
    assert engine.graphs == graphs
    engine.close()
    reference = Tracker(OnnxRuntimeBackend(imitated.folder, engine.manifest))
    np.testing.assert_array_equal(tracked, boxes(reference))


def test_a_frame_costs_what_was_promised(imitated: Imitated) -> None:
    calls = imitated.calls
    tracker = Tracker.load(imitated.folder, backend="auto")
    assert isinstance(tracker.backend, tensorrt.TensorRTBackend)
    calls.reset()
    tracker.init(FRAMES[0], BOX)
    # The frame's part and the window go up, the template runs once, and nothing comes back.
    assert (calls["upload"], calls["kernel"], calls["enqueue"], calls["download"]) == (2, 1, 1, 0)
    assert calls["copy"] == 0, "the template is written where the search engine reads it"
    tracker.update(FRAMES[1])
    assert calls["capture"] == 1
    calls.reset()
    uploaded = 0
    for frame in FRAMES[2:]:
        window = crop_window(tracker._targets[0].box, tracker.backend.manifest.search_factor)
        left, top, right, bottom = tensorrt.cuda_crop.covered([window], frame.shape)
        uploaded += 3 * (right - left) * (bottom - top) + tensorrt.cuda_crop.WINDOW.itemsize
        tracker.update(frame)
    frames = len(FRAMES) - 2
    assert calls.bytes_up == uploaded, "only what the window shows is copied"
    assert calls["cuGraphLaunch"] == calls["kernel"] == calls["download"] == frames
    assert calls["upload"] == 2 * frames, "beside the frame one small copy"
    assert calls["cuStreamSynchronize"] == frames
    for never in ("capture", "cuMemAlloc", "cuMemHostAlloc", "copy", "enqueue", "cuModuleLoadData"):
        assert calls[never] == 0, never
    tracker.init(FRAMES[3], BOX)
    tracker.update(FRAMES[4])
    assert calls["capture"] == 0, "a new target needs no new graph"
    tracker.close()


def test_shared_memory_needs_no_copies_up(imitated: Imitated) -> None:
    imitated.calls.driver.fake_integrated(1)
    tracker = Tracker.load(imitated.folder, backend="tensorrt")
    boxes(tracker)
    assert imitated.calls["upload"] == 0
    tracker.close()


def test_targets_come_and_go(imitated: Imitated) -> None:
    """Batches, several groups and moved slots give what single trackers give."""
    many = MultiTracker(open_backend(imitated.folder, "tensorrt"))
    manifest = many.backend.manifest
    starts = [BOX, (20, 20, 60, 50), (150, 100, 40, 70), (30, 150, 90, 60), (200, 40, 50, 50)]
    numbers = [many.add(FRAMES[0], box) for box in starts]
    singles = {}
    for number, box in zip(numbers, starts):
        singles[number] = Tracker(OnnxRuntimeBackend(imitated.folder, manifest))
        singles[number].init(FRAMES[0], box)
    for i, frame in enumerate(FRAMES[1:]):
        if i == 4:
            many.remove(numbers[0])
            del singles[numbers[0]]
        tracks = many.update(frame)
        assert set(tracks) == set(singles)
        for number, single in singles.items():
            expected = single.update(frame)
            # One run of a batch rounds differently from several of one.
            tolerance = 0.3 if "16" in manifest.precision else 1e-2
            np.testing.assert_allclose(tracks[number].box, expected.box, atol=tolerance)
    many.backend.close()


def test_nothing_of_tensorrt_outlives_the_gpus_context(imitated: Imitated) -> None:
    trt = tensorrt.load_tensorrt("tensorrt").module
    tracker = Tracker.load(imitated.folder, backend="tensorrt")
    boxes(tracker)
    tracker.close()
    assert trt.dead == {False: 4, True: 0}, "two engines, two contexts, none after the context was released"


def test_opening_that_fails_late_gives_everything_back_in_order(
    imitated: Imitated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, capability: Any) -> bytes:
        raise BackendError("no CUDA compiler found")

    monkeypatch.setattr(tensorrt, "compile_kernel", refuse)
    trt = tensorrt.load_tensorrt("tensorrt").module
    with pytest.raises(BackendError, match="no CUDA compiler"):
        open_backend(imitated.folder, "tensorrt")
    assert trt.dead == {False: 2, True: 0}


def test_before_tensorrt_10_each_group_has_an_engine_of_its_own(
    exported: Path, driver: ctypes.CDLL, imitated: Imitated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = imitation.imitated(driver, "8.5.2.2")
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: old)
    folder = imitation.add_engines(exported, tmp_path / "old", old)
    many = MultiTracker(open_backend(folder, "tensorrt"))
    numbers = [many.add(FRAMES[0], (20 + 30 * i, 30, 50, 40)) for i in range(5)]
    assert list(many.update(FRAMES[1])) == list(many.update(FRAMES[2])) == numbers
    many.close()


def test_a_frame_too_large_for_the_memory_does_no_harm(imitated: Imitated) -> None:
    engine = open_backend(imitated.folder, "tensorrt")
    window = CropWindow(10, 10, 40, (30.0, 30.0))
    small, large = np.zeros((60, 80, 3), np.uint8), np.zeros((600, 800, 3), np.uint8)
    engine.template(small, window)
    imitated.calls.driver.fake_largest(large.nbytes - 1)
    for _ in range(2):
        with pytest.raises(BackendError, match="cuMemAlloc"):
            engine.template(large, window)
        engine.template(small, window)  # the driver refuses copies to memory that is not allocated
    engine.close()


def test_a_capture_that_is_interrupted_is_ended(imitated: Imitated) -> None:
    engine = open_backend(imitated.folder, "tensorrt")
    assert isinstance(engine, tensorrt.TensorRTBackend)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with engine.cuda.current():
        with pytest.raises(KeyboardInterrupt):
            engine.cuda.capture(interrupted)
        engine.cuda.synchronise()
    engine.close()


class OnDevice:
    """A frame in the imitated device memory, as other packages offer theirs."""

    def __init__(self, frame: np.ndarray, version: int = 3, stream: Any = None) -> None:
        self.frame = frame
        self.shape = frame.shape
        self.__cuda_array_interface__ = {
            "shape": frame.shape,
            "typestr": "|u1" if frame.dtype == np.uint8 else "<f4",
            "strides": None if frame.flags.c_contiguous else frame.strides,
            "data": (frame.ctypes.data, False),
            "version": version,
            "stream": stream,
        }


class ByDlpack:
    """The same through DLPack: numpy's capsule, said to be on a GPU."""

    def __init__(self, frame: np.ndarray) -> None:
        self.frame, self.shape = frame, frame.shape

    def __dlpack_device__(self) -> Any:
        return 2, 0

    def __dlpack__(self, stream: Any = None) -> Any:
        assert stream == 5, "the owner has to know our stream"
        return self.frame.__dlpack__()


class LikeTorch(ByDlpack):
    """PyTorch's tensors have both, and their interface does not tell the stream that they are made on."""

    @property
    def __cuda_array_interface__(self) -> Any:
        return {**OnDevice(self.frame).__cuda_array_interface__, "version": 2}


@pytest.mark.parametrize("kind", ["interface", "default stream", "padded rows", "dlpack", "both"])
def test_frames_on_the_device_are_not_copied(imitated: Imitated, kind: str) -> None:
    def put(frame: np.ndarray) -> Any:
        if kind in ("dlpack", "both"):
            return (ByDlpack if kind == "dlpack" else LikeTorch)(frame)
        if kind == "padded rows":
            wide = np.zeros((frame.shape[0], frame.shape[1] + 5, 3), np.uint8)
            wide[:, : frame.shape[1]] = frame
            return OnDevice(wide[:, : frame.shape[1]])
        return OnDevice(frame, version=2 if kind == "default stream" else 3)

    tracker = Tracker.load(imitated.folder, backend="tensorrt")
    wanted = boxes(tracker)
    imitated.calls.reset()
    there = [put(frame) for frame in FRAMES]
    tracker.init(there[0], BOX)
    got = np.array([tracker.update(frame).box for frame in there[1:]])
    np.testing.assert_array_equal(got, wanted)
    assert imitated.calls.bytes_up == len(FRAMES) * tensorrt.cuda_crop.WINDOW.itemsize
    assert imitated.calls["cuStreamWaitEvent"] == (len(FRAMES) if kind == "default stream" else 0)
    tracker.close()


def test_unusable_frames_are_refused(imitated: Imitated) -> None:
    tracker = Tracker.load(imitated.folder, backend="tensorrt")
    for frame in (OnDevice(FRAMES[0].astype(np.float32)), OnDevice(FRAMES[0][..., ::-1]), OnDevice(FRAMES[0][..., 0])):
        with pytest.raises(FrameError):
            tracker.init(frame, BOX)
    with pytest.raises(FrameError):
        tracker.init(None, BOX)
    elsewhere = ByDlpack(FRAMES[0])
    elsewhere.__class__ = type("Elsewhere", (ByDlpack,), {"__dlpack_device__": lambda self: (2, 1)})
    with pytest.raises(FrameError, match="lies on GPU 1, the tracker runs on GPU 0"):
        tracker.init(elsewhere, BOX)
    tracker.close()


def test_larger_frames_make_room_once(imitated: Imitated) -> None:
    engine = open_backend(imitated.folder, "tensorrt")
    small, large = np.zeros((60, 80, 3), np.uint8), np.zeros((600, 800, 3), np.uint8)
    for frame, allocations in ((small, 1), (small, 0), (large, 1), (small, 0), (large, 0)):
        imitated.calls.reset()
        engine.template(frame, CropWindow(10, 10, 40, (30.0, 30.0)))
        assert imitated.calls["cuMemAlloc"] == allocations
    engine.close()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tensorrt": "8.5.2.2"}, "TensorRT 8.5.2.2, here is 10.3.0"),
        ({"gpu": "Xavier"}, "the GPU Xavier, here is Imitation"),
        ({"compute_capability": "7.2"}, "compute capability 7.2"),
        ({"model_sha256": "0" * 64}, "another model"),
        ({"batch": "1-2-2"}, "batches of 1-2-2"),
        ({"asymtrack_edge": "0.0.1"}, "asymtrack-edge 0.0.1"),
    ],
)
def test_a_foreign_engine_is_refused(imitated: Imitated, change: Any, words: str) -> None:
    imitation.edit_key(imitated.folder, **change)
    with pytest.raises(BackendError, match="asymtrack-build") as caught:
        open_backend(imitated.folder, "tensorrt")
    assert words in str(caught.value)
    # Left to choose, the CPU is the better answer.
    assert open_backend(imitated.folder, "auto").name == "onnxruntime"


def test_an_altered_engine_is_never_loaded(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    path = imitated.folder / "search.engine"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    manifest = tensorrt.load_tensorrt("tensorrt")
    monkeypatch.setattr(
        manifest.module.Runtime, "deserialize_cuda_engine", lambda *_: pytest.fail("the file was deserialised")
    )
    with pytest.raises(ManifestError, match="altered"):
        open_backend(imitated.folder, "tensorrt")


def test_without_gpu_or_tensorrt_it_says_so(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Any:
        raise BackendError("there is no CUDA driver here")

    monkeypatch.setattr(gpu_module, "load_driver", nothing)
    with pytest.raises(BackendError, match="no CUDA driver"):
        open_backend(exported, "tensorrt")
    with pytest.raises(BackendError, match="no CUDA driver"):
        cuda_module.open_cuda(0)
