"""Compares an export with the trained model: tensor by tensor, and track by track."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Sequence, Tuple

import numpy as np
import onnx
import onnxruntime as ort
import torch

from asymtrack_edge.errors import ExportError
from asymtrack_edge.export.split import SearchNetwork, TemplateNetwork, describe
from asymtrack_edge.geometry import Box, crop_window
from asymtrack_edge.manifest import FLOAT_RGB, Manifest
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime.backends.base import HostBackend
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend, session_options
from asymtrack_edge.runtime.comparison import SEGMENT, Limits, compare, figures, within
from asymtrack_edge.runtime.tracker import Tracker


class TorchBackend(HostBackend):
    """Runs an ``AsymTrack`` on the CPU, in training or folded form, in eager PyTorch; switches it to eval mode."""

    def __init__(self, model: AsymTrack) -> None:
        super().__init__(describe(model.variant, max_batch=64), "torch cpu")
        self._template = TemplateNetwork(model.eval(), FLOAT_RGB)
        self._search = SearchNetwork(model, FLOAT_RGB)
        self.reserve(1)

    def _run_template(self, slot: int) -> None:
        with torch.inference_mode():
            state = self._template(torch.from_numpy(self.template_image))
        for name, value in zip(self.state, state):
            self.state[name][slot] = value[0].numpy()

    def _run_searches(self, count: int) -> None:
        inputs = map(torch.from_numpy, self.search_arrays(slice(count)).values())
        with torch.inference_mode():
            self._predictions[:count] = self._search(*inputs).numpy()


def verify(
    folder: Path, manifest: Manifest, model: AsymTrack, frames: Sequence[np.ndarray], box: Box, limits: Limits
) -> Dict[str, Any]:
    """Compares the ONNX models in ``folder``, described by ``manifest``, with the trained fp32 ``model``.

    The model is neither folded nor split. ``frames`` are BGR uint8 frames of one clip, ``box`` the target in the first.
    Returns what was compared and measured, for the manifest. Raises ``ExportError``, with the figures, if the two
    differ by more than ``limits``.
    """
    reference = TorchBackend(model)
    exported = OnnxRuntimeBackend(folder, manifest)
    report: Dict[str, Any] = {"frames": len(frames), "track_length": SEGMENT, "runtime": exported.description}
    for backend in (reference, exported):
        backend.template(frames[0], crop_window(box, manifest.template_factor))
    report["state_difference"] = {
        name: float(np.abs(exported.state[name][0] - wanted[0]).max() / max(np.abs(wanted[0]).max(), 1e-30))
        for name, wanted in reference.state.items()
    }
    report.update(compare(reference, exported, frames, box), limits=asdict(limits))
    if manifest.precision == "fp16":
        searched = largest_half_value(folder / "search.onnx", search_inputs(exported, frames, box, every=6))
        once = largest_half_value(folder / "template.onnx", [{manifest.template.name: exported.template_image}])
        report["largest_half"], report["largest_half_tensor"] = max(searched, once)
    report["passed"] = within(report, limits)
    if not report["passed"]:
        reason = f"the exported model differs from the trained one: {', '.join(figures(report))}"
        half, most = report.get("largest_half", 0.0), limits.largest_half
        if half > most:
            name = report["largest_half_tensor"]
            reason = f"fp16 cannot hold this model's numbers: {name} reaches {half:.3g} (limit {most:g})"
        raise ExportError(f"{reason}; nothing was replaced. Try without --fp16 or --int8")
    return report


def search_inputs(
    backend: HostBackend, frames: Sequence[np.ndarray], box: Box, every: int
) -> Iterator[Dict[str, np.ndarray]]:
    """Yields the search network's inputs while a backend tracks the target, for every ``every``-th frame."""
    tracker = Tracker(backend, recover=False)
    tracker.init(frames[0], box)
    for i, frame in enumerate(frames[1:]):
        tracker.update(frame)
        if i % every == 0:
            yield {name: values.copy() for name, values in backend.search_arrays(slice(1)).items()}


def largest_half_value(model: Path, feeds: Iterable[Dict[str, np.ndarray]]) -> Tuple[float, str]:
    """The largest magnitude that an fp16 tensor of a model takes for ``feeds``, and the tensor's name.

    A CPU computes an fp16 graph in fp32 and rounds only at its outputs, so tracks that agree on a CPU say nothing about
    overflow on a GPU. Here every fp16 tensor becomes an output. The result is infinity if a value overflows or is not a
    number, and 0 with an empty name if no tensor is fp16.
    """
    opened = onnx.shape_inference.infer_shapes(onnx.load(str(model)))
    outputs, half = opened.graph.output, onnx.TensorProto.FLOAT16
    already = {value.name for value in outputs}
    outputs.extend(value for value in opened.graph.value_info if value.name not in already)
    names = [value.name for value in outputs if value.type.tensor_type.elem_type == half]
    session = ort.InferenceSession(opened.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    largest = (0.0, "")
    for feed in feeds:
        for name, values in zip(names, session.run(names, feed) if names else ()):
            magnitude = float(np.abs(values.astype(np.float32)).max(initial=0))
            largest = max(largest, (magnitude if np.isfinite(magnitude) else np.inf, name))
    return largest
