"""Files that are malicious, damaged or not checkpoints: each is refused in one line, and nothing is executed."""

from __future__ import annotations

import copyreg
import os
import pickle
import struct
import tracemalloc
import types
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from asymtrack_edge import _torch_files
from asymtrack_edge.checkpoints import open_checkpoint
from asymtrack_edge.errors import CheckpointError
from tests.helpers import TINY, Calls, filled_model, refused


@pytest.fixture(scope="module")
def tiny() -> Dict[str, Tensor]:
    return filled_model(TINY).state_dict()


def bad(path: Path) -> Calls:
    return Calls(os.system, f"touch {path}")


ATTACKS: Dict[str, Callable[[Path], Any]] = {
    "system": bad,
    "getattr": lambda p: Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"touch {p}"),
    "as a key": lambda p: {bad(p): 1},
    "rebuild": lambda p: Calls(torch._utils._rebuild_parameter, bad(p), False, None),
    "state": lambda p: Calls(types.SimpleNamespace, state={"f": bad(p)}),
    "factory": lambda p: defaultdict(eval, {"a": bad(p)}),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_calls_in_a_checkpoint_are_not_executed(attack: Any, tiny: Dict[str, Tensor], tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "w.pt"
    content = {"settings": attack(marker), "net": tiny, "after": attack(marker)}
    for new, protocol in ((True, 2), (True, 4), (False, 2), (False, 4)):
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        weights = open_checkpoint(path).tensors(TINY)
        assert all(torch.equal(weights[name], tensor) for name, tensor in tiny.items())
        assert not marker.exists()
    if attack is bad:  # plain pickle does execute it
        pickle.loads(pickle.dumps(bad(marker), 2))
        assert marker.exists()


def zipped(path: Path, content: bytes, *storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for i, storage in enumerate(storages):
            archive.writestr(f"archive/data/{i}", storage)
    return path


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
        b"\x82\x01TEXT\x85R.",
    ],
    ids=lambda form: ascii(form)[-24:],
)
def test_opcodes_that_could_call_are_refused(form: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if a module had registered a pickle extension.
    monkeypatch.setitem(copyreg._extension_cache, 1, os.system)
    command = f"touch {tmp_path}/x".encode()
    form = form.replace(b"TEXT", b"X" + struct.pack("<i", len(command)) + command).replace(b"COMMAND", command)
    refused(zipped(tmp_path / "w.pt", form))
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_a_file_cannot_change_objects_of_this_process(tmp_path: Path) -> None:
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cx\ny\n", b"ccollections\nOrderedDict\n"):
        state = b"N}X\x0c\0\0\0__defaults__)\x85sX\x06\0\0\0extendK\x01s\x86b."
        refused(zipped(tmp_path / "w.pt", b"\x80\x02" + name + state))
    assert _torch_files._tensor.__defaults__ is None and callable(_torch_files.Foreign.extend)


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
SET = b"(h\x0ah\x0b\x91q\x0c(h\x0ah\x0bK\x01\x91q\x0b00h\x0cq\x0a0"
NUMBERS = b"".join(b"\x8a\x0a%bN" % (k * (2**61 - 1)).to_bytes(10, "little") for k in range(100_000))
NAMES = b"".join(b"X\x10\0\0\0bottleneck.%05dh\x01" % k for k in range(1000))
MALFORMED = {
    "many dimensions": b"ctorch._utils\n_rebuild_tensor_v2\n(%bK\0(M\xff\xff%bt2tR." % (STORAGE, b"2" * 500_000),
    "sets of one another": b"}(" + 2 * (b"(K\x01\x91q\x0a(K\x02\x91q\x0b00" + 40 * SET + b"h\x0aN") + b"u.",
    "numbers of one hash": b"}(%bu." % NUMBERS,
    "long names": b"}X\x40\x0d\x03\0%b}(%bq\x010%bus." % (b"a" * 200_000, STORAGE, NAMES),
    "long string": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "long array": b"\x80\x04\x96" + struct.pack("<Q", 1 << 31) + b"abc.",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "memo index": b"\x80\x02]r\xff\xff\xff\x03.",
    "nested": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "tuples of one another": b"\x80\x02}K\x01" + 40 * b"2\x86" + b"K\x01s.",
    "call of a number": b"\x80\x02K\x01)R.",
    "itself": b"\x80\x02}q\x00" + b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + b"h\x00s" for i in range(26)) + b".",
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_pickles_take_little_memory(content: bytes, tmp_path: Path) -> None:
    tracemalloc.start()
    refused(zipped(tmp_path / "w.pt", content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


@pytest.mark.parametrize(
    ("record", "content", "words"),
    [
        ("zeros", bytes(50_000_000), "compressed or damaged"),
        ("zeros", bytes(50), "compressed or damaged"),  # smaller than the file, as such a record may claim to be
        ("constants.pkl", b"", "TorchScript"),
        ("data.pkl", b"\x80\x02" + b"]0" * 1000 + b"N.", "unreasonable size"),
        ("data/0", None, "storage '0' is missing or too short"),
        ("data/0", bytes(3999), "storage '0' is missing or too short"),
    ],
)
def test_archives_that_are_not_checkpoints_are_refused(
    record: str, content: Optional[bytes], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is a zip bomb."""
    monkeypatch.setattr(_torch_files, "MAX_PICKLE", 2000)
    path = tmp_path / "w.pt"
    torch.save({"net": {"bottleneck.a": torch.rand(1000)}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if record == "zeros" else zipfile.ZIP_STORED) as archive:
        for name, data in {**records, record: content}.items():
            if data is not None:
                archive.writestr(f"w/{name}", data)
    assert words in refused(path)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (1, (32,), (1,)),
        (-1, (32,), (1,)),
        (0, (32,), (2,)),
        (31, (32,), (-1,)),
        (0, (33,), (0,)),
        (1 << 62, (32,), (1 << 62,)),
        (0, (1 << 40, 1 << 40), (1, 1)),
        (0, (32,), (1, 1)),
        (0, ((1,),), (1,)),
        (0, None, (1,)),
    ],
)
def test_views_outside_their_storage_are_refused(offset: int, shape: Any, stride: Any, tmp_path: Path) -> None:
    storage, path = torch.ones(32)._typed_storage(), tmp_path / "w.pt"
    torch.save({"bottleneck.a": Calls(torch._utils._rebuild_tensor_v2, storage, 0, (32,), (1,), False, {})}, path)
    assert torch.equal(open_checkpoint(path).stored["bottleneck.a"], torch.ones(32))
    torch.save(
        {"bottleneck.a": Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})}, path
    )
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello", "is not a checkpoint"),
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
    ],
    ids=lambda value: ascii(value)[:24] if isinstance(value, bytes) else None,
)
def test_other_kinds_of_files_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth.tar"
    path.write_bytes(content)
    assert words in refused(path)


def test_paths_that_are_not_files_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "absent.pth")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Dict[str, Tensor], Dict[str, bytes]]:
    """Three tensors, and a file of them in each format."""
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
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_tensors_or_one_error(name: str, data: st.DataObject, few: Any, tmp_path: Path) -> None:
    tensors, whole = few[0], few[1][name]
    path = tmp_path / name
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    refused(path)
    broken = bytearray(whole)
    changes = st.tuples(st.integers(0, len(broken) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(changes, max_size=4)):
        broken[position] = value
    path.write_bytes(broken)
    try:
        read = open_checkpoint(path).stored
    except CheckpointError as error:
        assert broken != whole and "\n" not in str(error) and str(path) in str(error)
    else:  # PyTorch's zip format has checksums
        assert (name != "zip" and broken != whole) or all(torch.equal(read[n], tensors[n]) for n in read)
