"""Inference servers for tests: a small one in this process, and Triton itself where it is installed.

Both speak the KServe v2 protocol over gRPC and take a model repository as ``asymtrack-export --triton`` writes
it. The small one joins requests as Triton's dynamic batching does. Triton is the one of ``nvidia-pytriton``,
which has no backend for ONNX models: ``triton_onnxruntime.py`` stands in for that one.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any, Dict, List, Optional, Tuple

import grpc
import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype


def runs_and_requests(address: str, network: str) -> Tuple[int, int]:
    """How often a server ran a network so far, and for how many targets."""
    with triton.InferenceServerClient(address[len("triton://") :]) as client:
        stats = client.get_inference_statistics(network).model_stats
    return sum(s.execution_count for s in stats), sum(s.inference_count for s in stats)


class Network:
    """One version of a network: a queue of requests, and a thread that runs them in batches."""

    def __init__(self, folder: Path, config: Any) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = folder / config.default_model_filename
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.most, self.delay = config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds / 1e6
        self.runs = self.requests = 0
        self.waiting: queue.Queue[Optional[Tuple[Dict[str, np.ndarray], Future[Any]]]] = queue.Queue()
        Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        outputs = [output.name for output in self.session.get_outputs()]
        while True:
            batch = [self.waiting.get()]
            until = time.monotonic() + self.delay
            while batch[-1] is not None and len(batch) < self.most:
                try:
                    batch.append(self.waiting.get(timeout=max(0.0, until - time.monotonic())))
                except queue.Empty:
                    break
            full = [item for item in batch if item is not None]
            if full:
                feeds = {name: np.concatenate([inputs[name] for inputs, _ in full]) for name in full[0][0]}
                results = self.session.run(outputs, feeds)
                self.runs, self.requests = self.runs + 1, self.requests + len(full)
                for i, (_, future) in enumerate(full):
                    future.set_result({n: values[i : i + 1] for n, values in zip(outputs, results)})
            if batch[-1] is None:
                return


class SmallServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A server in this process."""

    def __init__(self, repository: Path, port: int = 0) -> None:
        self.configs: Dict[str, Any] = {}
        self.networks: Dict[Tuple[str, str], Network] = {}
        self.regions: Dict[str, np.ndarray] = {}
        for path in repository.glob("*/config.pbtxt"):
            config = self.configs[path.parent.name] = model_config_pb2.ModelConfig()
            text_format.Parse(path.read_text(), config)
            for version in (p for p in path.parent.iterdir() if p.is_dir()):
                self.networks[config.name, version.name] = Network(version, config)
        self._pool = ThreadPoolExecutor(80)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()
        for network in self.networks.values():
            network.waiting.put(None)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        if request.name not in self.configs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.name}")
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelStatistics(self, request: Any, context: Any) -> Any:
        found = [(v, n) for (name, v), n in self.networks.items() if name == request.name]
        of = service_pb2.ModelStatistics
        stats = [of(version=v, execution_count=n.runs, inference_count=n.requests) for v, n in found]
        return service_pb2.ModelStatisticsResponse(model_stats=stats)

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        self.regions[request.name] = np.memmap(f"/dev/shm/{request.key}", np.uint8, "r", shape=(request.byte_size,))
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        self.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        network = self.networks.get((request.model_name, request.model_version))
        if network is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown model {request.model_name} {request.model_version}")
        assert network is not None
        raw = iter(request.raw_input_contents)
        inputs = {}
        for tensor in request.inputs:
            where = tensor.parameters
            if "shared_memory_region" in where:
                offset = where["shared_memory_offset"].int64_param if "shared_memory_offset" in where else 0
                end = offset + where["shared_memory_byte_size"].int64_param
                content: Any = self.regions[where["shared_memory_region"].string_param][offset:end]
            else:
                content = next(raw)
            inputs[tensor.name] = np.frombuffer(content, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)
        future: Future[Any] = Future()
        network.waiting.put((inputs, future))
        response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version=request.model_version)
        for name, values in future.result().items():
            response.outputs.add(name=name, datatype=triton.np_to_triton_dtype(values.dtype), shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
        return response


def triton_folder() -> Optional[Path]:
    """``pytriton/tritonserver`` of ``$ASYMTRACK_TRITON``, an environment with nvidia-pytriton and onnxruntime."""
    root = Path(os.environ.get("ASYMTRACK_TRITON", "/nowhere"))
    return next(root.glob("lib/*/site-packages/pytriton/tritonserver"), None)


class TritonServer:
    """Triton, as a process of its own on CPUs."""

    def __init__(self, repository: Path, port: int = 0) -> None:
        folder = triton_folder()
        assert folder is not None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port or probe.getsockname()[1]
        backends = repository.parent / "backends"
        if not backends.exists():
            shutil.copytree(folder / "backends" / "python", backends / "python")
            version = "{}.{}".format(*sys.version_info)
            stub = folder / "python_backend_stubs" / version / "triton_python_backend_stub"
            shutil.copy(stub, backends / "python" / stub.name)
            (backends / "onnxruntime").mkdir()
            shutil.copy(Path(__file__).with_name("triton_onnxruntime.py"), backends / "onnxruntime" / "model.py")
        command = [
            str(folder / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--grpc-port={self.port}",
            "--grpc-address=127.0.0.1",
            "--allow-http=false",
            "--allow-metrics=false",
        ]
        packages = folder.parent.parent  # of its own environment: Triton's Python wants numpy 1
        libraries = str(packages / "nvidia_pytriton.libs")
        environment = {**os.environ, "PYTHONPATH": str(packages), "LD_LIBRARY_PATH": libraries}
        with open(repository.parent / "triton.log", "ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        with triton.InferenceServerClient(f"127.0.0.1:{self.port}") as client:
            while time.monotonic() < until:
                try:
                    if client.is_server_ready(client_timeout=1):
                        return
                except triton.InferenceServerException:
                    time.sleep(0.2)
                if self._process.poll() is not None:
                    break
        self.close()
        raise RuntimeError((repository.parent / "triton.log").read_text())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def kinds() -> List[Any]:
    """The servers that can run here."""
    return [SmallServer, *([TritonServer] if triton_folder() else [])]
