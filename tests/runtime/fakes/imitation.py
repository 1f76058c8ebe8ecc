"""A GPU that is not there: the driver in C over host memory, TensorRT and ONNX Runtime's CUDA over its CPU.

The real backends run on top: the ctypes calls, the crop kernel (compiled by g++ from the very source),
streams, graphs and named tensors. An "engine" is the ONNX model; running it means ONNX Runtime on the
host memory behind the bound addresses, queued on the stream like everything else.
"""

from __future__ import annotations

import ctypes
import enum
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import numpy as np
import onnx
import onnxruntime as ort

from asymtrack_edge.manifest import BATCH_AXIS, file_entry, load_manifest
from asymtrack_edge.runtime.backends.cuda.driver import Gpu
from asymtrack_edge.runtime.backends.cuda.kernel import SOURCE
from asymtrack_edge.runtime.backends.tensorrt.backend import NETWORKS, TENSORRT, TensorRT, engine_key

HERE = Path(__file__).parent
GPU = Gpu(0, "Imitation", (8, 7), False, 16, 31 << 30)
VERSION = "10.3.0"


def build_driver(folder: Path) -> Path:
    """Compiles the driver."""
    (folder / "crop_kernel.h").write_text(SOURCE)
    library = folder / "libcuda.so.1"
    # No fused multiply-adds: the kernel asks for none either.
    options = ["-std=c++14", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-subobject-linkage"]
    includes = [f"-I{HERE}", f"-I{folder}"]
    subprocess.run(["g++", *options, *includes, str(HERE / "fake_cuda.cpp"), "-o", str(library)], check=True)
    return library


class Calls:
    """What the driver counted."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver

    def __getitem__(self, name: str) -> int:
        return int(self.driver.fake_calls(name.encode()))

    @property
    def bytes_up(self) -> int:
        return int(self.driver.fake_bytes_up())

    def forget(self) -> None:
        self.driver.fake_forget()


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_long)


class _Engine:
    def __init__(self, content: bytes, trt: Any) -> None:
        self.trt = trt
        graph = onnx.load_from_string(content).graph
        self.values = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output)}
        self.inputs = {v.name for v in graph.input}
        self.content = content
        self.sessions: Dict[int, ort.InferenceSession] = {}
        self.names = list(self.values)
        self.get_tensor_name, self.num_io_tensors = self.names.__getitem__, len(self.names)
        self.contexts = 0

    def session(self, batch: int) -> ort.InferenceSession:
        """One for each batch, opened as the runtime does: the numbers are the same bit for bit."""
        if batch not in self.sessions:
            options = ort.SessionOptions()
            options.add_free_dimension_override_by_name(BATCH_AXIS, batch)
            self.sessions[batch] = ort.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
        return self.sessions[batch]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {1: self.trt.DataType.FLOAT, 10: self.trt.DataType.HALF}[self.values[name].elem_type]

    def get_tensor_shape(self, name: str) -> Any:
        return tuple(-1 if d.dim_param else d.dim_value for d in self.values[name].shape.dim)

    def create_execution_context(self) -> Any:
        self.contexts += 1
        return _Context(self, self.contexts == 1)

    def __del__(self) -> None:
        self.trt.died()


class _Context:
    def __init__(self, engine: _Engine, first: bool) -> None:
        self.engine = engine
        self.first = first
        self.addresses: Dict[str, int] = {}
        self.shapes = {name: engine.get_tensor_shape(name) for name in engine.names}
        self.kept: List[Any] = []

    def set_input_shape(self, name: str, shape: Any) -> bool:
        assert self.shapes[name][1:] == tuple(shape)[1:]
        if not self.first and int(self.engine.trt.__version__.split(".")[0]) < 10:
            return False  # the profile has been chosen by another context
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.engine.trt.refuses_addresses:
            return False
        assert address % 256 == 0, f"{name} is bound to an address that is not aligned"
        self.addresses[name] = address
        return True

    def __del__(self) -> None:
        self.engine.trt.died()

    def execute_async_v3(self, stream: int) -> bool:
        # Nothing of ``self`` in the function below: a cycle would keep the context alive.
        engine, trt = self.engine, self.engine.trt
        addresses = dict(self.addresses)
        batch = self.shapes[next(iter(self.engine.inputs))][0]
        shapes = {name: (batch, *self.engine.get_tensor_shape(name)[1:]) for name in self.engine.names}
        assert batch > 0 and set(addresses) == set(self.engine.names)

        def run(_: int) -> None:
            arrays = {n: trt.view(addresses[n], shapes[n], engine.get_tensor_dtype(n)) for n in addresses}
            feed = {n: array for n, array in arrays.items() if n in engine.inputs}
            outputs = [n for n in engine.names if n not in engine.inputs]
            for name, value in zip(outputs, engine.session(batch).run(outputs, feed)):
                arrays[name][...] = value

        callback = _CALLBACK(run)
        self.kept.append(callback)
        trt.driver.fake_host_function(callback, 0)
        return True


class _Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def make_tensorrt(driver: ctypes.CDLL, version: str = VERSION) -> Any:
    """A module that looks like TensorRT to the runtime; ``dead`` counts what died after the GPU's context."""
    trt = SimpleNamespace(
        __version__=version,
        Builder=object,
        ILogger=_Logger,
        DataType=enum.Enum("DataType", "FLOAT HALF INT32"),
        TensorIOMode=enum.Enum("TensorIOMode", "NONE INPUT OUTPUT"),
        driver=driver,
        refuses_addresses=False,
        warnings=[],
    )

    def view(address: int, shape: Any, dtype: Any) -> np.ndarray:
        kind = np.dtype(np.float16 if dtype == trt.DataType.HALF else np.float32)
        size = int(np.prod(shape)) * kind.itemsize
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), kind).reshape(shape)

    def died() -> None:
        trt.dead[driver.fake_calls(b"cuDevicePrimaryCtxRelease") > 0] += 1

    trt.view, trt.died, trt.dead = view, died, {False: 0, True: 0}

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            for warning in trt.warnings:
                self.logger.log(_Logger.WARNING, warning)
            return _Engine(content, trt)

    trt.Runtime = Runtime
    return trt


def add_engines(source: Path, target: Path, tensorrt: TensorRT) -> Path:
    """Copies an export and gives it engines for the GPU that is not there."""
    shutil.copytree(source, target)
    for network in NETWORKS:
        shutil.copy(target / f"{network}.onnx", target / f"{network}.engine")
    manifest = load_manifest(target, verify=False)
    files = {name: file_entry(target / name) for name in (f"{n}.{e}" for n in NETWORKS for e in ("onnx", "engine"))}
    manifest = replace(manifest, files=files, target="orin")
    engines = {f"{n}.engine": engine_key(manifest, n, tensorrt, GPU) for n in NETWORKS}
    replace(manifest, engines=engines).save(target)
    return target


def imitated(driver: ctypes.CDLL, version: str = VERSION) -> TensorRT:
    """The imitation as the package imports it."""
    return TensorRT(make_tensorrt(driver, version), TENSORRT, version)


class OnnxRuntimeGpu:
    """A module that looks like onnxruntime-gpu to the runtime; everything asked for ``cuda`` gets host memory.

    Attributes:
        refuses_graphs: whether sessions with a CUDA graph cannot be opened.
        fails: whether no session can run.
        opened: providers of each session, with their options.
    """

    __version__ = ort.__version__
    SessionOptions = ort.SessionOptions
    set_default_logger_severity = staticmethod(lambda level: None)

    class RunOptions(dict):
        add_run_config_entry = dict.__setitem__

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        self.opened: List[Any] = []
        self.refuses_graphs = self.fails = False

    def get_available_providers(self) -> List[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        assert not enable_fallback, "it would open another session without our stream"
        if self.refuses_graphs and any(p[1].get("enable_cuda_graph") == "1" for p in providers):
            raise RuntimeError("This session cannot use the graph capture feature")
        self.opened.append(providers)
        return Session(self, path, options, providers)


class Session:
    def __init__(self, module: OnnxRuntimeGpu, path: str, options: Any, providers: Any) -> None:
        self.module, self.providers = module, providers
        self.real = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.graph = any("1" in (p[1].get("enable_cuda_graph"), p[1].get("trt_cuda_graph_enable")) for p in providers)
        self.runs: Dict[Any, Any] = {}

    def get_providers(self) -> List[str]:
        return [name for name, _ in self.providers]

    def get_provider_options(self) -> Any:
        return dict(self.providers)

    def io_binding(self) -> Any:
        return _Binding(self.real)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.module.fails:
            raise RuntimeError("CUDA failure 700")
        key = options.get("gpu_graph_id")
        # A graph runs with the addresses that it was captured with.
        used = self.runs.setdefault(key, binding) if self.graph else binding
        real = self.real
        callback = _CALLBACK(lambda _: real.run_with_iobinding(used.real))
        binding.kept.append(callback)
        self.module.driver.fake_host_function(callback, 0)
        if self.graph or options.get("disable_synchronize_execution_providers") != "1":
            assert self.module.driver.cuStreamSynchronize(None) == 0


class _Binding:
    def __init__(self, real: ort.InferenceSession) -> None:
        self.real = real.io_binding()
        self.kept: List[Any] = []
        self.bind_input, self.bind_output = self._on_host(self.real.bind_input), self._on_host(self.real.bind_output)

    def _on_host(self, real: Any) -> Any:
        def bind(name: str, kind: str, index: int, *rest: Any) -> None:
            assert (kind, index) == ("cuda", 0)
            real(name, "cpu", 0, *rest)

        return bind


class Pycuda:
    """A module that looks like PyCUDA; notes in ``events`` what is done and undone."""

    def __init__(self) -> None:
        events: List[str] = []
        self.events = events

        class Error(Exception):
            pass

        class Context:
            push, detach = (lambda self: events.append("push")), (lambda self: events.append("detach"))
            pop = staticmethod(lambda: events.append("pop"))

        class Stream:
            handle = 5

            def __init__(self, flags: int) -> None:
                assert flags == 1

            def __del__(self) -> None:
                events.append("stream gone")

        class Module:
            def get_function(self, name: str) -> Any:
                launch = lambda *_: events.append("launch")  # noqa: E731
                return SimpleNamespace(prepare=lambda types: None, prepared_async_call=launch)

            def __del__(self) -> None:
                events.append("unloaded")

        class Host(np.ndarray):
            def free(self) -> None:
                events.append("host freed")

        def mem_alloc(size: int) -> Any:
            raise Error("out of memory")

        def pagelocked_empty(size: int, dtype: Any, mem_flags: int) -> Any:
            return np.zeros(size, dtype).view(Host)[:].view(Host)

        self.driver = SimpleNamespace(
            Error=Error,
            Context=Context,
            Stream=Stream,
            Device=lambda index: SimpleNamespace(retain_primary_context=Context),
            host_alloc_flags=SimpleNamespace(PORTABLE=1, DEVICEMAP=2),
            init=lambda: None,
            mem_alloc=mem_alloc,
            module_from_buffer=lambda content: Module(),
            pagelocked_empty=pagelocked_empty,
        )
