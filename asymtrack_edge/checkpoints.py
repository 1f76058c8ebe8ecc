"""Weights from files: the authors' checkpoints, plain state_dicts, safetensors and the bundled ones.

Nothing in a file is ever executed: PyTorch's files are read by an unpickler that cannot import or call (see
``_torch_files``). Whatever does not fit is refused with one line naming the tensor.

Typical use::

    model = load_model("AsymTrack_ep0500.pth.tar", VARIANTS["T"])
    weights = load_weights("run/ema-5000.safetensors")  # variant told from the file
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

from asymtrack_edge._torch_files import Foreign, MalformedError, is_torch, load_torch, require
from asymtrack_edge.errors import CheckpointError, MissingDependencyError
from asymtrack_edge.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from asymtrack_edge.network import AsymTrack

PathLike = Union[str, "os.PathLike[str]"]

#: What ``--weights`` takes: averaged weights (EMA) or raw ones.
WEIGHTS = ("ema", "raw")

#: Modules of the published network that it never uses; checkpoints hold their weights all the same.
_UNUSED = re.compile(r"\.blocks\.\d+\.(post_kernels|downsample|upsample)\.")
#: Where the names of this network begin; what stands before ("module.", "_orig_mod.") is stripped.
_ROOT = re.compile(r"(?:^|\.)((?:backbone\.(?:patch_embed|layers)|bottleneck|box_head)\..*)$", re.DOTALL)
_COUNTER = "num_batches_tracked"

#: Names under which training programs keep a state_dict in a checkpoint, in the order tried; of averaged weights too.
_WRAPPERS = (
    *("net", "state_dict", "model", "model_state_dict", "student", "module", "shadow"),
    *(
        "ema",
        "ema_state_dict",
        "state_dict_ema",
        "model_ema",
        "model_ema_state_dict",
        "ema_model",
        "net_ema",
        "teacher",
    ),
)
#: A part of a name that says that weights are averaged over training steps.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged?|teacher|shadow)(?:[._]|$)")

#: What people hand over by accident: first bytes, what it is and what to do.
_OTHERS = (
    (b"\x1f\x8b", "is a gzip archive: unpack it and give the checkpoint inside"),
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run 'git lfs pull'"),
    (b"<", "is a web page and not a checkpoint: the download did not give the file itself"),
    (b"\x80", "is a pickle, but not one that PyTorch saved"),
)


class _Copy(NamedTuple):
    """One copy of the network's weights in a file."""

    place: str
    prefix: str
    tensors: Dict[str, Tensor]  # by the network's own names

    @property
    def averaged(self) -> bool:
        return bool(_AVERAGED.search(self.label))

    @property
    def label(self) -> str:
        return ".".join(part for part in (self.place, self.prefix.rstrip(".")) if part)

    def __str__(self) -> str:
        kind = "averaged" if self.averaged else "raw"
        return f"{kind} ({_clip(self.label)[1:-1]})" if self.label else kind


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, not yet held against a variant.

    Attributes:
        path: the file.
        kind: ``"PyTorch"`` or ``"safetensors"``.
        taken: which weights these are, where they lie: ``"raw (net)"``, ``"averaged (model_ema)"``.
        choice: one line for the user where the file holds averaged weights; else empty.
        metadata: what a safetensors file says about itself (see ``save_weights``).
        variants: names of the published variants that it can be: what the metadata says, else what
            the tensors tell (see ``guess_variant``).
        stored: the tensors as they are in the file, by their names in ``AsymTrack.state_dict()``; unused
            modules of the published network are left out.
    """

    path: Path
    kind: str
    taken: str
    choice: str
    metadata: Dict[str, str]
    variants: Tuple[str, ...]
    stored: Dict[str, Tensor]

    def tensors(self, variant: Variant) -> Dict[str, Tensor]:
        """The weights of ``variant``.

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
        weights = {}
        for name in expected:
            if name not in self.stored:
                # Checkpoints of other programs may leave the counters out; nothing at inference reads them.
                weights[name] = torch.zeros((), dtype=torch.int64)
                continue
            tensor = self.stored[name].clone(memory_format=torch.contiguous_format)
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
        return weights

    def _check(self, variant: Variant, expected: Dict[str, Tuple[int, ...]]) -> None:
        """Compares names and shapes."""
        stated = self.metadata.get("variant", variant.name)
        if stated != variant.name:
            raise CheckpointError(
                f"{self.path} holds weights of variant {_clip(stated)}, not {variant.name}: choose that one"
            )
        need = f"variant {variant.name} needs"
        missing = [name for name in expected if name not in self.stored and not name.endswith(_COUNTER)]
        if missing:
            what = f"{self.path} has no tensor {_first(missing)}, which {need}"
            raise CheckpointError(what + self._hint(variant))
        for name, shape in expected.items():
            if name in self.stored and self.stored[name].shape != shape:
                what = f"{self.path}: tensor {name!r} is {_by(self.stored[name].shape)}, but {need} {_by(shape)}"
                raise CheckpointError(what + self._hint(variant))
        surplus = [name for name in self.stored if name not in expected]
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

    def model(self, variant: Variant) -> AsymTrack:
        """Makes the network of a variant with these weights, in evaluation mode, on the CPU.

        Raises:
            CheckpointError: see ``tensors``.
        """
        weights = self.tensors(variant)
        from asymtrack_edge.network import AsymTrack

        model = AsymTrack(variant)
        model.load_state_dict(weights)
        return model.eval()


