"""The device pipeline on an imitated GPU: the same tracks on both engines, and not a call more than promised."""

from __future__ import annotations

import ctypes
import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import numpy as np
import pytest

from asymtrack_edge.benchmarks.speed import measure  # noqa: F401 - or it would first be imported with the imitation in place
from asymtrack_edge.benchmarks.speed.command import main as bench
from asymtrack_edge.errors import BackendError, FrameError, ManifestError
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.geometry import CropWindow, crop_window
from asymtrack_edge.manifest import TensorSpec, load_manifest
from asymtrack_edge.runtime import MultiTracker, Tracker, open_backend
from asymtrack_edge.runtime.backends import device, onnxruntime_gpu
from asymtrack_edge.runtime.backends.cuda import driver as cuda_driver
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.runtime.backends.device import DeviceBackend
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from asymtrack_edge.runtime.backends.onnxruntime_gpu import OnnxRuntimeGpuBackend
from asymtrack_edge.runtime.backends.tensorrt import backend as tensorrt
from asymtrack_edge.runtime.backends.tensorrt.backend import TensorRTBackend, unfit
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests.helpers import SMALL, filled_model
from tests.runtime.fakes import imitation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the imitated driver needs g++")

CLIP = list(synthetic_clip(6))
FRAMES = [frame for frame, _ in CLIP]
BOX = CLIP[0][1]


class Imitated(NamedTuple):
    """An export, what the driver counts, and the library that runs the networks."""

    kind: str
    folder: Path
    calls: imitation.Calls
    library: Any

    def open(self, **options: Any) -> DeviceBackend:
        manifest = load_manifest(self.folder)
        if self.kind == "tensorrt":
            return TensorRTBackend(self.folder, manifest, **options)
        return OnnxRuntimeGpuBackend(self.folder, manifest, **options)


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


def install(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, version: str = imitation.VERSION) -> Any:
    """Puts the imitations in the place of driver, compiler, TensorRT and ONNX Runtime; returns the latter two."""
    trt = imitation.imitated(driver, version)
    ort = imitation.OnnxRuntimeGpu(driver)
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: trt)
    monkeypatch.setattr(onnxruntime_gpu, "ort", ort)
    monkeypatch.setattr(kernel, "crop_module", lambda capability: b"\x7fELF")
    return trt, ort


@pytest.fixture
def gpu(driver: ctypes.CDLL) -> Iterator[imitation.Calls]:
    """The driver, as new before the test; nothing of it may be left after."""
    gc.collect()
    driver.fake_gpu(0, 87, 16, 31)
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


