"""Reading weights: every supported kind of file, and every mismatch; saving weights."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, Callable, Dict
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asymtrack_edge import checkpoints, files
from asymtrack_edge.checkpoints import bundled_weights, load_weights, open_checkpoint, save_weights
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import VARIANTS
from tests.helpers import TINY, Calls, fill_all, filled_model, official_shapes, refused

T, S, B = (VARIANTS[name] for name in "TSB")
Weights = Dict[str, Tensor]


@pytest.fixture(scope="module")
def official() -> Weights:
    """The weights in an authors' checkpoint of T, including unused modules."""
    return fill_all(official_shapes("T"))


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return filled_model(TINY).state_dict()


#: A module that no longer exists when the file is read.
STATS = types.ModuleType("lib.train.admin.stats")
exec(
    """
class AverageMeter: pass
class EasyDict(dict): pass
class History(list): pass
class Odd:
    def __reduce__(self): return Odd, (), {"state": 2}, iter([3, 4]), iter([("a", 5)])
class Keyed:
    def __new__(cls, *_, **__): return object.__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"b": 2}
""",
    STATS.__dict__,
)


def authors_checkpoint(net: Any) -> Dict[str, Any]:
    """The entries of a published checkpoint, with more kinds of objects than it holds."""
    run, odd = STATS.AverageMeter(), [STATS.Odd(), STATS.Keyed(), STATS.History([1, 2, 3])]
    run.__dict__.update(device=torch.device("cpu"), env=STATS.EasyDict(a=1), scale=np.float64(0.5), path="x" * 300)
    run.history, run.avg, run.size = [0.5, np.float32(1)], 0.25, torch.Size([2, 3])
    weights = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([weights])
    weights.sum().backward()
    optimiser.step()
    return {
        "epoch": 500,
        "net": net,
        "net_info": {"constructor": None, "set": {1, 2}, "frozen": frozenset([3]), "bytes": b"ab", (1, 2): 3},
        "stats": OrderedDict(train={"loss": run}, val=defaultdict(list, a=[run]), odd=odd, array=np.arange(4)),
        "optimizer": optimiser.state_dict(),
    }


