"""``make gpu-check``: everything that only a real NVIDIA GPU can show, in under four minutes, without a network.

Usage: ``python -m tests.gpu.check [--dry] [--json FILE] [--only NAME,...]`` in the root of the repository. It needs
numpy and OpenCV; with PyTorch, onnx, onnxruntime-gpu or TensorRT it checks more, and says what it could not.
``pytest tests/gpu`` runs the same checks one by one. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import datetime
import gc
import importlib.util
import io
import json
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.cli import BACKENDS
from asymtrack_edge.errors import BackendError
from asymtrack_edge.geometry import Box, Cropper, CropWindow, crop_window, iou
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.runtime.backends.cuda.driver import Gpu, find_gpu, open_cuda
from asymtrack_edge.runtime.backends.device import DeviceBackend
from asymtrack_edge.runtime.backends.loading import model_folder
from asymtrack_edge.runtime.backends.tensorrt.backend import RTX, TENSORRT, TensorRTBackend, load_tensorrt
from asymtrack_edge.runtime.sources.clip import synthetic_clip

#: Seconds after which nothing new is begun.
LONGEST = 220.0

#: What a step may take (docs/gpu.md): name of the measure, its largest ratio.
AIMS = {"search step fp16 to reference": 0.1, "update() on host frames": 1.5, "update() on device frames": 1.2}
AIMS.update({"32 targets to one": 3.0, "search step fp16 to best candidate": 1.15})

BATCHES = (1, 8, 32)

Row = Dict[str, Any]

#: Networks of T to check, and the packages that have to be there to make them.
PRECISIONS = {"fp32": (), "fp16": ("export",)}


class Machine:
    """What is there to check: the GPU, by what is ``missing`` why, and models made in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.gpu: Optional[Gpu] = None
        self.missing: Dict[str, str] = {}
        self.folder = folder
        for find in (self._find_gpu, _find_torch, _find_onnxruntime, _find_export):
            try:
                find()
            except Exception as error:
                self.missing[find.__name__[len("_find_") :]] = str(error).splitlines()[0]

    def _find_gpu(self) -> None:
        self.gpu = find_gpu(0)

    def model(self, precision: str, target: str = "onnx") -> Path:
        """A directory of T: the bundled one, or an export of its weights for batches up to 32."""
        if (precision, target) == ("fp32", "onnx"):
            return model_folder("T")
        made = self.folder / f"{precision}-{target}"
        if not made.exists():
            from asymtrack_edge.checkpoints import load_model
            from asymtrack_edge.export.pipeline import Export, ExportOptions
            from asymtrack_edge.variants import VARIANTS

            made.mkdir(parents=True)
            options = ExportOptions(precision, target, max_batch=32)
            Export(load_model(None, VARIANTS["T"]), options).write(made).save(made)
        return made

    def backends(self) -> List[Tuple[str, str]]:
        """Backends that can run here, each with a precision."""
        names = [n for n in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt") if self.lacks((n,)) is None]
        return [(name, precision) for name in names for precision, needs in PRECISIONS.items() if not self.lacks(needs)]

    def lacks(self, needs: Sequence[str]) -> Optional[str]:
        """Why what needs such (keys of ``missing``, a backend, ``"any"`` backend) cannot run here; None if it can."""
        for need in needs:
            reason = self.missing.get("gpu" if need in BACKENDS or need == "any" else need)
            if reason is None and need.startswith("onnxruntime-"):
                reason = self.missing.get("onnxruntime")
            if reason is None and need == "onnxruntime-tensorrt" and not _has_library("nvinfer"):
                reason = "there is no libnvinfer"
            if reason is None and need == "tensorrt":
                reason = self.missing.get("export") or self._lacks_tensorrt()
            if reason is None and need == "any" and not self.backends():
                reason = self.lacks(("onnxruntime-cuda",))
            if reason is not None:
                return reason
        return None

    def _lacks_tensorrt(self) -> Optional[str]:
        reasons = []
        for flavour in (TENSORRT, RTX):
            try:
                load_tensorrt(flavour)
                if flavour == TENSORRT:
                    return None
                folder = self.model("fp32", "rtx")
                TensorRTBackend(folder, load_manifest(folder)).close()
                return None
            except BackendError as error:
                if "has no" in str(error):  # engine yet: nothing speaks against this GPU
                    return None
                reasons.append(str(error))
        return "; ".join(reasons)

    def open(self, backend: str, precision: str) -> Any:
        """Opens a backend on T."""
        if backend != "tensorrt":
            from asymtrack_edge.runtime.backends.onnxruntime_gpu import OnnxRuntimeGpuBackend

            folder = self.model(precision)
            return OnnxRuntimeGpuBackend(folder, load_manifest(folder), backend.split("-")[1])
        from asymtrack_edge.runtime.backends.tensorrt.build import build_in_place

        try:
            load_tensorrt(TENSORRT)
            target = "xavier" if self.integrated else "orin"
        except BackendError:
            target = "rtx"
        folder = self.model(precision, target)
        build_in_place(folder)
        return TensorRTBackend(folder, load_manifest(folder))

    @property
    def integrated(self) -> bool:
        """Whether the GPU shares the CPU's memory, as on a Jetson."""
        return self.gpu is not None and self.gpu.integrated


def _find_torch() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} here has no CUDA")


