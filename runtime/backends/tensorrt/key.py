"""What an engine was built from, by and for, and whether that still holds.

An engine is machine code: it runs only with the TensorRT and on the kind of GPU that it was built
with. The key is written into the manifest beside the engine's hash and compared before anything of
the engine is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, Mapping, Optional, Tuple

import asymtrack_edge
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.backends.cuda.gpu import Gpu
from asymtrack_edge.runtime.backends.tensorrt.library import RTX, TensorRT

NETWORKS = ("template", "search")

#: TensorRT-RTX compiles for a GPU when it first meets it: one engine serves all GPUs from Ampere
#: on; Turing (7.5) needs one of its own.
RTX_PORTABLE = "8.0+"
RTX_TURING = "7.5"

_WORDS = {
    "model_sha256": "another model (SHA-256 {0:.12}, here {1:.12})",
    "precision": "precision {0}, the manifest says {1}",
    "batch": "batches of {0}, here {1}",
    "flavour": "{0}, here is {1}",
    "tensorrt": "TensorRT {0}, here is {1}",
    "gpu": "the GPU {0}, here is {1}",
    "compute_capability": "compute capability {0}, here is {1}",
    "asymtrack_edge": "asymtrack-edge {0}, this is {1}",
}


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on.

    Attributes:
        model_sha256: of the ONNX file.
        precision: ``"fp32"`` or ``"fp16"``.
        batch: smallest, best and largest batch of its profile, as ``"1-8-8"``.
        flavour: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        tensorrt: version of the library.
        gpu: the GPU's name; ``"any"`` for TensorRT-RTX.
        compute_capability: ``"7.2"``; for TensorRT-RTX ``RTX_PORTABLE`` or ``RTX_TURING``.
        asymtrack_edge: version of this package, whose choices shape the engine.
    """

    model_sha256: str
    precision: str
    batch: str
    flavour: str
    tensorrt: str
    gpu: str
    compute_capability: str
    asymtrack_edge: str

    def to_json(self) -> Dict[str, str]:
        """As the manifest holds it."""
        return asdict(self)


def batch_profile(manifest: Manifest, network: str) -> Tuple[int, int, int]:
    """Smallest, best and largest batch of a network: templates always come one at a time."""
    most = manifest.max_batch if network == "search" else 1
    return 1, most, most


def engine_key(manifest: Manifest, network: str, tensorrt: TensorRT, gpu: Optional[Gpu]) -> EngineKey:
    """The key of an engine for ``network`` built or run by ``tensorrt`` on ``gpu``.

    Args:
        manifest: of the export directory.
        network: ``"template"`` or ``"search"``.
        tensorrt: the TensorRT at hand.
        gpu: where it is to run; None, for TensorRT-RTX only, means any GPU from Ampere on.
    """
    if tensorrt.flavour == RTX:
        turing = gpu is not None and gpu.compute_capability == (7, 5)
        name, capability = "any", RTX_TURING if turing else RTX_PORTABLE
    else:
        assert gpu is not None
        name, capability = gpu.name, "{}.{}".format(*gpu.compute_capability)
    return EngineKey(
        model_sha256=manifest.files[f"{network}.onnx"].sha256,
        precision=manifest.precision,
        batch="{}-{}-{}".format(*batch_profile(manifest, network)),
        flavour=tensorrt.flavour,
        tensorrt=tensorrt.version,
        gpu=name,
        compute_capability=capability,
        asymtrack_edge=asymtrack_edge.__version__,
    )


def engine_file(network: str, key: EngineKey) -> str:
    """Name of an engine's file: one export may hold engines for Turing beside the portable ones."""
    turing = key.flavour == RTX and key.compute_capability == RTX_TURING
    return f"{network}-sm75.engine" if turing else f"{network}.engine"


def difference(recorded: Mapping[str, Any], wanted: EngineKey) -> Optional[str]:
    """Why an engine with the recorded key cannot be used for ``wanted``, or None if it can."""
    for field, value in wanted.to_json().items():
        if recorded.get(field) != value:
            was = recorded.get(field, "unknown")
            return "it was built for " + _WORDS[field].format(str(was), value)
    return None