@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (True, 4), (False, 2), (False, 5)], ids=str)
def test_authors_checkpoint_with_foreign_classes(
    zipped: bool, protocol: int, official: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "AsymTrack_ep0500.pth.tar"
    for name in ("lib", "lib.train", "lib.train.admin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, STATS.__name__, STATS)
    content = authors_checkpoint(OrderedDict(official))
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    weights = load_weights(path)
    assert "lib" not in sys.modules
    assert list(weights) == list(AsymTrack(T).state_dict())
    assert all(torch.equal(tensor, official[name]) for name, tensor in weights.items())
    assert all(t.dtype == torch.float32 for n, t in weights.items() if not n.endswith("tracked"))


def prefixed(prefix: str, tensors: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def flattened(tensors: Weights) -> Weights:
    """All tensors as views of one storage."""
    views = torch.cat([t.float().flatten() for t in tensors.values()]).split([t.numel() for t in tensors.values()])
    return {name: view.view(t.shape) for (name, t), view in zip(tensors.items(), views)}


WRAPPINGS: Dict[str, Callable[[Weights], Any]] = {
    "plain": lambda d: d,
    "state_dict": lambda d: {"state_dict": d, "args": None},
    "ema": lambda d: {"ema": {"decay": 0.999, "module": d}},
    "stray tensors": lambda d: {"loss": torch.ones(2), "net": d},
    "compiled DDP": lambda d: prefixed("module._orig_mod.", d),
    "compiled part": lambda d: {k.replace("backbone.", "backbone._orig_mod.", 1): v for k, v in d.items()},
    "lightning": lambda d: {"state_dict": prefixed("tracker.model.", d)},
    "Python 2": lambda d: {"net": Calls(OrderedDict, [[name, tensor] for name, tensor in d.items()])},
    "FSDP": lambda d: {"net": d, "optim": {"state": {k: {"exp_avg": v, "exp_avg_sq": v} for k, v in d.items()}}},
    "averaged parameters": lambda d: {"net": d, "ema": {k: v for k, v in d.items() if "running" not in k}},
    "parameters": lambda d: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in d.items()},
    "transposed": lambda d: {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in d.items()},
    "no counters": lambda d: {k: v for k, v in d.items() if "num_batches" not in k},
    "shared storage": flattened,
    **{f"{dtype}": lambda d, t=dtype: {k: v.to(t) if v.is_floating_point() else v for k, v in d.items()}
       for dtype in (torch.float16, torch.bfloat16, torch.float64)},
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_and_prefixes_and_types(wrapping: str, tiny: Weights, tmp_path: Path) -> None:
    content = WRAPPINGS[wrapping](tiny)
    torch.serialization.set_crc32_options(wrapping != "plain")  # records without checksums
    torch.save(content, tmp_path / "zip.pt")
    torch.serialization.set_crc32_options(True)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    if "torch." in wrapping:
        save_file(content, str(tmp_path / "w.safetensors"))
    for path in tmp_path.iterdir():
        weights = open_checkpoint(path).tensors(TINY)
        assert set(weights) == set(tiny)
        for name, tensor in weights.items():
            assert tensor.is_contiguous() and tensor.dtype == tiny[name].dtype
            assert torch.allclose(tensor, tiny[name], rtol=1e-2, atol=1e-3), name


TWO_COPIES: Dict[str, Callable[[Weights, Weights], Any]] = {
    "net, ema.module": lambda raw, ema: {"net": raw, "ema": {"decay": torch.tensor(0.9), "module": ema}},
    "net, net_ema.module": lambda raw, ema: {"net_ema": prefixed("module.", ema), "net": raw},
    "net, EMA": lambda raw, ema: {"EMA": ema, "net": raw},
    "state_dict.student, state_dict.teacher": lambda raw, ema: {
        "state_dict": {**prefixed("student.", raw), **prefixed("teacher.", ema)}
    },
    "model, ema_model": lambda raw, ema: {**prefixed("ema_model.", ema), **prefixed("model.", raw)},
    ", model_ema": lambda raw, ema: {**raw, **prefixed("model_ema.", ema), "model_ema.updates": torch.tensor(3)},
}  # fmt: skip


@pytest.mark.parametrize("places", TWO_COPIES)
def test_raw_and_averaged_weights(places: str, tiny: Weights, tmp_path: Path) -> None:
    raw = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tiny.items()}
    path = tmp_path / "run.pth"
    torch.save(TWO_COPIES[places](raw, tiny), path)
    names = dict(zip(("raw", "ema"), places.split(", ")))
    labels = {"raw": f"raw ({names['raw']})" if names["raw"] else "raw", "ema": f"averaged ({names['ema']})"}
    for wanted, taken, other in ((None, "ema", "raw"), ("ema", "ema", "raw"), ("raw", "raw", "ema")):
        checkpoint = open_checkpoint(path, wanted)
        assert checkpoint.taken == labels[taken]
        assert f"using the {labels[taken]}; --weights {other} uses the {labels[other]}" in checkpoint.choice
        assert all(torch.equal(t, (tiny if taken == "ema" else raw)[n]) for n, t in checkpoint.tensors(TINY).items())


def test_the_only_copy_is_taken(tiny: Weights, tmp_path: Path) -> None:
    path = tmp_path / "run.pth"
    for key, label, other in (("model_ema", "averaged (model_ema)", "raw"), ("net", "raw (net)", "ema")):
        torch.save({key: tiny}, path)
        assert (open_checkpoint(path).taken, open_checkpoint(path).choice) == (label, "")
        assert f"holds no {other} weights, only {label}" in refused(path, TINY, other)
    torch.save({"best": dict(tiny), "last": tiny, "old": {"net": dict(tiny)}}, path)
    assert open_checkpoint(path).choice == "run.pth holds 3 sets of weights: using the raw (last)"


def test_a_wrong_variant_is_refused_and_the_right_one_named(official: Weights, tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    torch.save({"net": official}, path)
    assert open_checkpoint(path).variants == ("T",)
    message = refused(path, S)
    assert "'backbone.layers.2.blocks.1.gamma_1'" in message
    assert message.endswith("it looks like variant T, so choose that")
    torch.save({"net": fill_all(official_shapes("S"))}, path)
    assert refused(path, T).endswith("it looks like variant S or B, so choose that")
    assert set(open_checkpoint(path).tensors(B)) == set(open_checkpoint(path).tensors(S))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("box_head.conv3_tl.1.running_var", None, "'box_head.conv3_tl.1.running_var' is missing, but"),
        ("bottleneck.weight", torch.zeros(2, 3), "tensor 'bottleneck.weight' is (2, 3), but variant T needs (32, 32)"),
        ("backbone.layers.0.blocks.9.theta", torch.zeros(1), "blocks.9.theta' is (1,), but variant T needs none"),
        ("neck.weight", torch.zeros(2), "'neck.weight' is (2,), but variant T needs none"),
        ("bottleneck.bias", torch.full((32,), 1e300, dtype=torch.float64), "'bottleneck.bias' holds NaN or infinity"),
        ("bottleneck.bias", torch.full((32,), float("nan")), "'bottleneck.bias' holds NaN or infinity"),
        ("bottleneck.bias", torch.zeros(32, dtype=torch.int8), "'bottleneck.bias' is int8: give a"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, tensor: Any, words: str, tiny: Weights, tmp_path: Path) -> None:
    content = {key: value for key, value in {**tiny, name: tensor}.items() if value is not None}
    torch.save(content, tmp_path / "w.pt")
    save_file(content, str(tmp_path / "w.safetensors"))
    for path in tmp_path.iterdir():
        assert words in refused(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"conv1.weight": torch.zeros(2), "fc\n.weight": torch.zeros(2)}, "another network"),
        ({"epoch": 3, "lr": 0.1}, "holds no state_dict, only 'epoch', 'lr'"),
        (torch.zeros(3), "no state_dict"),
        ([], "no state_dict"),
        (torch.nn.Linear(2, 2), "save model.state_dict()"),
        ({"model": torch.nn.Linear(2, 2)}, "only 'model': save model.state_dict()"),
    ],
)
def test_other_networks_are_refused(content: Any, words: str, tmp_path: Path) -> None:
    for new in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
        assert words in refused(tmp_path / "w.pt")