def _find_onnxruntime() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError(f"onnxruntime {onnxruntime.__version__} here has no CUDA: install onnxruntime-gpu instead")


def _find_export() -> None:
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("torch") is None:
        raise RuntimeError("torch and onnx are needed to export in fp16")


def _has_library(name: str) -> bool:
    return bool(ctypes.util.find_library(name) or importlib.util.find_spec("tensorrt_libs"))


def kernel_equals_opencv(machine: Machine) -> str:
    """The crop kernel, compiled for this GPU, against OpenCV: floats and bytes, BGR and RGB."""
    frame = next(synthetic_clip(1))[0]
    cuda = open_cuda(0)
    worst, compared, size = 0, 0, 128
    records = np.zeros(1, kernel.WINDOW)
    planes, pixels = np.zeros((3, size, size), np.float32), np.zeros((size, size, 3), np.uint8)
    with cuda.current():
        launch = cuda.kernel(kernel.crop_module(cuda.gpu.compute_capability), kernel.KERNEL, kernel.TYPES)
        there, windows, out = (cuda.allocate(n) for n in (frame.nbytes, records.nbytes, planes.nbytes))
        for side in (1, 7, 100, 128, 131, 256, 257, 512):
            for rgb in (False, True):
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
    name = cuda.name
    cuda.close()
    # OpenCV on arm64 resizes by other code.
    allowed = int(machine.integrated)
    assert worst <= allowed, f"{compared} crops differ from OpenCV's by up to {worst}"
    return f"{compared} crops through the {name}, largest difference {worst}"


def agrees(backend: str, precision: str) -> Callable[[Machine], str]:
    """``asymtrack-check`` of a backend."""

    def run(machine: Machine) -> str:
        from asymtrack_edge.runtime.commands import check

        opened = machine.open(backend, precision)
        (first, box), (second, _) = synthetic_clip(2)
        tracker = Tracker(opened)
        tracker.init(first, box)
        tracker.update(second)
        graphs, target = opened.graphs, opened.manifest.target
        opened.close()
        said = io.StringIO()
        model = machine.model(precision, target)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = check.main([str(model), "--backend", backend])
        assert code == 0, said.getvalue().strip()
        # What ONNX Runtime leaves to TensorRT it need not be able to capture.
        assert graphs or backend == "onnxruntime-tensorrt", f"it runs without a CUDA graph: {said.getvalue().strip()}"
        return said.getvalue().strip()

    return run


def nothing_leaks(machine: Machine) -> str:
    """200 trackers (or as many as a minute has) opened, used and dropped without ``close``."""
    backend, precision = machine.backends()[0]
    clip = list(synthetic_clip(2))
    watch = open_cuda(0)
    began, free, opened = time.monotonic(), [], 0
    while opened < 200 and time.monotonic() - began < 60:
        tracker = Tracker(machine.open(backend, precision))
        tracker.init(*clip[0])
        tracker.update(clip[1][0])
        del tracker
        opened += 1
        with watch.current():
            free.append(watch.free_memory())
    watch.close()
    # The first ones load libraries and kernels, which stay.
    settled = min(5, opened - 1)
    lost = (free[settled] - free[-1]) / 2**20
    assert lost < 32, f"{lost:.0f} MiB of device memory are gone after {opened} trackers"
    return f"{opened} trackers of {backend}, {lost:+.1f} MiB"


