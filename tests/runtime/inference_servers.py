"""A small inference server for tests: KServe v2 over gRPC, for what ``asymtrack-export --triton`` writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Tuple

import grpc
import numpy as np
import onnxruntime as ort
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype


class SmallServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The server."""

    def __init__(self, repository: Path, port: int = 0) -> None:
        self.configs: Dict[str, Any] = {}
        self.networks: Dict[Tuple[str, str], ort.InferenceSession] = {}
        self.regions: Dict[str, np.ndarray] = {}
        for path in repository.glob("*/config.pbtxt"):
            config = self.configs[path.parent.name] = model_config_pb2.ModelConfig()
            text_format.Parse(path.read_text(), config)
            for version in (p for p in path.parent.iterdir() if p.is_dir()):
                path = version / config.default_model_filename
                self.networks[config.name, version.name] = ort.InferenceSession(str(path))
        self._pool = ThreadPoolExecutor(80)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self.configs[request.name])

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
        network = self.networks[request.model_name, request.model_version]
        response = service_pb2.ModelInferResponse()
        for output, values in zip(network.get_outputs(), network.run(None, inputs)):
            response.outputs.add(name=output.name, datatype=triton.np_to_triton_dtype(values.dtype), shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
        return response
