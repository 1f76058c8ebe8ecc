"""The ROS 2 node with stand-ins for ROS and for both layouts of vision_msgs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, List
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest

from asymtrack_edge.errors import FrameError, ServerError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime import MultiTracker, State, Track
from asymtrack_edge.runtime.ros import node as ros_node
from tests.runtime.simulated import ColourBackend, as_argument, coloured_patches

space: Any = SimpleNamespace
HUMBLE = space(
    Detection2DArray=lambda: space(header=None, detections=[]),
    Detection2D=lambda: space(id="", bbox=space(center=space(position=space()))),
    ObjectHypothesisWithPose=lambda: space(hypothesis=space(class_id="", score=0.0)),
)
FOXY = space(
    Detection2DArray=HUMBLE.Detection2DArray,
    Detection2D=lambda: space(bbox=space(center=space())),
    ObjectHypothesisWithPose=lambda: space(id="", score=0.0),
)


@pytest.mark.parametrize("state", State)
def test_detections_in_every_layout(state: State) -> None:
    new, old = (ros_node.detection(4, Track(Box(10, 20, 30, 40), 0.9, state), "stamp", m) for m in (HUMBLE, FOXY))
    for found in (new, old):
        assert found.header == "stamp" and (found.bbox.size_x, found.bbox.size_y) == (30.0, 40.0)
    assert new.id == "4" and vars(new.bbox.center.position) == vars(old.bbox.center) == {"x": 25.0, "y": 40.0}
    assert vars(new.results[0].hypothesis) == {"class_id": state.value, "score": 0.9}
    assert vars(old.results[0]) == {"id": state.value, "score": 0.9}


def image(encoding: str, pixels: np.ndarray, padding: int = 0) -> Any:
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)))
    return space(encoding=encoding, height=height, width=width, step=rows.shape[1], data=rows.tobytes(), header="h")


@pytest.mark.parametrize("padding", [0, 5])
def test_images(padding: int) -> None:
    bgr = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
    alpha = np.full((6, 8, 1), 9, np.uint8)
    for encoding, pixels in (("bgr8", bgr), ("rgb8", bgr[..., ::-1]), ("bgra8", np.concatenate((bgr, alpha), 2))):
        assert np.array_equal(ros_node.image_to_bgr(image(encoding, pixels, padding)), bgr)
    assert np.array_equal(ros_node.image_to_bgr(image("mono8", bgr[..., :1], padding))[..., 2], bgr[..., 0])
    with pytest.raises(FrameError, match="16UC1"):
        ros_node.image_to_bgr(image("16UC1", bgr))
    short = image("bgr8", bgr, padding)
    short.data = short.data[:-1]
    with pytest.raises(FrameError, match="bytes"):
        ros_node.image_to_bgr(short)


class FakeNode:
    """The part of ``rclpy.node.Node`` that is used."""

    def __init__(self, **parameters: Any) -> None:
        self.parameters, self.callbacks = parameters, {}
        self.published, self.lines = [], []

    def declare_parameter(self, name: str, default: Any) -> Any:
        return space(value=self.parameters.get(name, default))

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
        return space(publish=self.published.append)

    def create_subscription(self, kind: Any, topic: str, callback: Any, quality: Any) -> None:
        self.callbacks[topic] = callback

    def get_logger(self) -> Any:
        return Mock(warning=lambda line, **_: self.lines.append(line))


def test_the_node_follows_the_targets_of_its_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: List[Any] = []

    def load(**arguments: Any) -> MultiTracker:
        opened.append(arguments)
        tracker = MultiTracker(ColourBackend())
        monkeypatch.setattr(tracker, "add", Mock(side_effect=[ServerError("away"), *[DEFAULT] * 9], wraps=tracker.add))
        return tracker

    monkeypatch.setattr(MultiTracker, "load", load)
    frames = list(coloured_patches(4, 2))
    node = FakeNode(boxes=[as_argument(frames[0][1][0])], recover=False)
    kinds = space(Image=object, RegionOfInterest=object, UInt32=object, Empty=object)
    ros_node.TrackerNode(node, None, kinds, kinds, HUMBLE)
    receive = node.callbacks["image"]
    receive(image("bgr8", frames[0][0]))
    x, y, w, h = frames[1][1][1]
    node.callbacks["~/target"](space(x_offset=x, y_offset=y, width=w, height=h))
    receive(image("bgr8", frames[1][0]))
    receive(image("bgr8", frames[2][0]))
    for number in (1, 7):  # there is no target 7
        node.callbacks["~/remove"](space(data=number))
    receive(image("bgr8", frames[2][0]))
    receive(image("16UC1", frames[2][0]))
    node.callbacks["~/target"](space(x_offset=x, y_offset=y, width=w, height=h))
    node.callbacks["~/clear"](None)  # also clears the target that is still waiting
    receive(image("bgr8", frames[3][0]))
    receive(image("bgr8", frames[3][0]))
    assert [len(array.detections) for array in node.published] == [0, 0, 2, 1, 0, 0]
    for found, truth in zip(node.published[2].detections, frames[2][1]):
        centre = found.bbox.center.position
        assert (centre.x, centre.y) == pytest.approx(truth.centre, abs=0.1)
    assert any("16UC1" in line for line in node.lines)
    words = {"model": "T", "backend": "auto", "device": "auto"}
    assert opened == [{**words, "threads": None, "precision": None, "recover": False}]


def test_without_ros_one_line_says_what_is_missing(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    assert ros_node.main() == 2
    assert "rclpy: source /opt/ros" in capsys.readouterr().err
