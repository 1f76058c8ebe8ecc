"""The TraX entry point: driven by a scripted server, and by a real client where vot-trax is installed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from asymtrack_edge.benchmarks.accuracy import vot
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from tests.datasets.miniature import write_frames

STILL = TrackerSpec("python:fake_trackers:Still")


class Region:
    """Stands for trax.Rectangle and trax.Polygon."""

    RECTANGLE = "rectangle"

    def __init__(self, kind, values):
        self.type = kind
        self.values = values

    def bounds(self):
        return self.values

    def size(self):
        return len(self.values)

    def get(self, index):
        return self.values[index]


@pytest.fixture
def trax(monkeypatch):
    """A module ``trax`` whose server takes its requests from ``script`` and records the answers."""
    module = SimpleNamespace(
        TraxStatus=SimpleNamespace(INITIALIZE="initialize", FRAME="frame", QUIT="quit"),
        Region=Region,
        Image=SimpleNamespace(PATH="path"),
        Rectangle=SimpleNamespace(create=lambda *box: box),
        TraxException=type("TraxException", (Exception,), {}),
        ended=[],
        script=[],
        answers=[],
        setup={},
    )

    class Server:
        def __init__(self, regions, images, **setup):
            module.setup.update(setup, regions=regions, images=images)

        def wait(self):
            if not module.script:
                raise module.TraxException("pipe closed")
            return module.script.pop(0)

        def quit(self, reason=None):
            module.ended.append(reason)

        def status(self, objects):
            module.answers.append(objects)

    module.Server = Server
    monkeypatch.setitem(sys.modules, "trax", module)
    return module


def request(kind, path=None, *regions):
    image = {"color": SimpleNamespace(path=lambda: str(path))}
    return SimpleNamespace(type=kind, image=image, objects=[(r, {}) for r in regions])


def test_objects_are_followed_from_the_frame_they_appear_in(trax, tmp_path):
    write_frames(tmp_path, 1)
    frame = tmp_path / "00000001.jpg"
    polygon = Region("polygon", [(3, 2), (9, 4), (7, 8), (1, 6)])
    trax.script += [
        request("initialize", frame, Region("rectangle", (4, 5, 10, 8))),
        request("frame", frame),
        request("frame", frame, polygon),
        request("frame", frame),
        request("initialize", frame, Region("rectangle", (1, 1, 5, 5))),
        request("quit"),
    ]
    vot.serve(STILL)
    boxes = [[box for box, _ in answer] for answer in trax.answers]
    assert boxes == [
        [(4, 5, 10, 8)],
        [(5, 5, 10, 8)],
        [(6, 5, 10, 8), (1, 2, 8, 6)],
        [(7, 5, 10, 8), (2, 2, 8, 6)],
        [(1, 1, 5, 5)],
    ]
    assert trax.answers[1][0][1] == {"confidence": "1.0000"}
    assert trax.ended == [None]
    assert trax.setup["regions"] == ["rectangle"] and trax.setup["multiobject"] is True


def test_mistakes_are_one_line_and_the_client_is_told(trax, tmp_path, monkeypatch, capsys):
    def serve(*arguments):
        assert vot.main(list(arguments)) == 2
        return capsys.readouterr().err

    write_frames(tmp_path, 1)
    trax.script.append(request("initialize", tmp_path / "00000001.jpg", Region("mask", None)))
    assert "a rectangle or polygon is needed" in serve("--tracker", STILL.name)
    trax.script.append(request("initialize", tmp_path / "absent.jpg"))
    assert "cannot read the frame" in serve("--tracker", STILL.name)
    assert "needed" in trax.ended[0] and "absent.jpg" in trax.ended[1]
    assert serve("--tracker", STILL.name) == "error: the connection to the TraX client broke: pipe closed\n"
    assert "no/such/model" in serve("--model", "no/such/model")
    monkeypatch.setitem(sys.modules, "trax", None)
    assert "pip install 'asymtrack-edge[vot]'" in serve("--tracker", "opencv:MIL")


def test_a_real_client_over_pipes(tmp_path):
    trax = pytest.importorskip("trax", reason="vot-trax, of the extra 'vot', is not installed")
    from trax.client import Client

    write_frames(tmp_path, 3)
    images = [{"color": trax.FileImage.create(str(path))} for path in sorted(tmp_path.glob("*.jpg"))]
    command = [sys.executable, "-m", "asymtrack_edge.benchmarks.accuracy.vot", "--tracker", "opencv:MIL"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        pipes = (process.stdin.fileno(), process.stdout.fileno())
        client = Client(stream=pipes, timeout=30, log=lambda text: None)
        assert client.tracker_name == "opencv-mil"
        started, _ = client.initialize(images[0], [(trax.Rectangle.create(4, 5, 10, 8), {})], {})
        assert started[0][0].bounds() == (4, 5, 10, 8)
        for image in images[1:]:
            ((region, properties),), seconds = client.frame(image, {}, [])
            assert min(region.bounds()[2:]) > 0 and "confidence" in properties and seconds > 0
        client.quit()
        assert process.wait(timeout=20) == 0
