"""The TraX entry point, driven by a scripted server."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from asymtrack_edge.benchmarks.accuracy import vot
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from tests.datasets.miniature import write_frames

STILL = TrackerSpec("python:tests.benchmarks.accuracy.fake_trackers:Still")


@pytest.fixture
def trax(monkeypatch):
    """A module ``trax`` whose server receives the requests in ``script``; after them the connection is lost."""
    module = MagicMock()
    module.TraxException = type("TraxException", (Exception,), {})
    module.Rectangle.create = lambda *box: box
    module.script = []
    lost = iter(lambda: module.TraxException("pipe closed"), None)
    module.Server.return_value.wait.side_effect = (module.script.pop(0) if module.script else e for e in lost)
    monkeypatch.setitem(sys.modules, "trax", module)
    return module


def request(kind, path=None, *boxes):
    image = {"color": SimpleNamespace(path=lambda: str(path))}
    objects = [(SimpleNamespace(type="rectangle" if b else "special", bounds=lambda b=b: b), {}) for b in boxes]
    return SimpleNamespace(type=kind, image=image, objects=objects)


def test_objects_are_followed_from_the_frame_they_appear_in(trax, tmp_path):
    write_frames(tmp_path, 1)
    frame = tmp_path / "00000001.jpg"
    initialize, following, quits = trax.TraxStatus.INITIALIZE, trax.TraxStatus.FRAME, trax.TraxStatus.QUIT
    trax.script += [
        request(initialize, frame, (4, 5, 10, 8)),
        request(following, frame),
        request(following, frame, (1, 2, 8, 6)),
        request(following, frame),
        request(initialize, frame, (1, 1, 5, 5)),
        request(quits),
    ]
    vot.serve(STILL)
    answers = [call.args[0] for call in trax.Server.return_value.status.call_args_list]
    assert [[box for box, _ in answer] for answer in answers] == [
        [(4, 5, 10, 8)],
        [(5, 5, 10, 8)],
        [(6, 5, 10, 8), (1, 2, 8, 6)],
        [(7, 5, 10, 8), (2, 2, 8, 6)],
        [(1, 1, 5, 5)],
    ]
    assert answers[1][0][1] == {"confidence": "1.0000"}
    assert trax.Server.call_args.kwargs["tracker_name"] == STILL.label and trax.Server.call_args.kwargs["multiobject"]
    trax.Server.return_value.quit.assert_called_once_with(None)


def test_mistakes_are_one_line_and_the_client_is_told(trax, tmp_path, monkeypatch, capsys):
    def serve(*arguments):
        assert vot.main(list(arguments)) == 2
        return capsys.readouterr().err

    write_frames(tmp_path, 1)
    trax.script.append(request(trax.TraxStatus.INITIALIZE, tmp_path / "00000001.jpg", None))
    assert "a special: a rectangle is needed" in serve("--tracker", STILL.name)
    assert "needed" in trax.Server.return_value.quit.call_args.args[0]
    trax.script.append(request(trax.TraxStatus.INITIALIZE, tmp_path / "absent.jpg"))
    assert "absent.jpg does not exist" in serve("--tracker", STILL.name)
    assert serve("--tracker", STILL.name) == "error: the connection to the TraX client broke: pipe closed\n"
    assert "no/such/model" in serve("--model", "no/such/model")
    monkeypatch.setitem(sys.modules, "trax", None)
    assert "pip install 'asymtrack-edge[vot]'" in serve("--tracker", "opencv:MIL")
