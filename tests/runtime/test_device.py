"""The device pipeline on an imitated GPU: the CPU's tracks on both engines, and what no GPU at hand would show."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import numpy as np
import pytest

from asymtrack_edge.benchmarks.speed import measure  # noqa: F401 - or it would first be imported with the imitation in place
from asymtrack_edge.benchmarks.speed.command import main as bench
from asymtrack_edge.errors import BackendError, FrameError, ManifestError
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.geometry import CropWindow
from asymtrack_edge.manifest import TensorSpec, load_manifest
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.backends import device, onnxruntime_gpu
from asymtrack_edge.runtime.backends.cuda import driver as cuda_driver
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.runtime.backends.device import DeviceBackend
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from asymtrack_edge.runtime.backends.onnxruntime_gpu import OnnxRuntimeGpuBackend
from asymtrack_edge.runtime.backends.tensorrt import backend as tensorrt
from asymtrack_edge.runtime.backends.tensorrt.backend import TensorRTBackend
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests.helpers import SMALL, filled_model
from tests.runtime.fakes import imitation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the imitated driver needs g++")

CLIP = list(synthetic_clip(6))
FRAMES = [frame for frame, _ in CLIP]
BOX = CLIP[0][1]
WINDOW = CropWindow(10, 10, 40, (30.0, 30.0))


class Imitated(NamedTuple):
    """An export, what the driver counts, and the library that runs the networks."""

    kind: str
    folder: Path
    calls: imitation.Calls
    library: Any

    def open(self, **options: Any) -> DeviceBackend:
        opened = TensorRTBackend if self.kind == "tensorrt" else OnnxRuntimeGpuBackend
        return opened(self.folder, load_manifest(self.folder), **options)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return ctypes.CDLL(str(imitation.build_driver(tmp_path_factory.mktemp("driver"))))


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = {}

    def export(precision: str, target: str, batch: int) -> Path:
        key = (precision, target, batch)
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("export")
            options = ExportOptions(precision, target, max_batch=batch)
            Export(filled_model(SMALL), options).write(folder).save(folder)
        return made[key]

    return export


@pytest.fixture
def gpu(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[imitation.Calls]:
    """The driver, as new before the test; nothing of it may be left after."""
    gc.collect()
    driver.fake_gpu(0, 87, 16, 31)
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
    monkeypatch.setattr(kernel, "crop_module", lambda capability: b"\x7fELF")
    calls = imitation.Calls(driver)
    calls.forget()
    yield calls
    gc.collect()
    for name in ("upload", "download", "kernel", "begin capture", "end capture", "instantiate"):
        driver.fake_refuse(name.encode(), 0)
    driver.fake_largest(-1)
    assert driver.fake_contexts() == 0, "a context was left current"
    assert driver.fake_allocated() == 0, "device memory was not given back"
    assert driver.fake_pending() == 0, "work is in flight"
    assert driver.fake_retained() == 0, "the primary context is released as often as it was retained"


@pytest.fixture(params=["tensorrt fp32 3"])
def imitated(
    request: pytest.FixtureRequest, exports: Any, gpu: imitation.Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Imitated:
    """Imitations in the place of TensorRT and ONNX Runtime, and an export: engine, precision, batch, version."""
    kind, precision, batch, *version = request.param.split()
    trt, ort = imitation.imitated(gpu.driver, *version), imitation.OnnxRuntimeGpu(gpu.driver)
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: trt)
    monkeypatch.setattr(onnxruntime_gpu, "ort", ort)
    if kind == "cuda":
        return Imitated(kind, exports(precision, "onnx", int(batch)), gpu, ort)
    folder = imitation.add_engines(exports(precision, "orin", int(batch)), tmp_path / "export", trt)
    return Imitated(kind, folder, gpu, trt.module)


def on(*kinds: str) -> Any:
    return pytest.mark.parametrize("imitated", kinds, indirect=True)


both = on("tensorrt fp32 3", "cuda fp32 3")
only_onnxruntime = on("cuda fp32 3")


def boxes(backend: Any) -> np.ndarray:
    tracker = Tracker(backend)
    tracker.init(FRAMES[0], BOX)
    return np.array([tracker.update(frame).box for frame in FRAMES[1:]])


@pytest.mark.parametrize("way", ["graph", "cannot be captured", "mapped"])
@on("tensorrt fp32 3", "tensorrt fp16 1", "cuda fp32 3")
def test_tracks_as_onnxruntime_does(imitated: Imitated, way: str) -> None:
    imitated.calls.driver.fake_gpu(way == "mapped", 87, 16, 31)
    imitated.calls.driver.fake_refuse(b"begin capture", 801 if way == "cannot be captured" else 0)
    imitated.library.refuses_graphs = way == "cannot be captured"
    backend = imitated.open()
    if way == "mapped":
        backend.map_frames()
    tracked = boxes(backend)
    assert backend.graphs == (way != "cannot be captured")
    # The kernel normalises as one multiplication, NumPy on the host as well: the crops are equal to the bit.
    np.testing.assert_array_equal(tracked, boxes(OnnxRuntimeBackend(imitated.folder, backend.manifest)))
    backend.close()
    backend.close()
    assert imitated.calls["cuDevicePrimaryCtxRelease"] == 1
    with pytest.raises(BackendError, match="closed"):
        backend.reserve(1)


@pytest.mark.parametrize("integrated", [True, False])
@only_onnxruntime
def test_bench_times_both_ways_of_a_frame_on_a_jetson(imitated: Imitated, integrated: bool, capsys: Any) -> None:
    imitated.calls.driver.fake_gpu(integrated, 87, 16, 31)
    arguments = [str(imitated.folder), "--backend", "onnxruntime-cuda", "--protocol", "P5", "--seconds", "0.5"]
    assert bench(["speed", *arguments]) == 0
    printed = capsys.readouterr().out
    assert (", mapped" in printed) == integrated, printed


@both
def test_a_frame_costs_what_was_promised(imitated: Imitated) -> None:
    calls, backend = imitated.calls, imitated.open()
    tracker = Tracker(backend)
    tracker.init(FRAMES[0], BOX)
    tracker.update(FRAMES[1])
    calls.forget()
    for frame in FRAMES[2:]:
        tracker.update(frame)
    frames = len(FRAMES) - 2
    assert calls.bytes_up < frames * FRAMES[0].nbytes, "only what the window shows is copied"
    assert calls["kernel"] == calls["download"] == frames and calls["upload"] == 2 * frames
    if imitated.kind == "tensorrt":
        assert (calls["enqueue"], calls["cuGraphLaunch"], calls["cuStreamSynchronize"]) == (0, frames, frames)
    tracker.init(FRAMES[3], BOX)
    tracker.update(FRAMES[4])
    for never in ("capture", "cuMemAlloc", "cuMemHostAlloc", "cuModuleLoadData", "cuCtxSynchronize"):
        assert calls[never] == 0, never
    backend.close()


@on("tensorrt fp32 3", "tensorrt fp16 1", "cuda fp32 3", "tensorrt fp32 3 8.5.2.2")
def test_targets_come_and_go(imitated: Imitated) -> None:
    """Batches, several groups and moved slots give what single trackers give; before 10 each context has an engine."""
    backend = imitated.open()
    manifest = backend.manifest
    many, singles = MultiTracker(backend), {}
    for start in (BOX, (20, 20, 60, 50), (150, 100, 40, 70), (30, 150, 90, 60), (200, 40, 50, 50)):
        target = many.add(FRAMES[0], start)
        singles[target] = Tracker(OnnxRuntimeBackend(imitated.folder, manifest))
        singles[target].init(FRAMES[0], start)
    for i, frame in enumerate(FRAMES[1:]):
        if i == 2:
            many.remove(next(iter(singles)))
            del singles[next(iter(singles))]
        tracks = many.update(frame)
        assert set(tracks) == set(singles)
        for target, single in singles.items():
            # One run of a batch rounds differently from several of one.
            tolerance = 0.3 if "16" in manifest.precision else 1e-2
            np.testing.assert_allclose(tracks[target].box, single.update(frame).box, atol=tolerance)
    backend.close()


def test_every_number_of_targets_keeps_its_step(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    for kept, counts, captures in ((8, (1, 2, 3, 2, 1, 3, 1), 3), (2, (1, 2, 1, 3, 1, 2), 4)):
        monkeypatch.setattr(device, "KEPT", kept)
        backend = imitated.open()
        backend.reserve(3)
        imitated.calls.forget()
        for count in counts:
            backend.search(FRAMES[0], [WINDOW] * count)
        assert imitated.calls["capture"] == captures, "the one that was not used for longest goes first"
        backend.close()


@only_onnxruntime
def test_onnxruntime_runs_on_our_stream_without_tf32(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    imitated.open().close()
    name, options = imitated.library.opened[-1][0]
    assert name == "CUDAExecutionProvider" and options["user_compute_stream"] == "5" and options["use_tf32"] == "0"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    imitated.open(provider="tensorrt").close()
    providers = imitated.library.opened[-1]
    assert [p for p, _ in providers] == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert providers[0][1]["trt_engine_cache_path"] == "/cache/asymtrack-edge/onnxruntime-tensorrt"
    assert all(options["user_compute_stream"] == "5" for _, options in providers[:2])


@only_onnxruntime
def test_where_onnxruntime_cannot_run_it_says_why(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = imitated.open()
    imitated.library.fails = True
    with pytest.raises(BackendError, match=r"onnxruntime cannot run template.onnx: CUDA failure 700"):
        boxes(backend)
    backend.close()
    monkeypatch.setattr(imitation.Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="libraries do not load"):
        imitated.open()
    monkeypatch.setattr(imitated.library, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="pip uninstall onnxruntime, then pip install onnxruntime-gpu"):
        imitated.open()


@both
def test_what_is_dropped_is_given_back(imitated: Imitated) -> None:
    for _ in range(3):
        boxes(imitated.open())
    assert imitated.calls["cuDevicePrimaryCtxRelease"] == 3 and imitated.calls.driver.fake_allocated() == 0


@pytest.mark.parametrize("fails", ["upload", "download", "kernel"])
def test_a_call_that_fails_leaves_nothing_in_flight(imitated: Imitated, fails: str) -> None:
    backend = imitated.open(graph=False)
    tracker = Tracker(backend)
    tracker.init(FRAMES[0], BOX)
    wanted = tracker.update(FRAMES[1])
    tracker.init(FRAMES[0], BOX)
    imitated.calls.driver.fake_refuse(fails.encode(), 700)
    with pytest.raises(BackendError, match="ERROR_700"):
        tracker.update(FRAMES[1])
    assert imitated.calls.driver.fake_pending() == 0
    imitated.calls.driver.fake_refuse(fails.encode(), 0)
    assert tracker.update(FRAMES[1]) == wanted
    backend.close()


@pytest.mark.parametrize("call", ["begin capture", "end capture", "instantiate"])
def test_a_capture_that_fails_is_said_and_does_no_harm(imitated: Imitated, call: str, caplog: Any) -> None:
    imitated.calls.driver.fake_refuse(call.encode(), 900)
    backend = imitated.open()
    boxes(backend)
    assert not backend.graphs and "ERROR_900" in caplog.text
    backend.close()


def test_a_capture_that_is_interrupted_is_ended(imitated: Imitated) -> None:
    backend = imitated.open()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with backend.cuda.current():
        with pytest.raises(KeyboardInterrupt):
            backend.cuda.capture(interrupted)
        backend.cuda.synchronise()
    backend.close()


@pytest.mark.parametrize(("dtype", "shape"), [("float16", (3, 96, 96)), ("float32", (4, 96, 96))])
def test_images_that_the_kernel_cannot_write_are_refused(imitated: Imitated, dtype: str, shape: Any) -> None:
    manifest = load_manifest(imitated.folder)
    with pytest.raises(BackendError, match="the crop kernel writes"):
        TensorRTBackend(imitated.folder, replace(manifest, search=TensorSpec("image", dtype, shape)))
    assert imitated.calls["cuMemAlloc"] == 0, "nothing was bound"


def test_nothing_of_tensorrt_outlives_the_gpus_context_and_its_warnings_are_told(
    imitated: Imitated, caplog: Any
) -> None:
    imitated.library.warnings.append("Using an engine plan file across\n different models of devices")
    backend = imitated.open()
    boxes(backend)
    backend.close()
    assert imitated.library.dead == {False: 4, True: 0}, "two engines, two contexts"
    assert "TensorRT: Using an engine plan file across different models of devices" in caplog.text


def test_opening_that_fails_late_gives_everything_back_in_order(imitated: Imitated) -> None:
    imitated.library.refuses_addresses = True
    with pytest.raises(BackendError, match="does not take an address for image"):
        imitated.open()
    gc.collect()
    assert imitated.library.dead == {False: 3, True: 0}


def test_a_frame_too_large_for_the_memory_does_no_harm(imitated: Imitated) -> None:
    backend = imitated.open()
    small, large = np.zeros((60, 80, 3), np.uint8), np.zeros((600, 800, 3), np.uint8)
    backend.template(small, WINDOW)
    imitated.calls.driver.fake_largest(large.nbytes - 1)
    for _ in range(2):
        with pytest.raises(BackendError, match="cuMemAlloc"):
            backend.template(large, WINDOW)
        backend.template(small, WINDOW)  # the driver refuses copies to memory that is not allocated
    imitated.calls.driver.fake_largest(-1)
    for frame, allocations in ((large, 1), (small, 0), (large, 0)):
        imitated.calls.forget()
        backend.template(frame, WINDOW)
        assert imitated.calls["cuMemAlloc"] == allocations
    backend.close()


class OnDevice:
    """A frame in the imitated device memory, as other packages offer theirs."""

    def __init__(self, frame: np.ndarray, version: int = 3, layout: str = "", **more: Any) -> None:
        self.frame, self.shape = frame, frame.shape
        if layout:
            self.format = layout
        self.__cuda_array_interface__ = {
            "shape": frame.shape,
            "typestr": "|u1" if frame.dtype == np.uint8 else "<f4",
            "strides": None if frame.flags.c_contiguous else frame.strides,
            "data": (frame.ctypes.data, False),
            "version": version,
            **more,
        }


class ByDlpack:
    """The same through DLPack: numpy's capsule, said to be on a GPU."""

    exports, index = 0, 0

    def __init__(self, frame: np.ndarray) -> None:
        self.frame, self.shape = frame, frame.shape

    def __dlpack_device__(self) -> Any:
        return 2, self.index

    def __dlpack__(self, stream: Any = None) -> Any:
        assert stream == 5, "the owner has to know our stream"
        ByDlpack.exports += 1
        return self.frame.__dlpack__()


