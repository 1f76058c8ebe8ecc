"""Building engines: with the real TensorRT-RTX where it is installed, its decisions everywhere."""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Tuple

import pytest

from asymtrack_edge.errors import BackendError, ExportError
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends.cuda import driver
from asymtrack_edge.runtime.backends.cuda.driver import Gpu
from asymtrack_edge.runtime.backends.tensorrt import build as engine
from asymtrack_edge.runtime.backends.tensorrt.backend import TENSORRT, TensorRT, difference, engine_key
from asymtrack_edge.runtime.backends.tensorrt.build import EngineOptions
from asymtrack_edge.variants import VARIANTS
from tests.helpers import SMALL, filled_model

has_rtx = importlib.util.find_spec("tensorrt_rtx_bindings") is not None


def needs_rtx(test: Any) -> Any:
    return pytest.mark.tensorrt(pytest.mark.skipif(not has_rtx, reason="TensorRT-RTX is not installed")(test))


XAVIER = Gpu(0, "Xavier", (7, 2), True, 8, 31 << 30)


@pytest.fixture(autouse=True)
def current(monkeypatch: pytest.MonkeyPatch) -> List[int]:
    """GPUs that engines are built on, in a driver that does nothing."""
    built_on: List[int] = []

    def open_cuda(index: int) -> Any:
        return SimpleNamespace(current=lambda: nullcontext(built_on.append(index)), close=lambda: None)

    monkeypatch.setattr(engine, "open_cuda", open_cuda)
    return built_on


