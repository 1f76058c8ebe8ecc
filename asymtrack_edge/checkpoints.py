"""Weights from files: the authors' checkpoints, plain state_dicts, safetensors and the bundled ones.

Nothing in a file is ever executed: PyTorch's files are read by an unpickler that cannot import or
call (see ``_unpickle``). Whatever does not fit is refused with one line naming the tensor.

Typical use::

    model = load_model("AsymTrack_ep0500.pth.tar", VARIANTS["T"])
    weights = load_weights("run/ema-5000.safetensors")  # variant told from the file
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple, Union

from asymtrack_edge._formats import open_tensors
from asymtrack_edge._tensor_files import TensorFile, require
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.variants import VARIANTS, Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from asymtrack_edge.network import AsymTrack

PathLike = Union[str, "os.PathLike[str]"]

#: Modules of the published network that it never uses; checkpoints hold their weights all the same.
_UNUSED = re.compile(r"\.blocks\.\d+\.(post_kernels|downsample|upsample)\.")
#: Where the names of this network begin; what stands before ("module.", "_orig_mod.") is stripped.
_ROOT = re.compile(r"(?:^|\.)((?:backbone\.(?:patch_embed|layers)|bottleneck|box_head)\..*)$", re.DOTALL)
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Checkpoint:
    """An opened file of weights, before any of its numbers are read.

    Attributes:
        path: the file.
        kind: ``"PyTorch"`` or ``"safetensors"``.
        shapes: shape of each tensor by its name in ``AsymTrack.state_dict()``; unused modules of the
            published network are left out.
        metadata: what a safetensors file says about itself (see ``save_weights``).
        variants: names of the published variants that it can be: what the metadata says, else what
            the tensors tell (see ``guess_variant``).
    """

    path: Path
    kind: str
    shapes: Dict[str, Tuple[int, ...]]
    metadata: Dict[str, str]
    variants: Tuple[str, ...]
    _file: TensorFile
    _prefix: str

    def tensors(self, variant: Variant) -> Dict[str, Tensor]:
        """Reads the weights of ``variant``.

        Returns:
            Contiguous float32 tensors on the CPU with exactly the keys and shapes of
            ``AsymTrack(variant).state_dict()`` (and its int64 counters of BatchNorm).

        Raises:
            CheckpointError: a tensor is missing, has another shape, is not of a floating-point type,
                or holds NaN or infinity; or the file has tensors that the variant has no place for.
        """
        torch = require("torch")
        expected = _expected_shapes(variant)
        self._check(variant, expected)
        stored = {self._prefix + name: name for name in expected if name in self.shapes}
        weights = {}
        for stored_name, tensor in self._file.read(stored):
            name = stored[stored_name]
            if name.endswith(_COUNTER):
                weights[name] = tensor.to(torch.int64)
                continue
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).replace("torch.", "")
                raise CheckpointError(f"{self.path}: tensor {name!r} is {kind}, not floating point")
            weights[name] = tensor.to(torch.float32)
            if not torch.isfinite(weights[name]).all():
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} holds NaN or infinity: the training run has diverged; "
                    "use an earlier checkpoint"
                )
        # Checkpoints of other programs may leave the counters out; nothing at inference reads them.
        zero = torch.zeros((), dtype=torch.int64)
        return {name: weights[name] if name in weights else zero.clone() for name in expected}

    def _check(self, variant: Variant, expected: Dict[str, Tuple[int, ...]]) -> None:
        """Compares names and shapes."""
        stated = self.metadata.get("variant", variant.name)
        if stated != variant.name:
            raise CheckpointError(
                f"{self.path} holds weights of variant {_clip(stated)}, not {variant.name}: choose that one"
            )
        need = f"variant {variant.name} needs"
        missing = [name for name in expected if name not in self.shapes and not name.endswith(_COUNTER)]
        if missing:
            what = f"{self.path} has no tensor {_first(missing)}, which {need}"
            raise CheckpointError(what + self._hint(variant))
        for name, shape in expected.items():
            if self.shapes.get(name, shape) != shape:
                what = f"{self.path}: tensor {name!r} is {_by(self.shapes[name])}, but {need} {_by(shape)}"
                raise CheckpointError(what + self._hint(variant))
        surplus = [name for name in self.shapes if name not in expected]
        if surplus:
            what = f"{self.path} has a tensor {_first(surplus)} for which variant {variant.name} has no place"
            raise CheckpointError(what + self._hint(variant))

    def _hint(self, variant: Variant) -> str:
        """Ends a message with what the file probably is."""
        if not self.variants:
            return ": its tensors fit no published variant"
        if variant.name in self.variants:
            return ": the file is incomplete or of a modified model"
        return f": it looks like variant {' or '.join(self.variants)}, so choose that"


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Opens a file of weights and reads names and shapes, not numbers.

    The format is told by the contents: PyTorch's zip format or its older one, with the state_dict at
    the top or under ``net``, ``state_dict``, ``model``, ``model_state_dict`` or ``ema``; or
    safetensors. Prefixes such as ``module.`` are stripped.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged, is not a checkpoint, or
            holds the weights of some other network.
        MissingDependencyError: safetensors (for such a file) or torch is absent.
    """
    path = Path(path)
    file = open_tensors(path)
    prefix = _prefix(file.shapes)
    if prefix is None:
        names = ", ".join(_clip(name) for name in list(file.shapes)[:3])
        raise CheckpointError(f"{path} holds the weights of some other network (tensors {names}, ...)")
    shapes = {
        name[len(prefix) :]: shape
        for name, shape in file.shapes.items()
        if name.startswith(prefix) and not _UNUSED.search(name)
    }
    stated = file.metadata.get("variant", "")
    variants = (stated,) if stated in VARIANTS else guess_variant(shapes)
    return Checkpoint(path, file.kind, shapes, file.metadata, variants, file, prefix)


