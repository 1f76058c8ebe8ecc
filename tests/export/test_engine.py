"""Building engines with a mock TensorRT: types and target GPUs, and which engines are kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Collection, List
from unittest.mock import MagicMock, call

import pytest

from asymtrack_edge.errors import BackendError, ExportError
from asymtrack_edge.manifest import Manifest, load_manifest, read_file
from asymtrack_edge.runtime.backends.cuda import driver
from asymtrack_edge.runtime.backends.cuda.driver import Gpu
from asymtrack_edge.runtime.backends.tensorrt import backend, build
from asymtrack_edge.runtime.backends.tensorrt.backend import RTX, TENSORRT, TensorRT, difference, engine_key
from tests.helpers import export_small

XAVIER = Gpu(0, "Xavier", (7, 2), True, 8, 31 << 30)


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export for the target xavier, on a Xavier with TensorRT 8.5."""
    monkeypatch.setattr(build, "open_cuda", MagicMock())
    monkeypatch.setattr(build, "load_tensorrt", lambda flavour: fake_tensorrt("8.5.2.2"))
    monkeypatch.setattr(build, "find_gpu", lambda index: replace(XAVIER, index=index))
    return export_small(tmp_path / "export", "fp16", "xavier")


def fake_tensorrt(version: str, refuses: Collection[str] = ()) -> TensorRT:
    """Builds nothing while a flag in ``refuses`` is set; its module has the ``flags`` and ``layers``."""

    def layer(kind: str, output: str, source: str = "") -> Any:
        tensors = [SimpleNamespace(dtype=t.split(" ")[0], is_shape_tensor="shape" in t) for t in (output, source)]
        made = MagicMock(type=kind, precision=None, num_outputs=1, num_inputs=int(bool(source)))
        made.get_output.return_value, made.get_input.return_value = tensors
        return made

    trt = MagicMock(float32="float", flags=set())
    trt.layers = [
        layer("NORMALIZATION", "float", "half"),
        layer("CONVOLUTION", "half"),
        layer("CONSTANT", "float"),
        layer("SHAPE", "int shape"),
        layer("ELEMENTWISE", "float", "float shape"),
        layer("UNARY", "float shape"),
    ]
    names = ("FP16", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "TF32")
    trt.BuilderFlag = SimpleNamespace(**{name: name.split("_")[0] for name in names})
    trt.ILogger = type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1})
    trt.LayerType = SimpleNamespace(CONSTANT="CONSTANT", SHAPE="SHAPE")
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
    if not version.startswith("8"):
        trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    builder = trt.Builder.return_value
    network = builder.create_network.return_value
    network.num_layers, network.get_layer, network.num_inputs = 6, trt.layers.__getitem__, 1
    network.get_input.return_value = SimpleNamespace(name="image", shape=(-1, 3, 8, 8))
    config = builder.create_builder_config.return_value
    config.set_flag, config.clear_flag = trt.flags.add, trt.flags.discard
    builder.build_serialized_network = lambda *_: None if trt.flags.intersection(refuses) else b"engine"
    return TensorRT(trt, TENSORRT, version)


@pytest.mark.parametrize(
    ("version", "fp16", "kind", "flags"),
    [("10.3.0", True, 2, set()), ("8.5.2.2", True, 1, {"FP16", "OBEY"}), ("8.5.2.2", False, 1, set())],
)
def test_engines_keep_the_types_of_the_model(version: str, fp16: bool, kind: int, flags: Any, tmp_path: Path) -> None:
    tensorrt = fake_tensorrt(version)
    trt, builder = tensorrt.module, tensorrt.module.Builder.return_value
    trt.flags.add("TF32")
    (tmp_path / "search.onnx").write_bytes(b"model")
    content = build.build_engine(tensorrt, tmp_path / "search.onnx", fp16, (1, 8, 8), print, workspace_mb=256)
    assert content == b"engine" and trt.OnnxParser.return_value.parse.call_args == call(b"model")
    assert builder.create_builder_config().set_memory_pool_limit.call_args[0][1] == 256 << 20
    profile = call("image", (1, 3, 8, 8), (8, 3, 8, 8), (8, 3, 8, 8))
    assert builder.create_optimization_profile().set_shape.call_args == profile
    assert (builder.create_network.call_args, trt.flags) == (call(kind), flags)
    pinned = [layer.type for layer in trt.layers if layer.precision is not None]
    assert pinned == (["NORMALIZATION"] if "OBEY" in flags else [])


