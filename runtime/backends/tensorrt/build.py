"""Engines of an export directory: which are needed, which can stay, building, recording.

Needs numpy and a TensorRT, neither torch nor onnx, so that it runs on a device
(``asymtrack-build``); ``asymtrack-export`` uses it where there is a TensorRT.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from asymtrack_edge.errors import ExportError, ManifestError
from asymtrack_edge.manifest import FLOAT_RGB, Manifest, check_file, file_entry, load_manifest
from asymtrack_edge.runtime.backends.cuda.device import open_cuda
from asymtrack_edge.runtime.backends.cuda.gpu import Gpu, NoGpuError, find_gpu
from asymtrack_edge.runtime.backends.tensorrt.builder import EngineOptions, build_engine
from asymtrack_edge.runtime.backends.tensorrt.key import (
    NETWORKS,
    RTX_TURING,
    EngineKey,
    batch_profile,
    difference,
    engine_file,
    engine_key,
)
from asymtrack_edge.runtime.backends.tensorrt.library import RTX, NoTensorRTError, TensorRT, flavour_of, load_tensorrt

Report = Callable[[str], None]


def _silent(line: str) -> None:
    """Reports nothing."""


def build_engines(
    folder: Path,
    manifest: Manifest,
    options: Optional[EngineOptions] = None,
    device: int = 0,
    previous: Optional[Path] = None,
    report: Report = _silent,
    in_use: bool = False,
) -> Manifest:
    """Builds the engines that an export directory needs and does not have.

    For TensorRT: ``template.engine`` and ``search.engine`` for the GPU of this machine. For
    TensorRT-RTX, which needs no GPU to build: one pair for all GPUs from Ampere on, and, for fp16, a
    second pair for Turing. An engine whose key still fits is kept, one that is stale is replaced.

    Args:
        folder: holds the ONNX models; engines are written into it.
        manifest: describes them; it need not be written yet.
        options: how to build.
        device: index of the GPU to build for.
        previous: another export directory whose engines may be taken over where their keys fit (the
            one that this export is about to replace).
        report: called with a line on each engine.
        in_use: the directory can be loaded meanwhile: its manifest is written with every engine.

    Returns:
        The manifest with the engines' hashes and keys; not written, unless ``in_use``.

    Raises:
        NoTensorRTError: the TensorRT of the manifest's target is not installed.
        BackendError: there is no GPU to build for.
        ExportError: an engine cannot be built.
    """
    if manifest.input_format != FLOAT_RGB:
        raise ExportError(
            f"an export with {manifest.input_format} input is for ONNX Runtime: export with --target xavier, "
            "orin or rtx to build engines"
        )
    options = options or EngineOptions()
    tensorrt = load_tensorrt(flavour_of(manifest.target))
    for network, key in _wanted(manifest, tensorrt, device):
        name = engine_file(network, key)
        manifest = _make(folder, manifest, network, name, key, tensorrt, device, options, previous, report, in_use)
    return manifest


def build_in_place(
    folder: Path, options: Optional[EngineOptions] = None, device: int = 0, report: Report = _silent
) -> Manifest:
    """Builds engines into an existing export directory and rewrites its manifest, on the device.

    Raises:
        ManifestError: it is no export directory, or a model in it is altered.
        NoTensorRTError, BackendError, ExportError: see ``build_engines``.
    """
    manifest = load_manifest(folder, verify=False)
    for network in NETWORKS:
        check_file(folder, f"{network}.onnx", manifest.files[f"{network}.onnx"])
    if not os.access(folder, os.W_OK):
        raise ExportError(f"cannot write into {folder}: copy the directory to a place of your own")
    return build_engines(folder, manifest, options, device, report=report, in_use=True)


def how_to_build(folder: Path) -> str:
    """One line for a machine that cannot build engines."""
    return f"on the device, build them with: asymtrack-build {folder}"


def engines_or_note(
    folder: Path,
    manifest: Manifest,
    output: Path,
    options: Optional[EngineOptions] = None,
    device: int = 0,
    report: Report = _silent,
) -> Manifest:
    """``build_engines`` for the exporter: without a TensorRT or a GPU, one line that says so.

    Args:
        folder: the new directory.
        manifest: describes it.
        output: where the directory will be; engines of the one that is there now are kept if they fit.
        options: how to build.
        device: index of the GPU.
        report: called with a line on each engine, or with the one line.
    """
    try:
        if flavour_of(manifest.target) != RTX:
            load_tensorrt(flavour_of(manifest.target))
            find_gpu(device)
        return build_engines(folder, manifest, options, device, output, report)
    except (NoTensorRTError, NoGpuError) as error:
        report(f"no engines built: {error}; {how_to_build(output)}")
        return manifest


def _wanted(manifest: Manifest, tensorrt: TensorRT, device: int) -> List[Tuple[str, EngineKey]]:
    """Networks and keys of the engines to have."""
    if tensorrt.flavour != RTX:
        gpu = find_gpu(device)
        return [(network, engine_key(manifest, network, tensorrt, gpu)) for network in NETWORKS]
    gpus: List[Optional[Gpu]] = [None]
    if manifest.precision == "fp16":
        # fp32 matrix products do not exist for Turing in TensorRT-RTX: see turing.py.
        gpus.append(Gpu(0, "any", (7, 5), False))
    return [(network, engine_key(manifest, network, tensorrt, gpu)) for gpu in gpus for network in NETWORKS]


def _make(
    folder: Path,
    manifest: Manifest,
    network: str,
    name: str,
    key: EngineKey,
    tensorrt: TensorRT,
    device: int,
    options: EngineOptions,
    previous: Optional[Path],
    report: Report,
    in_use: bool,
) -> Manifest:
    """Keeps or builds one engine; returns the manifest with it, written if the directory is in use."""
    if not options.rebuild:
        reason = _keep(folder, manifest, name, key)
        if reason is None:
            report(f"{name}: kept")
            return manifest
        if previous is not None and _take_over(previous, folder, name, key):
            report(f"{name}: kept from the previous export")
            return _record(folder, manifest, name, key)
        if name in manifest.engines:
            report(f"{name}: rebuilding, {reason}")
    began = time.perf_counter()
    cache_file = _timing_cache_file(key)
    cache = b""
    with suppress(OSError):
        cache = cache_file.read_bytes()
    with _current_gpu(tensorrt, device):
        engine, cache = build_engine(
            tensorrt,
            folder / f"{network}.onnx",
            fp16=manifest.precision != "fp32",
            batch=batch_profile(manifest, network),
            options=options,
            capability="SM75" if key.flavour == RTX and key.compute_capability == RTX_TURING else None,
            timing_cache=cache,
        )
    if in_use and name in manifest.files:
        # A build takes minutes and may be interrupted: at any moment the manifest names only what is there.
        manifest = _without(manifest, name)
        _save(folder, manifest)
    _write(folder / name, engine)
    manifest = _record(folder, manifest, name, key)
    if in_use:
        _save(folder, manifest)
    if cache:
        with suppress(OSError):  # it only makes the next build faster
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            _write(cache_file, cache)
    report(
        f"{name}: {len(engine) / 1e6:.1f} MB, {key.precision}, batch {key.batch}, {tensorrt.name}, "
        f"{key.gpu} GPU, compute capability {key.compute_capability}, "
        f"built in {time.perf_counter() - began:.1f} s"
    )
    return manifest


@contextmanager
def _current_gpu(tensorrt: TensorRT, device: int) -> Iterator[None]:
    """Makes a GPU the one that TensorRT builds and measures on; TensorRT-RTX builds without any."""
    if tensorrt.flavour == RTX:
        yield
        return
    cuda = open_cuda(device)
    try:
        with cuda.current():
            yield
    finally:
        cuda.close()


def _keep(folder: Path, manifest: Manifest, name: str, key: EngineKey) -> Optional[str]:
    """None if the directory's engine ``name`` can stay, else the reason why not."""
    if name not in manifest.engines or name not in manifest.files:
        return "there is none"
    reason = difference(manifest.engines[name], key)
    if reason is None:
        try:
            check_file(folder, name, manifest.files[name])
        except ManifestError as error:
            return str(error)
    return reason


