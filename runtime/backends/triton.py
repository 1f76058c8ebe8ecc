"""NVIDIA Triton Inference Server as a backend: the networks run on a server that many clients share.

The client makes the crops and keeps the template state of its targets; the server keeps no state. Each target
takes one request per frame, and the requests of a frame are sent together, so that the server's dynamic
batching can combine them with those of other clients. If the server runs on this machine, crops and state are
in shared memory, and a request holds only their location.

The server must have exactly the networks of the client's model: ``asymtrack-export --triton`` writes the hash
of each version into the server's configuration, and the client uses the version that matches.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Dict, List

import numpy as np

from asymtrack_edge.errors import BackendError, ServerError, UsageError, require
from asymtrack_edge.manifest import NETWORKS, Manifest, TensorSpec
from asymtrack_edge.runtime.backends.base import HostBackend

#: Seconds after which a request counts as lost, and for which a frame waits for an unreachable server.
_TIMEOUT, _PATIENCE = 10.0, 1.0

#: Short pauses: by default, gRPC may look for a server that has come back only every two minutes.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]

_SHARED_MEMORY = Path("/dev/shm")

#: Prefix of the configuration parameter that holds a version's hash; the version's number follows it.
HASH_PARAMETER = "asymtrack_sha256_"


def network_name(manifest: Manifest, network: str) -> str:
    """A network's name on the server: ``"asymtrack-t-fp32-search"``."""
    return f"asymtrack-{manifest.variant}-{manifest.precision}-{network}".lower()


def networks_hash(manifest: Manifest) -> str:
    """SHA-256 over the hashes of both ONNX models: engines that were built later do not change it."""
    both = manifest.files["template.onnx"].sha256 + manifest.files["search.onnx"].sha256
    return hashlib.sha256(both.encode()).hexdigest()