def exported(folder: Path, target: str = "xavier", precision: str = "fp16", batch: int = 1) -> Path:
    folder.mkdir()
    options = ExportOptions(precision, target, max_batch=batch)
    Export(filled_model(SMALL), options).write(folder).save(folder)
    return folder


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export for a Xavier, on a Xavier with TensorRT 8.5."""
    monkeypatch.setattr(engine, "load_tensorrt", lambda flavour: fake_tensorrt("8.5.2.2", False)[0])
    monkeypatch.setattr(engine, "find_gpu", lambda index: replace(XAVIER, index=index))
    return exported(tmp_path / "export")


@needs_rtx
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS] + ["small"])
def test_rtx_builds_every_model(variant: str, precision: str, batch: int, tmp_path: Path) -> None:
    """TensorRT-RTX builds without a GPU."""
    model = filled_model(VARIANTS.get(variant, SMALL))
    manifest = Export(model, ExportOptions(precision, "rtx", max_batch=batch)).write(tmp_path)
    engine.build_engines(tmp_path, manifest).save(tmp_path)
    expected = {"template.engine", "search.engine"}
    if precision == "fp16":
        expected |= {"template-sm75.engine", "search-sm75.engine"}
    loaded = load_manifest(tmp_path)
    assert set(loaded.engines) == expected and expected <= set(loaded.files)
    assert loaded.engines["search.engine"]["batch"] == ("1-8-8" if batch == 8 else "1-1-1")
    assert all(loaded.files[name].bytes > 100_000 for name in expected)


@needs_rtx
def test_what_rtx_cannot_parse_is_named(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    values = [helper.make_tensor_value_info(name, 1, [1, 4]) for name in ("x", "y")]
    node = helper.make_node("NotAnOperator", ["x"], ["y"], "culprit")
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match="NotAnOperator"):
        tensorrt = engine.load_tensorrt("tensorrt-rtx")
        engine.build_engine(tensorrt, tmp_path / "model.onnx", False, (1, 1, 1), EngineOptions())


def fake_tensorrt(version: str, strongly_typed: bool, refuses: Tuple[str, ...] = ()) -> Tuple[TensorRT, Any]:
    """A TensorRT that notes what the builder is told; its network has an fp32, an fp16 and a shape layer.

    It builds nothing while a flag of ``refuses`` is set.
    """
    seen = SimpleNamespace(flags=set(), pinned={}, network=None, profile={}, workspace=0, parsed=b"")

    def tensor(dtype: str, shape_tensor: bool = False) -> Any:
        return SimpleNamespace(dtype=dtype, is_shape_tensor=shape_tensor)

    class Layer:
        def __init__(self, name: str, kind: str, output: Any, source: Any = None) -> None:
            self.name, self.type, self.num_outputs, self.num_inputs = name, kind, 1, int(source is not None)
            self.get_output, self.get_input = lambda _: output, lambda _: source
            self.set_output_type = lambda _, dtype: None

        precision = property(fset=lambda self, dtype: seen.pinned.__setitem__(self.name, dtype))

    layers = [
        Layer("norm", "NORMALIZATION", tensor("FLOAT"), tensor("HALF")),
        Layer("conv", "CONVOLUTION", tensor("HALF")),
        Layer("weights", "CONSTANT", tensor("FLOAT")),
        Layer("size", "SHAPE", tensor("INT32", True)),
        Layer("scale", "ELEMENTWISE", tensor("FLOAT"), tensor("FLOAT", True)),
        Layer("floor", "UNARY", tensor("FLOAT", True)),
    ]
    shapes = {"image": (-1, 3, 8, 8), "keys": (-1, 8, 4, 32)}
    inputs = [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]
    network = SimpleNamespace(
        num_layers=len(layers), get_layer=layers.__getitem__, num_inputs=2, get_input=inputs.__getitem__
    )
    config = SimpleNamespace(
        set_memory_pool_limit=lambda pool, size: setattr(seen, "workspace", size),
        set_flag=seen.flags.add,
        clear_flag=lambda flag: (seen.flags.discard(flag), seen.flags.add(f"not {flag}")),
        add_optimization_profile=lambda profile: None,
    )
    builder = SimpleNamespace(
        create_network=lambda flags: setattr(seen, "network", flags) or network,
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda n, *s: seen.profile.update({n: s})),
        build_serialized_network=lambda *_: None if seen.flags.intersection(refuses) else b"engine",
    )
    kinds = {"EXPLICIT_BATCH": 0, **({"STRONGLY_TYPED": 1} if strongly_typed else {})}
    module = SimpleNamespace(
        Builder=lambda logger: builder,
        ILogger=type("ILogger", (), {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2}),
        NetworkDefinitionCreationFlag=SimpleNamespace(**kinds),
        BuilderFlag=SimpleNamespace(
            FP16="FP16", OBEY_PRECISION_CONSTRAINTS="OBEY", PREFER_PRECISION_CONSTRAINTS="PREFER", TF32="TF32"
        ),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
        LayerType=SimpleNamespace(CONSTANT="CONSTANT", SHAPE="SHAPE"),
        OnnxParser=lambda *_: SimpleNamespace(parse=lambda content: setattr(seen, "parsed", content) or True),
        float32="FLOAT",
    )
    return TensorRT(module, TENSORRT, version), seen


@pytest.mark.parametrize("typed", [False, True])
def test_types_of_the_model_are_the_contract(typed: bool, tmp_path: Path) -> None:
    tensorrt, seen = fake_tensorrt("10.3.0" if typed else "8.5.2.2", typed)
    (tmp_path / "search.onnx").write_bytes(b"model")
    options = EngineOptions(workspace_mb=256)
    content = engine.build_engine(tensorrt, tmp_path / "search.onnx", True, (1, 8, 8), options)
    assert (content, seen.parsed) == (b"engine", b"model")
    assert seen.workspace == 256 << 20
    assert seen.profile == {
        "image": ((1, 3, 8, 8), (8, 3, 8, 8), (8, 3, 8, 8)),
        "keys": ((1, 8, 4, 32), (8, 8, 4, 32), (8, 8, 4, 32)),
    }
    if typed:
        assert seen.network == 2 and seen.flags == {"not TF32"} and not seen.pinned
    else:
        assert seen.network == 1 and seen.flags == {"not TF32", "FP16", "OBEY"}
        assert seen.pinned == {"norm": "FLOAT"}


def test_a_layer_without_an_fp32_implementation_costs_no_engine(tmp_path: Path) -> None:
    tensorrt, seen = fake_tensorrt("8.5.2.2", False, refuses=("OBEY",))
    (tmp_path / "m.onnx").write_bytes(b"model")
    lines: List[str] = []
    options = EngineOptions()
    content = engine.build_engine(tensorrt, tmp_path / "m.onnx", True, (1, 1, 1), options, report=lines.append)
    assert content == b"engine" and {"PREFER", "not OBEY"} <= seen.flags
    assert len(lines) == 1 and "cannot keep every fp32 layer in fp32" in lines[0] and "asymtrack-check" in lines[0]
    tensorrt, _ = fake_tensorrt("8.5.2.2", False, refuses=("OBEY", "PREFER"))
    with pytest.raises(ExportError, match="cannot build an engine from m"):
        engine.build_engine(tensorrt, tmp_path / "m.onnx", True, (1, 1, 1), options)


def test_fp32_needs_no_flags(tmp_path: Path) -> None:
    tensorrt, seen = fake_tensorrt("8.5.2.2", False)
    (tmp_path / "m.onnx").write_bytes(b"model")
    engine.build_engine(tensorrt, tmp_path / "m.onnx", False, (1, 1, 1), EngineOptions())
    assert seen.flags == {"not TF32"} and not seen.pinned


def test_on_a_device_engines_are_built_once(
    jetson: Path, current: List[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: List[str] = []
    manifest = engine.build_in_place(jetson, device=2, report=lines.append)
    assert current == [2, 2] and load_manifest(jetson) == manifest
    assert manifest.engines["search.engine"]["gpu"] == "Xavier" and "compute capability 7.2" in lines[1]
    engine.build_in_place(jetson, report=lines.append)
    assert lines[2:] == ["template.engine: kept", "search.engine: kept"]
    # A new export takes engines over.
    new = tmp_path / "new"
    shutil.copytree(jetson, new, ignore=shutil.ignore_patterns("*.engine"))
    engine.build_engines(new, replace(manifest, engines={}), previous=jetson, report=lines.append)
    assert all("kept from the previous export" in line for line in lines[4:]) and len(lines) == 6
    # A damaged engine is made anew; with another TensorRT both are.
    (jetson / "search.engine").write_bytes(b"damaged")
    engine.build_in_place(jetson, report=lines.append)
    assert "rebuilding" in lines[7] and "altered" in lines[7]
    monkeypatch.setattr(engine, "load_tensorrt", lambda flavour: fake_tensorrt("8.6.1", False)[0])
    engine.build_in_place(jetson, report=lines.append)
    assert "rebuilding, it was built for TensorRT 8.5.2.2, here is 8.6.1" in lines[9]
    assert load_manifest(jetson)


@pytest.mark.parametrize("broken", ["template", "search"])
def test_an_interrupted_rebuild_leaves_a_directory_that_loads(
    jetson: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    engine.build_in_place(jetson)
    content = iter([b"another template engine", b"another search engine"])

    def build(tensorrt: Any, model: Path, *_: Any) -> bytes:
        load_manifest(jetson)  # somebody may start right now
        if model.stem == broken:
            raise KeyboardInterrupt
        return next(content)

    monkeypatch.setattr(engine, "build_engine", build)
    with pytest.raises(KeyboardInterrupt):
        engine.build_in_place(jetson, EngineOptions(rebuild=True))
    assert set(load_manifest(jetson).engines) == {"template.engine", "search.engine"}


@pytest.mark.parametrize("lacks", ["gpu", "jetson", "tensorrt", "memory"])
def test_where_no_engine_can_be_built_the_models_stay(
    lacks: str, jetson: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_tensorrt(flavour: str) -> Any:
        raise BackendError("there is no TensorRT for Python here")

    def no_memory(tensorrt: Any, model: Path, *_: Any) -> bytes:
        if model.stem == "search":
            raise ExportError("TensorRT cannot build an engine from search.onnx: out of memory")
        return b"engine"

    words = {
        "gpu": "no NVIDIA GPU",
        "jetson": "xavier is a Jetson, and this GPU (NVIDIA GeForce RTX 4090) is not",
        "tensorrt": "there is no TensorRT",
        "memory": "out of memory",
    }[lacks]
    pc = Gpu(0, "NVIDIA GeForce RTX 4090", (8, 9))
    if lacks == "gpu":
        monkeypatch.setattr(engine, "find_gpu", driver.find_gpu)
        monkeypatch.setattr(driver, "LIBRARIES", ("libcuda-of-nowhere.so",))
    elif lacks == "jetson":
        monkeypatch.setattr(engine, "find_gpu", lambda index: pc)
    elif lacks == "tensorrt":
        monkeypatch.setattr(engine, "load_tensorrt", no_tensorrt)
    else:
        monkeypatch.setattr(engine, "build_engine", no_memory)
    manifest = load_manifest(jetson)
    lines: List[str] = []
    assert engine.engines_or_note(jetson, manifest, jetson, report=lines.append) == manifest
    assert words in lines[-1] and f"asymtrack-build {jetson}" in lines[-1]
    assert not list(jetson.glob("*.engine")), "half a pair of engines is of no use"
    if lacks in ("gpu", "tensorrt"):
        with pytest.raises(BackendError, match=words):
            engine.build_in_place(jetson)


def test_every_part_of_the_key_counts(tmp_path: Path) -> None:
    manifest = load_manifest(exported(tmp_path / "export"))
    tensorrt = TensorRT(None, TENSORRT, "8.5.2.2")
    key = engine_key(manifest, "search", tensorrt, XAVIER)
    assert (key["multiprocessors"], key["memory_gb"]) == ("8", "32"), "31 of 32 GB are left by the system"
    orin_nx, agx_orin = Gpu(0, "Orin", (8, 7), True, 8, 15 << 30), Gpu(0, "Orin", (8, 7), True, 16, 30 << 30)
    agx, nx = (engine_key(manifest, "search", tensorrt, gpu) for gpu in (agx_orin, orin_nx))
    assert "16 multiprocessors, here are 8" in str(difference(agx, nx))
    assert difference(key, key) is None
    for field in key:
        assert "else" in str(difference({**key, field: "else"}, key))
        assert difference({k: v for k, v in key.items() if k != field}, key) is not None


def test_an_export_for_the_cpu_gets_no_engines(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--target xavier"):
        engine.build_in_place(exported(tmp_path / "export", "onnx", "fp32"))
