"""Cases that can be raced: search networks on any backend or as published, and whole trackers."""

from __future__ import annotations

import argparse
from itertools import cycle, product
from pathlib import Path
from time import perf_counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import cv2
import numpy as np

from asymtrack_edge.benchmarks.speed.race import Case, settle, timed
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.benchmarks.worker import Worker
from asymtrack_edge.errors import BackendError, SourceError, require, without_secrets
from asymtrack_edge.geometry import Box, CropWindow
from asymtrack_edge.runtime.backends.base import Backend, device_index
from asymtrack_edge.runtime.backends.device import DeviceBackend
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.sources.clip import clip_argument, default_clip
from asymtrack_edge.variants import VARIANTS, Variant

#: Frame size of OpenCV Zoo's benchmarks and of most cameras.
HD = (1280, 720)
#: A note on a case.
UNTRAINED = "untrained weights (speed does not depend on them)"


def combinations(a: argparse.Namespace) -> Dict[str, TrackerSpec]:
    """Every combination of models and ``cli.add_backend``'s options, keyed by a name made of the parts that differ."""
    named: Dict[str, TrackerSpec] = {}
    parts = (a.model, a.backend, a.precision or (None,), a.threads or (None,))
    for model, backend, precision, count in product(*parts):
        texts = (model, backend, precision, f"{count} thread{'s' * (count != 1)}")
        several = [text for text, values in zip(texts, parts) if len(values) > 1 and text]
        name = ", ".join(several) or (f"{model}, {backend}" if backend != "auto" else model)
        while name in named:  # a model against itself
            name += " again"
        named[name] = TrackerSpec(model, backend, a.device, count, precision)
    return named


def _facts(backend: Backend, spec: TrackerSpec, note: str) -> Dict[str, Any]:
    """What is reported with the figures of an open backend, as fields of ``Case``."""
    manifest = backend.manifest
    device = "cpu" if backend.on_cpu else "server" if backend.name == "triton" else f"cuda:{device_index(spec.device)}"
    untrained = str(manifest.provenance.get("weights", "")).startswith("random")
    return {
        "tracker": f"AsymTrack-{manifest.variant}",
        "backend": backend.name,
        "device": device,
        "precision": backend.precision,
        "threads": backend.threads or None,
        "model_sha256": manifest.files["search.onnx"].sha256,
        "notes": tuple(n for n in (UNTRAINED if untrained else "", note) if n),
    }


def network_case(name: str, spec: TrackerSpec, targets: int = 1, together: bool = True) -> Case:
    """The search network of a model on random crops, with the template cached: no cropping, no decoding.

    The time is what the backend itself records as ``infer``. On a GPU it includes cutting the crop, in the same launch,
    and copying the prediction back. ``together``: one call for all ``targets``; otherwise one call per target.
    """
    backend = open_backend(**spec.load_arguments)
    backend.reserve(targets)
    side, z = backend.manifest.search_size, backend.manifest.template_size
    # One pixel larger than the crop: by the crop's convention the frame's last column and row are lost.
    frame = np.random.RandomState(0).randint(0, 256, (side + 1, side + 1, 3), np.uint8)
    centre = (side / 2, side / 2)
    for slot in range(targets):
        backend.template(frame, CropWindow(0, 0, z, centre), slot)
    window = CropWindow(0, 0, side, centre)
    calls = [[window] * targets] if together else [[window]] * targets
    run = timed(lambda: [backend.search(frame, windows) for windows in calls], lambda: backend.seconds["infer"])
    note = "includes the crop, which the GPU cuts in the same launch" if isinstance(backend, DeviceBackend) else ""
    return Case(name, run, backend.close, batch=targets, **_facts(backend, spec, note))


def reference_case(
    variant: Variant, device: str = "cpu", threads: Optional[int] = None, name: str = "reference form, PyTorch"
) -> Case:
    """The search network in the form in which its authors publish and time it (``reference_form``).

    It is timed in a separate process that has loaded nothing else. Eager PyTorch allocates memory for every
    intermediate result, which is cheaper once the process has freed a larger block: in this process, which has loaded
    other models, the step can be a third faster than in the authors' script.

    A variant that differs from the published ones is untrained. ``device`` is that of a case; anything but ``"cuda:N"``
    means the CPU. Raises AsymTrackError if PyTorch or the device is not available.
    """
    device = device if device.startswith("cuda") else "cpu"
    trained = VARIANTS.get(variant.name) == variant
    worker = Worker(_reference, variant, trained, device, threads)

    def ask(times: int, calls: int) -> List[float]:
        worker.send(times, calls)
        return list(worker.receive())

    return Case(
        name,
        lambda calls: ask(calls, 1),
        worker.close,
        burst=None if device == "cpu" else lambda calls: ask(1, calls)[0],
        tracker=f"AsymTrack-{variant.name}",
        backend="torch",
        precision="fp32",
        device=device,
        threads=threads,
        notes=() if trained else (UNTRAINED,),
    )


