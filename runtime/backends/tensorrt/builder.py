"""One ONNX model to one engine: parser, precision, profile, builder.

Precision policy, the same for every version: the types written in the ONNX model are the contract.
The fp16 export holds fp16 tensors with fp32 islands (LayerNorm, softmax, sums over positions), was
verified to hold no number that they cannot (``overflow``), and TensorRT has to keep to them:

* TensorRT 10, 11 and TensorRT-RTX build *strongly typed*: types are taken from the model. (The flag
  is passed where it exists; TensorRT 11 and RTX know nothing else.)
* TensorRT 8.5 and 8.6 know no strong typing. There fp16 is allowed by the builder flag, and every
  layer whose result is fp32 in the model is pinned to fp32 with ``OBEY_PRECISION_CONSTRAINTS``.
  fp16 layers are left free: fp32 in their place costs time, never accuracy, so that pinning cannot
  leave a layer without an implementation.

TF32 is switched off: fp32 means fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Optional, Tuple

from asymtrack_edge.errors import ExportError
from asymtrack_edge.runtime.backends.tensorrt.library import RTX, TensorRT, collecting_logger, last_words


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


def build_engine(
    tensorrt: TensorRT,
    model: Path,
    fp16: bool,
    batch: Tuple[int, int, int],
    options: EngineOptions,
    capability: Optional[str] = None,
    timing_cache: bytes = b"",
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
    if fp16 and not _strongly_typed(tensorrt):
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
        # Constants and shape arithmetic have no arithmetic precision to set.
        if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE) or not layer.num_outputs:
            continue
        outputs = [layer.get_output(k) for k in range(layer.num_outputs)]
        if any(output is None or output.dtype != trt.float32 for output in outputs):
            continue
        layer.precision = trt.float32
        for k, output in enumerate(outputs):
            if not output.is_shape_tensor:
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