def open_checkpoint(path: PathLike, weights: Optional[str] = None) -> Checkpoint:
    """Reads a file of weights.

    The format is told by the contents: PyTorch's zip format or its older one, with the state_dict at
    the top or under the names in which training programs keep it (``net``, ``state_dict``, ``model``,
    ``ema``, ...); or safetensors. Prefixes such as ``module.`` are stripped.

    Args:
        path: the file.
        weights: where it holds both, ``"ema"`` for the weights averaged over training steps or ``"raw"``
            for those of the last step; None for the averaged ones where there are any.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged, is not a checkpoint, holds
            the weights of some other network, or none of the kind asked for.
        MissingDependencyError: safetensors (for such a file) or torch is absent.
    """
    path = Path(path)
    with _described(path):
        kind, tree, metadata = _read(path)
        found = list(_state_dicts(tree))
        if not found:
            raise MalformedError(_no_tensors(tree))
    copies = [copy for place, tensors in found for copy in _copies(place, tensors)]
    if not copies:
        names = ", ".join(_clip(name) for name in list(found[0][1])[:3])
        raise CheckpointError(f"{path} holds the weights of some other network (tensors {names}, ...)")
    copy, choice = _choose(path, copies, weights)
    stored = {name: tensor for name, tensor in copy.tensors.items() if not _UNUSED.search(name)}
    stated = metadata.get("variant", "")
    variants = (stated,) if stated in VARIANTS else guess_variant(stored)
    return Checkpoint(path, kind, str(copy), choice, metadata, variants, stored)


