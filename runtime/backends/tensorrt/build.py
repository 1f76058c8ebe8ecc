"""Builds the engines of a model directory: which are needed, which can stay, and how to build one.

Needs numpy and TensorRT, but neither torch nor onnx, so that it runs on a device
(``asymtrack-build``); ``asymtrack-export`` uses it where TensorRT is installed.

Precision policy, the same for every version: the types written in the ONNX model are binding.
The fp16 export has fp16 tensors with fp32 islands (LayerNorm, softmax, sums over positions). It was verified
that its values fit these types (``export.verify.largest_half_value``), and TensorRT must keep them:

* TensorRT 10, 11 and TensorRT-RTX build *strongly typed*: types are taken from the model. (The flag
  is passed where it exists; TensorRT 11 and RTX always build this way.)
* TensorRT 8.5 and 8.6 have no strong typing. There the builder flag allows fp16, and every layer
  whose result is fp32 in the model is pinned to fp32 with ``OBEY_PRECISION_CONSTRAINTS``. fp16 layers
  are left free: running them in fp32 costs time, never accuracy. If a pinned layer has no
  implementation in fp32, the engine is built with ``PREFER_PRECISION_CONSTRAINTS``, and a
  message says so: ``asymtrack-check`` must then show whether it is accurate enough.

TF32 is switched off: fp32 means fp32.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

from asymtrack_edge.errors import BackendError, ExportError, ManifestError
from asymtrack_edge.files import locked, write_bytes
from asymtrack_edge.manifest import NETWORKS, Manifest, file_entry, load_manifest, read_file, read_networks
from asymtrack_edge.runtime.backends.cuda.driver import Gpu, find_gpu, open_cuda
from asymtrack_edge.runtime.backends.tensorrt import backend
from asymtrack_edge.runtime.backends.tensorrt.backend import RTX, Key, TensorRT, flavour_of, load_tensorrt

WORKSPACE_MB = 512  #: maximum scratch memory per layer, in MiB
Report = Callable[[str], object]


def build_engines(
    folder: Path,
    manifest: Manifest,
    report: Report,
    device: int = 0,
    workspace_mb: int = WORKSPACE_MB,
    rebuild: bool = False,
) -> Manifest:
    """Builds the engines that a model directory lacks, and updates its manifest after each.

    For TensorRT: ``template.engine`` and ``search.engine`` for the GPU of this machine. For
    TensorRT-RTX, which needs no GPU to build: one pair for all GPUs from Ampere on, and, for fp16, a
    second pair for Turing. An engine whose key still fits is kept; a stale one is replaced.

    Args:
        folder: holds the ONNX models; engines are written into it.
        manifest: describes them; it need not be written yet.
        report: called with a line about each engine.
        device: index of the GPU to build for.
        workspace_mb: maximum scratch memory per layer, in MiB.
        rebuild: whether to build even an engine that still fits.

    Raises:
        BackendError: there is no GPU to build for, or no TensorRT for the manifest's platform.
        ExportError: an engine cannot be built.
    """
    if manifest.platform == "onnx":  # in fp16 it also has LayerNorm and softmax, for which ONNX Runtime uses fp32
        raise ExportError("the model is for ONNX Runtime: export with --target xavier, orin or rtx to build engines")
    tensorrt = load_tensorrt(flavour_of(manifest.platform))
    rtx = tensorrt.flavour == RTX
    gpus: List[Optional[Gpu]] = [None if rtx else find_gpu(device)]
    if rtx and manifest.precision == "fp16":
        # TensorRT-RTX has no fp32 matrix products for Turing: see SpelledOutProducts.
        gpus.append(Gpu(0, "any", (7, 5)))
    for gpu, network in product(gpus, NETWORKS):
        key, began = backend.engine_key(manifest, network, tensorrt, gpu), time.perf_counter()
        name = backend.engine_file(network, key)
        reason = "as requested" if rebuild else _stale(folder, manifest, name, key)
        if reason is None:
            report(f"{name}: kept")
            continue
        if name in manifest.engines:
            report(f"{name}: rebuilding, {reason}")
        batch = backend.batch_profile(manifest, network)
        capability = "SM75" if rtx and key["compute_capability"] == backend.RTX_TURING else None
        with ExitStack() as stack:
            if not rtx:  # TensorRT-RTX builds without a GPU
                cuda = open_cuda(device)
                stack.callback(cuda.close)
                stack.enter_context(cuda.current())
            half = manifest.precision == "fp16"
            engine = build_engine(tensorrt, folder / f"{network}.onnx", half, batch, report, workspace_mb, capability)
        # The directory may be in use, and a build may be interrupted: the manifest must name only existing files.
        files, engines = dict(manifest.files), dict(manifest.engines)
        files.pop(name, None)
        engines.pop(name, None)
        replace(manifest, files=files, engines=engines).save(folder)
        write_bytes(folder / name, engine)
        files[name], engines[name] = file_entry(folder / name), key
        manifest = replace(manifest, files=files, engines=engines)
        manifest.save(folder)
        report(
            f"{name}: {len(engine) / 1e6:.1f} MB, {key['precision']}, batch {key['batch']}, {tensorrt.name}, "
            f"{key['gpu']} GPU, compute capability {key['compute_capability']}, "
            f"built in {time.perf_counter() - began:.1f} s"
        )
    return manifest


def build_in_place(folder: Path, report: Report = print, **options: Any) -> Manifest:
    """``build_engines`` for an existing model directory, on the device; ``ManifestError`` unless it is intact."""
    load_manifest(folder)
    if not os.access(folder, os.W_OK):
        raise ExportError(f"cannot write into {folder}: copy the directory to a place where you can write")
    if any(path.is_symlink() for path in folder.iterdir()):
        raise ExportError(f"{folder} holds links, so files elsewhere would be overwritten: build in a copy (cp -rL)")
    with locked(folder):  # another process that builds here would change the manifest
        manifest = load_manifest(folder)
        read_networks(folder, manifest)
        return build_engines(folder, manifest, report, **options)


def engines_or_note(folder: Path, manifest: Manifest, output: Path, report: Report) -> Manifest:
    """``build_engines`` for the exporter: if none can be built, a line says so and the models stay.

    ``output`` is the directory's final place; engines of the directory that is there now are kept if they fit.
    """
    try:
        if flavour_of(manifest.platform) != RTX:
            load_tensorrt(flavour_of(manifest.platform))
            gpu = find_gpu(0)
            if not gpu.integrated:
                raise BackendError(f"{manifest.platform} may be for a Jetson, and this GPU ({gpu.name}) is not in one")
        there = manifest
        with suppress(ManifestError, KeyError, TypeError):  # there is no earlier directory, or it is unusable
            earlier = load_manifest(output)
            models = [entry.sha256 for entry in manifest.files.values()]
            engines = {n: k for n, k in earlier.engines.items() if n in earlier.files and k["model_sha256"] in models}
            for name in engines:
                (folder / name).write_bytes(read_file(output, name, earlier.files[name]))
            files = {**manifest.files, **{name: earlier.files[name] for name in engines}}
            there = replace(manifest, files=files, engines=engines)
        return build_engines(folder, there, report)
    except Exception as error:  # whatever a builder does, the verified models stay
        report(f"no engines built: {error}; on the device, build them with: asymtrack-build {output}")
        for path in folder.glob("*.engine"):
            path.unlink()
        return manifest


def _stale(folder: Path, manifest: Manifest, name: str, key: Key) -> Optional[str]:
    """Why the directory's engine ``name`` must be rebuilt; None if it can stay."""
    if name not in manifest.engines or name not in manifest.files:
        return "there is none"
    try:
        read_file(folder, name, manifest.files[name])
    except ManifestError as error:
        return str(error)
    return backend.difference(manifest.engines[name], key)


