"""``make gpu-check``: checks that need a real NVIDIA GPU; they take four minutes, plus building engines.

Usage: ``python -m tests.gpu.check [--dry] [--json FILE] [--only NAME,...]`` in the root of the repository. It needs
numpy and OpenCV, and no network. With PyTorch, onnx, onnxruntime-gpu or TensorRT it checks more; it lists the checks
that it could not run. Exit code 1 means that a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib
import io
import json
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.benchmarks.speed.machine import facts
from asymtrack_edge.benchmarks.speed.race import timed
from asymtrack_edge.benchmarks.tables import markdown_table
from asymtrack_edge.checkpoints import bundled_weights, open_checkpoint
from asymtrack_edge.errors import AsymTrackError
from asymtrack_edge.geometry import Box, Cropper, CropWindow, crop_window, iou
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.runtime.backends.cuda.driver import open_cuda
from asymtrack_edge.runtime.backends.device import DeviceBackend
from asymtrack_edge.runtime.commands import check as check_command
from asymtrack_edge.runtime.sources.clip import default_clip, synthetic_clip
from asymtrack_edge.variants import VARIANTS
from tests.gpu.machine import PRECISIONS, Machine

#: Seconds after which no further check is started and no further tracker opened.
LONGEST = 220.0

BATCHES = (1, 8, 32)
#: The measurement that others are compared with.
REFERENCE = "reference form, eager PyTorch, fp32"

#: How each library copies an array into the GPU's memory; the key is the library that is needed.
GPU_ARRAYS: Dict[str, Callable[[np.ndarray], Any]] = {
    "torch": lambda frame: importlib.import_module("torch").from_numpy(frame).cuda(),
    "cupy": lambda frame: importlib.import_module("cupy").asarray(frame),
    "numba": lambda frame: importlib.import_module("numba.cuda").to_device(frame),
}

Row = Dict[str, Any]


def kernel_equals_opencv(machine: Machine) -> str:
    """Compares the crop kernel, compiled for this GPU, with OpenCV: floats and bytes, BGR and RGB."""
    frame = next(synthetic_clip(1))[0]
    cuda = open_cuda(0)
    worst, compared, size = 0, 0, 128
    records = np.zeros(1, kernel.WINDOW)
    planes, pixels = np.zeros((3, size, size), np.float32), np.zeros((size, size, 3), np.uint8)
    with cuda.current():
        launch = kernel.load_crop(cuda)
        there, windows, out = (cuda.allocate(n) for n in (frame.nbytes, records.nbytes, planes.nbytes))
        for side, rgb in product((1, 7, 100, 128, 131, 256, 257, 512), (False, True)):
            source = np.ascontiguousarray(frame[..., ::-1]) if rgb else frame
            window = CropWindow(-20, 30, side, (0.0, 0.0))
            cuda.upload(there, source)
            kernel.write_windows(records, (window,), there, frame.strides[0], frame.shape, rgb)
            cuda.upload(windows, records)
            for as_bytes, result in ((0, planes), (1, pixels)):
                arguments = (windows, out, size, as_bytes, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
                launch(kernel.grid(size, 1), kernel.BLOCK, arguments)
                cuda.download(result, out)
            cuda.synchronise()
            crop = np.zeros((size, size, 3), np.uint8)
            Cropper().crop(frame, window, crop)
            for ours in (planes.transpose(1, 2, 0)[..., ::-1], pixels):
                worst = max(worst, int(np.abs(ours.astype(int) - crop.astype(int)).max()))
                compared += 1
    cuda.close()
    allowed = int(machine.integrated)  # on arm64, OpenCV resizes with different code
    assert worst <= allowed, f"{compared} crops differ from OpenCV's by up to {worst}"
    return f"{compared} crops through {type(cuda).__name__}, largest difference {worst}"


def follow(tracker: Tracker, frames: Sequence[Any], box: Box) -> List[Box]:
    """Boxes of the target in all frames after the first, in which it is marked."""
    tracker.init(frames[0], box)
    return [tracker.update(frame).box for frame in frames[1:]]


def agrees(backend: str, precision: str, machine: Machine) -> str:
    opened = machine.open(backend, precision)
    follow(Tracker(opened), *default_clip(2))
    graphs, model = opened._open.networks["search"].graph, machine.model(precision, opened.manifest.platform)
    opened.close()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = check_command.main([str(model), "--backend", backend])
    said = output.getvalue().strip()
    assert code == 0, said
    # With the TensorRT provider, a CUDA graph is not guaranteed.
    assert graphs or backend == "onnxruntime-tensorrt", f"it runs without a CUDA graph: {said}"
    return said


def nothing_leaks(machine: Machine) -> str:
    """200 trackers (or as many as there is time for) opened, used and dropped without ``close``."""
    backend, precision = machine.backends()[0]
    frames, box = default_clip(2)
    watch = open_cuda(0)
    free: List[int] = []
    while len(free) < 12 or (len(free) < 200 and time.monotonic() - machine.began < LONGEST):
        follow(Tracker(machine.open(backend, precision)), frames, box)
        with watch.current():
            left, total = ctypes.c_size_t(), ctypes.c_size_t()
            watch.driver.call("cuMemGetInfo_v2", ctypes.byref(left), ctypes.byref(total))
        free.append(left.value)
    watch.close()
    # The first trackers load libraries and kernels, which stay in memory.
    lost = (free[5] - free[-1]) / 2**20
    allowed = 256 if machine.integrated else 32  # an integrated GPU shares the system's memory
    assert lost < allowed, f"{len(free)} trackers leaked {lost:.0f} MiB of device memory"
    return f"{len(free)} trackers of {backend}, {lost:+.1f} MiB"


def two_threads_and_pytorch(machine: Machine) -> str:
    """Two trackers in two threads, while PyTorch computes in a third."""
    import torch

    backend, precision = machine.backends()[0]
    clip = default_clip(30)
    with Tracker(machine.open(backend, precision)) as alone:
        wanted = follow(alone, *clip)
    # Each thread captures a graph in its first update; until then no other thread may allocate.
    ready = threading.Barrier(3)

    def work() -> List[Box]:
        try:
            with Tracker(machine.open(backend, precision)) as tracker:
                follow(tracker, *clip)
                ready.wait(60)
                return [follow(tracker, *clip) for _ in range(3)][-1]
        except BaseException:
            ready.abort()  # so that the others do not wait for it
            raise

    with ThreadPoolExecutor(2) as threads:
        working = [threads.submit(work) for _ in range(2)]
        with contextlib.suppress(threading.BrokenBarrierError):  # the cause is raised below
            ready.wait(60)
        a = torch.randn(1024, 1024, device="cuda")
        expected, rounds = float((a @ a).sum()), 0
        while not all(thread.done() for thread in working):
            assert float((a @ a).sum()) == expected, "PyTorch's result changes while the trackers run"
            rounds += 1
    working.sort(key=lambda thread: isinstance(thread.exception(), threading.BrokenBarrierError))
    for number, thread in enumerate(working):
        overlaps = [iou(ours, theirs) for ours, theirs in zip(thread.result(), wanted)]
        assert min(overlaps) > 0.99, f"thread {number} gives different boxes: least IoU {min(overlaps):.3f}"
    return f"two trackers of {backend} agree with a single one, during {rounds} matrix products of PyTorch"


def frames_on_the_gpu(library: str, machine: Machine) -> str:
    """Frames in a library's GPU arrays give the same boxes as frames in host memory."""
    backend, precision = machine.backends()[0]
    frames, box = default_clip(12)
    there = list(map(GPU_ARRAYS[library], frames))
    with Tracker(machine.open(backend, precision)) as tracker:
        apart = float(np.abs(np.subtract(follow(tracker, frames, box), follow(tracker, there, box))).max())
    assert apart < 0.01, f"frames on the GPU give different boxes: they differ by {apart:.3f} pixels"
    return f"{len(frames)} frames, boxes within {apart:.4f} pixels"


def _time(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call that waits for the GPU."""
    run = timed(call)
    run(20)
    return 1e3 * float(np.median(run(150)))


def speed(backend: str, precision: str, machine: Machine) -> List[Row]:
    """Times the search step and ``update()`` on 1280x720 frames, for each batch size."""
    frames = [frame for frame, _ in synthetic_clip(8, (1280, 720))]
    there = list(map(GPU_ARRAYS["torch"], frames)) if "torch" not in machine.missing else []
    opened = machine.open(backend, precision)
    rows = [row for batch in BATCHES for row in _backend_rows(opened, backend, precision, batch, frames, there)]
    opened.close()
    return rows


def speed_of_reference(machine: Machine) -> List[Row]:
    """Times the reference form in eager PyTorch, in fp32, which the others are compared with."""
    import torch

    from asymtrack_edge.benchmarks.reference_form import ReferenceForm

    rows: List[Row] = []
    with torch.inference_mode():
        for batch in BATCHES:
            z, x = (torch.randn(batch, 3, side, side, device="cuda") for side in (128, 256))
            form = ReferenceForm(open_checkpoint(bundled_weights(VARIANTS["T"])).model(VARIANTS["T"]).cuda()).eval()
            features = form.template(z)
            ms = _time(lambda f=form, x=x, t=features: (f(x, t), torch.cuda.synchronize()))
            rows.append({"what": REFERENCE, "batch": batch, "ms": ms})
    return rows


def _backend_rows(
    opened: DeviceBackend, backend: str, precision: str, batch: int, frames: Sequence[Any], there: Sequence[Any]
) -> List[Row]:
    boxes = [Box(600 - 10 * (i % 8), 330 + 10 * (i // 8), 90, 70) for i in range(batch)]
    many = MultiTracker(opened)
    targets = [many.add(frames[0], b) for b in boxes]
    opened.search(frames[1], [crop_window(b, opened.manifest.search_factor) for b in boxes])
    group = opened._open.groups[0]

    def step() -> None:
        with opened.cuda.current():
            group.run(batch)
            opened.cuda.synchronise()

    graph = opened._open.networks["search"].graph
    common = {"backend": backend, "precision": precision, "batch": batch, "graph": graph}
    rows = [{**common, "what": f"{backend} {precision}: crop and search network", "ms": _time(step)}]
    for place, given in (("on the host", frames), ("on the GPU", there)):
        if given:
            turn = cycle(given)
            ms = _time(lambda turn=turn: many.update(next(turn)))
            rows.append({**common, "what": f"{backend} {precision}: update(), frames {place}", "ms": ms})
    for target in targets:
        many.remove(target)
    return rows


class Check(NamedTuple):
    """A check. ``run`` returns a text or rows, and raises on failure; ``needs`` is as in ``Machine.lacks``."""

    name: str
    run: Callable[[Machine], Any]
    needs: Tuple[str, ...] = ("gpu",)


def _each(name: str, run: Callable[..., Any], *backends: str) -> List[Check]:
    return [Check(f"{name} {b} {p}", partial(run, b, p), (b, *PRECISIONS[p])) for b, p in product(backends, PRECISIONS)]


CHECKS = (
    Check("kernel against OpenCV", kernel_equals_opencv),
    *_each("check", agrees, "onnxruntime-cuda", "tensorrt"),
    *(Check(f"frames of {name}", partial(frames_on_the_gpu, name), ("any", name)) for name in GPU_ARRAYS),
    Check("speed of the reference", speed_of_reference, ("gpu", "torch")),
    *_each("speed", speed, "onnxruntime-cuda", "tensorrt"),
    Check("two threads and PyTorch", two_threads_and_pytorch, ("any", "torch")),
    *_each("check", agrees, "onnxruntime-tensorrt"),
    *_each("speed", speed, "onnxruntime-tensorrt"),
    Check("memory", nothing_leaks, ("any",)),
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=(__doc__ or "").splitlines()[0])
    add, default = parser.add_argument, Path("gpu-check.json")
    add("--dry", action="store_true", help="only list what would run here")
    add("--json", type=Path, default=default, metavar="FILE", help="the report (default: %(default)s)")
    add("--only", default="", metavar="NAME,...", help="run only checks whose names contain one of these")
    add("--table", type=Path, metavar="FILE", help="only print an existing report as the table of docs/gpu.md")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        print(markdown(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        began, machine = time.monotonic(), Machine(Path(folder))
        print(machine.gpu or f"no GPU: {machine.missing['gpu']}")
        chosen = [c for c in CHECKS if any(part in c.name for part in arguments.only.split(","))]
        if arguments.dry:
            for check in chosen:
                lack = machine.lacks(check.needs)
                print(f"would run   {check.name}" if lack is None else f"cannot run  {check.name}: {lack}")
            return 0
        versions = {"python": facts()["python"], **facts()["versions"]}
        gpu, today = machine.gpu and machine.gpu.__dict__, datetime.date.today().isoformat()
        results: List[Row] = []
        report: Row = {"date": today, "gpu": gpu, "versions": versions, "checks": results}
        for check in chosen:
            results.append(_run(check, machine))
            report["seconds"] = round(time.monotonic() - began, 1)
            _compare([row for result in results for row in result.get("rows", ())])
            # Written after each check: if a library crashes the process, earlier results are kept.
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(markdown(report))
    failed = [r["name"] for r in results if r["result"] == "failed"]
    absent = sum(r["result"] == "not run" for r in results)
    print(f"{len(failed)} of {len(results)} failed, {absent} not run; figures in {arguments.json}")
    return 1 if failed else 0


def _compare(rows: Sequence[Row]) -> None:
    reference = {row["batch"]: row["ms"] for row in rows if row["what"] == REFERENCE}
    for row in rows:
        if row["batch"] in reference:
            row["times_reference"] = round(reference[row["batch"]] / row["ms"], 2)


def _run(check: Check, machine: Machine) -> Dict[str, Any]:
    lack = machine.lacks(check.needs)
    if lack is None and time.monotonic() - machine.began > LONGEST:
        lack = "no time left"
    started = time.monotonic()
    result: Dict[str, Any] = {"name": check.name, "result": "not run", "detail": lack}
    if lack is None:
        try:
            said = check.run(machine)
            result.update({"detail": said} if isinstance(said, str) else {"detail": f"{len(said)} rows", "rows": said})
            result["result"] = "passed"
        except Exception as error:  # every failure is a finding
            if not isinstance(error, (AssertionError, AsymTrackError)):
                traceback.print_exc()
            result.update(result="failed", detail=f"{type(error).__name__}: {error}")
            traceback.clear_frames(error.__traceback__)
        gc.collect()
    seconds = time.monotonic() - started
    if "onnxruntime-tensorrt" in check.needs:  # it builds engines when it opens a model
        machine.began += seconds
    result["seconds"] = round(seconds, 1)
    print(f"{result['result']:8} {result['seconds']:6.1f} s  {check.name}: {result['detail']}", flush=True)
    return result


def markdown(report: Row) -> str:
    """The table of docs/gpu.md from a report."""
    table: Dict[str, Row] = {}
    for row in (row for check in report["checks"] for row in check.get("rows", ())):
        text = f"{row['ms']:.3f} ms ({row.get('times_reference', '-')} x)"
        table.setdefault(row["what"], {"step": row["what"]})[f"batch {row['batch']}"] = text
    card = (report["gpu"] or {"name": "no GPU"})["name"]
    libraries = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    note = f"{report['date']}; {libraries}. Model T; (x): speedup over the reference form."
    return markdown_table(card, list(table.values()), note)


if __name__ == "__main__":
    sys.exit(main())
