"""An imitated GPU: a driver in C++ over host memory; TensorRT and ONNX Runtime's CUDA provider run on the CPU.

The real backends run on it: the ctypes calls, the crop kernel (compiled by g++ from its real source),
streams, graphs and named tensors. An "engine" is the ONNX model; running it is queued on the stream.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import onnxruntime as ort

from asymtrack_edge.manifest import NETWORKS, file_entry, load_manifest
from asymtrack_edge.runtime import Tracker
from asymtrack_edge.runtime.backends.cuda.driver import Gpu
from asymtrack_edge.runtime.backends.cuda.kernel import SOURCE
from asymtrack_edge.runtime.backends.device import DeviceBackend
from asymtrack_edge.runtime.backends.tensorrt.backend import TENSORRT, TensorRT, TensorRTBackend, engine_key
from asymtrack_edge.runtime.sources.clip import default_clip

GPU = Gpu(0, "Imitation", (8, 7), False, 16, 31 << 30)
FRAMES, BOX = default_clip(6)


def build_driver(folder: Path) -> ctypes.CDLL:
    (folder / "crop_kernel.h").write_text(SOURCE)
    library = folder / "libcuda.so.1"
    # No fused multiply-adds, as in the kernel.
    options = ["-std=c++14", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-subobject-linkage"]
    source = Path(__file__).with_name("fake_cuda.cpp")
    subprocess.run(["g++", *options, f"-I{folder}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class Calls:
    """The driver's call counts."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        self.forget = driver.fake_forget

    def __getitem__(self, name: str) -> int:
        return int(self.driver.fake_calls(name.encode()))


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_long)


def queue(driver: ctypes.CDLL, kept: List[Any], work: Callable[[], object]) -> None:
    """Queues a call on the stream; a graph may repeat it as long as ``kept`` lives."""
    kept.append(_CALLBACK(lambda _: work()))
    driver.fake_host_function(kept[-1], 0)


class Engine:
    """On deletion, records in ``trt.died`` whether the GPU's context still existed."""

    def __init__(self, content: bytes, trt: Any) -> None:
        self.trt, self.contexts = trt, 0
        self.session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.inputs = [v.name for v in self.session.get_inputs()]
        self.values = {v.name: v for v in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.get_tensor_name, self.num_io_tensors = list(self.values).__getitem__, len(self.values)

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return "HALF" if "16" in self.values[name].type else "FLOAT"

    def get_tensor_shape(self, name: str) -> Any:
        return tuple(-1 if isinstance(n, str) else n for n in self.values[name].shape)

    def create_execution_context(self) -> Any:
        self.contexts += 1
        return Context(self, self.contexts == 1)

    def __del__(self) -> None:
        self.trt.died.append(self.trt.driver.fake_retained() > 0)


class Context:
    __del__ = Engine.__del__

    def __init__(self, engine: Engine, first: bool) -> None:
        self.engine, self.trt, self.first = engine, engine.trt, first
        self.addresses: Dict[str, int] = {}
        self.batch = engine.get_tensor_shape(engine.inputs[0])[0]
        self.kept: List[Any] = []

    def set_input_shape(self, name: str, shape: Any) -> bool:
        assert self.engine.get_tensor_shape(name)[1:] == tuple(shape)[1:]
        self.batch = shape[0]
        # Before TensorRT 10, only one context can use the profile.
        return self.first or int(self.trt.__version__.split(".")[0]) >= 10

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} is bound to an address that is not aligned"
        self.addresses[name] = address
        return not self.trt.refuses_addresses

    def execute_async_v3(self, stream: int) -> bool:
        # The function below must not refer to ``self``: a reference cycle would keep the context alive.
        engine, arrays = self.engine, {}
        for name, address in self.addresses.items():
            shape = (self.batch, *engine.get_tensor_shape(name)[1:])
            dtype = np.dtype("float16" if engine.get_tensor_dtype(name) == "HALF" else "float32")
            memory = (ctypes.c_ubyte * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
            arrays[name] = np.frombuffer(memory, dtype).reshape(shape)

        def run() -> None:
            outputs = [name for name in arrays if name not in engine.inputs]
            for name, value in zip(outputs, engine.session.run(outputs, {n: arrays[n] for n in engine.inputs})):
                arrays[name][...] = value

        queue(self.trt.driver, self.kept, run)
        return True


def tensorrt(driver: ctypes.CDLL, version: str = "10.3.0") -> TensorRT:
    """TensorRT as the package imports it; its module also has ``refuses_addresses`` and ``died``."""
    trt: Any = type("TensorRT", (), {})
    trt.__version__, trt.driver, trt.refuses_addresses, trt.died = version, driver, False, []
    trt.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2})
    trt.DataType = SimpleNamespace(FLOAT="FLOAT", HALF="HALF")
    trt.TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: Engine(content, trt))
    return TensorRT(trt, TENSORRT, version)


