"""jetson:// sources and outputs, with a stand-in for jetson-utils that uses the imitated GPU's memory."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, List
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from asymtrack_edge.errors import AsymTrackError, SourceError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime import Tracker, jetson, open_source
from asymtrack_edge.runtime.jetson import JetsonFrame, JetsonWriter
from asymtrack_edge.runtime.outputs import Result
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.sources.reader import Captured, Reader
from asymtrack_edge.runtime.tracker import MultiTracker, State, Track
from tests.runtime.fakes.imitation import BOX, FRAMES, Imitated, boxes


class Image:
    """A ``cudaImage``."""

    def __init__(self, pixels: np.ndarray, layout: str) -> None:
        self.pixels, self.format, self.shape = pixels, layout, pixels.shape
        self.height, self.width = pixels.shape[:2]

    @property
    def __cuda_array_interface__(self) -> Any:
        return {"shape": self.shape, "typestr": "<u1", "data": (self.pixels.ctypes.data, False), "version": 3}


class Utils(ModuleType):
    """jetson-utils. Its sources give ``FRAMES`` four times, in a buffer that they reuse, and then fail."""

    def __init__(self) -> None:
        super().__init__("jetson_utils")
        self.opened: List[Any] = []
        self.rendered: List[np.ndarray] = []
        self.close = Mock()
        utils = self

        class videoSource:
            GetFrameRate, Close = Mock(return_value=30), self.close

            def __init__(self, uri: str, argv: List[str]) -> None:
                if "nobody" in uri:
                    raise Exception("failed to create videoSource device")
                utils.opened.append((uri, argv))
                self.frames = iter(FRAMES * 4)
                self.buffer = Image(np.empty_like(FRAMES[0]), "rgb8")

            def Capture(self, timeout: int) -> Image:
                self.buffer.pixels[...] = next(self.frames)[..., ::-1]
                return self.buffer

        class videoOutput:
            Close = self.close

            def __init__(self, uri: str, argv: List[str]) -> None:
                assert argv == ["--headless"]
                self.GetWidth = lambda: 0 if "none" in uri else 320  # what cannot be opened raises nothing
                utils.opened.append(uri)

            def Render(self, image: Image) -> None:
                if "full" in utils.opened[-1]:
                    raise Exception("videoOutput failed to render image")
                utils.rendered.append(image.pixels.copy())

        self.videoSource, self.videoOutput = videoSource, videoOutput

        self.cudaAllocMapped = lambda width, height, format: Image(np.zeros((height, width, 3), np.uint8), format)
        self.cudaMemcpy = lambda target, source: np.copyto(target.pixels, source.pixels)
        self.cudaToNumpy = lambda image: image.pixels
        self.cudaDeviceSynchronize = lambda: None

    def cudaDrawLine(self, image: Image, start: Any, end: Any, colour: Any, width: float) -> None:
        cv2.line(image.pixels, [round(v) for v in start], [round(v) for v in end], colour[:3], round(width))


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Utils:
    monkeypatch.setitem(sys.modules, "jetson_utils", Utils())
    return sys.modules["jetson_utils"]


def test_a_file_is_tracked_without_a_copy_to_the_host(
    imitated: Imitated, utils: Utils, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = imitated.open()
    wanted = boxes(backend)
    monkeypatch.setattr(JetsonFrame, "copy", lambda self: pytest.fail("the frame was copied to the host"))
    (tmp_path / "clip.mp4").write_bytes(b"video")
    tracker = Tracker(backend)
    with open_source(f"jetson://file://{tmp_path}/clip.mp4") as source:
        assert source.fps == 30 and not source.live
        frames = list(islice(source, len(FRAMES)))  # read ahead: frames must outlive jetson-utils' buffers
        tracker.init(frames[0], BOX)
        np.testing.assert_array_equal([tracker.update(frame).box for frame in frames[1:]], wanted)
    utils.close.assert_called_once_with()


def test_targets_are_marked_in_the_frame_that_was_shown(imitated: Imitated, utils: Utils, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"video")
    backend = imitated.open()
    wanted, run = boxes(backend)[0], Run(MultiTracker(backend), Reader(open_source(f"jetson://{tmp_path}/clip.mp4")))
    np.testing.assert_array_equal(run.first_frame(), FRAMES[0])
    run.latest.frame.image.image.pixels[:] = 0  # the camera reuses its memory
    run.start([BOX])
    np.testing.assert_array_equal(run.tracker.update(FRAMES[1])[0].box, wanted)
    run.close()
    run.tracker.close()


def test_cameras_and_streams_are_live(utils: Utils) -> None:
    source: Any = open_source("jetson://csi://0?width=1280&height=720&fps=60")
    assert utils.opened == [("csi://0", ["--input-width=1280", "--input-height=720", "--input-rate=60"])]
    assert source.live and source.fps == 30
    frames = list(source)
    np.testing.assert_array_equal(frames[-1].copy(), FRAMES[-1])
    np.testing.assert_array_equal(np.asarray(frames[-1]), FRAMES[-1])
    assert len({id(frame.image) for frame in frames}) == jetson.KEPT < len(frames), "memory must be reused"
    source.reconnect()
    assert source.read() is not None
    source.close()
    open_source("jetson://rtsp://camera/live?channel=1")
    assert utils.opened[-1] == ("rtsp://camera/live?channel=1", []), "the option is for the server"
    assert "secret" not in open_source("jetson://rtsp://user:secret@camera/live").name
    assert utils.opened[-1] == ("rtsp://user:secret@camera/live", [])


def test_errors_are_explained(utils: Utils, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("missing.mp4", "there is no file missing"),
        ("csi://nobody", "cannot open csi://nobody: failed to create"),
        ("csi://0?zoom=2", "'zoom'"),
    ):
        with pytest.raises(AsymTrackError, match=message):
            open_source(f"jetson://{name}")
    monkeypatch.setitem(sys.modules, "jetson_utils", None)
    with pytest.raises(SourceError, match="needs jetson-utils"):
        open_source("jetson://csi://0")


def test_boxes_are_drawn_on_the_gpu(utils: Utils) -> None:
    writer = JetsonWriter(Path("webrtc://@:8554/out"))
    assert utils.opened == ["webrtc://@:8554/out"]
    frame = JetsonFrame(Image(np.zeros((60, 80, 3), np.uint8), "rgb8"))
    result = Result(Captured(frame, 0, 0.0, 0.0), {0: Track(Box(10, 10, 40, 20), 0.9, State.TRACKING)}, 0.0)
    writer.write(result)
    (drawn,) = utils.rendered
    assert tuple(drawn[10, 30]) == tuple(drawn[20, 50]) == (230, 159, 0), "the box must be orange, in RGB"
    assert not drawn[20, 30].any() and not np.asarray(frame).any(), "the frame itself must not change"
    writer.close()
    utils.close.assert_called_once_with()
    for name, reason in (("full.mp4", "videoOutput failed"), ("none.mp4", "its messages above")):
        with pytest.raises(OSError, match=f"cannot write it: {reason}"):
            JetsonWriter(Path(name)).write(result)
