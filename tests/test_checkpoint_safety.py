"""Files that are hostile, damaged or no checkpoints: one line each, and nothing is executed."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import sys
import time
import types
import zipfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from asymtrack_edge import _torch_files
from asymtrack_edge._torch_files import Foreign, Unpickler
from asymtrack_edge.checkpoints import load_weights, open_checkpoint
from asymtrack_edge.errors import CheckpointError
from tests.checkpoint_files import TINY, Calls, bad, refused, rezip, touch, weights_of


def unpickled(content: bytes) -> Any:
    return Unpickler(io.BytesIO(content)).load()


@pytest.fixture(scope="module")
def tiny() -> Dict[str, Tensor]:
    return weights_of(TINY)


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
    "state": lambda p: Calls(types.SimpleNamespace, state={"f": bad(p)}),
    "setstate": lambda p: Calls(Calls, builtins.exec, touch(p), state=(touch(p),)),
    "factory": lambda p: defaultdict(eval, {"a": bad(p)}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_calls_in_a_checkpoint_are_not_made(
    attack: Callable[[Path], Any], tiny: Dict[str, Tensor], tmp_path: Path
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "w.pt"
    content = {"settings": attack(marker), "net": tiny, "after": attack(marker)}
    for zipped, protocol in ((True, 2), (True, 4), (False, 2), (False, 4)):
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        weights = load_weights(path, TINY)
        assert all(torch.equal(weights[name], tensor) for name, tensor in tiny.items())
        assert not marker.exists()


def test_the_attacks_work_on_plain_pickle(tmp_path: Path) -> None:
    """So that the test above is one."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(ATTACKS["system"](marker), 2))
    assert marker.exists()


@pytest.mark.parametrize(
    "form",
    [
        b"cos\nsystem\n(TEXTtR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93TEXT\x85R.",
        b"(VCOMMAND\nios\nsystem\n.",
        b"(cos\nsystem\nVCOMMAND\no.",
        b"\x80\x02cos\nsystem\nTEXT\x85\x81.",
        b"\x80\x04cos\nsystem\nTEXT\x85}\x92.",
        b"cbuiltins\nobject\n)R}\x8c\x01xcos\nsystem\nTEXT\x85Rsb.",
        b"PCOMMAND\n.",
        b"cos\nsystem\nTEXT\x85RQ.",
        b"\x82\x01VCOMMAND\n\x85R.",
    ],
    ids=lambda form: ascii(form)[-24:],
)
def test_opcodes_that_could_call_do_not(form: bytes, tmp_path: Path) -> None:
    command = f"touch {tmp_path}/x".encode()
    form = form.replace(b"TEXT", b"X" + struct.pack("<i", len(command)) + command).replace(b"COMMAND", command)
    with suppress(KeyError):  # an opcode that is not admitted
        assert isinstance(unpickled(form), Foreign)
    assert not list(tmp_path.iterdir())