@pytest.mark.parametrize("half", [True, False])
def test_saving_and_loading(half: bool, tmp_path: Path) -> None:
    weights = flattened(filled_model(S).state_dict())
    path = tmp_path / "S.safetensors"
    path.write_bytes(b"earlier content")
    save_weights(path, weights, {"variant": "S", "pairs": 1234, "data": ["a", "b"]}, half=half)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert abs(path.stat().st_size - 3.75e6 * (2 if half else 4)) < 2e5
    opened = open_checkpoint(path)
    assert opened.metadata == {"variant": "S", "pairs": "1234", "data": '["a", "b"]'} and opened.variants == ("S",)
    assert refused(path, B).endswith("holds weights of variant 'S', not B: choose that variant")
    path.write_bytes(bytes(path.stat().st_size))  # the tensors are in memory by now
    for name, tensor in opened.tensors(S).items():
        assert torch.equal(tensor, (weights[name].half() if half else weights[name]).to(tensor.dtype))


def test_failing_to_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    for value, words in ((1e6, "'a'.*float32"), (float("nan"), "NaN")):
        with pytest.raises(CheckpointError, match=words):
            save_weights(path, {"a": torch.tensor([value])}, {})
    monkeypatch.setattr(files.OutputFile, "write", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        save_weights(path, {"a": torch.zeros(1)}, {})
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bundled_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "BUNDLED", tmp_path)
    with pytest.raises(CheckpointError, match=r"this package has no weights for variant T: .*-train"):
        bundled_weights(T)
    save_weights(tmp_path / "T.safetensors", filled_model(T).state_dict(), {"variant": "T"})
    assert not open_checkpoint(bundled_weights(T)).model(T).training