def test_a_layer_without_an_fp32_implementation_does_not_prevent_an_engine(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"model")
    lines: List[str] = []
    arguments = tmp_path / "m.onnx", True, (1, 1, 1), lines.append
    tensorrt = fake_tensorrt("8.5.2.2", refuses=("OBEY",))
    assert build.build_engine(tensorrt, *arguments) == b"engine" and tensorrt.module.flags == {"FP16", "PREFER"}
    assert len(lines) == 1 and "cannot keep every fp32 layer in fp32" in lines[0] and "asymtrack-check" in lines[0]
    with pytest.raises(ExportError, match="cannot build an engine from m"):
        build.build_engine(fake_tensorrt("8.5.2.2", refuses=("FP16",)), *arguments)
    parser = tensorrt.module.OnnxParser.return_value
    parser.parse.return_value, parser.num_errors, error = False, 1, parser.get_error.return_value
    error.node_name.return_value, error.desc.return_value = "culprit", "no plugin"
    with pytest.raises(ExportError, match=r"cannot parse m\.onnx: .*node culprit .*: no plugin"):
        build.build_engine(tensorrt, *arguments)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rtx_builds_without_a_gpu_and_separately_for_turing(precision: str, tmp_path: Path, monkeypatch: Any) -> None:
    """TensorRT-RTX has no fp32 matrix products for Turing, so an fp16 model gets separate engines for it."""
    rtx = replace(fake_tensorrt("1.7"), flavour=RTX)
    for name, found in (("load_tensorrt", lambda flavour: rtx), ("find_gpu", None), ("open_cuda", None)):
        monkeypatch.setattr(build, name, found)
    manifest = build.build_in_place(export_small(tmp_path / "export", precision, "rtx", max_batch=8))
    turing = ["template-sm75.engine", "search-sm75.engine"] if precision == "fp16" else []
    assert list(manifest.engines) == ["template.engine", "search.engine", *turing]
    assert [manifest.engines[f"{network}.engine"]["batch"] for network in ("template", "search")] == ["1-1-1", "1-8-8"]
    chosen = rtx.module.Builder().create_builder_config().set_compute_capability.call_args_list
    assert chosen == [call(rtx.module.ComputeCapability.SM75, 0) for _ in turing]


