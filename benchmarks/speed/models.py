"""Export directories to measure: the bundled ones, the user's, or untrained ones made once and kept.

Speed does not depend on weights. Where there are none, an untrained model is exported into the
user's cache folder and every row made with it says so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple

import asymtrack_edge
from asymtrack_edge.errors import CheckpointError, ManifestError, MissingDependencyError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends.loading import model_folder
from asymtrack_edge.variants import Variant

if TYPE_CHECKING:
    from asymtrack_edge.network import AsymTrack

SEED = 0
#: Longest verification clip of these exports: whole tracks are ``asymtrack-export``'s business.
_CLIP_FRAMES = 3


def cache_folder() -> Path:
    """Where exports made for measuring are kept (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "asymtrack-edge" / "bench"


def target_for(backend: str) -> str:
    """Key of ``export.pipeline.TARGETS`` whose models a backend reads best."""
    if backend != "tensorrt":
        return "onnx"
    from asymtrack_edge.benchmarks.speed.facts import package_version

    version = package_version("tensorrt") or ""
    return "xavier" if version.startswith("8.5") else "orin"


def export_folder(
    variant: Variant,
    precision: str = "fp32",
    max_batch: int = 1,
    backend: str = "onnxruntime",
    say: Optional[Callable[[str], None]] = None,
) -> Path:
    """A verified export directory of a variant, made if it is not there yet.

    Args:
        variant: published or changed (ablations are exported untrained).
        precision: ``"fp32"`` or ``"fp16"``.
        max_batch: most targets in one call; 1 for a static batch.
        backend: what will run it.
        say: called with one line before anything slow.

    Raises:
        MissingDependencyError: it has to be made and torch or onnx is absent.
        ExportError: the export failed.
    """
    target = target_for(backend)
    if not is_ablated(variant) and target == "onnx":
        try:
            folder = model_folder(variant.name)
            bundled = load_manifest(folder)
            if bundled.precision == precision and bundled.max_batch >= max_batch:
                return folder
        except ManifestError:
            pass  # none is bundled
    key = _key(variant, precision, max_batch, target)
    folder = cache_folder() / f"{variant.name.lower()}-{precision}-{target}-b{max_batch}-{key}"
    try:
        load_manifest(folder)
        return folder
    except ManifestError:
        pass  # not made yet, or damaged
    if say is not None:
        say(f"exporting AsymTrack-{variant.name}, {precision}, batch {max_batch} (once; kept in {folder.parent})")
    return _export(variant, precision, max_batch, target, folder)


def _export(variant: Variant, precision: str, max_batch: int, target: str, folder: Path) -> Path:
    try:
        from asymtrack_edge.export.pipeline import ExportOptions, export
        from asymtrack_edge.runtime.sources.clip import default_clip
    except ImportError as error:
        raise MissingDependencyError(
            error.name or "torch", "export", "making a model to measure (or give one with --model DIR)"
        ) from None
    model, weights = torch_model(variant)
    folder.parent.mkdir(parents=True, exist_ok=True)
    options = ExportOptions(precision=precision, target=target, max_batch=max_batch)
    export(model, options, folder, {"weights": weights}, default_clip(_CLIP_FRAMES))
    return folder


def _key(variant: Variant, precision: str, max_batch: int, target: str) -> str:
    """Tells apart what would give different graphs: settings, version and the code that makes them."""
    digest = hashlib.sha256(repr((asdict(variant), precision, max_batch, target)).encode())
    digest.update(asymtrack_edge.__version__.encode())
    for package in ("asymtrack_edge.network", "asymtrack_edge.export"):
        for path in _sources(package):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _sources(package: str) -> Any:
    import importlib.util

    spec = importlib.util.find_spec(package)
    for base in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(base).glob("*.py"))


def is_ablated(variant: Variant) -> bool:
    """Whether the variant differs from the published one of its name."""
    from asymtrack_edge.variants import VARIANTS

    return VARIANTS.get(variant.name) != variant


def torch_model(variant: Variant) -> Tuple[AsymTrack, str]:
    """The trained network where weights are bundled, else an untrained one; and which it is."""
    from asymtrack_edge.checkpoints import load_model

    if not is_ablated(variant):
        try:
            return load_model(None, variant), f"bundled {variant.name}"
        except CheckpointError:
            pass  # none are bundled
    import torch

    from asymtrack_edge.network import AsymTrack

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return AsymTrack(variant).eval(), f"random, seed {SEED}"


def state_sha256(model: Any) -> str:
    """Hash of the weights of a torch module: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def multiply_adds(variant: Variant) -> Optional[int]:
    """Of the folded, split search network at batch 1; None without torch."""
    try:
        from asymtrack_edge.export.pipeline import model_size
        from asymtrack_edge.network import AsymTrack
    except ImportError:
        return None
    if variant not in _COUNTED:
        _COUNTED[variant] = int(model_size(AsymTrack(variant))["search_multiply_adds"])
    return _COUNTED[variant]


_COUNTED: Dict[Variant, int] = {}


def clear_cache() -> None:
    """Removes every export kept for measuring."""
    shutil.rmtree(cache_folder(), ignore_errors=True)


def say_on_stderr(line: str) -> None:
    """The usual ``say``: stdout belongs to the results."""
    print(line, file=sys.stderr, flush=True)