def two_threads_and_pytorch(machine: Machine) -> str:
    """Two trackers in two threads, while PyTorch computes in a third."""
    import torch

    backend, precision = machine.backends()[0]
    clip = list(synthetic_clip(30))
    frames, box = [frame for frame, _ in clip], clip[0][1]

    def follow(tracker: Tracker) -> List[Box]:
        tracker.init(frames[0], box)
        return [tracker.update(frame).box for frame in frames[1:]]

    alone = Tracker(machine.open(backend, precision))
    wanted = follow(alone)
    alone.close()
    found: Dict[int, List[Box]] = {}
    # A graph is captured at the first update in a thread; nobody else may allocate meanwhile.
    ready = threading.Barrier(3)

    def work(number: int) -> None:
        tracker = Tracker(machine.open(backend, precision))
        follow(tracker)
        ready.wait(60)
        for _ in range(3):
            found[number] = follow(tracker)
        tracker.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    a = torch.randn(1024, 1024, device="cuda")
    expected, rounds = float((a @ a).sum()), 0
    while any(thread.is_alive() for thread in threads):
        assert float((a @ a).sum()) == expected, "PyTorch computes something else beside the trackers"
        rounds += 1
    for number in range(2):
        overlaps = [iou(ours, theirs) for ours, theirs in zip(found[number], wanted)]
        assert min(overlaps) > 0.99, f"thread {number} tracks otherwise: least IoU {min(overlaps):.3f}"
    return f"two trackers of {backend} as one alone, {rounds} products of PyTorch beside them"


def frames_of_pytorch(machine: Machine) -> str:
    """Tensors as frames give what host frames give."""
    import torch

    backend, precision = machine.backends()[0]
    clip = list(synthetic_clip(12))
    tracker = Tracker(machine.open(backend, precision))
    tracks = []
    for frames in ([f for f, _ in clip], [torch.from_numpy(f).cuda() for f, _ in clip]):
        tracker.init(frames[0], clip[0][1])
        tracks.append([tracker.update(frame).box for frame in frames[1:]])
    tracker.close()
    apart = float(np.abs(np.subtract(*tracks)).max())
    assert apart < 0.01, f"frames on the GPU are tracked otherwise: boxes differ by {apart:.3f} pixels"
    return f"{len(clip)} frames, boxes within {apart:.4f} pixels"


def _time(call: Callable[[], Any], rounds: int = 150) -> float:
    """Median milliseconds of a call that waits for the GPU."""
    for _ in range(20):
        call()
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        spent.append(time.perf_counter() - began)
    return 1e3 * float(np.median(spent))


def speed(machine: Machine) -> List[Row]:
    """Search step and ``update()`` on 1280x720 against the published form in eager PyTorch, on this GPU."""
    rows: List[Row] = []
    reference = _reference_rows(machine, rows)
    frames = [frame for frame, _ in synthetic_clip(8, (1280, 720))]
    there: Sequence[Any] = ()
    if "torch" not in machine.missing:
        import torch

        there = [torch.from_numpy(frame).cuda() for frame in frames]
    for backend, precision in machine.backends():
        try:
            opened = machine.open(backend, precision)
        except BackendError as error:
            rows.append({"what": f"{backend} {precision}", "failed": str(error)})
            continue
        for batch in BATCHES:
            rows += _backend_rows(opened, backend, precision, batch, frames, there)
        opened.close()
    for row in rows:
        base = reference.get(row.get("batch", 0))
        if base and "ms" in row:
            row["times_reference"] = round(base / row["ms"], 2)
    return rows


def _reference_rows(machine: Machine, rows: List[Row]) -> Dict[int, float]:
    """Times the published form in fp32, and the folded one as PyTorch's CUDA graph."""
    times: Dict[int, float] = {}
    if "torch" in machine.missing:
        return times
    import torch

    from asymtrack_edge.benchmarks.reference_form import ReferenceForm
    from asymtrack_edge.checkpoints import load_model
    from asymtrack_edge.variants import VARIANTS

    with torch.inference_mode():
        for batch in BATCHES:
            z, x = (torch.randn(batch, 3, side, side, device="cuda") for side in (128, 256))
            form = ReferenceForm(load_model(None, VARIANTS["T"]).cuda()).eval()
            features = form.template(z)
            times[batch] = _time(lambda f=form, x=x, t=features: (f(x, t), torch.cuda.synchronize()), 60)
            rows.append({"what": "reference, eager fp32", "batch": batch, "ms": times[batch]})
            if "export" not in machine.missing:
                for half in (False, True):
                    row = {"what": f"folded, PyTorch CUDA graph {'fp16' if half else 'fp32'}", "batch": batch}
                    try:
                        rows.append({**row, "ms": _time(_folded_graph(z, x, half))})
                    except RuntimeError as error:
                        rows.append({**row, "failed": str(error).splitlines()[0]})
    return times