def _take_over(previous: Path, folder: Path, name: str, key: EngineKey) -> bool:
    """Copies an engine from another export directory if it fits there and here."""
    try:
        theirs = load_manifest(previous, verify=False)
    except ManifestError:
        return False
    if _keep(previous, theirs, name, key) is not None:
        return False
    shutil.copyfile(previous / name, folder / name)
    return True


def _record(folder: Path, manifest: Manifest, name: str, key: EngineKey) -> Manifest:
    files = {**manifest.files, name: file_entry(folder / name)}
    engines: Dict[str, Dict[str, Any]] = {**manifest.engines, name: key.to_json()}
    return replace(manifest, files=files, engines=engines)


def _without(manifest: Manifest, name: str) -> Manifest:
    files = {n: entry for n, entry in manifest.files.items() if n != name}
    engines = {n: key for n, key in manifest.engines.items() if n != name}
    return replace(manifest, files=files, engines=engines)


def _timing_cache_file(key: EngineKey) -> Path:
    """Where measurements of layers are kept between builds: one file per TensorRT and GPU."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{key.flavour}-{key.tensorrt}-{key.gpu}-{key.compute_capability}")
    return base / "asymtrack-edge" / f"timing-{name}.cache"


def _save(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest so that a reader sees the old one or the new one, whole."""
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        manifest.save(Path(beside))
        os.replace(Path(beside) / "manifest.json", folder / "manifest.json")


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise
