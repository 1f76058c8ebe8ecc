"""The device pipeline on an imitated GPU: the same tracks as on the CPU, and errors that a real GPU rarely shows."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Optional
from unittest.mock import MagicMock

import numpy as np
import pytest

from asymtrack_edge.benchmarks.speed import measure  # noqa: F401 - imported before the imitation is in place
from asymtrack_edge.benchmarks.speed.command import main as bench
from asymtrack_edge.errors import BackendError, FrameError, ManifestError, UsageError
from asymtrack_edge.geometry import CropWindow
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.backends import device, onnxruntime_gpu
from asymtrack_edge.runtime.backends.cuda import driver as cuda_driver
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from asymtrack_edge.runtime.backends.onnxruntime_gpu import OnnxRuntimeGpuBackend
from asymtrack_edge.runtime.backends.tensorrt import backend as tensorrt
from asymtrack_edge.runtime.backends.tensorrt.backend import TensorRTBackend
from tests.runtime.fakes import imitation
from tests.runtime.fakes.imitation import BOX, FRAMES, Imitated, boxes
from tests.runtime.simulated import as_argument, check_several, coloured_patches, write_video

WINDOW = CropWindow(10, 10, 40, (30.0, 30.0))


@pytest.mark.parametrize("way", ["graph", "cannot be captured", "mapped"])
@pytest.mark.parametrize("engine", ["tensorrt", "onnxruntime"])
def test_tracks_as_onnxruntime_does(imitated: Imitated, engine: str, way: str, monkeypatch: Any, caplog: Any) -> None:
    imitated.calls.driver.fake_gpu(way == "mapped", 87, 16, 31)
    imitated.refuse("begin capture", 801 if way == "cannot be captured" else 0)
    ort = imitation.onnxruntime_gpu(imitated.calls.driver, refuses_graphs=way == "cannot be captured")
    monkeypatch.setattr(onnxruntime_gpu, "ort", ort)
    manifest = load_manifest(imitated.folder)
    backend = imitated.open() if engine == "tensorrt" else OnnxRuntimeGpuBackend(imitated.folder, manifest)
    if way == "mapped":
        backend.map_frames()
    np.testing.assert_allclose(boxes(backend), boxes(OnnxRuntimeBackend(imitated.folder, manifest)), atol=1e-3)
    graph = backend._open.networks["search"].graph
    assert graph == (way != "cannot be captured") and ("CUDA graph" in caplog.text) != graph
    backend.close()
    backend.close()
    assert imitated.calls["cuDevicePrimaryCtxRelease"] == 1
    with pytest.raises(UsageError, match="closed"):
        backend.reserve(1)


@pytest.mark.parametrize("integrated", [True, False])
def test_bench_times_copied_and_mapped_frames_on_a_jetson(imitated: Imitated, integrated: bool, capsys: Any) -> None:
    imitated.calls.driver.fake_gpu(integrated, 87, 16, 31)
    clip = imitated.folder.with_name("clip.avi")
    write_video(clip, 4)
    box = next(coloured_patches(1))[1][0]
    arguments = ["--backend", "tensorrt", "--protocol", "P5", "--seconds", "0.1", "--clip", str(clip)]
    assert bench(["speed", str(imitated.folder), *arguments, "--box", as_argument(box)]) == 0
    assert (", mapped" in capsys.readouterr().out) == integrated


def test_driver_calls_per_frame(imitated: Imitated) -> None:
    calls, backend = imitated.calls, imitated.open()
    tracker = Tracker(backend)
    tracker.init(FRAMES[0], BOX)
    tracker.update(FRAMES[1])
    calls.forget()
    for frame in FRAMES[2:]:
        tracker.update(frame)
    frames = len(FRAMES) - 2
    assert calls.driver.fake_bytes_up() < frames * FRAMES[0].nbytes, "more than the window was copied"
    assert calls["kernel"] == calls["download"] == frames and calls["upload"] == 2 * frames
    assert (calls["enqueue"], calls["cuGraphLaunch"], calls["cuStreamSynchronize"]) == (0, frames, frames)
    tracker.init(FRAMES[3], BOX)
    tracker.update(FRAMES[4])
    for never in ("capture", "cuMemAlloc", "cuMemHostAlloc", "cuModuleLoadData", "cuCtxSynchronize"):
        assert calls[never] == 0, never


RUNS = [("fp32 3", "tensorrt"), ("fp32 3", "onnxruntime"), ("fp16 1", "tensorrt"), ("fp32 3 8.5.2.2", "tensorrt")]


@pytest.mark.parametrize(("imitated", "engine"), RUNS, indirect=["imitated"])
def test_targets_come_and_go(imitated: Imitated, engine: str, monkeypatch: Any) -> None:
    """Batches, groups and moved slots give single trackers' tracks; before TensorRT 10, each context has an engine."""
    starts = (BOX, (20, 20, 60, 50), (150, 100, 40, 70), (30, 150, 90, 60), (200, 40, 50, 50), (90, 90, 50, 60))
    manifest = load_manifest(imitated.folder)
    monkeypatch.setattr(onnxruntime_gpu, "ort", imitation.onnxruntime_gpu(imitated.calls.driver))
    opened = imitated.open() if engine == "tensorrt" else OnnxRuntimeGpuBackend(imitated.folder, manifest, "tensorrt")
    with MultiTracker(opened) as many:
        single = Tracker(OnnxRuntimeBackend(imitated.folder, manifest))
        # One run of a batch rounds differently from several runs of one target.
        pixels, score = (0.3, 0.02) if manifest.precision == "fp16" else (1e-2, 1e-3)
        check_several(many, single, FRAMES, starts, pixels, score)


