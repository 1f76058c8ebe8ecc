"""Weights from files: the authors' checkpoints, plain state_dicts, safetensors and the bundled ones.

Nothing in a file is ever executed (see ``_torch_files``). Whatever does not fit is refused with one line naming the
tensor.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

from asymtrack_edge._torch_files import LEGACY, Foreign, MalformedError, open_torch
from asymtrack_edge.errors import CheckpointError, MissingDependencyError
from asymtrack_edge.files import write_bytes
from asymtrack_edge.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from asymtrack_edge.network import AsymTrack

PathLike = Union[str, "os.PathLike[str]"]

#: Modules of the published network that it never uses; checkpoints hold their weights all the same.
_UNUSED = re.compile(r"\.blocks\.\d+\.(post_kernels|downsample|upsample)\.")
#: Where the names of this network begin; what stands before ("net.", "module.", "_orig_mod.") tells copies apart.
_ROOT = re.compile(r"(?:^|\.)((?:backbone\.(?:patch_embed|layers)|bottleneck|box_head)\..*)$", re.DOTALL)
_COUNTER = "num_batches_tracked"
#: A part of a name that says that weights are averaged over training steps.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged?|teacher|shadow)(?:[._]|$)")
#: Dictionaries lie in each other at most so deep, under names at most so long.
_DEPTH, _NAME = 4, 100

#: What people hand over by accident: how it begins, what it is and what to do.
_OTHERS = (
    (rb"$", "is empty: copy or download it again"),
    (rb"\x1f\x8b", "is a gzip archive: unpack it and give the checkpoint inside"),
    (rb".{257}ustar", "is a tar archive: unpack it and give the checkpoint inside"),
    (rb"version https://git-lfs", "is a Git LFS pointer and not the file itself: run 'git lfs pull'"),
    (rb"\s*<", "is a web page and not a checkpoint: the download did not give the file itself"),
    (rb"\x80", "is a pickle, but not one that PyTorch saved"),
    (rb"", "is not a checkpoint: expected PyTorch's or the safetensors format"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, not yet held against a variant.

    Attributes:
        path: the file.
        taken: which weights these are, where they lie: ``"raw (net)"``, ``"averaged (model_ema)"``.
        choice: one line for the user where the file holds averaged weights; else empty.
        metadata: what a safetensors file says about itself (see ``save_weights``).
        variants: names of the published variants that it can be: what the metadata says, else what the number of
            encoder blocks tells. The tensors of S and B are the same.
        stored: the tensors as they are in the file, by their names in ``AsymTrack.state_dict()``; unused
            modules of the published network are left out.
    """

    path: Path
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
        import torch

        from asymtrack_edge.network import AsymTrack

        stated = self.metadata.get("variant", variant.name)
        if stated != variant.name:
            raise CheckpointError(
                f"{self.path} holds weights of variant {_clip(stated)}, not {variant.name}: choose that one"
            )
        with torch.device("meta"):
            expected = AsymTrack(variant).state_dict()
        need, have = ({name: _by(t.shape) for name, t in tensors.items()} for tensors in (expected, self.stored))
        # Checkpoints of other programs may leave the counters out; nothing at inference reads them.
        have.update((name, need[name]) for name in need if name.endswith(_COUNTER))
        wrong = [name for name in {**need, **have} if need.get(name) != have.get(name)]
        if wrong:
            if not self.variants:
                hint = "its tensors fit no published variant"
            elif variant.name in self.variants:
                hint = "the file is incomplete or of a modified model"
            else:
                hint = f"it looks like variant {' or '.join(self.variants)}, so choose that"
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            found, needed = have.get(wrong[0], "missing"), need.get(wrong[0], "none")
            what = f"tensor {_clip(wrong[0])}{more} is {found}, but variant {variant.name} needs {needed}"
            raise CheckpointError(f"{self.path}: {what}: {hint}")
        weights = {}
        for name in expected:
            if name.endswith(_COUNTER):
                weights[name] = self.stored.get(name, torch.zeros(())).to(torch.int64, copy=True)
                continue
            tensor = self.stored[name]
            if not tensor.is_floating_point():
                raise CheckpointError(f"{self.path}: tensor {name!r} is {tensor.dtype}, not floating point")
            weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            if not torch.isfinite(weights[name]).all():
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} holds NaN or infinity: the training run has diverged; "
                    "use an earlier checkpoint"
                )
        return weights

    def model(self, variant: Variant) -> AsymTrack:
        """The network of a variant with these weights (see ``tensors``), in evaluation mode, on the CPU."""
        from asymtrack_edge.network import AsymTrack

        model = AsymTrack(variant)
        model.load_state_dict(self.tensors(variant))
        return model.eval()