def build_engine(
    tensorrt: TensorRT,
    model: Path,
    fp16: bool,
    batch: Tuple[int, int, int],
    report: Report,
    workspace_mb: int = WORKSPACE_MB,
    capability: Optional[str] = None,
) -> bytes:
    """Builds and serialises an engine; ``ExportError``, with nodes and reasons, if that fails.

    Args:
        tensorrt: the TensorRT to build it with.
        model: ONNX file with fp32 or fp16 tensors.
        fp16: whether the model holds fp16 tensors.
        batch: smallest, optimal and largest batch; not used for a model with a fixed batch.
        report: called with a line if fp32 cannot be enforced.
        workspace_mb: maximum scratch memory per layer, in MiB.
        capability: for TensorRT-RTX the only compute capability to build for (``"SM75"``); None for its default.
    """
    trt = tensorrt.module
    logger = backend.collecting_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # "factory function returned nullptr": what the binding says if CUDA cannot start
        raise ExportError(f"{tensorrt.name} cannot start its builder: {logger.last_words()}") from None
    kinds = trt.NetworkDefinitionCreationFlag
    typed = getattr(kinds, "STRONGLY_TYPED", None)
    # 8.x requires an explicit batch.
    network = builder.create_network(1 << int(kinds.EXPLICIT_BATCH if typed is None else typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.read_bytes()):
        for error in map(parser.get_error, range(parser.num_errors)):
            # 8.x knows only the node's number, newer versions its name and type.
            name = f"{error.node_name()} ({error.node_operator()})" if hasattr(error, "node_name") else error.node()
            logger.errors.append(f"node {name}: {error.desc()}")
        raise ExportError(f"{tensorrt.name} cannot parse {model.name}: {logger.last_words()}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    config.clear_flag(trt.BuilderFlag.TF32)
    pinned = fp16 and typed is None and hasattr(trt.BuilderFlag, "FP16")
    if pinned:
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        _pin_fp32(trt, network)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that runs can be captured as a graph
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(tensor.shape[0] < 0 for tensor in inputs):  # the batch axis is free
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            profile.set_shape(tensor.name, *((n, *tuple(tensor.shape)[1:]) for n in batch))
        config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None and pinned:
        report(
            f"{model.name}: {tensorrt.name} cannot keep every fp32 layer in fp32 ({logger.last_words(1)}); "
            "building as close to it as possible: check the result with asymtrack-check"
        )
        config.clear_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ExportError(f"{tensorrt.name} cannot build an engine from {model.name}: {logger.last_words()}")
    return bytes(serialized)


def _pin_fp32(trt: Any, network: Any) -> None:
    """Pins every layer with fp32 results to fp32, for versions without strong typing."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        # Constants and shape arithmetic have no precision that could be set.
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