def guess_variant(tensors: Mapping[str, Any]) -> Tuple[str, ...]:
    """Tells published variants from the names of tensors, by the number of encoder blocks.

    S and B differ in the size of their crops and in their training only, so no tensor can tell them
    apart and both are returned.

    Args:
        tensors: anything keyed by the names of ``AsymTrack.state_dict()``.

    Returns:
        ``("T",)``, ``("S", "B")``, or nothing where no published variant fits.
    """
    depths = [0, 0, 0]
    for name in tensors:
        match = re.match(r"backbone\.layers\.([012])\.blocks\.\d+\.gamma_1$", name)
        if match:
            depths[int(match.group(1))] += 1
    return tuple(name for name, variant in VARIANTS.items() if variant.depths == tuple(depths))


def load_weights(path: PathLike, variant: Optional[Variant] = None) -> Dict[str, Tensor]:
    """Reads the weights of a variant, whatever kind of file they are in.

    Args:
        path: see ``open_checkpoint``.
        variant: what to read them as; None for what the file looks like. Weights of S and B have the
            same tensors, so None serves for both.

    Returns:
        See ``Checkpoint.tensors``; fit for ``AsymTrack(variant).load_state_dict(...)``.

    Raises:
        CheckpointError: see ``open_checkpoint`` and ``Checkpoint.tensors``.
        MissingDependencyError: torch or safetensors is absent.
    """
    checkpoint = open_checkpoint(path)
    if variant is None:
        if not checkpoint.variants:
            raise CheckpointError(f"{path} fits none of the variants {', '.join(VARIANTS)}: name yours")
        variant = VARIANTS[checkpoint.variants[0]]
    return checkpoint.tensors(variant)


def load_model(path: Optional[PathLike], variant: Variant, device: Union[str, torch.device] = "cpu") -> AsymTrack:
    """Makes the network of a variant with its weights, in evaluation mode.

    Args:
        path: see ``open_checkpoint``; None for the bundled weights.
        variant: which model.
        device: where to put it.

    Raises:
        CheckpointError: see ``load_weights``; or no weights of this variant are bundled.
        MissingDependencyError: torch or safetensors is absent.
    """
    require("torch")
    from asymtrack_edge.network import AsymTrack

    weights = load_weights(bundled_weights(variant) if path is None else path, variant)
    model = AsymTrack(variant)
    model.load_state_dict(weights)
    return model.to(device).eval()


def bundled_weights(variant: Variant) -> Path:
    """The file of weights that comes with this package.

    Raises:
        CheckpointError: none come for this variant.
    """
    path = Path(__file__).parent / "weights" / f"{variant.name}.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"no weights of variant {variant.name} come with this package: give a checkpoint of the authors "
            "(AsymTrack_ep0500.pth.tar, see the README) or train one with asymtrack-train"
        )
    return path


def save_weights(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], half: bool = True) -> None:
    """Writes a safetensors file, whole or not at all: beside ``path`` first, then renamed.

    Args:
        path: what to write; replaced if it exists.
        tensors: a state_dict; floating-point tensors are converted, others kept.
        metadata: goes into the file's header as strings (others than strings as JSON). Name the
            ``variant``: loading as another is then refused.
        half: store float16 instead of float32.

    Raises:
        CheckpointError: the file cannot be written, or a tensor holds NaN, infinity or a number too
            large for float16.
        MissingDependencyError: torch or safetensors is absent.
    """
    torch = require("torch")
    path = Path(path)
    dtype = torch.float16 if half else torch.float32
    converted = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if not torch.isfinite(tensor).all():
                limit = " or a number too large for float16: save as float32" if half else ""
                raise CheckpointError(f"cannot save tensor {name!r}: it holds NaN or infinity{limit}")
        # A copy, because safetensors refuses tensors that share memory.
        converted[name] = tensor.clone(memory_format=torch.contiguous_format)
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    data = require("safetensors.torch").save(converted, header)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if beside.exists():
            beside.unlink()


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()


def _prefix(names: Mapping[str, Any]) -> Optional[str]:
    """What stands before the network's own names in most of ``names``; None if none is its own."""
    counts: Counter[str] = Counter()
    for name in names:
        match = _ROOT.search(name)
        if match:
            counts[name[: match.start(1)]] += 1
    return min(counts, key=lambda prefix: (-counts[prefix], len(prefix))) if counts else None


def _expected_shapes(variant: Variant) -> Dict[str, Tuple[int, ...]]:
    torch = require("torch")
    from asymtrack_edge.network import AsymTrack

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in AsymTrack(variant).state_dict().items()}


def _by(shape: Tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"


def _first(names: List[str]) -> str:
    return _clip(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _clip(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")