def _reference(variant: Variant, trained: bool, device: str, threads: Optional[int]) -> Callable[..., List[float]]:
    """Runs in the worker: returns a function that times ``calls`` calls back to back, ``times`` times, in seconds."""
    torch = require("torch", "export", "timing the reference form")

    from asymtrack_edge.benchmarks.reference_form import ReferenceForm
    from asymtrack_edge.checkpoints import bundled_weights, open_checkpoint
    from asymtrack_edge.network import AsymTrack

    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device here: use --device cpu")
    torch.manual_seed(0)
    model = open_checkpoint(bundled_weights(variant)).model(variant) if trained else AsymTrack(variant)
    reference = ReferenceForm(model.to(device)).eval()
    z, x = (torch.randn(1, 3, side, side).to(device) for side in (variant.template_size, variant.search_size))
    with torch.inference_mode():
        template = reference.template(z)

    def seconds_of(calls: int) -> float:
        with torch.inference_mode():
            began = perf_counter()
            for _ in range(calls):
                reference(x, template)
            if device != "cpu":
                torch.cuda.synchronize(device)
            return perf_counter() - began

    def answer(say: Any, times: int, calls: int) -> List[float]:
        if times > 1:
            seconds_of(1)  # wakes the threads and fills the caches: the first call of a turn does not count
        seconds = [seconds_of(calls) for _ in range(times)]
        settle()  # the next case's turn starts once this process's threads are idle
        return seconds

    return answer


class VideoClip(NamedTuple):
    """Decoded BGR uint8 frames, the target's box in the first one, and the encoded video that they come from."""

    frames: List[np.ndarray]
    box: Box
    source: str


def make_clip(folder: Path, source: Optional[str] = None, box: Optional[Sequence[float]] = None) -> VideoClip:
    """The clip that ``--clip`` and ``--box`` name, or a synthetic 1280x720 clip encoded into ``folder``.

    Raises AsymTrackError if the clip cannot be read, the box is invalid, or this OpenCV cannot encode video.
    """
    given = clip_argument(source, box)
    if given is None or source is None:
        source = str(folder / "synthetic.mp4")
        frames, _ = given = default_clip(size=HD)
        writer = cv2.VideoWriter(source, cv2.VideoWriter_fourcc(*"mp4v"), 30.0, HD)  # type: ignore[attr-defined]
        if not writer.isOpened():
            raise SourceError("this OpenCV cannot encode mp4v: give --clip FILE and --box")
        for frame in [*frames, *frames[-2::-1]]:  # forwards, then backwards: no jump
            writer.write(frame)
        writer.release()
    return VideoClip(*given, source)


def tracker_case(name: str, spec: TrackerSpec, clip: VideoClip, mapped: bool = False) -> Case:
    """P5: the whole ``update(frame)`` of any tracker on frames that are already in memory.

    ``mapped``: an integrated GPU reads the frames directly from the CPU's memory.
    """
    tracker = spec.build()
    height, width = clip.frames[0].shape[:2]
    note = f"frames: {Path(without_secrets(clip.source)).name}, {width}x{height}"
    threads = spec.threads if spec.kind == "opencv" else None  # a user's own tracker does not get this setting
    facts: Dict[str, Any] = {"tracker": spec.name, "backend": spec.kind, "threads": threads, "notes": (note,)}
    if spec.kind == "model":
        facts = {"subject": tracker, "close": tracker.close, **_facts(tracker.backend, spec, note)}
        if mapped:
            tracker.backend.map_frames()
    frames = cycle([*clip.frames, *clip.frames[-2:0:-1]])  # forwards and backwards forever: no jump
    tracker.init(next(frames), tuple(clip.box))
    return Case(name, timed(lambda: tracker.update(next(frames))), **facts)
