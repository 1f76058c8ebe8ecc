"""Files that are hostile, damaged or no checkpoints: one line each, and nothing is executed."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from asymtrack_edge._torch_files import Foreign, MalformedError, PickleStream, Unpickler
from asymtrack_edge.checkpoints import load_weights
from asymtrack_edge.errors import CheckpointError
from tests.checkpoint_files import (
    TINY,
    Builds,
    Calls,
    T,
    bad,
    files_of,
    read_all,
    refused,
    rezip,
    tiny_weights,
    touch,
)


def unpickled(content: bytes) -> Any:
    return Unpickler(PickleStream(content)).load()


@pytest.fixture(scope="module")
def tiny() -> Dict[str, Tensor]:
    return tiny_weights()


ATTACKS: Dict[str, Callable[[Path], Any]] = {
    "system": bad,
    "eval": lambda p: Calls(builtins.eval, touch(p)),
    "exec": lambda p: Calls(builtins.exec, touch(p)),
    "getattr": lambda p: Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"touch {p}"),
    "open": lambda p: Calls(open, str(p), "w"),
    "nested": lambda p: {"a": [({"b": bad(p)},)]},
    "as a key": lambda p: {bad(p): 1},
    "torch.load": lambda p: Calls(torch.load, bad(p)),
    "torch.hub": lambda p: Calls(torch.hub.load, "owner/repo", bad(p)),
    "rebuild": lambda p: Calls(torch._utils._rebuild_parameter, bad(p), False, None),
    "state": lambda p: Builds({"f": bad(p)}, types.SimpleNamespace),
    "setstate": lambda p: Builds((touch(p),), Calls, builtins.exec, touch(p)),
    "factory": lambda p: defaultdict(eval, {"a": bad(p)}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_calls_in_a_checkpoint_are_not_made(
    attack: Callable[[Path], Any], protocol: int, tiny: Dict[str, Tensor], tmp_path: Path
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "w.pt"
    content = {"settings": attack(marker), "net": tiny, "after": attack(marker)}
    for zipped in (True, False):
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        weights = load_weights(path, TINY)
        assert all(torch.equal(weights[name], tensor) for name, tensor in tiny.items())
        assert not marker.exists()


def test_the_attacks_work_on_plain_pickle(tmp_path: Path) -> None:
    """So that the test above is one."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(ATTACKS["system"](marker), 2))
    assert marker.exists()


OPCODES: Dict[str, Callable[[str], bytes]] = {
    "GLOBAL": lambda c: b"cos\nsystem\n(V" + c.encode() + b"\ntR.",
    "STACK_GLOBAL": lambda c: b"\x80\x04\x8c\x02os\x8c\x06system\x93V" + c.encode() + b"\n\x85R.",
    "INST": lambda c: b"(V" + c.encode() + b"\nios\nsystem\n.",
    "OBJ": lambda c: b"(cos\nsystem\nV" + c.encode() + b"\no.",
    "NEWOBJ": lambda c: b"\x80\x02cos\nsystem\nV" + c.encode() + b"\n\x85\x81.",
    "NEWOBJ_EX": lambda c: b"\x80\x04cos\nsystem\nV" + c.encode() + b"\n\x85}\x92.",
    "BUILD": lambda c: b"cbuiltins\nobject\n)R}Vx\ncos\nsystem\nV" + c.encode() + b"\n\x85Rsb.",
    "PERSID": lambda c: b"P" + c.encode() + b"\n.",
    "BINPERSID": lambda c: b"cos\nsystem\nV" + c.encode() + b"\n\x85RQ.",
    "EXT": lambda c: b"\x82\x01V" + c.encode() + b"\n\x85R.",
}


@pytest.mark.parametrize("form", OPCODES.values(), ids=OPCODES.keys())
def test_opcodes_that_could_call_do_not(form: Callable[[str], bytes], tmp_path: Path) -> None:
    marker = tmp_path / "x"
    assert isinstance(unpickled(form(f"touch {marker}")), Foreign)
    assert not marker.exists()


