"""Weights from files: the authors' checkpoints, plain state_dicts, safetensors and the bundled weights.

Nothing in a file is ever executed (see ``_torch_files``). A file that does not fit is refused with a one-line message
that names the tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, Dict, Iterator, Mapping, Optional, Set, Tuple

from asymtrack_edge._torch_files import MalformedError, open_torch
from asymtrack_edge.errors import CheckpointError, require
from asymtrack_edge.files import AnyPath, write_bytes
from asymtrack_edge.variants import BUNDLED, VARIANTS, Variant

if TYPE_CHECKING:
    from torch import Tensor

    from asymtrack_edge.network import AsymTrack

#: Entries of checkpoints that are not used: leftover modules of the published network, and BatchNorm's counters.
_UNUSED = re.compile(r"\.blocks\.\d+\.(post_kernels|downsample|upsample)\.|num_batches_tracked$")
#: Tensor names of this network. The prefix before them ("net.", "module.", "_orig_mod.") tells copies apart.
_ROOT = re.compile(r"(?:^|[./])((?:backbone\.(?:patch_embed|layers)|bottleneck|box_head)\.[^/]*)$", re.DOTALL)
#: The magic number near the beginning of a file in PyTorch's format before 1.6.
_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19."
#: A part of a name that marks weights as averaged over training steps.
_AVERAGED = re.compile(r"(?:^|[./]|(?<!exp)_)(?:ema|swa|avg|averaged?|teacher|shadow)(?:[./_]|$)", re.I)
#: What torch.compile, FSDP and activation checkpointing insert into the names of the modules they wrap.
_WRAPPED = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

#: Files given by mistake: how they begin, what they are and what to do.
_OTHERS = (
    (rb"$", "is empty: copy or download it again"),
    (rb"\x1f\x8b|.{257}ustar", "is a gzip or tar archive: unpack it and give the checkpoint inside"),
    (rb"version https://git-lfs", "is a Git LFS pointer and not the file itself: run 'git lfs pull'"),
    (rb"\s*<", "is a web page and not a checkpoint: the download did not give the file itself"),
    (rb"\x80", "is a pickle, but not one that PyTorch saved"),
    (rb"", "is not a checkpoint: expected PyTorch's or the safetensors format"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, not yet compared with a variant.

    Attributes:
        path: the file.
        taken: which weights these are and where they lie in the file: ``"raw (net)"``, ``"averaged (model_ema)"``.
        choice: one line for the user if the file holds several sets of weights; else empty.
        metadata: the header of a safetensors file (see ``save_weights``).
        variants: names of the published variants that it may be: the one in the metadata, else those with its number
            of encoder blocks. The tensors of S and B are the same.
        stored: the tensors as they are in the file, by their names in ``AsymTrack.state_dict()``; unused
            modules of the published network are left out.
        sha256: of the whole file, hexadecimal.
    """

    path: Path
    taken: str
    choice: str
    metadata: Dict[str, str]
    variants: Tuple[str, ...]
    stored: Dict[str, Tensor]
    sha256: str

    def tensors(self, variant: Variant) -> Dict[str, Tensor]:
        """The weights of ``variant``.

        Returns:
            Contiguous float32 tensors on the CPU with exactly the keys and shapes of
            ``AsymTrack(variant).state_dict()`` (and its int64 counters of BatchNorm, all zero).

        Raises:
            CheckpointError: a tensor is missing, has another shape, or holds NaN or infinity; or the file has
                tensors that the variant does not have.
        """
        import torch

        from asymtrack_edge.network import AsymTrack

        stated = self.metadata.get("variant", variant.name)
        if stated != variant.name:
            raise CheckpointError(
                f"{self.path} holds weights of variant {_clip(stated)}, not {variant.name}: choose that variant"
            )
        with torch.device("meta"):
            expected = AsymTrack(variant).state_dict()
        need = {name: tuple(tensor.shape) for name, tensor in expected.items() if not _UNUSED.search(name)}
        have = {name: tuple(tensor.shape) for name, tensor in self.stored.items()}
        if wrong := [name for name in {**need, **have} if need.get(name) != have.get(name)]:
            hint = "the file is incomplete or from a modified model"
            if self.variants and variant.name not in self.variants:
                hint = f"it looks like variant {' or '.join(self.variants)}, so choose that"
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            found, needed = have.get(wrong[0], "missing"), need.get(wrong[0], "none")
            what = f"tensor {_clip(wrong[0])}{more} is {found}, but variant {variant.name} needs {needed}"
            raise CheckpointError(f"{self.path}: {what}: {hint}")
        weights = {name: torch.zeros((), dtype=torch.int64) for name in expected}  # BatchNorm's counters stay zero
        for name in need:
            what = f"{self.path}: tensor {name!r}"
            if not self.stored[name].is_floating_point():
                kind = str(self.stored[name].dtype).rpartition(".")[2]
                raise CheckpointError(f"{what} is {kind}: give a checkpoint that is not quantised")
            weights[name] = self.stored[name].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            if not torch.isfinite(weights[name]).all():
                advice = "the training run has diverged; use an earlier checkpoint"
                raise CheckpointError(f"{what} holds NaN or infinity: {advice}")
        return weights

    def model(self, variant: Variant) -> AsymTrack:
        """The network of a variant with these weights (see ``tensors``), in evaluation mode, on the CPU."""
        from asymtrack_edge.network import AsymTrack

        model = AsymTrack(variant)
        model.load_state_dict(self.tensors(variant))
        return model.eval()


