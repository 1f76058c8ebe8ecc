"""Reading weights: every supported kind of file, everything that may not fit, saving."""

from __future__ import annotations

import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asymtrack_edge import checkpoints, files
from asymtrack_edge.checkpoints import (
    guess_variant,
    load_model,
    load_weights,
    open_checkpoint,
    save_weights,
)
from asymtrack_edge.errors import CheckpointError, MissingDependencyError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import VARIANTS
from tests.checkpoint_files import TINY, official_weights, read_all, refused, tiny_weights
from tests.helpers import fill_all, golden_answers, golden_inputs, official_shapes

T, S, B = (VARIANTS[name] for name in "TSB")


@pytest.fixture(scope="module")
def official() -> Dict[str, Tensor]:
    return official_weights()


@pytest.fixture(scope="module")
def tiny() -> Dict[str, Tensor]:
    return tiny_weights()


@pytest.fixture()
def foreign() -> Iterator[types.SimpleNamespace]:
    """Classes of packages that no longer exist when the file is read."""
    names = ("lib", "lib.train", "lib.train.admin", "lib.train.admin.settings", "lib.train.admin.stats")
    modules = {name: types.ModuleType(name) for name in names}
    sys.modules.update(modules)

    def define(module: str, name: str, bases: Any = (object,), **members: Any) -> Any:
        cls = type(name, bases, {"__module__": module, "__qualname__": name, **members})
        setattr(modules[module], name, cls)
        return cls

    settings_, stats = "lib.train.admin.settings", "lib.train.admin.stats"

    def reduce_with_items(self: Any) -> Any:
        return type(self), (1,), {"state": 2}, iter([3, 4]), iter([("a", 5)])

    yield types.SimpleNamespace(
        Settings=define(settings_, "Settings"),
        AverageMeter=define(stats, "AverageMeter"),
        EasyDict=define(settings_, "EasyDict", (dict,)),
        Ordered=define(stats, "Ordered", (OrderedDict,)),
        List=define(stats, "History", (list,)),
        Odd=define(stats, "Odd", __reduce__=reduce_with_items, __init__=lambda self, *_: None),
        Keyed=define(stats, "Keyed", __getnewargs_ex__=lambda self: ((1,), {"b": 2}), __new__=_new),
    )
    for name in modules:
        sys.modules.pop(name, None)


def _new(cls: Any, *_: Any, **__: Any) -> Any:
    return object.__new__(cls)


def authors_checkpoint(net: Any, foreign: types.SimpleNamespace) -> Dict[str, Any]:
    """The entries of a published checkpoint, with more kinds of objects than those hold."""
    run = foreign.Settings()
    run.__dict__.update(device=torch.device("cpu"), env=foreign.EasyDict(a=1), scale=np.float64(0.5))
    run.project_path = "x" * 300
    meter = foreign.AverageMeter()
    meter.history, meter.avg, meter.size = [0.5, np.float32(1)], 0.25, torch.Size([2, 3])
    weights = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([weights])
    weights.sum().backward()
    optimiser.step()
    return {
        "epoch": 500,
        "actor_type": "AsymTrackActor",
        "net_type": "AsymTrack",
        "net": net,
        "net_info": {"constructor": None, "set": {1, 2}, "frozen": frozenset([3]), "bytes": b"ab", (1, 2): 3},
        "stats": OrderedDict(train=foreign.Ordered(loss=meter), val=defaultdict(list, a=[meter])),
        "history": foreign.List([1, 2, 3]),
        "settings": run,
        "odd": [foreign.Odd(), foreign.Keyed()],
        "array": np.arange(4),
        "optimizer": optimiser.state_dict(),
    }


@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (True, 4), (False, 2), (False, 5)], ids=str)
def test_authors_checkpoint_with_foreign_classes(
    zipped: bool, protocol: int, official: Dict[str, Tensor], foreign: types.SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "AsymTrack_ep0500.pth.tar"
    content = authors_checkpoint(OrderedDict(official), foreign)
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name == "lib" or name.startswith("lib.")]:
        del sys.modules[name]
    before = set(sys.modules)
    weights = load_weights(path, T)
    assert not [name for name in set(sys.modules) - before if name.split(".")[0] == "lib"]
    assert list(weights) == list(AsymTrack(T).state_dict())
    assert all(torch.equal(tensor, official[name]) for name, tensor in weights.items())
    assert all(t.dtype == torch.float32 for n, t in weights.items() if not n.endswith("tracked"))