def test_each_number_of_targets_keeps_its_captured_step(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    for kept, counts, captures in ((8, (1, 2, 3, 2, 1, 3, 1), 3), (2, (1, 2, 1, 3, 1, 2), 4)):
        monkeypatch.setattr(device, "KEPT", kept)
        backend = imitated.open()
        backend.reserve(3)
        imitated.calls.forget()
        for count in counts:
            backend.search(FRAMES[0], [WINDOW] * count)
        assert imitated.calls["capture"] == captures, "the least recently used is not dropped first"
        backend.close()


def test_if_onnxruntime_cannot_run_it_says_why(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(imitated.folder)
    ort = imitation.onnxruntime_gpu(imitated.calls.driver)
    for name, broken, words in (
        ("get_available_providers", lambda: ["CPUExecutionProvider"], "pip uninstall -y onnxruntime, then"),
        ("get_providers", lambda _: ["CPUExecutionProvider"], "libraries do not load"),
        ("run_with_iobinding", MagicMock(side_effect=RuntimeError("failure 700")), "cannot run .*failure 700"),
    ):
        monkeypatch.setattr(onnxruntime_gpu, "ort", ort)
        with monkeypatch.context() as patch, pytest.raises(BackendError, match=words):
            patch.setattr(ort if hasattr(ort, name) else ort.InferenceSession, name, broken, raising=False)
            boxes(OnnxRuntimeGpuBackend(imitated.folder, manifest))


def test_the_tensorrt_providers_engines_are_kept_by_weights_and_batch(imitated: Imitated, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(imitated.folder / "cache"))
    monkeypatch.setattr(onnxruntime_gpu, "ort", imitation.onnxruntime_gpu(imitated.calls.driver))
    backend = OnnxRuntimeGpuBackend(imitated.folder, load_manifest(imitated.folder), "tensorrt")
    backend.reserve(2)
    for count in (1, 2):
        backend.search(FRAMES[0], [WINDOW] * count)
    kept = list((imitated.folder / "cache" / "asymtrack-edge").glob("*/*-[12]"))
    assert len(kept) == 3, "one for the template network, two for the search network (one and two targets)"


def test_dropped_backends_release_everything_before_the_gpus_context(imitated: Imitated) -> None:
    for _ in range(3):
        boxes(imitated.open())
    assert imitated.calls["cuDevicePrimaryCtxRelease"] == 3 and imitated.calls.driver.fake_allocated() == 0
    assert imitated.library.died == [True] * 12, "each backend has two engines and two contexts"
    imitated.library.refuses_addresses = True
    with pytest.raises(BackendError, match="does not take an address for image"):
        imitated.open()
    gc.collect()
    assert imitated.library.died == [True] * 15


@pytest.mark.parametrize("fails", ["upload", "download", "kernel"])
def test_a_failed_call_leaves_no_queued_work(imitated: Imitated, fails: str) -> None:
    imitated.refuse("end capture", 900)  # so that it runs without a graph
    tracker = Tracker(imitated.open())
    tracker.init(FRAMES[0], BOX)
    wanted = tracker.update(FRAMES[1])
    tracker.init(FRAMES[0], BOX)
    imitated.refuse(fails, 700)
    with pytest.raises(BackendError, match="ERROR_700"):
        tracker.update(FRAMES[1])
    assert imitated.calls.driver.fake_pending() == 0
    imitated.refuse(fails, 0)
    assert tracker.update(FRAMES[1]) == wanted


def test_warnings_of_tensorrt_at_load_are_logged(caplog: Any) -> None:
    made = imitation.tensorrt(MagicMock())
    words = lambda logger: lambda _: logger.log(made.module.ILogger.WARNING, "a\n b")  # noqa: E731
    warning = lambda logger: MagicMock(deserialize_cuda_engine=words(logger))  # noqa: E731
    for runtime, said in ((warning, "a b"), (MagicMock(side_effect=TypeError("nullptr")), "it gave no reason")):
        made.module.Runtime = runtime
        with pytest.raises(BackendError, match=f"cannot load search.engine: {said}; the driver may be too old"):
            tensorrt.TensorRTNetwork(b"", "search.engine", MagicMock(), "search", made, 0)
    assert "TensorRT: a b" in caplog.text
    assert tensorrt.collecting_logger(made.module) is tensorrt.collecting_logger(made.module, warn=True)


@pytest.mark.parametrize("call", ["end capture", "instantiate"])
def test_a_failed_capture_is_reported_and_does_no_harm(imitated: Imitated, call: str, caplog: Any) -> None:
    imitated.refuse(call, 900)
    backend = imitated.open()
    boxes(backend)
    assert not backend._open.networks["search"].graph and "ERROR_900" in caplog.text
    with backend.cuda.current():
        with pytest.raises(KeyboardInterrupt):
            backend.cuda.capture(MagicMock(side_effect=KeyboardInterrupt))
        backend.cuda.synchronise()


def test_frames_and_targets_too_large_for_the_memory_do_no_harm(imitated: Imitated) -> None:
    backend = imitated.open()
    small, large = np.zeros((60, 80, 3), np.uint8), np.zeros((600, 800, 3), np.uint8)
    backend.template(small, WINDOW)
    imitated.calls.driver.fake_largest(300_000)
    held = imitated.calls.driver.fake_allocated()
    for fails in (partial(backend.template, large, WINDOW), partial(backend.reserve, 3)) * 2:
        with pytest.raises(BackendError, match="cuMemAlloc"):
            fails()
        backend.template(small, WINDOW)  # the driver refuses copies to memory that is not allocated
    assert imitated.calls.driver.fake_allocated() == held
    imitated.calls.driver.fake_largest(-1)
    for frame, allocations in ((large, 1), (small, 0), (large, 0)):
        imitated.calls.forget()
        backend.template(frame, WINDOW)
        assert imitated.calls["cuMemAlloc"] == allocations


def there(frame: np.ndarray, version: Optional[int] = 3, dlpack: Optional[int] = None, **more: Any) -> Any:
    """A frame in the imitated device memory, with the interfaces that other packages' arrays have.

    ``version`` is that of the CUDA array interface and ``dlpack`` the GPU that DLPack names; None leaves the interface
    out. ``more`` has the attribute ``format``, or further entries of the array interface.
    """
    found = SimpleNamespace(frame=frame, shape=frame.shape, asked=[])
    if "format" in more:
        found.format = more.pop("format")
    if version is not None:
        found.__cuda_array_interface__ = {
            "shape": frame.shape,
            "typestr": "|u1" if frame.dtype == np.uint8 else "<f4",
            "strides": None if frame.flags.c_contiguous else frame.strides,
            "data": (frame.ctypes.data, False),
            "version": version,
            **more,
        }
    if dlpack is not None:
        found.__dlpack_device__ = lambda: (2, dlpack) if dlpack >= 0 else (3, 0)  # pinned memory of the host
        found.__dlpack__ = lambda stream: found.asked.append(stream) or frame.__dlpack__()
    return found


def padded(frame: np.ndarray) -> np.ndarray:
    return np.pad(frame, ((0, 0), (0, 5), (0, 0)))[:, : frame.shape[1]]


#: How a frame is put on the device, and how many calls per frame wait for its stream and for the whole GPU.
PLACES = {
    "stream": (lambda f: there(f, stream=1), 1, 0),
    "version 2": (lambda f: there(f, version=2), 0, 1),
    "jetson rgb8": (lambda f: there(np.ascontiguousarray(f[..., ::-1]), format="rgb8"), 0, 1),
    "Numba, padded rows": (lambda f: there(padded(f), stream=None), 1, 0),
    "dlpack": (lambda f: there(f, version=None, dlpack=0), 0, 0),
    "both, as PyTorch": (lambda f: there(f, version=2, dlpack=0), 0, 0),
    "both, rgb8": (lambda f: there(np.ascontiguousarray(f[..., ::-1]), dlpack=0, format="rgb8"), 0, 0),
}


@pytest.mark.parametrize("kind", PLACES)
def test_frames_on_the_device_are_read_in_place(imitated: Imitated, kind: str) -> None:
    put, waits, stops = PLACES[kind]
    backend = imitated.open()
    wanted = boxes(backend)
    imitated.calls.forget()
    frames = [put(frame) for frame in FRAMES]
    np.testing.assert_array_equal(boxes(backend, frames), wanted)
    assert imitated.calls.driver.fake_bytes_up() == len(FRAMES) * kernel.WINDOW.itemsize
    assert imitated.calls["cuStreamWaitEvent"] == waits * len(FRAMES)
    assert imitated.calls["cuCtxSynchronize"] == stops * len(FRAMES)
    for frame in frames:
        assert frame.asked == ([5] if hasattr(frame, "__dlpack__") else []), "not asked once, with our stream"


def test_unusable_frames_are_refused(imitated: Imitated) -> None:
    backend = imitated.open()
    frame = FRAMES[0]
    for wrong, words in (
        (there(frame.astype(np.float32)), "uint8"),
        (there(frame[..., ::-1]), "strides"),
        (there(frame[..., 0]), "shape"),
        (there(frame, format="rgba8"), "bgr8 or rgb8, not rgba8"),
        (there(frame, dlpack=1), "is on cuda:1, but the tracker runs on cuda:0"),
        (there(frame, version=None, dlpack=-1), "frame"),
        (None, "nothing"),
    ):
        with pytest.raises(FrameError, match=words):
            backend.check_frame(wrong)


def test_a_foreign_or_altered_engine_is_never_loaded(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imitated.library, "Runtime", lambda logger: SimpleNamespace())
    path = imitated.folder / "template.engine"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ManifestError, match="altered"):
        imitated.open()
    path.write_bytes(content)
    imitated.calls.driver.fake_gpu(0, 87, 8, 31)
    with pytest.raises(BackendError, match="its multiprocessors is 16, here 8: build it here with asymtrack-build"):
        imitated.open()


def test_rtx_says_which_gpus_it_does_not_support(imitated: Imitated, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = replace(tensorrt.load_tensorrt("tensorrt"), flavour="tensorrt-rtx")
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda flavour: rtx)
    no, mend = "does not run on Imitation", "asymtrack-build"
    for capability, said in ((75, "only .* --fp16"), (89, mend), (90, no), (103, no), (120, mend), (87, no)):
        imitated.calls.driver.fake_gpu(0, capability, 16, 31)
        with pytest.raises(BackendError, match=said):
            TensorRTBackend(imitated.folder, replace(load_manifest(imitated.folder), platform="rtx"))


@pytest.mark.parametrize("works", [True, False])
def test_pycuda_is_used_if_it_works_and_silently_skipped_otherwise(
    works: bool, calls: imitation.Calls, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    class Host(np.ndarray):
        free = MagicMock()

    cuda, left = MagicMock(Error=type("Error", (Exception,), {})), []
    cuda.mem_alloc.side_effect = cuda.Error
    cuda.pagelocked_empty = lambda size, dtype, mem_flags: np.zeros(size, dtype).view(Host)[:].view(Host)
    monkeypatch.setitem(sys.modules, "pycuda", MagicMock(driver=cuda) if works else None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", cuda)
    monkeypatch.setitem(sys.modules, "asymtrack_edge.runtime.backends.cuda.pycuda", None)
    del sys.modules["asymtrack_edge.runtime.backends.cuda.pycuda"]  # so that it is imported for this test only
    opened: Any = cuda_driver.open_cuda(0)
    assert type(opened).__name__ == ("PycudaDevice" if works else "CudaDevice") and not recwarn.list
    if not works:
        opened.close()
        return
    streams, context = opened._streams, cuda.Device(0).retain_primary_context()
    context.detach.side_effect = lambda: left.append((len(streams), Host.free.call_count))
    with opened.current():
        with pytest.raises(BackendError, match="CUDA failed"):
            opened.allocate(-1)
        opened.kernel(b"", kernel.KERNEL, kernel.TYPES)((1, 1, 1), (1, 1, 1), ())
        opened.pinned(16)
    assert cuda.module_from_buffer().get_function().prepared_async_call.call_count == 1
    opened.driver.get(cuda_driver.c_void_p, "cuDevicePrimaryCtxRetain", 0)  # as PyCUDA does
    ThreadPoolExecutor(1).submit(opened.close).result()  # in another thread, PyCUDA does not release the context
    assert left == [(0, 1)], "stream and memory must be released before the context"
    assert context.push.call_count == cuda.Context.pop.call_count