def test_on_a_device_engines_are_built_once(jetson: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: List[str] = []
    manifest = build.build_in_place(jetson, device=2, report=lines.append)
    assert build.open_cuda.mock_calls.count(call(2)) == 2 and load_manifest(jetson) == manifest
    assert manifest.engines["search.engine"]["gpu"] == "Xavier" and "compute capability 7.2" in lines[1]
    build.build_in_place(jetson, report=lines.append)
    assert lines[2:] == ["template.engine: kept", "search.engine: kept"]
    # A new export takes over the engines of the old one.
    new = tmp_path / "new"
    shutil.copytree(jetson, new, ignore=shutil.ignore_patterns("*.engine"))
    bare = replace(manifest, engines={}, files={n: f for n, f in manifest.files.items() if n.endswith("onnx")})
    assert build.engines_or_note(new, bare, jetson, lines.append) == manifest
    assert lines[4:] == lines[2:4]
    # A damaged engine is rebuilt; with another TensorRT, both are.
    (jetson / "search.engine").write_bytes(b"damaged")
    build.build_in_place(jetson, report=lines.append)
    assert "rebuilding" in lines[7] and "altered" in lines[7]
    monkeypatch.setattr(build, "load_tensorrt", lambda flavour: fake_tensorrt("8.6.1"))
    build.build_in_place(jetson, report=lines.append)
    assert "rebuilding, its tensorrt is 8.5.2.2, here 8.6.1" in lines[9]
    (jetson / "search.engine").replace(tmp_path / "mine")
    (jetson / "search.engine").symlink_to(tmp_path / "mine")
    with pytest.raises(ExportError, match="holds links"):
        build.build_in_place(jetson, rebuild=True)


@pytest.mark.parametrize("broken", ["template", "search"])
def test_an_interrupted_rebuild_leaves_a_directory_that_loads(jetson: Path, monkeypatch: Any, broken: str) -> None:
    build.build_in_place(jetson)

    def intact() -> Manifest:
        manifest = load_manifest(jetson)
        assert all(read_file(jetson, *file) for file in manifest.files.items())
        return manifest

    def build_engine(tensorrt: Any, model: Path, *_: Any) -> bytes:
        intact()  # another process may load the model right now
        if model.stem == broken:
            raise KeyboardInterrupt
        return b"another engine"

    monkeypatch.setattr(build, "build_engine", build_engine)
    with pytest.raises(KeyboardInterrupt):
        build.build_in_place(jetson, rebuild=True)
    assert set(intact().engines) == {"template.engine", "search.engine"}


def test_the_models_are_kept_if_no_engine_can_be_built(jetson: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(tensorrt: Any, model: Path, *_: Any) -> bytes:
        if model.stem == "search":
            raise ExportError("TensorRT cannot build an engine from search.onnx: out of memory")
        return b"engine"

    pc = Gpu(0, "NVIDIA GeForce RTX 4090", (8, 9))
    no_tensorrt = MagicMock(side_effect=BackendError("there is no TensorRT for Python here"))
    monkeypatch.setattr(driver, "LIBRARIES", ("libcuda-of-nowhere.so",))
    manifest, lines = load_manifest(jetson), []
    for name, broken, words in (
        ("find_gpu", driver.find_gpu, "no CUDA driver here"),
        ("load_tensorrt", no_tensorrt, "there is no TensorRT"),
        ("find_gpu", lambda index: pc, "xavier may be for a Jetson, and this GPU (NVIDIA GeForce RTX 4090) is not"),
        ("build_engine", no_memory, "out of memory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, broken)
            assert build.engines_or_note(jetson, manifest, jetson, report=lines.append) == manifest
            assert words in lines[-1] and f"asymtrack-build {jetson}" in lines[-1]
            assert not list(jetson.glob("*.engine")), "one engine of two is useless"


def test_every_field_of_the_key_matters(tmp_path: Path) -> None:
    manifest = load_manifest(export_small(tmp_path / "export", "fp16", "xavier"))
    tensorrt = TensorRT(None, TENSORRT, "8.5.2.2")
    key = engine_key(manifest, "search", tensorrt, XAVIER)
    assert (key["multiprocessors"], key["memory_gb"]) == ("8", "32"), "the system reports 31 of 32 GB"
    agx_orin, orin_nx = (Gpu(0, "Orin", (8, 7), True, count, gb << 30) for count, gb in ((16, 30), (8, 15)))
    agx, nx = (engine_key(manifest, "search", tensorrt, gpu) for gpu in (agx_orin, orin_nx))
    assert "its multiprocessors is 16, here 8" in str(difference(agx, nx))
    for field in key:
        assert "else" in str(difference({**key, field: "else"}, key))


def test_an_export_for_the_cpu_gets_no_engines(tmp_path: Path) -> None:
    """Float crops are not supported either: in fp16 such an export has no fp32 LayerNorm."""
    manifest = replace(load_manifest(export_small(tmp_path / "export", "fp16", "orin")), platform="onnx")
    with pytest.raises(ExportError, match="--target xavier"):
        build.build_engines(tmp_path, manifest, print)


def test_an_installed_but_unusable_tensorrt_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(__version__="8.4.1", Builder=None)
    for found, words in ((old, "8.4.1 is too old"), (OSError("no libnvinfer"), "does not load: no libnvinfer")):
        with monkeypatch.context() as patch, pytest.raises(BackendError, match=words):
            patch.setattr(backend.importlib, "import_module", MagicMock(side_effect=[found]))
            backend.load_tensorrt(TENSORRT)
