"""ONNX Runtime on the CPU; on a GPU it is in ``onnxruntime_gpu``.

All tensors are bound once: the template network writes straight into the arrays that the search network
reads.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
import onnxruntime as ort

from asymtrack_edge.errors import BackendError
from asymtrack_edge.manifest import BATCH_AXIS, Manifest
from asymtrack_edge.runtime.backends.host import HostBackend
from asymtrack_edge.runtime.backends.threads import processors, side_by_side

if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":
    # The package sets the variable; a program that imported onnxruntime first did so without it.
    ort.disable_telemetry_events()


def open_session(path: Path, threads: Optional[int] = None) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU, for batches of one where the model's batch axis is free.

    ``threads`` are for one operator; None means one per core that this process may use. ``BackendError`` if the model
    cannot be loaded.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Known before, the batch spares the operators that compute shapes.
    options.add_free_dimension_override_by_name(BATCH_AXIS, 1)
    options.intra_op_num_threads = threads or processors()
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many unrelated types here
        reason = str(error).splitlines()[0]
        raise BackendError(f"onnxruntime {ort.__version__} cannot load {path}: {reason}") from None


class OnnxRuntimeBackend(HostBackend):
    """ONNX Runtime on the CPU.

    One target uses all threads inside each operator. Several are spread over the threads instead, one
    whole network each: nothing waits at the end of an operator, and the features of one target stay in
    the cache, which those of a batch do not. ``threads`` None means one per core that this process may use.
    """

    name = "onnxruntime"
    on_cpu = True

    def __init__(
        self, folder: Path, manifest: Manifest, threads: Optional[int] = None, description: str = "onnxruntime CPU"
    ) -> None:
        super().__init__(manifest, description)
        self.threads = threads or processors()
        self._search_path = folder / "search.onnx"
        #: Per network and slot what runs it there, its tensors bound.
        self._bound: Dict[Tuple[int, int], Any] = {}
        self._template: Any = open_session(folder / "template.onnx", self.threads)
        self._search: Any = self._open_search()
        #: The search network for several targets side by side; opened when there is room for a second one.
        self._lanes: Any = None
        self.reserve(1)

    def reserve(self, slots: int) -> None:
        """Makes room for at least this many targets. The second one opens the search network once more."""
        if slots > self.capacity:
            # They hold addresses of the arrays that are about to be replaced.
            self._bound.clear()
        super().reserve(slots)
        if slots > 1 and self.threads > 1 and self._lanes is None:
            self._lanes = self._open_lanes()

    def close(self) -> None:
        """Gives back networks and threads."""
        self._bound.clear()
        self._template = self._search = self._lanes = None

    def _run_template(self, slot: int) -> None:
        if (0, slot) not in self._bound:
            outputs = {name: values[slot : slot + 1] for name, values in self.state.items()}
            self._bound[0, slot] = _bind(self._template, {self.manifest.template.name: self._template_image}, outputs)
        self._template.run_with_iobinding(self._bound[0, slot])

    def _run_searches(self, count: int) -> None:
        spread = side_by_side(count, self.threads) if self._lanes is not None else 0
        if spread:
            self._run_lanes([self._bound_search(self._lanes, slot) for slot in range(spread)])
        for slot in range(spread, count):
            self._run_search(self._bound_search(self._search, slot))

    def _bound_search(self, network: Any, slot: int) -> Any:
        key, row = (id(network), slot), slice(slot, slot + 1)
        if key not in self._bound:
            inputs = {name: values[row] for name, values in self.state.items()}
            inputs[self.manifest.search.name] = self._search_images[row]
            self._bound[key] = self._bind_search(network, inputs, self._predictions[row])
        return self._bound[key]

    def _open_search(self) -> Any:  # to run one target on all threads
        return open_session(self._search_path, self.threads)

    def _open_lanes(self) -> Any:  # to run several targets side by side, one thread each
        return _Lanes(open_session(self._search_path, 1), self.threads)

    def _bind_search(self, network: Any, inputs: Dict[str, np.ndarray], prediction: np.ndarray) -> Any:
        """Binds a slot's arrays to a network; returns what ``_run_search`` and ``_run_lanes`` take."""
        return _bind(network, inputs, {self.manifest.output.name: prediction})

    def _run_search(self, bound: Any) -> None:
        self._search.run_with_iobinding(bound)

    def _run_lanes(self, bound: Sequence[Any]) -> None:
        self._lanes.run(bound)


class _Lanes:
    """A session that several threads run at the same time."""

    def __init__(self, session: ort.InferenceSession, threads: int) -> None:
        self.io_binding = session.io_binding
        self.run_one = session.run_with_iobinding
        self.threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1, "asymtrack-lane")

    def run(self, bindings: Sequence[Any]) -> None:
        """Runs all bindings; returns or raises when none is running any more."""
        # Each thread takes the next target when it is done with one: next() on it is atomic.
        waiting = iter(bindings)

        def work() -> None:
            for binding in waiting:
                self.run_one(binding)

        others = [self._helpers.submit(work) for _ in range(min(len(bindings), self.threads) - 1)]
        try:
            work()
        finally:
            # Nobody may still write the predictions when this returns, whatever happened.
            wait(others)
        for other in others:
            other.result()


def _bind(network: Any, inputs: Dict[str, np.ndarray], outputs: Dict[str, np.ndarray]) -> Any:
    """Binds contiguous host arrays by address: nothing is copied, neither now nor per run."""
    binding = network.io_binding()
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
    return binding
