"""A Triton server as backend: the same tracks, outages are survived, a wrong model is refused."""

from __future__ import annotations

import contextlib
import csv
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
import onnxruntime as ort
import pytest

from asymtrack_edge.benchmarks.speed import command as bench
from asymtrack_edge.errors import BackendError, ExportError, ServerError, UsageError
from asymtrack_edge.manifest import FileEntry, load_manifest
from asymtrack_edge.runtime.backends import triton as backend_module
from asymtrack_edge.runtime.backends.loading import model_folder
from asymtrack_edge.runtime.backends.triton import networks_hash
from asymtrack_edge.runtime.commands import track
from asymtrack_edge.runtime.sources.clip import default_clip
from asymtrack_edge.runtime.tracker import MultiTracker, Tracker

pytest.importorskip("tritonclient.grpc", exc_type=ImportError)
import grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from asymtrack_edge.export.triton import write_repository
from tests.datasets.miniature import write_images
from tests.runtime.simulated import as_argument, check_several

SEARCH = "asymtrack-t-fp32-search"
FRAMES, BOX = default_clip(12)
BOXES = [BOX, (40, 60, 50, 40), (200, 150, 40, 60)]


class SmallServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A small inference server (KServe v2 over gRPC) for repositories that ``asymtrack-export --triton`` writes."""

    def __init__(self, repository: Path, port: int = 0) -> None:
        self.configs: Dict[str, Any] = {}
        self.networks: Dict[Tuple[str, str], ort.InferenceSession] = {}
        self.regions: Dict[str, np.ndarray] = {}
        for path in repository.glob("*/config.pbtxt"):
            config = self.configs[path.parent.name] = parsed(path)
            for version in (p for p in path.parent.iterdir() if p.is_dir()):
                self.networks[config.name, version.name] = ort.InferenceSession(version / config.default_model_filename)
        self._server = grpc.server(ThreadPoolExecutor(80), options=[("grpc.so_reuseport", 0)])
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
            response.outputs.add(name=output.name, datatype=np_to_triton_dtype(values.dtype), shape=values.shape)
            response.raw_output_contents.append(values.tobytes())
        return response


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The bundled T as a model repository."""
    folder = model_folder("T")
    write_repository(folder, replace(load_manifest(folder), max_batch=8), tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def start(repository: Path) -> Iterator[Any]:
    """Returns a function that starts a server for the repository, on a given or any port."""
    with contextlib.ExitStack() as servers:
        yield lambda port=0: servers.enter_context(contextlib.closing(SmallServer(repository, port)))


def address(server: Any) -> str:
    return f"triton://127.0.0.1:{server.port}"


def parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_a_repository_describes_and_identifies_the_networks(repository: Path) -> None:
    manifest = replace(load_manifest(model_folder("T")), max_batch=8)
    config = parsed(repository / SEARCH / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == (SEARCH, "onnxruntime", 8)
    assert [(i.name, list(i.dims)) for i in config.input][:2] == [("image", [256, 256, 3]), ("etm2_taps", [2, 3])]
    assert config.input[0].data_type == model_config_pb2.TYPE_UINT8
    expected = {"asymtrack_sha256_1": networks_hash(manifest), "cudnn_conv_algo_search": "1"}
    assert {key: p.string_value for key, p in config.parameters.items()} == expected
    assert (repository / SEARCH / "1" / "model.onnx").read_bytes() == (model_folder("T") / "search.onnx").read_bytes()
    template = parsed(repository / "asymtrack-t-fp32-template" / "config.pbtxt")
    assert [o.name for o in template.output] == [i.name for i in config.input[1:]]
    # In half precision with engines, which are made up because TensorRT is not installed here.
    half = tuple(replace(spec, dtype="float16") for spec in manifest.state)
    engines = {f"{n}.engine": {"flavour": "tensorrt"} for n in ("template", "search")}
    for name in engines:
        (repository.parent / name).write_bytes(name.encode())
    write_repository(repository.parent, replace(manifest, state=half, engines=engines, precision="fp16"), repository)
    config = parsed(repository / "asymtrack-t-fp16-search" / "config.pbtxt")
    assert config.backend == "tensorrt" and list(config.parameters) == ["asymtrack_sha256_1"]
    assert {i.data_type for i in config.input[1:]} == {model_config_pb2.TYPE_FP16}
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert (repository / config.name / "1" / "model.plan").read_bytes() == b"search.engine"
    assert parsed(repository / "asymtrack-t-fp16-template" / "config.pbtxt").max_batch_size == 1


def test_a_new_model_becomes_the_next_version_and_an_existing_one_keeps_its_version(repository: Path) -> None:
    folder = model_folder("T")
    manifest = replace(load_manifest(folder), max_batch=8)
    other = replace(manifest, files={**manifest.files, "search.onnx": FileEntry(1, "0" * 64)})
    shutil.copytree(repository / SEARCH / "1", repository / SEARCH / "1.bak")  # a user's backup
    assert write_repository(folder, other, repository) == 2
    assert write_repository(folder, manifest, repository) == 1
    hashes = {key: p.string_value for key, p in parsed(repository / SEARCH / "config.pbtxt").parameters.items()}
    assert [hashes[f"asymtrack_sha256_{n}"] for n in (1, 2)] == [networks_hash(manifest), networks_hash(other)]
    with pytest.raises(ExportError, match="another --batch"):
        write_repository(folder, replace(other, max_batch=2), repository)
    with pytest.raises(ExportError, match="cannot write into /dev/null/models: Not a directory"):
        write_repository(folder, other, Path("/dev/null/models"))


@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "plain"])
def test_several_targets_come_and_go(start: Any, shared: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if not shared:
        monkeypatch.setattr(backend_module, "_SHARED_MEMORY", Path("/nowhere"))
    at = address(start())
    with MultiTracker.load("T", backend=at) as many, Tracker.load("T", backend="onnxruntime") as single:
        check_several(many, single, FRAMES, BOXES, pixels=5e-3, score=1e-3)
        assert bool(many.backend._region) is shared
    assert not list(Path("/dev/shm").glob("asymtrack-*"))
    assert bench.main(["speed", "T", "--protocol", "P1", "--seconds", "0.1", "--backend", at, "--json"]) == 0
    assert '"device": "server"' in capsys.readouterr().out


def test_a_run_reports_a_lost_server_and_continues_when_it_is_back(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, FRAMES)
    server = start()
    calls: List[int] = []
    search = backend_module.TritonBackend.search

    def interrupted(self: Any, frame: np.ndarray, windows: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            server.close()
        if len(calls) == 5:
            start(server.port)
        return search(self, frame, windows)

    monkeypatch.setattr(backend_module.TritonBackend, "search", interrupted)
    boxes = tmp_path / "boxes.csv"
    arguments = [str(tmp_path), "--box", as_argument(BOX), "--backend", address(server), "--boxes", str(boxes)]
    assert track.main(arguments) == 1  # it ran, and two frames were left out
    told = capsys.readouterr().err
    assert told.count("cannot be used") == told.count(f"Triton at 127.0.0.1:{server.port} answers again\n") == 1
    rows = {int(row["frame"]): row for row in csv.DictReader(boxes.open())}
    assert sorted(rows) == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]  # the calls for frames 3 and 4 found no server
    with Tracker.load("T", backend="onnxruntime") as local:
        local.init(FRAMES[0], BOX)
        for i in sorted(rows)[1:]:
            np.testing.assert_allclose([float(rows[i][k]) for k in "xywh"], local.update(FRAMES[i]).box, atol=0.01)


def test_another_model_is_refused_at_the_start_and_after_an_outage(start: Any, repository: Path, capsys: Any) -> None:
    server = start()
    with Tracker.load("T", backend=address(server)) as tracker:
        tracker.init(FRAMES[0], BOX)
        server.close()
        with pytest.raises(ServerError, match="cannot be used"):
            tracker.update(FRAMES[1])
        config = repository / SEARCH / "config.pbtxt"
        config.write_text(config.read_text().replace("asymtrack_sha256_1", "other"))
        start(server.port)
        with pytest.raises(BackendError, match="other networks"):
            tracker.update(FRAMES[2])
    assert track.main(["nothing.mp4", "--box", "1,2,30,40", "--backend", address(server)]) == 2
    told = capsys.readouterr().err
    assert f"has other networks as {SEARCH}" in told and told.count("\n") == 1


def test_invalid_addresses_and_arguments_are_refused() -> None:
    for wrong in ("triton://", "triton://host:port", "triton://host/path", "triton://me@host"):
        with pytest.raises(UsageError, match="triton://HOST"):
            Tracker.load("T", backend=wrong)
    for device, error, said in (("cpu", UsageError, "leave out"), ("auto", ServerError, "127.0.0.1:9 cannot be used")):
        with pytest.raises(error, match=said):
            Tracker.load("T", backend="triton://127.0.0.1:9", device=device)