class LikeTorch(ByDlpack):
    """PyTorch's tensors have both, and their interface does not tell the stream that they are made on."""

    @property
    def __cuda_array_interface__(self) -> Any:
        return {**OnDevice(self.frame).__cuda_array_interface__, "version": 2}


class Elsewhere(ByDlpack):
    index = 1


def padded(frame: np.ndarray) -> np.ndarray:
    wide = np.zeros((frame.shape[0], frame.shape[1] + 5, 3), np.uint8)
    wide[:, : frame.shape[1]] = frame
    return wide[:, : frame.shape[1]]


#: How a frame is put on the device; calls of a frame that wait for its stream, and for the whole GPU.
PLACES = {
    "stream": (lambda f: OnDevice(f, stream=1), 1, 0),
    "version 2": (lambda f: OnDevice(f, version=2), 0, 1),
    "jetson rgb8": (lambda f: OnDevice(np.ascontiguousarray(f[..., ::-1]), layout="rgb8"), 0, 1),
    "jetson bgr8": (lambda f: OnDevice(f, layout="bgr8"), 0, 1),
    "ready, padded rows": (lambda f: OnDevice(padded(f), stream=None), 0, 0),
    "dlpack": (ByDlpack, 0, 0),
    "both": (LikeTorch, 0, 0),
}