def test_authors_checkpoint_gives_the_published_answers(
    official: Dict[str, Tensor], foreign: types.SimpleNamespace, tmp_path: Path
) -> None:
    path = tmp_path / "AsymTrack_ep0500.pth.tar"
    torch.save(authors_checkpoint(official, foreign), path)
    model = load_model(path, T)
    assert not model.training
    with torch.no_grad():
        box = model(*golden_inputs(T)).box[0].numpy()
    assert np.abs(box - golden_answers("T")["box_cxcywh"]).max() < 1e-5


WRAPPINGS: Dict[str, Callable[[Dict[str, Tensor]], Any]] = {
    "plain": lambda d: d,
    "net": lambda d: {"epoch": 1, "net": d},
    "state_dict": lambda d: {"state_dict": d},
    "model": lambda d: {"model": d, "args": None},
    "model_state_dict": lambda d: {"model_state_dict": d},
    "ema": lambda d: {"ema": {"decay": 0.999, "module": d}},
    "stray tensors": lambda d: {"loss": torch.ones(1), "net": d},
    "DDP": lambda d: {"net": {"module." + k: v for k, v in d.items()}},
    "compiled": lambda d: {"_orig_mod." + k: v for k, v in d.items()},
    "compiled DDP": lambda d: {"module._orig_mod." + k: v for k, v in d.items()},
    "lightning": lambda d: {"state_dict": {"tracker.model." + k: v for k, v in d.items()}},
    "parameters": lambda d: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in d.items()},
    "half": lambda d: {k: v.half().float() for k, v in d.items()},
    "double": lambda d: {k: v.double() for k, v in d.items()},
    "transposed": lambda d: {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in d.items()},
    "no counters": lambda d: {k: v for k, v in d.items() if "num_batches" not in k},
    "shared storage": lambda d: flattened(d),
}