def open_checkpoint(path: AnyPath, weights: Optional[str] = None) -> Checkpoint:
    """Reads a file of weights.

    The contents decide the format: PyTorch's zip format or its older one, with the state_dict at the top level or
    nested in other dictionaries (``net``, ``state_dict``, ``model``, ``ema``, ...); or safetensors. Prefixes such as
    ``module.`` are stripped.

    Args:
        path: the file.
        weights: ``"ema"`` for the weights averaged over training steps, ``"raw"`` for those of the last
            step; None for the averaged weights if there are any.

    Raises:
        CheckpointError: the file cannot be read, is truncated or damaged, is not a checkpoint, holds
            the weights of another network, or lacks the kind of weights asked for.
        MissingDependencyError: torch or safetensors is missing.
    """
    for package in ("safetensors", "torch"):
        require(package, "export", "reading a checkpoint")
    path = Path(path)
    try:
        if not path.is_file():  # opening a FIFO would block
            what = "is a folder: give the checkpoint file inside it" if path.is_dir() else "is not a regular file"
            raise MalformedError(what if path.exists() else "does not exist: check the path")
        with open(path, "rb") as file:
            tree, metadata, read = _open(file)
            taken, choice, tensors = _choose(tree, weights)
            stored = {name: read(tensor) for name, tensor in tensors.items() if not _UNUSED.search(name)}
            file.seek(0)
            sha = hashlib.sha256()  # of the file that was read: a training run may have put another in its place
            for part in iter(partial(file.read, 1 << 20), b""):
                sha.update(part)
    except MalformedError as error:
        raise CheckpointError(" ".join(f"{path} {error}".split())) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # malformed streams: pickle, zipfile and torch raise many kinds of error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or damaged ({reason}): copy or download it again") from None
    block = re.compile(r"backbone\.layers\.([012])\.blocks\.\d+\.gamma_1$")
    blocks = Counter(match[1] for match in map(block.match, stored) if match)
    depths = tuple(blocks[stage] for stage in "012")
    stated = metadata.get("variant", "")
    names = [stated] if stated in VARIANTS else [name for name, v in VARIANTS.items() if v.depths == depths]
    return Checkpoint(path, taken, choice and f"{path.name} {choice}", metadata, tuple(names), stored, sha.hexdigest())


def _open(file: BinaryIO) -> Tuple[Any, Dict[str, str], Callable[[Any], Tensor]]:
    """The contents of a file of any supported kind, its metadata, and a function that reads one of its tensors."""
    from safetensors import SafetensorError, safe_open

    head = file.read(512)
    file.seek(0)
    if head[8:9] == b"{":
        try:
            opened = safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt")
            # Copies, because the file may be replaced while its memory is mapped.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise MalformedError(f"is a truncated or damaged safetensors file ({error}): download it again") from None
        return tensors, opened.metadata() or {}, lambda tensor: tensor
    if head[:2] == b"PK" or _LEGACY in head[:32]:
        tree, read = open_torch(file)
        return tree, {}, read
    raise MalformedError(next(what for pattern, what in _OTHERS if re.match(pattern, head, re.DOTALL)))


