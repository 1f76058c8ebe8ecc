"""Engines of a model directory: which are needed, which can stay; parser, precision, profile, builder.

Needs numpy and a TensorRT, neither torch nor onnx, so that it runs on a device
(``asymtrack-build``); ``asymtrack-export`` uses it where there is a TensorRT.

Precision policy, the same for every version: the types written in the ONNX model are the contract.
The fp16 export holds fp16 tensors with fp32 islands (LayerNorm, softmax, sums over positions), was
verified to hold no number that they cannot (``overflow``), and TensorRT has to keep to them:

* TensorRT 10, 11 and TensorRT-RTX build *strongly typed*: types are taken from the model. (The flag
  is passed where it exists; TensorRT 11 and RTX know nothing else.)
* TensorRT 8.5 and 8.6 know no strong typing. There fp16 is allowed by the builder flag, and every
  layer whose result is fp32 in the model is pinned to fp32 with ``OBEY_PRECISION_CONSTRAINTS``.
  fp16 layers are left free: fp32 in their place costs time, never accuracy. Where a layer has no
  implementation in fp32 all the same, the engine is built with ``PREFER_PRECISION_CONSTRAINTS``, and a
  note says so: ``asymtrack-check`` has to tell whether it is good enough.

TF32 is switched off: fp32 means fp32.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from asymtrack_edge.errors import BackendError, ExportError, ManifestError
from asymtrack_edge.files import write_bytes
from asymtrack_edge.manifest import FLOAT_RGB, Manifest, check_file, file_entry, load_manifest
from asymtrack_edge.runtime.backends.cuda.driver import Gpu, find_gpu, open_cuda
from asymtrack_edge.runtime.backends.cuda.kernel import cache_file, write_cache
from asymtrack_edge.runtime.backends.tensorrt.library import (
    NETWORKS,
    RTX,
    RTX_TURING,
    EngineKey,
    TensorRT,
    batch_profile,
    collecting_logger,
    difference,
    engine_file,
    engine_key,
    flavour_of,
    last_words,
    load_tensorrt,
)

Report = Callable[[str], None]


def _silent(line: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class EngineOptions:
    """How to build engines.

    Attributes:
        workspace_mb: most scratch memory of one layer, in MiB.
        optimization_level: 0 (fast to build) to 5 (fast to run); None for TensorRT's default.
        rebuild: build even where an engine with the same key exists.
    """

    workspace_mb: int = 512
    optimization_level: Optional[int] = None
    rebuild: bool = False


def build_engines(
    folder: Path,
    manifest: Manifest,
    options: Optional[EngineOptions] = None,
    device: int = 0,
    previous: Optional[Path] = None,
    report: Report = _silent,
    in_use: bool = False,
) -> Manifest:
    """Builds the engines that a model directory needs and does not have.

    For TensorRT: ``template.engine`` and ``search.engine`` for the GPU of this machine. For
    TensorRT-RTX, which needs no GPU to build: one pair for all GPUs from Ampere on, and, for fp16, a
    second pair for Turing. An engine whose key still fits is kept, one that is stale is replaced.

    Args:
        folder: holds the ONNX models; engines are written into it.
        manifest: describes them; it need not be written yet.
        options: how to build.
        device: index of the GPU to build for.
        previous: another model directory whose engines may be taken over where their keys fit (the
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
        if not options.rebuild:
            reason = _keep(folder, manifest, name, key)
            if reason is None:
                report(f"{name}: kept")
                continue
            if previous is not None and _take_over(previous, folder, name, key):
                report(f"{name}: kept from the previous export")
                manifest = _record(folder, manifest, name, key)
                continue
            if name in manifest.engines:
                report(f"{name}: rebuilding, {reason}")
        began = time.perf_counter()
        engine = _build(folder, manifest, network, key, tensorrt, device, options, report)
        if in_use and name in manifest.files:
            # A build takes minutes and may be interrupted: at any moment the manifest names only what is there.
            manifest = _without(manifest, name)
            _save(folder, manifest)
        write_bytes(folder / name, engine)
        manifest = _record(folder, manifest, name, key)
        if in_use:
            _save(folder, manifest)
        report(
            f"{name}: {len(engine) / 1e6:.1f} MB, {key.precision}, batch {key.batch}, {tensorrt.name}, "
            f"{key.gpu} GPU, compute capability {key.compute_capability}, "
            f"built in {time.perf_counter() - began:.1f} s"
        )
    return manifest


def build_in_place(
    folder: Path, options: Optional[EngineOptions] = None, device: int = 0, report: Report = _silent
) -> Manifest:
    """Builds engines into an existing model directory and rewrites its manifest, on the device.

    Raises:
        ManifestError: it is no model directory, or a model in it is altered.
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


def engines_or_note(folder: Path, manifest: Manifest, output: Path, report: Report = _silent) -> Manifest:
    """``build_engines`` for the exporter: where none can be built, one line says so and the models stay.

    Args:
        folder: the new directory.
        manifest: describes it.
        output: where the directory will be; engines of the one that is there now are kept if they fit.
        report: called with a line on each engine, or with the one line.
    """
    try:
        if flavour_of(manifest.target) != RTX:
            load_tensorrt(flavour_of(manifest.target))
            gpu = find_gpu(0)
            if not gpu.integrated:
                raise BackendError(f"{manifest.target} is a Jetson, and this GPU ({gpu.name}) is not one's")
        return build_engines(folder, manifest, previous=output, report=report)
    except (BackendError, ExportError, OSError, RuntimeError) as error:
        report(f"no engines built: {error}; {how_to_build(output)}")
        for path in folder.glob("*.engine"):
            path.unlink()
        return replace(
            manifest, engines={}, files={n: f for n, f in manifest.files.items() if not n.endswith(".engine")}
        )


def _wanted(manifest: Manifest, tensorrt: TensorRT, device: int) -> List[Tuple[str, EngineKey]]:
    """Networks and keys of the engines to have."""
    if tensorrt.flavour != RTX:
        gpu = find_gpu(device)
        return [(network, engine_key(manifest, network, tensorrt, gpu)) for network in NETWORKS]
    gpus: List[Optional[Gpu]] = [None]
    if manifest.precision == "fp16":
        # fp32 matrix products do not exist for Turing in TensorRT-RTX: see SpelledOutProducts.
        gpus.append(Gpu(0, "any", (7, 5)))
    return [(network, engine_key(manifest, network, tensorrt, gpu)) for gpu in gpus for network in NETWORKS]


def _build(
    folder: Path,
    manifest: Manifest,
    network: str,
    key: EngineKey,
    tensorrt: TensorRT,
    device: int,
    options: EngineOptions,
    report: Report,
) -> bytes:
    """Builds one engine on the GPU that it is for, with what earlier builds have measured there."""
    kind = "-".join((key.flavour, key.tensorrt, key.gpu, key.compute_capability, key.multiprocessors))
    kept = cache_file("timing-{}.cache".format(re.sub(r"[^A-Za-z0-9.]+", "-", kind)))
    measured = b""
    if kept is not None:
        with suppress(OSError):
            measured = kept.read_bytes()
    capability = "SM75" if key.flavour == RTX and key.compute_capability == RTX_TURING else None
    model, half, batch = folder / f"{network}.onnx", manifest.precision != "fp32", batch_profile(manifest, network)
    with _current_gpu(tensorrt, device):
        engine, measured = build_engine(tensorrt, model, half, batch, options, capability, measured, report)
    if measured:
        write_cache(kept, measured)
    return engine


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
    """Copies an engine from another model directory if it fits there and here."""
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


def _save(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest so that a reader sees the old one or the new one, whole."""
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        manifest.save(Path(beside))
        os.replace(Path(beside) / "manifest.json", folder / "manifest.json")


def build_engine(
    tensorrt: TensorRT,
    model: Path,
    fp16: bool,
    batch: Tuple[int, int, int],
    options: EngineOptions,
    capability: Optional[str] = None,
    timing_cache: bytes = b"",
    report: Report = _silent,
) -> Tuple[bytes, bytes]:
    """Builds an engine.

    Args:
        tensorrt: what to build it with.
        model: ONNX file with fp32 or fp16 tensors.
        fp16: whether the model holds fp16 tensors.
        batch: smallest, best and largest batch; not used by a model with a fixed batch.
        options: limits.
        capability: for TensorRT-RTX the name of the only compute capability to build for
            (``"SM75"``); None for its portable default.
        timing_cache: what an earlier build returned; ignored where it does not fit.
        report: called with a line where fp32 could not be enforced.

    Returns:
        The serialised engine, and the timing cache for the next build.

    Raises:
        ExportError: the model cannot be parsed or built; names nodes and reasons.
    """
    trt = tensorrt.module
    logger = collecting_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # "factory function returned nullptr": what the binding says without a GPU
        raise ExportError(f"{tensorrt.name} cannot start its builder: {last_words(logger.errors)}") from None
    network = builder.create_network(_network_flags(tensorrt))
    _parse(tensorrt, network, logger, model)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.optimization_level is not None and hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = options.optimization_level
    pinned = fp16 and not _strongly_typed(tensorrt)
    if pinned:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        _pin_fp32(trt, network)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # what runs can be captured as a graph
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    _add_profile(builder, network, config, batch)
    cache = _use_timing_cache(tensorrt, config, timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None and pinned:
        report(
            f"{model.name}: {tensorrt.name} cannot keep every fp32 layer in fp32 ({last_words(logger.errors, 1)}); "
            "built as near to it as it can: hold it against the model with asymtrack-check"
        )
        config.clear_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ExportError(f"{tensorrt.name} cannot build an engine from {model.name}: {last_words(logger.errors)}")
    return bytes(serialized), b"" if cache is None else bytes(cache.serialize())


def _strongly_typed(tensorrt: TensorRT) -> bool:
    trt = tensorrt.module
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(trt.BuilderFlag, "FP16")


def _network_flags(tensorrt: TensorRT) -> int:
    """``STRONGLY_TYPED`` where it exists, else ``EXPLICIT_BATCH``, which 8.x demands."""
    kinds = tensorrt.module.NetworkDefinitionCreationFlag
    flag = getattr(kinds, "STRONGLY_TYPED", None)
    if flag is None:
        flag = kinds.EXPLICIT_BATCH
    return 1 << int(flag)


def _parse(tensorrt: TensorRT, network: Any, logger: Any, model: Path) -> None:
    parser = tensorrt.module.OnnxParser(network, logger)
    if parser.parse(model.read_bytes()):
        return
    reasons: List[str] = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
    raise ExportError(f"{tensorrt.name} cannot parse {model.name}: {last_words(reasons or logger.errors)}")


def _parser_error(error: Any) -> str:
    """One parser error, by node: 8.5 knows the node's number only, newer ones its name and type."""
    if hasattr(error, "node_name"):
        where = f"{error.node_name() or 'node ' + str(error.node())} ({error.node_operator()})"
    else:
        where = f"node {error.node()}"
    return f"{where}: {error.desc()}"


def _pin_fp32(trt: Any, network: Any) -> None:
    """Pins every layer with fp32 results to fp32, for versions without strong typing."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        # Constants and shape arithmetic are not executed in a precision that could be set.
        if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE) or not layer.num_outputs:
            continue
        outputs = [layer.get_output(k) for k in range(layer.num_outputs)]
        if any(output is None or output.is_shape_tensor or output.dtype != trt.float32 for output in outputs):
            continue
        first = layer.get_input(0) if layer.num_inputs else None
        if first is not None and first.is_shape_tensor:
            continue
        layer.precision = trt.float32
        for k in range(len(outputs)):
            layer.set_output_type(k, trt.float32)


def _add_profile(builder: Any, network: Any, config: Any, batch: Tuple[int, int, int]) -> None:
    """Adds the batch profile if the network's inputs have a free batch axis."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if all(tensor.shape[0] >= 0 for tensor in inputs):
        return
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        rest = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((n, *rest) for n in batch))
    config.add_optimization_profile(profile)


def _use_timing_cache(tensorrt: TensorRT, config: Any, content: bytes) -> Any:
    """Gives the builder its earlier measurements; TensorRT-RTX measures nothing when it builds."""
    if tensorrt.flavour == RTX:
        return None
    cache = config.create_timing_cache(content)
    if not config.set_timing_cache(cache, False):
        # Of another TensorRT or GPU: start anew.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache
