"""A small inference server for tests, in this process.

It speaks the KServe v2 protocol over gRPC, takes a model repository as ``asymtrack-export --triton`` writes it, and
joins requests as Triton's dynamic batching does.
"""

from __future__ import annotations

import contextlib
import queue
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any, Dict, List, Tuple

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
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.most, self.delay = config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds / 1e6
        self.runs = self.requests = 0
        self.waiting: queue.Queue[Tuple[Dict[str, np.ndarray], Future[Any]]] = queue.Queue()
        Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            batch: List[Any] = [self.waiting.get()]
            until = time.monotonic() + self.delay
            while len(batch) < self.most and (time.monotonic() < until or not self.waiting.empty()):
                with contextlib.suppress(queue.Empty):
                    batch.append(self.waiting.get(timeout=max(0.0, until - time.monotonic())))
            feeds = {name: np.concatenate([inputs[name] for inputs, _ in batch]) for name in batch[0][0]}
            results = self.session.run(self.outputs, feeds)
            self.runs, self.requests = self.runs + 1, self.requests + len(batch)
            for i, (_, future) in enumerate(batch):
                future.set_result({n: values[i : i + 1] for n, values in zip(self.outputs, results)})


class SmallServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The server."""

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

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

    def ModelStatistics(self, request: Any, context: Any) -> Any:
        of = service_pb2.ModelStatistics
        found = [n for (name, _), n in self.networks.items() if name == request.name]
        stats = [of(execution_count=n.runs, inference_count=n.requests) for n in found]
        return service_pb2.ModelStatisticsResponse(model_stats=stats)

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        self.regions[request.name] = np.memmap(f"/dev/shm/{request.key}", np.uint8, "r", shape=(request.byte_size,))
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        self.regions.pop(request.name, None)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        raw, inputs = iter(request.raw_input_contents), {}
        for tensor in request.inputs:
            where = tensor.parameters
            if "shared_memory_region" in where:
                begin, size = (where[f"shared_memory_{key}"].int64_param for key in ("offset", "byte_size"))
                content: Any = self.regions[where["shared_memory_region"].string_param][begin : begin + size]
            else:
                content = next(raw)
            inputs[tensor.name] = np.frombuffer(content, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)
        future: Future[Any] = Future()
        self.networks[request.model_name, request.model_version].waiting.put((inputs, future))
        response = service_pb2.ModelInferResponse()
        for name, values in future.result().items():
            response.outputs.add(name=name, datatype=triton.np_to_triton_dtype(values.dtype), shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
        return response