@pytest.mark.parametrize("kind", PLACES)
def test_frames_on_the_device_are_read_in_place(imitated: Imitated, kind: str) -> None:
    put, waits, stops = PLACES[kind]
    backend = imitated.open()
    wanted = boxes(backend)
    imitated.calls.forget()
    ByDlpack.exports = 0
    there = [put(frame) for frame in FRAMES]
    tracker = Tracker(backend)
    tracker.init(there[0], BOX)
    np.testing.assert_array_equal([tracker.update(frame).box for frame in there[1:]], wanted)
    assert imitated.calls.bytes_up == len(FRAMES) * kernel.WINDOW.itemsize
    assert imitated.calls["cuStreamWaitEvent"] == waits * len(FRAMES)
    assert imitated.calls["cuCtxSynchronize"] == stops * len(FRAMES)
    assert ByDlpack.exports == (len(FRAMES) if kind in ("dlpack", "both") else 0), "once a frame"
    backend.close()


def test_unusable_frames_are_refused(imitated: Imitated) -> None:
    backend = imitated.open()
    frame = FRAMES[0]
    for wrong, words in (
        (OnDevice(frame.astype(np.float32)), "uint8"),
        (OnDevice(frame[..., ::-1]), "strides"),
        (OnDevice(frame[..., 0]), "shape"),
        (OnDevice(frame, layout="rgba8"), "bgr8 or rgb8, not rgba8"),
        (Elsewhere(frame), "lies on cuda:1, the tracker runs on cuda:0"),
        (None, "nothing"),
    ):
        with pytest.raises(FrameError, match=words):
            backend.check_frame(wrong)
    backend.close()