def _state_dicts(node: Any, place: str = "", depth: int = 3) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Finds the state_dicts: what known wrappers hold, or the tensors of ``node`` itself."""
    if isinstance(node, Foreign):  # an instance of a foreign subclass of dict keeps its items
        node = node.items
    if not isinstance(node, dict) or not depth:
        return
    found = False
    for wrapper in _WRAPPERS:
        for inner in _state_dicts(node.get(wrapper), f"{place}.{wrapper}".lstrip("."), depth - 1):
            found = True
            yield inner
    tensors = {name: value for name, value in node.items() if type(value).__name__ == "Tensor"}
    if tensors and not found:
        yield place, tensors


def _copies(place: str, tensors: Mapping[str, Any]) -> List[_Copy]:
    """The copies of this network in a state_dict, told apart by their prefixes; the fullest first."""
    copies: Dict[str, _Copy] = {}
    strays = []
    for name, tensor in tensors.items():
        match = _ROOT.search(name)
        if match:
            prefix = name[: match.start(1)]
            copies.setdefault(prefix, _Copy(place, prefix, {})).tensors[match.group(1)] = tensor
        elif tensor.numel() > 1:  # counters and decays of averaging are no weights
            strays.append(name)
    for name in strays:
        owner = max((prefix for prefix in copies if name.startswith(prefix)), key=len, default=None)
        if owner is not None:
            copies[owner].tensors[name[len(owner) :]] = tensors[name]
    return sorted(copies.values(), key=lambda copy: (-len(copy.tensors), len(copy.prefix)))


def _choose(path: Path, copies: List[_Copy], weights: Optional[str]) -> Tuple[_Copy, str]:
    """The copy to take, and a line on it if there are averaged weights."""
    fullest = max(len(copy.tensors) for copy in copies)
    copies = [copy for copy in copies if 2 * len(copy.tensors) >= fullest]
    averaged = next((copy for copy in copies if copy.averaged), None)
    raw = next((copy for copy in copies if not copy.averaged), None)
    if averaged and raw:
        taken, other, flag = (raw, averaged, "ema") if weights == "raw" else (averaged, raw, "raw")
        return taken, f"{path.name} holds two sets of weights: takes the {taken}; --weights {flag} takes the {other}"
    only = averaged or raw
    assert only is not None
    if weights is not None and only is not (raw if weights == "raw" else averaged):
        raise CheckpointError(f"{path} holds no {weights} weights, only {only}: leave out --weights {weights}")
    return only, f"{path.name} holds {only} weights" if averaged else ""


def _no_tensors(tree: Any) -> str:
    if isinstance(tree, dict):
        for wrapper in _WRAPPERS:
            if isinstance(tree.get(wrapper), Foreign):
                return f"holds an object of {_clip(tree[wrapper].name)} as {wrapper!r}: save its state_dict() instead"
        names = ", ".join(_clip(name) for name in list(tree)[:5])
        return f"holds no state_dict, only {names or 'an empty dictionary'}"
    name = tree.name if isinstance(tree, Foreign) else type(tree).__name__
    return f"holds a {_clip(name)} and no state_dict: save model.state_dict() instead"


def _read(path: Path) -> Tuple[str, Any, Dict[str, str]]:
    """Reads a file of any supported kind, told by its contents: kind, tree of tensors, metadata."""
    if path.is_dir():
        raise MalformedError("is a folder: give the checkpoint file inside it")
    if not path.is_file():
        raise MalformedError("is not a regular file" if path.exists() else "does not exist: check the path")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise MalformedError("is empty: copy or download it again")
    if head[8:9] == b"{":
        return "safetensors", *_safetensors(path)
    if is_torch(head):
        return "PyTorch", load_torch(path), {}
    if head[257:262] == b"ustar":
        raise MalformedError("is a tar archive: unpack it and give the checkpoint inside")
    for magic, message in _OTHERS:
        if head.lstrip().startswith(magic):
            raise MalformedError(message)
    raise MalformedError("is not a checkpoint: expected PyTorch's or the safetensors format")


def _safetensors(path: Path) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Tensors and metadata, read by the format's own library, which checks sizes and offsets."""
    require("torch")
    library = require("safetensors")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            # Copies, because the file may be replaced while its memory is mapped.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except library.SafetensorError as error:
        raise MalformedError(f"is a truncated or damaged safetensors file ({error}): download it again") from None
    if not tensors:
        raise MalformedError("holds no tensors")
    return tensors, metadata


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Turns what parsers raise on damaged files into a ``CheckpointError`` of one line naming the file."""
    try:
        yield
    except (CheckpointError, MissingDependencyError):
        raise
    except MalformedError as error:
        raise CheckpointError(" ".join(f"{path} {error}".split())) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # streams that make no sense: pickle, zipfile and torch raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or damaged ({reason}): copy or download it again") from None


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


def load_weights(path: PathLike, variant: Optional[Variant] = None, weights: Optional[str] = None) -> Dict[str, Tensor]:
    """Reads the weights of a variant, whatever kind of file they are in.

    Args:
        path: see ``open_checkpoint``.
        weights: see there.
        variant: what to read them as; None for what the file looks like. Weights of S and B have the
            same tensors, so None serves for both.

    Returns:
        See ``Checkpoint.tensors``; fit for ``AsymTrack(variant).load_state_dict(...)``.

    Raises:
        CheckpointError: see ``open_checkpoint`` and ``Checkpoint.tensors``.
        MissingDependencyError: torch or safetensors is absent.
    """
    checkpoint = open_checkpoint(path, weights)
    if variant is None:
        if not checkpoint.variants:
            raise CheckpointError(f"{path} fits none of the variants {', '.join(VARIANTS)}: name yours")
        variant = VARIANTS[checkpoint.variants[0]]
    return checkpoint.tensors(variant)


def load_model(path: Optional[PathLike], variant: Variant) -> AsymTrack:
    """Makes the network of a variant with its weights, in evaluation mode, on the CPU.

    Args:
        path: see ``open_checkpoint``; None for the bundled weights.
        variant: which model.

    Raises:
        CheckpointError: see ``load_weights``; or no weights of this variant are bundled.
        MissingDependencyError: torch or safetensors is absent.
    """
    return open_checkpoint(bundled_weights(variant) if path is None else path).model(variant)


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
    """Writes a safetensors file, whole or not at all.

    Args:
        path: what to write; replaced if it exists.
        tensors: a state_dict; floating-point tensors are converted, others kept.
        metadata: goes into the file's header as strings (others than strings as JSON). Name the
            ``variant``: loading as another is then refused.
        half: store float16 instead of float32.

    Raises:
        UsageError: no file can be written there.
        CheckpointError: the disk is full or gone, or a tensor holds NaN, infinity or a number too
            large for float16.
        MissingDependencyError: torch or safetensors is absent.
    """
    torch = require("torch")
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
    from asymtrack_edge.files import write_bytes

    try:
        write_bytes(path, data)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


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