def flattened(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """All tensors as views of one storage."""
    flat = torch.cat([t.float().flatten() for t in tensors.values()])
    views = flat.split([t.numel() for t in tensors.values()])
    return {name: view.view(t.shape) for (name, t), view in zip(tensors.items(), views)}


@pytest.mark.parametrize("wrapping", WRAPPINGS.values(), ids=WRAPPINGS.keys())
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_wrappers_and_prefixes(
    wrapping: Callable[[Dict[str, Tensor]], Any], zipped: bool, tiny: Dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(wrapping(tiny), path, _use_new_zipfile_serialization=zipped)
    weights = load_weights(path, TINY)
    assert set(weights) == set(tiny)
    for name, tensor in weights.items():
        assert tensor.is_contiguous()
        assert torch.allclose(tensor, tiny[name], atol=2e-3), name


def prefixed(prefix: str, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


TWO_COPIES: Dict[str, Callable[[Dict[str, Tensor], Dict[str, Tensor]], Any]] = {
    "net (ema)": lambda raw, ema: {"net": raw, "ema": ema},
    "net (ema.module)": lambda raw, ema: {"net": raw, "ema": {"decay": torch.tensor(0.9), "module": ema}},
    "state_dict (state_dict_ema)": lambda raw, ema: {"state_dict_ema": prefixed("module.", ema), "state_dict": raw},
    "model (model_ema)": lambda raw, ema: {"model": raw, "model_ema": ema, "optimizer": {}},
    "state_dict.student (state_dict.teacher)": lambda raw, ema: {
        "state_dict": {**prefixed("student.", raw), **prefixed("teacher.", ema)}
    },
    "student (teacher)": lambda raw, ema: {"teacher": ema, "student": raw},
    "model (ema_model)": lambda raw, ema: {**prefixed("ema_model.", ema), **prefixed("model.", raw)},
    "(model_ema)": lambda raw, ema: {**raw, **prefixed("model_ema.", ema), "model_ema.updates": torch.tensor(3)},
}


@pytest.mark.parametrize("case", TWO_COPIES)
def test_raw_and_averaged_weights(case: str, tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    raw = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tiny.items()}
    path = tmp_path / "run.pth"
    torch.save(TWO_COPIES[case](raw, tiny), path)
    places = {"raw": "raw" + case[: case.index("(")].rstrip(), "ema": "averaged " + case[case.index("(") :]}
    places["raw"] = "raw" if case.startswith("(") else f"raw ({case.split(' ')[0]})"
    for wanted, taken, other in ((None, "ema", "raw"), ("ema", "ema", "raw"), ("raw", "raw", "ema")):
        checkpoint = open_checkpoint(path, wanted)
        assert checkpoint.taken.startswith(places[taken][:-1])
        assert checkpoint.choice.startswith(f"run.pth holds two sets of weights: takes the {checkpoint.taken}; ")
        assert f"--weights {other} takes the {'averaged' if other == 'ema' else 'raw'}" in checkpoint.choice
        expected = tiny if taken == "ema" else raw
        assert all(torch.equal(t, expected[n]) for n, t in load_weights(path, TINY, wanted).items())


def test_one_copy_is_named(tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "run.pth"
    torch.save({"model_ema": tiny}, path)
    assert open_checkpoint(path).choice == "run.pth holds averaged (model_ema) weights"
    assert "holds no raw weights, only averaged (model_ema)" in refused(path, TINY, "raw")
    torch.save({"net": tiny}, path)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.taken, checkpoint.choice) == ("raw (net)", "")
    assert "holds no ema weights, only raw (net)" in refused(path, TINY, "ema")


def test_records_without_a_checksum(tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    """As ``torch.serialization.set_crc32_options(False)`` writes them; a wrong checksum stays damage."""
    path = tmp_path / "w.pt"
    torch.save({"net": tiny}, path)
    content = path.read_bytes()
    for crc, fine in ((0, True), (1, False)):
        changed = bytearray(content)
        for info in zipfile.ZipFile(path).infolist():
            old = info.CRC.to_bytes(4, "little") + info.file_size.to_bytes(4, "little")
            changed = changed.replace(old, crc.to_bytes(4, "little") + old[4:])
        (tmp_path / "changed.pt").write_bytes(changed)
        if fine:
            assert set(load_weights(tmp_path / "changed.pt", TINY)) == set(tiny)
        else:
            assert "Bad CRC-32" in refused(tmp_path / "changed.pt", TINY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precisions_become_fp32(dtype: torch.dtype, tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.items()}
    torch.save(stored, tmp_path / "w.pt")
    save_file(stored, str(tmp_path / "w.safetensors"))
    for path in tmp_path.iterdir():
        weights = load_weights(path, TINY)
        for name, tensor in weights.items():
            expected = stored[name].float() if tiny[name].is_floating_point() else stored[name]
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


def test_wrong_variant(official: Dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save({"net": official}, path)
    message = refused(path, S)
    assert "'backbone.layers.2.blocks.1.gamma_1'" in message
    assert message.endswith("it looks like variant T, so choose that")
    torch.save({"net": fill_all(official_shapes("S"))}, path)
    assert refused(path, T).endswith("it looks like variant S or B, so choose that")
    assert set(load_weights(path, B)) == set(load_weights(path, S)) == set(load_weights(path))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("box_head.conv3_tl.1.running_var", None, "no tensor 'box_head.conv3_tl.1.running_var', which variant T needs"),
        ("bottleneck.weight", torch.zeros(256, 128), "'bottleneck.weight' is 256x128, but variant T needs 256x256"),
        ("backbone.layers.0.blocks.9.theta", torch.zeros(1), "has a tensor 'backbone.layers.0.blocks.9.theta' for"),
    ],
)
def test_tensors_that_do_not_fit(
    name: str, tensor: Optional[Tensor], words: str, official: Dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"
    content = {**official, name: tensor}
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    message = refused(path)
    assert words in message and "the file is incomplete or of a modified model" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(value: float, tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    broken = {k: v.clone() for k, v in tiny.items()}
    broken["bottleneck.weight"][3, 5] = value
    torch.save(broken, tmp_path / "w.pt")
    save_file(broken, str(tmp_path / "w.safetensors"))
    for path in tmp_path.iterdir():
        assert "tensor 'bottleneck.weight' holds NaN or infinity" in refused(path, TINY)
    with pytest.raises(CheckpointError, match=r"bottleneck\.weight"):
        save_weights(tmp_path / "again.safetensors", broken, {})
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((32,), 1e300, dtype=torch.float64), "holds NaN or infinity"),
        (torch.zeros(32, dtype=torch.int64), "is int64, not floating point"),
    ],
)
def test_numbers_that_are_no_weights(tensor: Tensor, words: str, tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({**tiny, "bottleneck.bias": tensor}, tmp_path / "w.pt")
    assert f"'bottleneck.bias' {words}" in refused(tmp_path / "w.pt", TINY)


def test_other_networks(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"conv1.weight": torch.zeros(2), "fc\n.weight": torch.zeros(2)}, path)
    assert "some other network" in refused(path)
    torch.save({"epoch": 3, "lr": 0.1}, path)
    assert "holds no state_dict, only 'epoch', 'lr'" in refused(path)
    torch.save(torch.zeros(3), path)
    assert "no state_dict" in refused(path)
    torch.save([], path)
    assert "no state_dict" in refused(path)


def test_guessing(tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    shapes = {name: official_shapes(name) for name in "TSB"}
    assert guess_variant(shapes["T"]) == ("T",)
    assert guess_variant(shapes["S"]) == guess_variant(shapes["B"]) == ("S", "B")
    assert guess_variant({"conv1.weight": 0}) == ()
    torch.save(tiny, tmp_path / "w.pt")
    assert "fits none of the variants T, S, B" in refused(tmp_path / "w.pt", None)


@pytest.mark.parametrize("half", [True, False])
def test_saving_and_loading(half: bool, official: Dict[str, Tensor], tmp_path: Path) -> None:
    model = AsymTrack(T)
    model.load_state_dict({name: official[name] for name in model.state_dict()})
    path = tmp_path / "T.safetensors"
    path.write_bytes(b"what was there before")
    save_weights(path, model.state_dict(), {"variant": "T", "pairs": 1234, "data": ["a", "b"]}, half=half)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert abs(path.stat().st_size - 3.44e6 * (2 if half else 4)) < 1e5
    opened = open_checkpoint(path)
    assert opened.metadata == {"variant": "T", "pairs": "1234", "data": '["a", "b"]'}
    assert opened.variants == ("T",)
    assert opened.kind == "safetensors"
    weights = load_weights(path)
    for name, tensor in weights.items():
        assert torch.equal(tensor, (official[name].half() if half else official[name]).to(tensor.dtype))
    assert "holds weights of variant 'S', not T" in _restated(path, "S")


def _restated(path: Path, variant: str) -> str:
    save_weights(path, load_weights(path), {"variant": variant})
    return refused(path, T)


def test_metadata_tells_b_from_s(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights = fill_all({name: tuple(v.shape) for name, v in AsymTrack(B).state_dict().items()})
    save_weights(path, weights, {"variant": "B"})
    assert open_checkpoint(path).variants == ("B",)
    load_weights(path, B)
    assert refused(path, S).endswith("holds weights of variant 'B', not S: choose that one")


def test_numbers_too_large_for_half(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match=r"'a'.*float32"):
        save_weights(path, {"a": torch.tensor([1e6])}, {})
    save_weights(path, {"a": torch.tensor([1e6])}, {}, half=False)
    assert read_all(path)["a"].item() == 1e6


def test_failed_saves_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.OutputFile, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_weights(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_views_can_be_saved(tmp_path: Path) -> None:
    flat = torch.arange(8.0)
    save_weights(tmp_path / "w.safetensors", {"a": flat[:4], "b": flat[2:].view(2, 3).t()}, {})
    read = read_all(tmp_path / "w.safetensors")
    assert torch.equal(read["a"].float(), flat[:4])
    assert torch.equal(read["b"].float(), flat[2:].view(2, 3).t())


def test_bundled_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official: Dict[str, Tensor]) -> None:
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "checkpoints.py"))
    with pytest.raises(CheckpointError, match=r"no weights of variant T come with this package: .*-train"):
        load_model(None, T)
    (tmp_path / "weights").mkdir()
    keys = AsymTrack(T).state_dict()
    save_weights(tmp_path / "weights" / "T.safetensors", {k: official[k] for k in keys}, {"variant": "T"})
    assert isinstance(load_model(None, T), AsymTrack)


@pytest.mark.parametrize("module", ["torch", "safetensors"])
def test_absent_packages_are_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, str(path))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {module}, .*asymtrack-edge\[export\]"):
        load_weights(path, T)