def test_a_foreign_or_altered_engine_is_never_loaded(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitated.library.Runtime, "deserialize_cuda_engine", lambda *_: pytest.fail("deserialised"))
    path = imitated.folder / "template.engine"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ManifestError, match="altered"):
        imitated.open()
    path.write_bytes(content)
    imitated.calls.driver.fake_gpu(0, 87, 8, 31)
    with pytest.raises(BackendError, match="of 16 multiprocessors, here are 8: build it here with asymtrack-build"):
        imitated.open()


def test_rtx_says_which_gpus_it_does_not_support(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = replace(tensorrt.load_tensorrt("tensorrt"), flavour="tensorrt-rtx")
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: rtx)
    for capability, supported in ((75, True), (89, True), (90, False), (103, False), (120, True), (87, False)):
        imitated.calls.driver.fake_gpu(0, capability, 16, 31)
        with pytest.raises(BackendError, match="asymtrack-build" if supported else "does not run on Imitation"):
            TensorRTBackend(imitated.folder, replace(load_manifest(imitated.folder), target="rtx"))


def test_without_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARIES", ("libcuda-of-nowhere.so",))
    with pytest.raises(BackendError, match="no CUDA driver"):
        cuda_driver.open_cuda(0)


@pytest.mark.parametrize("works", [True, False])
def test_pycuda_serves_where_it_works_and_is_not_noticed_where_not(
    works: bool, gpu: imitation.Calls, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    ours = "asymtrack_edge.runtime.backends.cuda.pycuda"
    monkeypatch.setitem(sys.modules, ours, None)
    del sys.modules[ours]  # imported with this module, and forgotten after the test
    pycuda = imitation.Pycuda()
    monkeypatch.setitem(sys.modules, "pycuda", pycuda if works else None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", pycuda.driver)
    opened = cuda_driver.open_cuda(0)
    assert opened.name == ("PyCUDA" if works else "CUDA driver") and not recwarn.list
    if not works:
        opened.close()
        return
    with opened.current():
        with pytest.raises(BackendError, match="CUDA failed: out of memory"):
            opened.allocate(-1)
        opened.kernel(b"", kernel.KERNEL, kernel.TYPES)((1, 1, 1), (1, 1, 1), ())
        opened.pinned(16)
    del opened
    gc.collect()
    assert pycuda.events == [
        *("push", "pop"),  # to make stream and event
        *("push", "launch", "pop"),
        *("push", "host freed", "unloaded", "stream gone", "pop", "detach"),
    ]
