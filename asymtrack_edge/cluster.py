"""Work spread over a Ray cluster: joining it, carrying a model there, taking the results.

The files of a model travel through the object store, once. What the items of the work name (sequences) does not:
every node must see it under the same path. A task whose worker or node dies is run again.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

from asymtrack_edge.errors import AsymTrackError, require


def join_cluster(address: str, processors: int) -> Any:
    """Joins a cluster; returns the module ``ray``.

    Args:
        address: of the cluster; ``"auto"`` finds the one that runs, ``"local"`` starts one on this machine.
        processors: of one that is started here.

    Raises:
        MissingDependencyError: Ray is not installed.
        AsymTrackError: there is no such cluster.
    """
    ray = require("ray", "ray", "--ray")
    try:
        if ":" in address:  # Ray itself tries for minutes where nobody answers
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        # Workers find what this process finds, modules in the working directory among it.
        environment = {"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}}
        options = {"num_cpus": processors} if address == "local" else {}
        quiet = {"ignore_reinit_error": True, "log_to_driver": False, "logging_level": "error"}
        ray.init(address, runtime_env=environment, **options, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise AsymTrackError(f"cannot join a Ray cluster at {address}: {error}") from None
    return ray


def needs_gpu(backend: str, device: str) -> bool:
    """Whether a task with this backend on this device has to ask the cluster for a GPU."""
    return "cuda" in device or backend in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt")


def spread(
    ray: Any,
    build: Callable[[Optional[str]], Any],
    work: Callable[[Any, Any], Any],
    model: str,
    items: Sequence[Any],
    processors: int,
    gpu: bool,
) -> Iterator[Tuple[int, Union[Any, AsymTrackError]]]:
    """Calls ``work(tracker, item)`` for each item on a worker; a task asks for ``processors`` and a ``gpu``.

    ``build`` makes the tracker once on each worker, from the folder there with the files of ``model``, or from None if
    that is no directory. Yields the number of each item with its result, or the error for which Ray gave up.
    """
    shipped = sorted(Path(model).iterdir()) if model and Path(model).is_dir() else []
    carried = ray.put((build, {path.name: path.read_bytes() for path in shipped if path.is_file()}))
    task = ray.remote(num_cpus=processors, num_gpus=int(gpu), max_retries=3)(_task)
    # In a list: Ray replaces a bare reference by its value, for each task anew.
    pending = {task.remote(work, [carried], item): i for i, item in enumerate(items)}
    try:
        while pending:
            (done,), _ = ray.wait(list(pending))
            number = pending.pop(done)
            try:
                yield number, ray.get(done)
            except ray.exceptions.RayError as error:
                yield number, AsymTrackError(f"Ray gave up: {str(error).strip().splitlines()[-1]}")
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _task(work: Callable[[Any, Any], Any], carried: List[Any], item: Any) -> Any:
    return work(_built(carried[0])[0], item)


@lru_cache(maxsize=2)
def _built(carried: Any) -> Tuple[Any, tempfile.TemporaryDirectory]:
    """This worker's tracker, and the folder with its model's files; both stay as long as the cache holds them."""
    import ray

    build, content = ray.get(carried)
    folder = tempfile.TemporaryDirectory()
    for name, data in content.items():
        Path(folder.name, name).write_bytes(data)
    return build(folder.name if content else None), folder
