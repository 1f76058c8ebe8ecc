"""ONNX Runtime on the CPU; for GPUs see ``onnxruntime_gpu``.

Tensors are bound by address: the template network writes straight into the arrays that the search network
reads.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from asymtrack_edge.errors import BackendError, ManifestError
from asymtrack_edge.manifest import BATCH_AXIS, Manifest, read_networks
from asymtrack_edge.runtime.backends.base import HostBackend
from asymtrack_edge.runtime.backends.threads import processors

try:
    import onnxruntime as ort

    ort.InferenceSession  # noqa: B018
except (AttributeError, ImportError) as error:  # uninstalling one of the two packages damages the other
    again = "pip install --force-reinstall onnxruntime (or onnxruntime-gpu with --no-deps, see docs/gpu.md)"
    raise BackendError(f"onnxruntime cannot be used ({error}): {again}") from None

if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":
    # asymtrack_edge sets the variable, but the program may have imported onnxruntime before.
    ort.disable_telemetry_events()


def session_options() -> ort.SessionOptions:
    """Options for running models on the CPU: few log messages, one target at a time."""
    options = ort.SessionOptions()
    # Memory planning saves no time, and before 1.19 gives wrong results where LayerNorm is fp16.
    options.log_severity_level, options.enable_mem_pattern = 3, False
    # A fixed batch removes the operators that compute shapes.
    options.add_free_dimension_override_by_name(BATCH_AXIS, 1)
    return options


class OnnxRuntimeBackend(HostBackend):
    """ONNX Runtime on the CPU.

    One target uses all threads inside each operator. Several targets are spread over the threads instead, one
    whole network per thread: no thread waits at the end of an operator, and the features of one target fit in
    the cache, unlike those of a batch. ``threads`` None means one per core that this process may use.
    """

    name = "onnxruntime"
    on_cpu = True

    def __init__(self, folder: Path, manifest: Manifest, threads: Optional[int] = None) -> None:
        super().__init__(manifest, f"{self.name} CPU")
        self.threads = threads or processors()
        #: Each network's file, read once: the folder may be replaced while it is in use.
        self._files = read_networks(folder, manifest)
        self._folder = folder
        self._process = os.getpid()
        #: By ``id`` of a search network, and slot: a function that runs it, with its tensors bound.
        self._bound: Dict[Tuple[int, int], Callable[[], object]] = {}
        self._template: Any = self._open_session("template", self.threads)
        del self._files["template"]  # no longer needed
        self._search = self._open_search(1)
        #: The search network for several targets side by side, and the threads that run it.
        self._lanes: Any = None
        self._pool: Optional[ThreadPoolExecutor] = None
        self.reserve(1)

    def reserve(self, slots: int) -> None:
        """Makes room for at least this many targets. The second target opens the search network again."""
        if slots > self.capacity:
            # Bindings hold addresses of the arrays that are about to be replaced.
            self._bound.clear()
        super().reserve(slots)
        if slots > 1 and self.threads > 1 and self._lanes is None:
            self._lanes = self._open_search(self.threads)
            self._pool = ThreadPoolExecutor(self.threads, "asymtrack-lane")

    def close(self) -> None:
        if os.getpid() != self._process:
            # A fork lacks the sessions' threads. Releasing a session, even at exit, would wait for them: leak them.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dict(vars(self))))
            return
        self._bound.clear()
        self._template = self._search = self._lanes = self._pool = None

    def _run_template(self, slot: int) -> None:
        # Bound anew: this happens once per target, and costs little compared with the run.
        outputs = {name: values[slot : slot + 1] for name, values in self.state.items()}
        _bind(self._template, {self.manifest.template.name: self.template_image}, outputs)()

    def _run_searches(self, count: int) -> None:
        spread = 0
        pool = self._pool if os.getpid() == self._process else None  # a fork has none of its threads
        if pool is not None and (spread := _side_by_side(count, self.threads)):
            lanes = [self._bound_search(self._lanes, slot) for slot in range(spread)]
            runs: List[Future[object]] = []
            try:
                with suppress(RuntimeError):  # the main thread has ended: no new threads can start
                    runs.extend(map(pool.submit, lanes))
                spread = len(runs)
                for run in runs:
                    run.result()
            finally:  # even after a signal: no run may write predictions after this
                for run in runs:
                    run.cancel()
                wait(runs)
        for slot in range(spread, count):
            self._bound_search(self._search, slot)()

    def _bound_search(self, network: Any, slot: int) -> Callable[[], object]:
        key, row = (id(network), slot), slice(slot, slot + 1)
        if key not in self._bound:
            self._bound[key] = self._bind_search(network, self.search_arrays(row), self._predictions[row])
        return self._bound[key]

    def _open_search(self, lanes: int) -> Any:
        """Opens the search network to run on one target with all threads, or on ``lanes`` targets side by side."""
        return self._open_session("search", self.threads // lanes)

    def _open_session(self, network: str, threads: int) -> ort.InferenceSession:
        """Opens a session; ``ManifestError`` unless its tensors are those of the manifest, which sizes the arrays."""
        options = session_options()
        options.intra_op_num_threads = threads
        try:
            session = ort.InferenceSession(self._files[network], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many unrelated types here
            place, reason = self._folder / network, str(error).splitlines()[0]
            raise BackendError(f"onnxruntime {ort.__version__} cannot load {place}.onnx: {reason}") from None
        specs = {spec.name: (spec.dtype, spec.shape) for side in self.manifest.tensors(network) for spec in side}
        found = {}
        for value in (*session.get_inputs(), *session.get_outputs()):
            shape, kind = value.shape[1:], {"tensor(float)": "float32"}.get(value.type, value.type[7:-1])
            # The size of an axis that the exporter left free is unknown.
            sides = zip(shape, specs.get(value.name, ("", shape))[1])
            found[value.name] = kind, tuple(a if isinstance(a, int) else b for a, b in sides)
        if found != specs:
            raise ManifestError(f"{self._folder}: {network}.onnx does not match the manifest: export again")
        return session

    def _bind_search(self, network: Any, inputs: Dict[str, np.ndarray], prediction: np.ndarray) -> Callable[[], object]:
        """Binds a slot's arrays to a network from ``_open_search``; returns a function that runs it."""
        return _bind(network, inputs, {self.manifest.output.name: prediction})


def _side_by_side(targets: int, threads: int) -> int:
    """How many of ``targets`` run side by side, one thread each; the rest run one by one on all threads.

    These are whole rounds of one target per thread, and a partial last one if it keeps most of the threads
    busy: an operator on many threads is about half as efficient as on one.
    """
    if targets == 1 or threads == 1:
        return 0
    rest = targets % threads
    return targets if 2 * rest > threads else targets - rest


def _bind(network: Any, inputs: Dict[str, np.ndarray], outputs: Dict[str, np.ndarray]) -> Callable[[], object]:
    """Binds contiguous host arrays by address: nothing is copied, now or in a run."""
    binding = network.io_binding()
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
    return partial(network.run_with_iobinding, binding)