def open_checkpoint(path: PathLike, weights: Optional[str] = None) -> Checkpoint:
    """Reads a file of weights.

    The format is told by the contents: PyTorch's zip format or its older one, with the state_dict at the top or
    inside other dictionaries (``net``, ``state_dict``, ``model``, ``ema``, ...); or safetensors. Prefixes such as
    ``module.`` are stripped.

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
        if path.is_dir():
            raise MalformedError("is a folder: give the checkpoint file inside it")
        if not path.is_file():
            raise MalformedError("is not a regular file" if path.exists() else "does not exist: check the path")
        with open(path, "rb") as file:
            tree, metadata, read = _open(file)
            taken, choice, tensors = _choose(_copies(tree), weights)
            stored = {name: read(tensor) for name, tensor in tensors.items() if not _UNUSED.search(name)}
    blocks = [re.match(r"backbone\.layers\.([012])\.blocks\.\d+\.gamma_1$", name) for name in stored]
    depths = tuple(sum(match is not None and match[1] == stage for match in blocks) for stage in "012")
    stated = metadata.get("variant", "")
    variants = [stated] if stated in VARIANTS else [name for name, v in VARIANTS.items() if v.depths == depths]
    return Checkpoint(path, taken, choice and f"{path.name} {choice}", metadata, tuple(variants), stored)


def _open(file: BinaryIO) -> Tuple[Any, Dict[str, str], Callable[[Any], Tensor]]:
    """What a file of any supported kind holds, what it says about itself, and what reads one of its tensors."""
    _require("torch")
    head = file.read(512)
    file.seek(0)
    if head[8:9] == b"{":
        library = _require("safetensors")
        try:
            opened = library.safe_open(file.name, framework="pt")
            # Copies, because the file may be replaced while its memory is mapped.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except library.SafetensorError as error:
            raise MalformedError(f"is a truncated or damaged safetensors file ({error}): download it again") from None
        return tensors, opened.metadata() or {}, lambda tensor: tensor
    if head[:2] == b"PK" or LEGACY in head[:32]:
        tree, read = open_torch(file)
        return tree, {}, read
    raise MalformedError(next(what for pattern, what in _OTHERS if re.match(pattern, head, re.DOTALL)))


def _copies(tree: Any) -> Dict[str, Dict[str, Any]]:
    """The copies of this network's weights in a file, by what stands before their names."""
    copies: Dict[str, Dict[str, Any]] = {}
    others: List[str] = []
    todo, seen = [("", tree, 0)], set()
    for place, node, depth in todo:
        # An instance of a foreign subclass of dict keeps its items.
        items = node.items if isinstance(node, Foreign) else node
        if not isinstance(items, dict) or id(items) in seen or depth > _DEPTH:
            continue
        seen.add(id(items))
        here: Dict[str, Dict[str, Any]] = {}
        strays = []
        for name, value in items.items():
            match = _ROOT.search(name)
            if not hasattr(value, "shape"):
                if isinstance(value, (dict, Foreign)) and len(name) <= _NAME:
                    todo.append((f"{place}{name}.", value, depth + 1))
            elif match:
                here.setdefault(name[: match.start(1)], {})[match[1]] = value
            elif math.prod(value.shape) > 1:  # counters and decays of averaging are no weights
                strays.append(name)
        fullest = sorted(here, key=lambda prefix: -len(here[prefix]))[:4]
        for name in strays:
            owner = max((prefix for prefix in fullest if name.startswith(prefix)), key=len, default=None)
            if owner is not None:
                here[owner][name[len(owner) :]] = items[name]
        copies.update((place + prefix, here[prefix]) for prefix in fullest)
        others += strays
    if copies:
        return copies
    if others:
        names = ", ".join(map(_clip, others[:3]))
        raise MalformedError(f"holds the weights of some other network (tensors {names}, ...)")
    content = list(tree.items())[:5] if isinstance(tree, dict) else [("an object", tree)]
    names = ", ".join(f"{_clip(n)} ({_clip(v.name)})" if isinstance(v, Foreign) else _clip(n) for n, v in content)
    raise MalformedError(f"holds no state_dict, only {names or 'an empty dictionary'}: save model.state_dict()")