def _tensors(node: Any, seen: Set[int], place: str = "", depth: int = 0) -> Iterator[Tuple[str, Any]]:
    """Names and tensors in nested dictionaries, up to four levels deep: ``ema/module/bottleneck.weight``."""
    if isinstance(node, dict) and id(node) not in seen and depth <= 4:
        seen.add(id(node))
        for name, value in node.items():
            short = isinstance(name, (str, int)) and len(str(name)) <= 256  # a pickle can repeat a name for free
            if short and isinstance(name, str) and hasattr(value, "shape"):
                yield _WRAPPED.sub("", f"{place}{name}"), value
            elif short:
                yield from _tensors(value, seen, f"{place}{name}/", depth + 1)


def _choose(tree: Any, weights: Optional[str]) -> Tuple[str, str, Dict[str, Any]]:
    """The label of the set of weights to take, a line about the other sets if there are any, and its tensors."""
    # Averaging adds counters and decays, which are not weights.
    tensors = {name: t for name, t in _tensors(tree, set()) if _ROOT.search(name) or math.prod(t.shape) > 1}
    prefixes = {name: name[: match.start(1)] for name in tensors if (match := _ROOT.search(name))}
    if tensors and not prefixes:
        names = ", ".join(_clip(name) for name in islice(tensors, 3))
        raise MalformedError(f"holds the weights of another network (tensors {names}, ...)")
    if not prefixes:
        keys = [key for key in tree if isinstance(key, str)] if isinstance(tree, dict) else []
        names = ", ".join(map(_clip, keys[:5]))
        raise MalformedError(f"holds no state_dict, only {names or 'an object'}: save model.state_dict()")
    sizes = Counter(prefixes.values())
    ranked = sorted(sizes, key=lambda prefix: (sizes[prefix], -len(prefix)))
    whole = [prefix for prefix in ranked if 2 * sizes[prefix] >= max(sizes.values())]
    # The largest set of each kind: a later prefix replaces an earlier one.
    places = {"ema" if _AVERAGED.search(prefix) else "raw": prefix for prefix in whole}
    taken = weights or ("ema" if "ema" in places else "raw")
    if taken not in places:
        (only,) = map(_label, places, places.values())
        raise MalformedError(f"holds no {weights} weights, only {only}: leave out --weights {weights}")
    label, place = _label(taken, places[taken]), places[taken]
    choice = f"holds {len(whole)} sets of weights: using the {label}" if len(whole) > 1 else ""
    choice += "".join(f"; --weights {k} uses the {_label(k, places[k])}" for k in places if k != taken)
    # An averaged set may lack the statistics of BatchNorm: the raw set provides them.
    raw = places.get("raw", place)
    found = {name[len(raw) :]: t for name, t in tensors.items() if prefixes.get(name) == raw and ".running_" in name}
    # Other tensors with the set's prefix are kept, so that they are reported as tensors that do not fit.
    beside = [name for name in tensors if name.startswith(place) and prefixes.get(name, place) == place]
    found.update({name[len(place) :]: tensors[name] for name in beside})
    return label, choice, {name: tensor for name, tensor in found.items() if "/" not in name}


def _label(kind: str, prefix: str) -> str:
    where = f" ({_clip(prefix.replace('/', '.').rstrip('.'))[1:-1]})" if prefix else ""
    return ("averaged" if kind == "ema" else "raw") + where


def load_weights(path: AnyPath, variant: Optional[Variant] = None) -> Dict[str, Tensor]:
    """The weights in a file, by default for the variant that it looks like; see ``Checkpoint.tensors``."""
    checkpoint = open_checkpoint(path)
    return checkpoint.tensors(variant or VARIANTS[(checkpoint.variants or ("T",))[0]])


def bundled_weights(variant: Variant) -> Path:
    """The bundled file of weights for a variant; raises ``CheckpointError`` if there is none."""
    path = BUNDLED / f"{variant.name}.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"this package has no weights for variant {variant.name}: give the authors' checkpoint "
            "(AsymTrack_ep0500.pth.tar, see the README) or train one with asymtrack-train"
        )
    return path


def save_weights(path: AnyPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], half: bool = True) -> None:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: what to write; replaced if it exists.
        tensors: a state_dict; floating-point tensors are converted, others kept.
        metadata: goes into the file's header as strings (other values as JSON). If it names the
            ``variant``, the file cannot be loaded as another variant.
        half: store float16 instead of float32.

    Raises:
        UsageError: no file can be written there.
        CheckpointError: the disk is full or gone, or a tensor holds NaN, infinity or a number too
            large for float16.
    """
    import torch
    from safetensors.torch import save

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
        write_bytes(path, save(converted, header))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


def _clip(name: Any) -> str:
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."