class TritonBackend(HostBackend):
    """The networks of a model on a Triton server at ``"triton://host:8001"``, its gRPC port (default: 8001).

    While the server is unreachable, frames are lost: each call of ``search`` or ``template`` tries to reach it
    for a second, then raises ``ServerError``. The first call after its return works as before.
    ``BackendError`` if the server has other networks under the model's name.
    """

    name = "triton"
    _search_images: np.ndarray

    def __init__(self, manifest: Manifest, address: str) -> None:
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC prints a line when a connection is lost
        grpc = require("tritonclient.grpc", "triton", "the backend triton://")
        from tritonclient.utils import InferenceServerException, np_to_triton_dtype

        parts = re.fullmatch(r"triton://([^/@?#:\[\]]+|\[[\da-fA-F:.]+\])(?::(\d+))?/?", address)
        if parts is None:
            raise UsageError(f"{address!r} is not a Triton server's address: give triton://HOST or triton://HOST:8001")
        url = f"{parts[1]}:{parts[2] or 8001}"
        super().__init__(manifest, f"Triton at {url}")
        self._grpc, self._error, self._dtype = grpc, InferenceServerException, np_to_triton_dtype
        self._local = parts[1] in ("localhost", "127.0.0.1", "[::1]")
        self._client = grpc.InferenceServerClient(url, channel_args=_CHANNEL)
        self._version = ""  # matching version of the networks; empty while not connected
        self._region = ""  # name of the shared memory; empty if there is none
        self._offsets: Dict[str, int] = {}  # of the arrays in it
        #: The inputs of each slot's requests. Without shared memory, only the crop is replaced for each request.
        self._inputs: Dict[int, List[Any]] = {}
        self.reserve(1)
        try:
            self._connect()
        except InferenceServerException as error:
            raise self._lost(error) from None

    def reserve(self, slots: int) -> None:
        if slots > self.capacity:
            super().reserve(slots)
            if self._version:
                self._share()

    def move(self, source: int, to: int) -> None:
        super().move(source, to)
        if not self._region:
            self._inputs.pop(to, None)

    def close(self) -> None:
        self._unshare()
        self._client.close()

    def _run_template(self, slot: int) -> None:
        result = self._ask("template", 1)[0]
        for spec in self.manifest.state:
            self.state[spec.name][slot] = result.as_numpy(spec.name)[0]
        if not self._region:
            self._inputs.pop(slot, None)

    def _run_searches(self, count: int) -> None:
        for slot, result in enumerate(self._ask("search", count)):
            self._predictions[slot] = result.as_numpy(self.manifest.output.name)[0]

    def _ask(self, network: str, count: int) -> List[Any]:
        """Sends the requests of slots 0 to ``count`` - 1 until a server answers; returns the results in this order."""
        began = monotonic()
        while True:
            try:
                if not self._version:
                    self._connect()
                return self._send(network, count)
            except self._error as error:
                self._version = ""
                if monotonic() - began > _PATIENCE:
                    raise self._lost(error) from None
                sleep(0.1)

    def _send(self, network: str, count: int) -> List[Any]:
        answers: List[Future[Any]] = [Future() for _ in range(count)]
        name = network_name(self.manifest, network)
        for slot, answer in enumerate(answers):
            if network == "search":
                inputs = self._search_inputs(slot)
            else:
                inputs = [self._input(self.manifest.template).set_data_from_numpy(self.template_image)]

            def done(result: Any, error: Any, answer: Future[Any] = answer) -> None:
                answer.set_exception(error) if error is not None else answer.set_result(result)

            self._client.async_infer(name, inputs, done, self._version, client_timeout=_TIMEOUT)
        wait(answers)  # for all of them: the next frame must not overwrite what a request still reads
        return [answer.result() for answer in answers]

    def _search_inputs(self, slot: int) -> List[Any]:
        if slot not in self._inputs:
            arrays = self.search_arrays(slice(None))
            self._inputs[slot] = [self._input(spec) for spec in (self.manifest.search, *self.manifest.state)]
            for made in self._inputs[slot]:
                size = arrays[made.name()][slot].nbytes
                if self._region:
                    made.set_shared_memory(self._region, size, self._offsets[made.name()] + slot * size)
                else:
                    made.set_data_from_numpy(arrays[made.name()][slot : slot + 1])
        elif not self._region:
            self._inputs[slot][0].set_data_from_numpy(self._search_images[slot : slot + 1])
        return self._inputs[slot]

    def _input(self, spec: TensorSpec) -> Any:
        return self._grpc.InferInput(spec.name, [1, *spec.shape], self._dtype(np.dtype(spec.dtype)))

    def _connect(self) -> None:
        """Finds the version of both networks that matches the model, and shares memory with the server."""
        wanted, versions = networks_hash(self.manifest), []
        for network in NETWORKS:
            name = network_name(self.manifest, network)
            config = self._client.get_model_config(name, client_timeout=_TIMEOUT).config
            hashes = {key: p.string_value for key, p in config.parameters.items() if key.startswith(HASH_PARAMETER)}
            fitting = [int(key[len(HASH_PARAMETER) :]) for key, value in hashes.items() if value == wanted]
            if not fitting:
                raise BackendError(
                    f"{self.description} has other networks as {name} than this model (SHA-256 {wanted:.12}): use the "
                    "model exported for it, or add this one to its repository with asymtrack-export --triton"
                )
            versions.append(max(fitting))
        self._version = str(min(versions))
        self._share()

    def _lost(self, error: Any) -> ServerError:
        return ServerError(f"{self.description} cannot be used: {' '.join(str(error.message()).split())}")

    def _share(self) -> None:
        """Puts the contents of requests into memory shared with the server, where possible."""
        self._unshare()
        if not self._local or not _SHARED_MEMORY.is_dir():
            return
        arrays = self.search_arrays(slice(None))
        layout = np.dtype([(name, array.dtype, array.shape) for name, array in arrays.items()], align=True)
        self._offsets = {name: field[1] for name, field in (layout.fields or {}).items()}
        size = layout.itemsize
        region = f"asymtrack-{uuid.uuid4().hex}"
        path = _SHARED_MEMORY / region
        try:
            with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full /dev/shm would kill the process later
                memory = np.asarray(np.memmap(file, layout, "r+", shape=(1,)))[0]
            self._client.register_system_shared_memory(region, f"/{region}", size, client_timeout=_TIMEOUT)
        except (OSError, self._error):  # a server in a container has its own /dev/shm: send the data instead
            return
        finally:
            # Both sides have mapped it by now: it disappears with the last of them, however the process ends.
            path.unlink(missing_ok=True)
        for name, array in arrays.items():
            memory[name][...] = array
            arrays[name] = memory[name]
        self._search_images = arrays.pop(self.manifest.search.name)
        self.state.update(arrays)
        self._region = region

    def _unshare(self) -> None:
        region, self._region = self._region, ""
        self._inputs.clear()
        if region:
            with suppress(self._error):  # the server is gone
                self._client.unregister_system_shared_memory(region, client_timeout=1.0)