def add_engines(source: Path, target: Path, tensorrt: TensorRT) -> Path:
    """Copies an export and adds engines for the imitated GPU."""
    shutil.copytree(source, target)
    manifest = load_manifest(target)
    files, engines = dict(manifest.files), {}
    for network in NETWORKS:
        name = f"{network}.engine"
        shutil.copy(target / f"{network}.onnx", target / name)
        files[name], engines[name] = file_entry(target / name), engine_key(manifest, network, tensorrt, GPU)
    replace(manifest, files=files, engines=engines).save(target)
    return target


def onnxruntime_gpu(driver: ctypes.CDLL, refuses_graphs: bool = False) -> Any:
    """The module ``onnxruntime`` with a GPU; tensors on ``cuda`` are in host memory."""

    class Session:
        def __init__(self, path: str, options: Any, providers: Any, **choices: Any) -> None:
            if refuses_graphs and providers[0][1]["enable_cuda_graph"] == "1":
                raise RuntimeError("This session cannot use the graph capture feature")
            self.get_provider_options = lambda: dict(providers)
            self.tensorrt = self.get_provider_options().get("TensorrtExecutionProvider", {})
            assert not {"0", "1"} & {v for n, v in self.tensorrt.items() if n.startswith("trt_")}, "not True or False"
            self.real = ort.InferenceSession(path, options, ["CPUExecutionProvider"], **choices)

        def get_providers(self) -> List[str]:
            return list(self.get_provider_options())

        def io_binding(self) -> Any:
            real = self.real.io_binding()
            on_host = [lambda n, _, i, *rest, f=f: f(n, "cpu", i, *rest) for f in (real.bind_input, real.bind_output)]
            return SimpleNamespace(real=real, kept=[], bind_input=on_host[0], bind_output=on_host[1])

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            real, bound = self.real, binding.real
            if self.tensorrt.get("trt_cuda_graph_enable") == "True":
                bound = vars(self).setdefault("captured", bound)  # the session always repeats its first graph
            queue(driver, binding.kept, lambda: real.run_with_iobinding(bound))

    available = lambda: ["CUDAExecutionProvider", "TensorrtExecutionProvider"]  # noqa: E731
    return SimpleNamespace(**{**vars(ort), "InferenceSession": Session, "get_available_providers": available})


class Imitated(NamedTuple):
    """An export with engines, the driver's call counts, and the library that runs the networks."""

    folder: Path
    calls: Calls
    library: Any

    def open(self) -> DeviceBackend:
        """A backend. A test need not close it: when dropped, it releases everything."""
        return TensorRTBackend(self.folder, load_manifest(self.folder))

    def refuse(self, call: str, code: int) -> None:
        self.calls.driver.fake_refuse(call.encode(), code)


def boxes(backend: Any, frames: Sequence[Any] = FRAMES) -> np.ndarray:
    """Boxes of the clip's target in all frames after the first."""
    tracker = Tracker(backend)
    tracker.init(frames[0], BOX)
    return np.array([tracker.update(frame).box for frame in frames[1:]])