def test_a_lambda_in_place_of_the_weights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"net": Calls(os.system, "true")}, path)
    assert "posix.system" in refused(path) or "nt.system" in refused(path)


def test_a_whole_module_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "save model.state_dict() instead" in refused(path)
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    assert "save its state_dict() instead" in refused(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 62) + b"abc.",
        b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        b"I" + b"9" * 1_000_000 + b"\n.",
        b"L" + b"9" * 1_000_000 + b"L\n.",
        b"\x80\x02]r\xff\xff\xff\xff.."[:-2],
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"",
        b".",
        b"0.",
        b"\x80\x02R.",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02K\x01)R.",
        b"\x80\x05\x97.",
    ],
    ids=lambda data: ascii(data[:12]),
)
def test_senseless_pickles_are_refused_quickly(data: bytes, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    assert "damaged" in refused(tmp_path / "w.pt")


def test_the_size_of_a_pickle_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pickle_ = b"\x80\x02" + b"]0" * 1000 + b"N."
    assert unpickled(pickle_) is None
    monkeypatch.setattr(PickleStream, "left", 2002)
    with pytest.raises(MalformedError, match="unreasonable size"):
        unpickled(pickle_)


def test_large_memo_indices_take_no_memory() -> None:
    assert unpickled(b"\x80\x02]r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == []


def test_shared_tuples_as_keys_are_not_hashed() -> None:
    """A tuple of twice a tuple of twice ... takes 2**60 steps to hash."""
    doubled = b")" + b"2\x86" * 60
    assert unpickled(b"\x80\x02}" + doubled + b"K\x01s.") == {}
    assert isinstance(unpickled(b"\x80\x04\x8f(" + doubled + b"\x90."), Foreign)


def test_deep_nesting_is_harmless() -> None:
    value = unpickled(b"\x80\x02)" + b"\x85" * 200_000 + b".")
    assert isinstance(value, tuple)


@pytest.mark.parametrize(("size", "words"), [(1, "compressed"), (50_000_000, "claim to be larger than the file")])
def test_compressed_archives_are_refused(size: int, words: str, tmp_path: Path) -> None:
    """A zip bomb among them."""
    path = tmp_path / "w.pt"
    torch.save({"net": {"a": torch.rand(1000)}}, path)
    rezip(path, lambda records: records.update({"archive/zeros": bytes(size)}), zipfile.ZIP_DEFLATED)
    assert words in refused(path)


def test_missing_and_short_storages(tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pt"

    def remove(records: Dict[str, bytes]) -> None:
        del records[next(name for name in records if name.endswith("data/3"))]

    def shorten(records: Dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith("data/3"))
        records[name] = records[name][:-1]

    for change, words in ((remove, "truncated or damaged"), (shorten, "too short")):
        torch.save({"net": tiny}, path)
        rezip(path, change)
        assert words in refused(path, TINY)


class RawTensor:
    """A tensor as PyTorch pickles it, with any numbers."""

    def __init__(self, key: str, numel: int, offset: Any, shape: Any, stride: Any) -> None:
        self.key, self.numel, self.view = key, numel, (offset, shape, stride)

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (_Reference((self.key, self.numel)), *self.view, False, OrderedDict())


class _Reference(tuple):
    pass


def write_raw(path: Path, content: Any, *storages: bytes) -> None:
    """A PyTorch zip file, its description unchecked."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, _Reference):
                return ("storage", torch.FloatStorage, obj[0], "cpu", obj[1])
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for i, storage in enumerate(storages):
            archive.writestr(f"archive/data/{i}", storage)


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "numel"),
    [
        (0, (32,), (1,), 31),
        (1, (32,), (1,), 32),
        (-1, (32,), (1,), 32),
        (0, (32,), (2,), 32),
        (31, (32,), (-1,), 32),
        (0, (32,), (0,), 1),
        (0, (32,), (1,), 33),
        (0, (32,), (1,), 1 << 40),
        (1 << 62, (32,), (1 << 62,), 32),
        (0, (1 << 40, 1 << 40), (1, 1), 32),
        (0, "abc", (1,), 32),
        (0, ((1,),), (1,), 32),
        (0, (1.5,), (1,), 32),
        (0, None, (1,), 32),
    ],
)
def test_views_outside_their_storage(
    offset: int, shape: Any, stride: Any, numel: int, tiny: Dict[str, Tensor], tmp_path: Path
) -> None:
    """32 numbers as the bias of the stem, where they are not all there."""
    name, path = "backbone.patch_embed.proj.bias", tmp_path / "w.pt"
    content: Dict[str, Any] = {k: RawTensor("0", 1 << 20, 0, tuple(t.shape), t.stride()) for k, t in tiny.items()}
    content[name] = RawTensor("1", 32, 0, (32,), (1,))
    write_raw(path, content, bytes(4 << 20), bytes(128))
    assert load_weights(path, TINY)[name].abs().max() == 0
    content[name] = RawTensor("1", numel, offset, shape, stride)
    write_raw(path, content, bytes(4 << 20), bytes(4 * min(numel, 32)))
    assert "damaged" in refused(path, TINY)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello", "is not a checkpoint"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00" + bytes(40), "gzip"),
        (bytes(257) + b"ustar\x0000" + bytes(250), "tar archive"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
        (b"PK\x05\x06" + bytes(18), "no data.pkl"),
        (struct.pack("<Q", 1 << 60) + b"{" + bytes(100), "safetensors"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "truncated or damaged"),
        (np.random.RandomState(0).bytes(4096), "not a checkpoint"),
    ],
    ids=lambda value: ascii(value)[:24] if isinstance(value, bytes) else None,
)
def test_other_files(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    path.write_bytes(content)
    assert words in refused(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "absent.pth")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    with pytest.raises(CheckpointError):
        load_weights("a\0b", T)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / ("x" * 200) / "y")


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1)}, path)

    def pretend(records: Dict[str, bytes]) -> None:
        root = next(iter(records)).split("/")[0]
        records[f"{root}/constants.pkl"] = b"."

    rezip(path, pretend)
    assert "TorchScript" in refused(path)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """Three tensors in each format, as bytes, and the tensors."""
    tensors = {"a.weight": torch.randn(2, 3), "a.bias": torch.arange(3.0).half(), "n": torch.tensor(7)}
    folder = tmp_path_factory.mktemp("few")
    return {"tensors": tensors, "files": [(p.name, p.read_bytes()) for p in files_of(tensors, folder)]}


def test_truncations_of_a_small_file(few: Dict[str, Any], tmp_path: Path) -> None:
    for name, data in few["files"]:
        path = tmp_path / name
        path.write_bytes(data)
        assert all(torch.equal(t, few["tensors"][n]) for n, t in read_all(path).items())
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError) as caught:
                read_all(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [0, 1, 2], ids=["zip", "old format", "safetensors"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_tensors_or_one_error(
    index: int, data: st.DataObject, few: Dict[str, Any], tmp_path: Path
) -> None:
    name, content = few["files"][index]
    broken = bytearray(content)
    changes = st.tuples(st.integers(0, len(broken) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, min_size=1, max_size=4)):
        broken[position] = value
    path = tmp_path / name
    path.write_bytes(broken)
    try:
        tensors = read_all(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in tensors.values())


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_random_pickles(content: bytes) -> None:
    before = set(sys.modules)
    with suppress(Exception):
        unpickled(b"\x80\x04" + content)
    assert set(sys.modules) == before


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_byte_of_a_whole_model(data: st.DataObject, tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    """A damaged byte anywhere in PyTorch's zip format is noticed, or it does not touch the weights."""
    path = tmp_path / "w.pt"
    torch.save({"net": tiny}, path)
    content = bytearray(path.read_bytes())
    ends = st.one_of(st.integers(0, 40_000), st.integers(len(content) - 20_000, len(content) - 1))
    position = data.draw(st.one_of(ends, st.integers(0, len(content) - 1)))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        weights = load_weights(path, TINY)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(torch.equal(weights[name], tensor) for name, tensor in tiny.items())
