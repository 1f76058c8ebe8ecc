"""A model as two entries of a Triton model repository.

Each entry has a numbered folder per version, with the network and the manifest of its model, and a
``config.pbtxt`` with the hash of every served version: a client uses the version of its own model
(``runtime.backends.triton``). A model that is already served keeps its version number.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Dict

from asymtrack_edge.errors import ExportError, ManifestError
from asymtrack_edge.export.pipeline import replaced_directory
from asymtrack_edge.files import locked, write_text
from asymtrack_edge.manifest import NETWORKS, Manifest, TensorSpec, load_manifest
from asymtrack_edge.runtime.backends.triton import HASH_PARAMETER, network_name, networks_hash

_TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}

#: Versions served per network: clients of the previous version go on while others move to the newest one.
SERVED_VERSIONS = 2

#: How long a request waits for others to join its batch: little compared with a frame's 33 ms.
QUEUE_DELAY_MICROSECONDS = 1000


def write_repository(folder: Path, manifest: Manifest, repository: Path) -> int:
    """Adds the model in ``folder``, whose batch axis must be free, to a repository; creates it if it is missing.

    If all networks have TensorRT engines, they are written as plans, for the GPU and TensorRT that built them; else
    as ONNX models for Triton's ONNX Runtime backend. Returns the number of the model's version.

    Raises:
        ExportError: the repository has a network of that name with other inputs, or cannot be written.
    """
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with locked(repository):
            plan = all(manifest.engines.get(f"{n}.engine", {}).get("flavour") == "tensorrt" for n in NETWORKS)
            kind = "plan" if plan else "onnx"
            versions: Dict[int, Manifest] = {}
            interface = attrgetter("template", "search", "state", "output", "max_batch")
            entry = repository / network_name(manifest, "search")
            for path in (p for p in entry.glob("*/manifest.json") if p.parent.name.isdecimal()):
                other = None
                with suppress(ManifestError):
                    other = versions[int(path.parent.name)] = load_manifest(path.parent)
                fits = other is not None and interface(other) == interface(manifest)
                if not (fits and path.with_name(f"model.{kind}").is_file()):
                    raise ExportError(
                        f"{path.parent} is damaged, or has other inputs, another --batch or another format: "
                        f"remove {entry}, or give another --triton"
                    )
            served = sorted(versions)[-SERVED_VERSIONS:]
            same = [number for number in served if networks_hash(versions[number]) == networks_hash(manifest)]
            number = max(same) if same else 1 + max(versions, default=0)
            versions[number] = manifest
            for network in NETWORKS:
                entry = repository / network_name(manifest, network)
                with replaced_directory(entry / str(number)) as version:
                    shutil.copyfile(folder / f"{network}.{'engine' if plan else kind}", version / f"model.{kind}")
                    manifest.save(version)
                # Written after the network: a polling server never sees the hash of a version that does not exist yet.
                write_text(entry / "config.pbtxt", config(manifest, network, versions, plan))
            return number
    except OSError as error:
        raise ExportError(f"cannot write into {repository}: {error.strerror or error}") from None


def config(manifest: Manifest, network: str, versions: Dict[int, Manifest], plan: bool) -> str:
    """The text of ``config.pbtxt``; ``manifest`` belongs to the newest of ``versions``."""
    search = network == "search"
    inputs, outputs = manifest.tensors(network)
    # An engine of the template network takes one template at a time.
    batch = manifest.max_batch if search or not plan else 1

    def tensor(spec: TensorSpec) -> str:
        return f"data_type: {_TYPES[spec.dtype]} dims: {list(spec.shape)}"

    zeros = " ".join(f'inputs {{ key: "{i.name}" value {{ {tensor(i)} zero_data: true }} }}' for i in inputs)
    lines = [
        f'name: "{network_name(manifest, network)}"',
        f'backend: "{"tensorrt" if plan else "onnxruntime"}"',
        f'default_model_filename: "model.{"plan" if plan else "onnx"}"',
        f"max_batch_size: {batch}",
        *(f'input {{ name: "{spec.name}" {tensor(spec)} }}' for spec in inputs),
        *(f'output {{ name: "{spec.name}" {tensor(spec)} }}' for spec in outputs),
        f"version_policy {{ latest {{ num_versions: {SERVED_VERSIONS} }} }}",
        f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY_MICROSECONDS} }}",
        "# With two instances of the search network, the copies of one overlap the other's run.",
        f"instance_group {{ count: {2 if search else 1} kind: {'KIND_GPU' if plan else 'KIND_AUTO'} }}",
        "# The first run of a network takes seconds on a GPU: the server does it before any client's request.",
        *(f'model_warmup {{ name: "batch of {n}" batch_size: {n} {zeros} }}' for n in sorted({1, batch})),
        *(
            f'parameters {{ key: "{HASH_PARAMETER}{n}" value {{ string_value: "{networks_hash(m)}" }} }}'
            for n, m in sorted(versions.items())[-SERVED_VERSIONS:]
        ),
        # Heuristics: before 1.20, ONNX Runtime's default is to time cuDNN's algorithms at every new batch size.
        *([] if plan else ['parameters { key: "cudnn_conv_algo_search" value { string_value: "1" } }']),
    ]
    return "\n".join(lines) + "\n"