def _folded_graph(z: Any, x: Any, half: bool) -> Callable[[], Any]:
    import torch

    from asymtrack_edge.checkpoints import load_model
    from asymtrack_edge.export.fold import fold, to_half
    from asymtrack_edge.export.split import SearchNetwork, TemplateNetwork
    from asymtrack_edge.manifest import FLOAT_RGB
    from asymtrack_edge.variants import VARIANTS

    model = fold(load_model(None, VARIANTS["T"]))
    model = (to_half(model) if half else model).cuda()
    state = TemplateNetwork(model, FLOAT_RGB).cuda()(z)
    search = SearchNetwork(model, FLOAT_RGB).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            search(x, *state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        search(x, *state)
    return lambda: (graph.replay(), torch.cuda.synchronize(), search)


def _backend_rows(
    opened: DeviceBackend, backend: str, precision: str, batch: int, frames: Sequence[Any], there: Sequence[Any]
) -> List[Row]:
    most = opened.manifest.max_batch
    if batch > most:
        return [{"what": f"{backend} {precision}", "batch": batch, "failed": f"exported for batches of {most}"}]
    box = Box(600, 330, 90, 70)
    boxes = [Box(box.x - 10 * (i % 8), box.y + 10 * (i // 8), box.w, box.h) for i in range(batch)]
    many = MultiTracker(opened)
    targets = [many.add(frames[0], b) for b in boxes]
    opened.search(frames[1], [crop_window(b, opened.manifest.search_factor) for b in boxes])
    group = opened._open.groups[0]

    def step() -> None:
        with opened.cuda.current():
            group.run(batch)
            opened.cuda.synchronise()

    common = {"backend": backend, "precision": precision, "batch": batch, "graph": opened.graphs}
    rows = [{**common, "what": f"{backend} {precision}: search step with crop", "ms": _time(step)}]
    for place, given in (("host", frames), ("device", there)):
        if given:
            turn = iter(range(10**9))
            ms = _time(lambda given=given, turn=turn: many.update(given[next(turn) % len(given)]))
            rows.append({**common, "what": f"{backend} {precision}: update() on {place} frames", "ms": ms})
    for target in targets:
        many.remove(target)
    return rows


def ratios(rows: Sequence[Row]) -> List[Row]:
    """What the speed table says about the aims, for the fastest backend in fp16 (else fp32)."""
    timed = {(row["what"], row["batch"]): row["ms"] for row in rows if "ms" in row}
    steps = [(ms, name) for (name, batch), ms in timed.items() if batch == 1 and "search step" in name]
    steps = [s for s in steps if "fp16" in s[1]] or steps
    if not steps:
        return []
    step, name = min(steps)
    kind = name.split(":")[0]
    best = min((ms for (n, b), ms in timed.items() if b == 1 and n.startswith("folded")), default=None)
    found = {
        "search step fp16 to reference": (step, timed.get(("reference, eager fp32", 1))),
        "search step fp16 to best candidate": (step, best),
        "update() on host frames": (timed.get((f"{kind}: update() on host frames", 1)), step),
        "update() on device frames": (timed.get((f"{kind}: update() on device frames", 1)), step),
        "32 targets to one": (timed.get((f"{kind}: search step with crop", 32)), step),
    }
    aims = ((measure, a / b, AIMS[measure]) for measure, (a, b) in found.items() if a and b)
    return [{"measure": m, "of": kind, "ratio": round(r, 3), "at_most": aim, "met": r <= aim} for m, r, aim in aims]


class Check(NamedTuple):
    """One check: ``run`` returns what to say, or rows, and raises where it fails; ``needs`` as in ``Machine.lacks``."""

    name: str
    run: Callable[[Machine], Any]
    needs: Tuple[str, ...] = ("gpu",)


CHECKS = (
    Check("kernel against OpenCV", kernel_equals_opencv),
    Check("check onnxruntime-cuda fp32", agrees("onnxruntime-cuda", "fp32"), ("onnxruntime-cuda",)),
    Check("check onnxruntime-cuda fp16", agrees("onnxruntime-cuda", "fp16"), ("onnxruntime-cuda", "export")),
    Check("check tensorrt fp32", agrees("tensorrt", "fp32"), ("tensorrt",)),
    Check("check tensorrt fp16", agrees("tensorrt", "fp16"), ("tensorrt",)),
    Check("check onnxruntime-tensorrt fp32", agrees("onnxruntime-tensorrt", "fp32"), ("onnxruntime-tensorrt",)),
    Check("frames of PyTorch", frames_of_pytorch, ("any", "torch")),
    Check("speed", speed, ("any",)),
    Check("two threads and PyTorch", two_threads_and_pytorch, ("any", "torch")),
    Check("memory", nothing_leaks, ("any",)),
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the checks."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=(__doc__ or "").splitlines()[0])
    add, default = parser.add_argument, Path("gpu-check.json")
    add("--dry", action="store_true", help="only say what would run here")
    add("--json", type=Path, default=default, metavar="FILE", help="(default: %(default)s)")
    add("--only", default="", metavar="NAME,...", help="checks whose names contain one of these")
    add("--table", type=Path, metavar="FILE", help="only print the docs' table of a report")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        print(markdown(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        print(machine.gpu or f"no GPU: {machine.missing['gpu']}")
        chosen = [c for c in CHECKS if any(part in c.name for part in arguments.only.split(","))]
        if arguments.dry:
            for check in chosen:
                lack = machine.lacks(check.needs)
                print(f"would run   {check.name}" if lack is None else f"cannot run  {check.name}: {lack}")
            return 0
        results = [_run(check, machine, began) for check in chosen]
    rows = next((r["rows"] for r in results if "rows" in r), [])
    report = {
        "date": datetime.date.today().isoformat(),
        "gpu": machine.gpu and machine.gpu.__dict__,
        "versions": _versions(),
        "seconds": round(time.monotonic() - began, 1),
        "checks": results,
        "ratios": ratios(rows),
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(markdown(report))
    for row in rows:
        if "failed" in row:
            print(f"failed  {row['what']}: {row['failed']}")
    for aim in ratios(rows):
        met = "met   " if aim["met"] else "MISSED"
        print(f"{met}  {aim['measure']} ({aim['of']}): {aim['ratio']} (at most {aim['at_most']})")
    failed = [r["name"] for r in results if r["result"] == "failed"]
    print(f"{report['seconds']} s; {len(failed)} of {len(results)} failed; figures in {arguments.json}")
    return 1 if failed else 0


def _run(check: Check, machine: Machine, began: float) -> Dict[str, Any]:
    lack = machine.lacks(check.needs)
    if lack is None and time.monotonic() - began > LONGEST:
        lack = "no time was left"
    started = time.monotonic()
    result: Dict[str, Any] = {"name": check.name, "result": "not run", "detail": lack}
    if lack is None:
        try:
            said = check.run(machine)
            result.update(result="passed", detail=said if isinstance(said, str) else f"{len(said)} rows")
            if not isinstance(said, str):
                result["rows"] = said
        except Exception as error:  # every failure is a finding
            if not isinstance(error, (AssertionError, BackendError)):
                traceback.print_exc()
            result.update(result="failed", detail=f"{type(error).__name__}: {error}")
            traceback.clear_frames(error.__traceback__)
        gc.collect()
    result["seconds"] = round(time.monotonic() - started, 1)
    print(f"{result['result']:8} {result['seconds']:6.1f} s  {check.name}: {result['detail']}", flush=True)
    return result


def _versions() -> Dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("numpy", "cv2", "onnxruntime", "torch", "tensorrt", "tensorrt_rtx_bindings", "pycuda"):
        with contextlib.suppress(Exception):
            found[name] = str(__import__(name).__version__)
    return found


def markdown(report: Row) -> str:
    """The table of docs/gpu.md from a report."""
    rows = next((check["rows"] for check in report["checks"] if "rows" in check), [])
    cells: Dict[str, Dict[int, str]] = {}
    for row in rows:
        if "ms" in row:
            text = f"{row['ms']:.3f} ms ({row.get('times_reference', '-')} x)"
            cells.setdefault(row["what"], {})[row["batch"]] = text
    lines = ["| | " + " | ".join(f"batch {n}" for n in BATCHES) + " |", "|---|" + "---:|" * len(BATCHES)]
    lines += [f"| {what} | " + " | ".join(of.get(n, "") for n in BATCHES) + " |" for what, of in cells.items()]
    card = (report["gpu"] or {"name": "no GPU"})["name"]
    libraries = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join([*lines, "", f"{card}, {report['date']}; {libraries}. T; (x): times as fast as the reference."])


if __name__ == "__main__":
    sys.exit(main())