def _choose(copies: Dict[str, Dict[str, Any]], weights: Optional[str]) -> Tuple[str, str, Dict[str, Any]]:
    """What the copy to take is, a line on it if there are averaged weights, and its tensors."""
    fullest = max(map(len, copies.values()))
    found: Dict[str, Tuple[str, Dict[str, Any]]] = {}
    for prefix, tensors in sorted(copies.items(), key=lambda copy: (-len(copy[1]), len(copy[0]))):
        if 2 * len(tensors) >= fullest:
            kind = "ema" if _AVERAGED.search(prefix) else "raw"
            where = f" ({_clip(prefix.rstrip('.'))[1:-1]})" if prefix else ""
            found.setdefault(kind, ({"ema": "averaged", "raw": "raw"}[kind] + where, tensors))
    taken = weights or min(found)
    if taken not in found:
        only = found[min(found)][0]
        raise MalformedError(f"holds no {weights} weights, only {only}: leave out --weights {weights}")
    label, tensors = found.pop(taken)
    choice = f"holds {label} weights" if taken == "ema" else ""
    for flag, (other, _) in found.items():
        choice = f"holds two sets of weights: takes the {label}; --weights {flag} takes the {other}"
    return label, choice, tensors


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Turns what parsers raise on damaged files into a ``CheckpointError`` of one line naming the file."""
    try:
        yield
    except MissingDependencyError:
        raise
    except MalformedError as error:
        raise CheckpointError(" ".join(f"{path} {error}".split())) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # streams that make no sense: pickle, zipfile and torch raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or damaged ({reason}): copy or download it again") from None


def load_weights(path: PathLike, variant: Optional[Variant] = None, weights: Optional[str] = None) -> Dict[str, Tensor]:
    """See ``open_checkpoint`` and ``Checkpoint.tensors``; without a variant, of the one that the file looks like."""
    checkpoint = open_checkpoint(path, weights)
    return checkpoint.tensors(variant or VARIANTS[(checkpoint.variants or ("T",))[0]])


def load_model(path: Optional[PathLike], variant: Variant) -> AsymTrack:
    """The network of a variant with the weights of a file, None for the bundled ones: see ``Checkpoint.model``."""
    return open_checkpoint(bundled_weights(variant) if path is None else path).model(variant)


def bundled_weights(variant: Variant) -> Path:
    """The file of weights that comes with this package; raises ``CheckpointError`` if none comes for the variant."""
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
    torch = _require("torch")
    converted = {}
    for name, tensor in tensors.items():
        # A copy, because safetensors refuses tensors that share memory.
        tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float16 if half else torch.float32)
            if not torch.isfinite(tensor).all():
                limit = " or a number too large for float16: save as float32" if half else ""
                raise CheckpointError(f"cannot save tensor {name!r}: it holds NaN or infinity{limit}")
        converted[name] = tensor
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    try:
        write_bytes(path, _require("safetensors.torch").save(converted, header))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


def _require(module: str) -> Any:
    """Imports torch or safetensors when first needed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(module.split(".")[0], "export", "reading a checkpoint") from None


def _by(shape: Tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _clip(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:77] + "...")