def zipped(path: Path, content: bytes, *storages: bytes) -> Path:
    """A PyTorch zip file around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for i, storage in enumerate(storages):
            archive.writestr(f"archive/data/{i}", storage)
    return path


#: A tuple of twice a tuple of twice ... takes 2**60 steps to hash.
DOUBLED = b")" + b"q\x00h\x00\x86" * 60
LONG = b"X" + struct.pack("<i", 1_000_000) + bytes(1_000_000)
SENSELESS = {
    "long string": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "longer string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
    "long array": b"\x80\x04\x96" + struct.pack("<Q", 1 << 62) + b"abc.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "decimal number": b"I" + b"9" * 1_000_000 + b"\n.",
    "memo index": b"\x80\x02]r\xff\xff\xff\xff.."[:-2],
    "marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "empty": b"",
    "stop": b".",
    "pop": b"0.",
    "call of nothing": b"\x80\x02R.",
    "no memo": b"\x80\x02h\x05.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
    "call of a number": b"\x80\x02K\x01)R.",
    "buffer": b"\x80\x05\x97.",
    # What would cost the square of the file's size, or more.
    "long names": b"\x80\x04" + LONG + b"q\x000" + b"h\x00h\x00\x93" * 200_000 + b".",
    "long arguments": b"\x80\x02(" + b"N" * 500_000 + b"tq\x000cx\ny\nq\x010" + b"h\x01h\x00R0" * 200_000 + b".",
    "pairs": b"\x80\x02](" + b"N" * 500_000 + b"eq\x00\x85q\x020ccollections\nOrderedDict\nq\x010"
    + b"h\x01h\x02R0" * 200_000 + b".",
    "shape": b"\x80\x02(ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000N"
    b"K\x01tQK\x00" + DOUBLED + b"h\x00tR.",
    "keys": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "itself": b"\x80\x02}q\x00" + b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + b"h\x00s" for i in range(26)) + b".",
}  # fmt: skip


@pytest.mark.parametrize("content", SENSELESS.values(), ids=SENSELESS)
def test_senseless_pickles_are_refused_quickly(content: bytes, tmp_path: Path) -> None:
    began = time.monotonic()
    refused(zipped(tmp_path / "w.pt", content))
    assert time.monotonic() - began < 60


def test_the_size_of_a_pickle_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_torch_files, "MAX_PICKLE", 2000)
    assert "unreasonable size" in refused(zipped(tmp_path / "w.pt", b"\x80\x02" + b"]0" * 1000 + b"N."))


def test_what_is_large_only_when_it_is_spread_out_stays_small() -> None:
    assert unpickled(b"\x80\x02]r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == []
    assert unpickled(b"\x80\x04\x8f(" + DOUBLED + b"\x90.") is None
    assert isinstance(unpickled(b"\x80\x02)" + b"\x85" * 200_000 + b"."), tuple)


@pytest.mark.parametrize(
    ("record", "content", "words"),
    [("zeros", bytes(1), "compressed"), ("zeros", bytes(50_000_000), "larger"), ("constants.pkl", b"", "TorchScript")],
)
def test_archives_that_are_no_checkpoints(record: str, content: bytes, words: str, tmp_path: Path) -> None:
    """A zip bomb among them."""
    path = tmp_path / "w.pt"
    torch.save({"net": {"a": torch.rand(1000)}}, path)
    method = zipfile.ZIP_STORED if words == "TorchScript" else zipfile.ZIP_DEFLATED
    rezip(path, lambda records: records.update({f"{next(iter(records)).split('/')[0]}/{record}": content}), method)
    assert words in refused(path)


@pytest.mark.parametrize("left", [None, -1])
def test_missing_and_short_storages(left: Optional[int], tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"net": tiny}, path)

    def change(records: Dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith("data/3"))
        data = records.pop(name)
        if left:
            records[name] = data[:left]

    rezip(path, change)
    assert "storage '3' is missing or too short" in refused(path)


class RawTensor:
    """A tensor as PyTorch pickles it, with any numbers."""

    def __init__(self, key: str, numel: int, offset: Any, shape: Any, stride: Any) -> None:
        self.arguments = (_Reference((key, numel)), offset, shape, stride, False, {})

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Reference(Tuple[str, int]):
    pass


class RawPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.FloatStorage, obj[0], "cpu", obj[1]) if isinstance(obj, _Reference) else None


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
    name = "backbone.patch_embed.proj.bias"
    content: Dict[str, Any] = {k: RawTensor("0", 1 << 20, 0, tuple(t.shape), t.stride()) for k, t in tiny.items()}

    def written(tensor: RawTensor, size: int) -> Path:
        buffer = io.BytesIO()
        RawPickler(buffer, 2).dump({**content, name: tensor})
        return zipped(tmp_path / "w.pt", buffer.getvalue(), bytes(4 << 20), bytes(size))

    assert load_weights(written(RawTensor("1", 32, 0, (32,), (1,)), 128), TINY)[name].abs().max() == 0
    assert "damaged" in refused(written(RawTensor("1", numel, offset, shape, stride), 4 * min(numel, 32)))


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
        (struct.pack("<Q", 2) + b"{}", "no state_dict"),
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
    assert "does not exist" in refused(tmp_path / ("x" * 200) / "y")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Dict[str, Tensor], Dict[str, bytes]]:
    """Three tensors, and files of them in each format."""
    tensors = {
        "bottleneck.weight": torch.randn(2, 3),
        "box_head.a": torch.ones(3).half(),
        "box_head.n": torch.tensor(7),
    }
    folder = tmp_path_factory.mktemp("few")
    for name in ("zip", "old"):
        content = {"net": tensors, "settings": Calls(os.getcwd)}
        torch.save(content, folder / name, _use_new_zipfile_serialization=name == "zip")
    save_file(tensors, str(folder / "safetensors"))
    return tensors, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["zip", "old", "safetensors"])
def test_truncations_of_a_small_file(name: str, few: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(few[1][name])
    read = open_checkpoint(path).stored
    assert set(read) == set(few[0]) and all(torch.equal(read[n], tensor) for n, tensor in few[0].items())
    for length in range(0, len(few[1][name]), 7):
        path.write_bytes(few[1][name][:length])
        refused(path)


@pytest.mark.parametrize("name", ["zip", "old", "safetensors"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_tensors_or_one_error(name: str, data: st.DataObject, few: Any, tmp_path: Path) -> None:
    broken = bytearray(few[1][name])
    changes = st.tuples(st.integers(0, len(broken) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, min_size=1, max_size=4)):
        broken[position] = value
    path = tmp_path / name
    path.write_bytes(broken)
    try:
        read = open_checkpoint(path).stored
    except CheckpointError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:  # PyTorch's zip format has checksums
        assert name != "zip" or all(torch.equal(read[n], few[0][n]) for n in read)


@settings(max_examples=120, deadline=None)
@given(content=st.binary(max_size=200))
def test_random_pickles(content: bytes) -> None:
    before = set(sys.modules)
    with suppress(Exception):
        unpickled(b"\x80\x04" + content)
    assert set(sys.modules) == before