@pytest.fixture(params=["tensorrt fp32 3", "tensorrt fp16 1", "cuda fp32 3"])
def imitated(
    request: pytest.FixtureRequest, exports: Any, gpu: imitation.Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Imitated:
    trt, ort = install(gpu.driver, monkeypatch)
    kind, precision, batch = request.param.split()
    if kind == "tensorrt":
        folder = imitation.add_engines(exports(precision, "orin", int(batch)), tmp_path / "export", trt)
        return Imitated(kind, folder, gpu, trt.module)
    return Imitated(kind, exports(precision, "onnx", int(batch)), gpu, ort)


only_tensorrt = pytest.mark.parametrize("imitated", ["tensorrt fp32 3"], indirect=True)
only_onnxruntime = pytest.mark.parametrize("imitated", ["cuda fp32 3"], indirect=True)
one_of_each = pytest.mark.parametrize("imitated", ["tensorrt fp32 3", "cuda fp32 3"], indirect=True)


def boxes(backend: Any) -> np.ndarray:
    tracker = Tracker(backend)
    tracker.init(FRAMES[0], BOX)
    return np.array([tracker.update(frame).box for frame in FRAMES[1:]])


@pytest.mark.parametrize("way", ["graph", "no graph", "cannot be captured", "mapped"])
def test_tracks_as_onnxruntime_does(imitated: Imitated, way: str) -> None:
    imitated.calls.driver.fake_gpu(way == "mapped", 87, 16, 31)
    imitated.calls.driver.fake_refuse(b"begin capture", 801 if way == "cannot be captured" else 0)
    imitated.library.refuses_graphs = way == "cannot be captured"
    backend = imitated.open(graph=way != "no graph")
    if way == "mapped":
        backend.map_frames()
    tracked = boxes(backend)
    assert backend.graphs == (way in ("graph", "mapped"))
    reference = OnnxRuntimeBackend(imitated.folder, backend.manifest)
    # The kernel normalises as one multiplication, NumPy on the host as well: the crops are equal to the bit.
    np.testing.assert_array_equal(tracked, boxes(reference))
    backend.close()


@pytest.mark.parametrize("imitated", ["cuda fp32 3"], indirect=True)
@pytest.mark.parametrize("integrated", [True, False])
def test_bench_times_both_ways_of_a_frame_on_a_jetson(
    imitated: Imitated, integrated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    imitated.calls.driver.fake_gpu(integrated, 87, 16, 31)
    arguments = [str(imitated.folder), "--backend", "onnxruntime-cuda", "--protocol", "P5", "--seconds", "0.5"]
    assert bench(["speed", *arguments]) == 0
    printed = capsys.readouterr().out
    assert (", mapped" in printed) == integrated, printed


def test_a_frame_costs_what_was_promised(imitated: Imitated) -> None:
    calls, backend = imitated.calls, imitated.open()
    tracker = Tracker(backend)
    calls.forget()
    tracker.init(FRAMES[0], BOX)
    # The frame's part and the window go up, the template runs once, and its state stays on the device.
    states = len(backend.manifest.state)
    assert (calls["upload"], calls["kernel"], calls["enqueue"], calls["download"]) == (2, 1, 1, 0)
    assert calls["copy"] == states
    tracker.update(FRAMES[1])
    calls.forget()
    uploaded = 0
    for frame in FRAMES[2:]:
        window = crop_window(tracker._targets[0].box, backend.manifest.search_factor)
        left, top, right, bottom = kernel.covered([window], frame.shape)
        uploaded += 3 * (right - left) * (bottom - top) + kernel.WINDOW.itemsize
        tracker.update(frame)
    frames = len(FRAMES) - 2
    assert calls.bytes_up == uploaded, "only what the window shows is copied"
    assert calls["kernel"] == calls["download"] == frames
    assert calls["upload"] == 2 * frames, "beside the frame one small copy"
    if imitated.kind == "tensorrt":
        assert (calls["enqueue"], calls["cuGraphLaunch"], calls["cuStreamSynchronize"]) == (0, frames, frames)
    for never in ("capture", "cuMemAlloc", "cuMemHostAlloc", "copy", "cuModuleLoadData", "cuCtxSynchronize"):
        assert calls[never] == 0, never
    tracker.init(FRAMES[3], BOX)
    tracker.update(FRAMES[4])
    assert calls["capture"] == 0, "a new target needs no new graph"
    backend.close()


def test_targets_come_and_go(imitated: Imitated) -> None:
    """Batches, several groups and moved slots give what single trackers give."""
    backend = imitated.open()
    manifest = backend.manifest
    many = MultiTracker(backend)
    starts = [BOX, (20, 20, 60, 50), (150, 100, 40, 70), (30, 150, 90, 60), (200, 40, 50, 50)]
    singles = {}
    for start in starts:
        target = many.add(FRAMES[0], start)
        singles[target] = Tracker(OnnxRuntimeBackend(imitated.folder, manifest))
        singles[target].init(FRAMES[0], start)
    for i, frame in enumerate(FRAMES[1:]):
        if i == 2:
            gone = next(iter(singles))
            many.remove(gone)
            del singles[gone]
        tracks = many.update(frame)
        assert set(tracks) == set(singles)
        for target, single in singles.items():
            # One run of a batch rounds differently from several of one.
            tolerance = 0.3 if "16" in manifest.precision else 1e-2
            np.testing.assert_allclose(tracks[target].box, single.update(frame).box, atol=tolerance)
    backend.close()


@one_of_each
def test_every_number_of_targets_keeps_its_step(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = imitated.open()
    backend.reserve(3)
    windows = [CropWindow(10, 10, 40, (30.0, 30.0))] * 3

    def made() -> int:
        return imitated.calls["capture"] if imitated.kind == "tensorrt" else len(imitated.library.captures)

    for count in (1, 2, 3, 2, 1, 3, 1):
        backend.search(FRAMES[0], windows[:count])
    assert made() == 3
    backend.close()
    monkeypatch.setattr(device, "KEPT", 2)
    backend = imitated.open()
    backend.reserve(3)
    for count in (1, 2, 1, 3, 1, 2):
        backend.search(FRAMES[0], windows[:count])
    assert made() == 3 + 4, "2 was not used for longest when 3 came, and was made anew"
    backend.close()


@only_onnxruntime
def test_every_group_has_a_graph_of_its_own(imitated: Imitated) -> None:
    backend = imitated.open()
    backend.reserve(6)
    alone = [backend.search(FRAMES[1], [CropWindow(10 * i, 10, 80, (0.0, 0.0)) for i in range(6)])]
    assert len(set(imitated.library.captures)) == len(imitated.library.captures) == 2
    assert not np.array_equal(alone[0][:3], alone[0][3:])
    backend.close()


@only_onnxruntime
def test_onnxruntime_runs_on_our_stream_without_tf32(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    imitated.open().close()
    name, options = imitated.library.opened[-1][0]
    assert name == "CUDAExecutionProvider" and options["user_compute_stream"] == "5" and options["use_tf32"] == "0"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    OnnxRuntimeGpuBackend(imitated.folder, load_manifest(imitated.folder), "tensorrt").close()
    providers = imitated.library.opened[-1]
    assert [p for p, _ in providers] == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert providers[0][1]["trt_engine_cache_path"] == "/cache/asymtrack-edge/onnxruntime-tensorrt"
    assert all(options["user_compute_stream"] == "5" for _, options in providers[:2])


@only_onnxruntime
def test_a_session_on_another_stream_or_provider_is_refused(
    imitated: Imitated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imitation._Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="libraries do not load"):
        imitated.open()
    monkeypatch.undo()


@only_onnxruntime
def test_without_the_provider_it_says_what_to_install(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitated.library, "get_available_providers", lambda: ["CPUExecutionProvider"], raising=False)
    with pytest.raises(BackendError, match="pip uninstall onnxruntime, then pip install onnxruntime-gpu"):
        imitated.open()


@one_of_each
def test_closing_twice_and_dropping_give_everything_back_once(imitated: Imitated) -> None:
    backend = imitated.open()
    boxes(backend)
    backend.close()
    backend.close()
    assert imitated.calls["cuDevicePrimaryCtxRelease"] == 1
    with pytest.raises(BackendError, match="closed"):
        backend.reserve(1)
    for _ in range(20):
        boxes(imitated.open())
    assert imitated.calls["cuDevicePrimaryCtxRelease"] == 21, "a dropped backend is given back when its last name goes"
    assert imitated.calls.driver.fake_allocated() == 0


@pytest.mark.parametrize("fails", ["upload", "download", "kernel"])
@one_of_each
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


@only_onnxruntime
def test_a_run_that_fails_is_one_line(imitated: Imitated) -> None:
    backend = imitated.open()
    boxes(backend)
    imitated.library.fails = True
    with pytest.raises(BackendError, match=r"onnxruntime cannot run template.onnx: CUDA failure 700"):
        boxes(backend)
    backend.close()


@pytest.mark.parametrize("call", ["begin capture", "end capture", "instantiate"])
@only_tensorrt
def test_a_capture_that_fails_is_said_and_does_no_harm(
    imitated: Imitated, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    imitated.calls.driver.fake_refuse(call.encode(), 900)
    backend = imitated.open()
    boxes(backend)
    assert not backend.graphs and "ERROR_900" in caplog.text
    backend.close()


@only_tensorrt
def test_a_capture_that_is_interrupted_is_ended(imitated: Imitated) -> None:
    backend = imitated.open()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with backend.cuda.current():
        with pytest.raises(KeyboardInterrupt):
            backend.cuda.capture(interrupted)
        backend.cuda.synchronise()
    backend.close()


@one_of_each
def test_images_that_the_kernel_cannot_write_are_refused(imitated: Imitated) -> None:
    manifest = load_manifest(imitated.folder)
    for wrong in (
        TensorSpec("image", "float16", manifest.search.shape),
        TensorSpec("image", manifest.search.dtype, (4, 96, 96)),
        TensorSpec("image", manifest.search.dtype, (3, 96, 64)),
    ):
        with pytest.raises(BackendError, match="the crop kernel writes"):
            DeviceBackend.__init__(object.__new__(TensorRTBackend), replace(manifest, search=wrong), "")
    assert imitated.calls["cuMemAlloc"] == 0, "nothing was bound"


@only_tensorrt
def test_nothing_of_tensorrt_outlives_the_gpus_context(imitated: Imitated) -> None:
    backend = imitated.open()
    boxes(backend)
    backend.close()
    assert imitated.library.dead == {False: 4, True: 0}, "two engines, two contexts"


@only_tensorrt
def test_opening_that_fails_late_gives_everything_back_in_order(imitated: Imitated) -> None:
    imitated.library.refuses_addresses = True
    with pytest.raises(BackendError, match="does not take an address for image"):
        imitated.open()
    gc.collect()
    assert imitated.library.dead == {False: 3, True: 0}


@only_tensorrt
def test_what_tensorrt_warns_of_reaches_the_log(imitated: Imitated, caplog: pytest.LogCaptureFixture) -> None:
    imitated.library.warnings.append("Using an engine plan file across\n different models of devices")
    imitated.open().close()
    assert "TensorRT: Using an engine plan file across different models of devices" in caplog.text


def test_before_tensorrt_10_each_context_has_an_engine_of_its_own(
    exports: Any, gpu: imitation.Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = install(gpu.driver, monkeypatch, "8.5.2.2")
    folder = imitation.add_engines(exports("fp32", "orin", 3), tmp_path / "old", old)
    backend = TensorRTBackend(folder, load_manifest(folder))
    many = MultiTracker(backend)
    targets = [many.add(FRAMES[0], (20 + 30 * i, 30, 50, 40)) for i in range(5)]
    assert list(many.update(FRAMES[1])) == list(many.update(FRAMES[2])) == targets
    backend.close()


@one_of_each
def test_a_frame_too_large_for_the_memory_does_no_harm(imitated: Imitated) -> None:
    backend = imitated.open()
    window = CropWindow(10, 10, 40, (30.0, 30.0))
    small, large = np.zeros((60, 80, 3), np.uint8), np.zeros((600, 800, 3), np.uint8)
    backend.template(small, window)
    imitated.calls.driver.fake_largest(large.nbytes - 1)
    for _ in range(2):
        with pytest.raises(BackendError, match="cuMemAlloc"):
            backend.template(large, window)
        backend.template(small, window)  # the driver refuses copies to memory that is not allocated
    imitated.calls.driver.fake_largest(-1)
    for frame, allocations in ((large, 1), (small, 0), (large, 0)):
        imitated.calls.forget()
        backend.template(frame, window)
        assert imitated.calls["cuMemAlloc"] == allocations
    backend.close()


class OnDevice:
    """A frame in the imitated device memory, as other packages offer theirs."""

    def __init__(self, frame: np.ndarray, version: int = 3, layout: str = "", **more: Any) -> None:
        self.frame = frame
        self.shape = frame.shape
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

    exports = 0

    def __init__(self, frame: np.ndarray) -> None:
        self.frame, self.shape = frame, frame.shape

    def __dlpack_device__(self) -> Any:
        return 2, 0

    def __dlpack__(self, stream: Any = None) -> Any:
        assert stream == 5, "the owner has to know our stream"
        ByDlpack.exports += 1
        return self.frame.__dlpack__()


class LikeTorch(ByDlpack):
    """PyTorch's tensors have both, and their interface does not tell the stream that they are made on."""

    @property
    def __cuda_array_interface__(self) -> Any:
        return {**OnDevice(self.frame).__cuda_array_interface__, "version": 2}


def padded(frame: np.ndarray) -> np.ndarray:
    wide = np.zeros((frame.shape[0], frame.shape[1] + 5, 3), np.uint8)
    wide[:, : frame.shape[1]] = frame
    return wide[:, : frame.shape[1]]


#: How a frame is put on the device; calls of a frame that wait for its stream, and for the whole GPU.
PLACES = {
    "ready": (lambda f: OnDevice(f, stream=None), 0, 0),
    "stream": (lambda f: OnDevice(f, stream=1), 1, 0),
    "version 2": (lambda f: OnDevice(f, version=2), 0, 1),
    "jetson rgb8": (lambda f: OnDevice(np.ascontiguousarray(f[..., ::-1]), layout="rgb8"), 0, 1),
    "jetson bgr8": (lambda f: OnDevice(f, layout="bgr8"), 0, 1),
    "padded rows": (lambda f: OnDevice(padded(f), stream=None), 0, 0),
    "dlpack": (ByDlpack, 0, 0),
    "both": (LikeTorch, 0, 0),
}


@pytest.mark.parametrize("kind", PLACES)
@one_of_each
def test_frames_on_the_device_are_read_in_place(imitated: Imitated, kind: str) -> None:
    put, waits, stops = PLACES[kind]
    backend = imitated.open()
    wanted = boxes(backend)
    imitated.calls.forget()
    ByDlpack.exports = 0
    there = [put(frame) for frame in FRAMES]
    tracker = Tracker(backend)
    tracker.init(there[0], BOX)
    got = np.array([tracker.update(frame).box for frame in there[1:]])
    np.testing.assert_array_equal(got, wanted)
    assert imitated.calls.bytes_up == len(FRAMES) * kernel.WINDOW.itemsize
    assert imitated.calls["cuStreamWaitEvent"] == waits * len(FRAMES)
    assert imitated.calls["cuCtxSynchronize"] == stops * len(FRAMES)
    assert ByDlpack.exports == (len(FRAMES) if kind in ("dlpack", "both") else 0), "once a frame"
    backend.close()


@one_of_each
def test_unusable_frames_are_refused(imitated: Imitated) -> None:
    backend = imitated.open()
    frame = FRAMES[0]
    for wrong, words in (
        (OnDevice(frame.astype(np.float32)), "uint8"),
        (OnDevice(frame[..., ::-1]), "strides"),
        (OnDevice(frame[..., 0]), "shape"),
        (OnDevice(frame, layout="rgba8"), "bgr8 or rgb8, not rgba8"),
        (None, "nothing"),
    ):
        with pytest.raises(FrameError, match=words):
            backend.check_frame(wrong)
    elsewhere = ByDlpack(frame)
    elsewhere.__class__ = type("Elsewhere", (ByDlpack,), {"__dlpack_device__": lambda self: (2, 1)})
    with pytest.raises(FrameError, match="lies on cuda:1, the tracker runs on cuda:0"):
        backend.check_frame(elsewhere)
    backend.close()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tensorrt": "8.5.2.2"}, "TensorRT 8.5.2.2, here is 10.3.0"),
        ({"gpu": "Xavier"}, "the GPU Xavier, here is Imitation"),
        ({"compute_capability": "7.2"}, "compute capability 7.2"),
        ({"multiprocessors": "8"}, "a GPU of 8 multiprocessors, here are 16"),
        ({"memory_gb": "64"}, "a board of 64 GB, here are 32"),
        ({"model_sha256": "0" * 64}, "another model"),
        ({"batch": "1-2-2"}, "batches of 1-2-2"),
        ({"format": "1"}, "an earlier version of asymtrack-edge"),
    ],
)
@only_tensorrt
def test_a_foreign_engine_is_refused(imitated: Imitated, change: Any, words: str) -> None:
    imitation.edit_key(imitated.folder, **change)
    with pytest.raises(BackendError, match="asymtrack-build") as caught:
        imitated.open()
    assert words in str(caught.value)
    assert unfit(load_manifest(imitated.folder)) == str(caught.value)


@only_tensorrt
def test_rtx_says_which_gpus_it_does_not_support(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = replace(tensorrt.load_tensorrt("tensorrt"), flavour="tensorrt-rtx")
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: rtx)
    manifest = replace(load_manifest(imitated.folder), target="rtx")
    for capability, supported in ((75, True), (89, True), (90, False), (103, False), (120, True), (87, False)):
        imitated.calls.driver.fake_gpu(0, capability, 16, 31)
        reason = unfit(manifest)
        assert reason is not None
        assert ("does not run on Imitation" in reason) == (not supported), reason
        assert ("asymtrack-build" in reason) == supported


@only_tensorrt
def test_an_altered_engine_is_never_loaded(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(imitated.folder)
    path = imitated.folder / "template.engine"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    monkeypatch.setattr(imitated.library.Runtime, "deserialize_cuda_engine", lambda *_: pytest.fail("deserialised"))
    with pytest.raises(ManifestError, match="altered"):
        TensorRTBackend(imitated.folder, manifest)


def test_without_gpu_it_says_so(exports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARIES", ("libcuda-of-nowhere.so",))
    folder = exports("fp32", "orin", 3)
    with pytest.raises(BackendError, match="no CUDA driver"):
        TensorRTBackend(folder, load_manifest(folder))
    with pytest.raises(BackendError, match="no CUDA driver"):
        cuda_driver.open_cuda(0)


@only_onnxruntime
def test_auto_falls_back_to_the_cpu_and_says_why(
    imitated: Imitated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", imitated.library.get_available_providers)
    backend = open_backend(imitated.folder)
    assert backend.name == "onnxruntime-cuda"
    backend.close()
    monkeypatch.setattr(imitation._Session, "get_providers", lambda self: ["CPUExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert open_backend(imitated.folder).name == "onnxruntime"
    assert "not onnxruntime-cuda: " in caplog.text and "CUDA and cuDNN libraries do not load" in caplog.text
    with pytest.raises(BackendError, match="libraries do not load"):
        open_backend(imitated.folder, device="cuda")


class TestPycuda:
    """PyCUDA in the driver's place: it serves where it works, and is not noticed where it does not."""

    def open(self, monkeypatch: pytest.MonkeyPatch, driver: ctypes.CDLL, module: Any) -> cuda_driver.CudaDevice:
        import sys

        monkeypatch.setattr(cuda_driver, "load_driver", lambda: driver)
        ours = "asymtrack_edge.runtime.backends.cuda.pycuda"
        monkeypatch.setitem(sys.modules, ours, None)
        del sys.modules[ours]  # imported with this module, and forgotten after the test
        monkeypatch.setitem(sys.modules, "pycuda", module)
        monkeypatch.setitem(sys.modules, "pycuda.driver", getattr(module, "driver", None))
        return cuda_driver.open_cuda(0)

    def test_one_that_cannot_start_is_not_noticed(
        self, gpu: imitation.Calls, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
    ) -> None:
        device_ = self.open(monkeypatch, gpu.driver, None)
        assert device_.name == "CUDA driver" and not recwarn.list
        device_.close()

    def test_it_gives_back_in_order_and_its_errors_are_ours(
        self, gpu: imitation.Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pycuda = imitation.Pycuda()
        device_ = self.open(monkeypatch, gpu.driver, pycuda)
        assert device_.name == "PyCUDA"
        with device_.current():
            with pytest.raises(BackendError, match="CUDA failed: out of memory"):
                device_.allocate(-1)
            device_.kernel(b"", kernel.KERNEL, kernel.TYPES)((1, 1, 1), (1, 1, 1), ())
            device_.pinned(16)
        del device_
        gc.collect()
        assert pycuda.events == [
            *("push", "pop"),  # to make stream and event
            *("push", "launch", "pop"),
            *("push", "host freed", "unloaded", "stream gone", "pop", "detach"),
        ]
