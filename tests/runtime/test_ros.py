"""The ROS 2 node's messages, with stand-ins for both layouts of vision_msgs; and the node itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Dict, List

import numpy as np
import pytest

from asymtrack_edge.errors import FrameError, MissingDependencyError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime import MultiTracker, State, Track
from asymtrack_edge.runtime.ros.messages import detections, image_to_bgr
from tests.runtime.simulated import ColourBackend, coloured_patches


def space(**fields: Any) -> Any:
    return SimpleNamespace(**fields)


HUMBLE = space(
    Detection2DArray=lambda: space(header=None, detections=[]),
    Detection2D=lambda: space(
        header=None,
        id="",
        results=[],
        bbox=space(center=space(position=space(x=0.0, y=0.0)), size_x=0.0, size_y=0.0),
    ),
    ObjectHypothesisWithPose=lambda: space(hypothesis=space(class_id="", score=0.0)),
)
FOXY = space(
    Detection2DArray=lambda: space(header=None, detections=[]),
    Detection2D=lambda: space(header=None, results=[], bbox=space(center=space(x=0.0, y=0.0), size_x=0.0, size_y=0.0)),
    ObjectHypothesisWithPose=lambda: space(id="", score=0.0),
)
TRACKS = {4: Track(Box(10, 20, 30, 40), 0.9, State.TRACKING), 7: Track(Box(1, 2, 3, 5), 0.1, State.LOST)}


def test_detections_since_humble() -> None:
    array = detections(TRACKS, "stamp", HUMBLE)
    first, second = array.detections
    assert array.header == first.header == "stamp"
    assert (first.id, second.id) == ("4", "7")
    assert (first.bbox.center.position.x, first.bbox.center.position.y) == (25.0, 40.0)
    assert (first.bbox.size_x, first.bbox.size_y) == (30.0, 40.0)
    assert first.results[0].hypothesis.class_id == "tracking" and first.results[0].hypothesis.score == 0.9
    assert second.results[0].hypothesis.class_id == "lost"


def test_detections_of_foxy() -> None:
    first, second = detections(TRACKS, "stamp", FOXY).detections
    assert (first.bbox.center.x, first.bbox.center.y) == (25.0, 40.0)
    assert (first.results[0].id, second.results[0].id) == ("tracking", "lost")


def image(encoding: str, pixels: np.ndarray, padding: int = 0) -> Any:
    rows = pixels.reshape(pixels.shape[0], -1)
    rows = np.pad(rows, ((0, 0), (0, padding)))
    height, width = pixels.shape[:2]
    data = rows.tobytes()
    return space(encoding=encoding, height=height, width=width, step=rows.shape[1], data=data, header="h")


def test_images() -> None:
    bgr = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
    alpha = np.full((6, 8, 1), 9, np.uint8)
    for padding in (0, 5):
        assert np.array_equal(image_to_bgr(image("bgr8", bgr, padding)), bgr)
        assert np.array_equal(image_to_bgr(image("rgb8", bgr[..., ::-1], padding)), bgr)
        assert np.array_equal(image_to_bgr(image("bgra8", np.concatenate((bgr, alpha), 2), padding)), bgr)
        assert np.array_equal(image_to_bgr(image("mono8", bgr[..., :1], padding))[..., 2], bgr[..., 0])
    with pytest.raises(FrameError, match="16UC1"):
        image_to_bgr(image("16UC1", bgr))
    short = image("bgr8", bgr)
    short.data = short.data[:-1]
    with pytest.raises(FrameError, match="143 bytes"):
        image_to_bgr(short)


class FakeNode:
    """As much of ``rclpy.node.Node`` as the node uses."""

    parameters: ClassVar[Dict[str, Any]] = {}

    def __init__(self, name: str) -> None:
        self.callbacks: Dict[str, Any] = {}
        self.published: List[Any] = []
        self.lines: List[str] = []

    def declare_parameter(self, name: str, default: Any) -> Any:
        return space(value=self.parameters.get(name, default))

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Any:
        return space(publish=self.published.append)

    def create_subscription(self, kind: Any, topic: str, callback: Any, quality: Any) -> None:
        self.callbacks[topic] = callback

    def get_logger(self) -> Any:
        def log(line: str, **_: Any) -> None:
            self.lines.append(line)

        return space(info=log, warning=log, error=log)


def test_node_without_ros_says_what_is_missing() -> None:
    sys.modules.pop("asymtrack_edge.runtime.ros.node", None)
    if importlib.util.find_spec("rclpy") is not None:
        pytest.skip("ROS is here")
    with pytest.raises(MissingDependencyError, match=r"rclpy: source /opt/ros"):
        importlib.import_module("asymtrack_edge.runtime.ros.node")


def test_node_follows_what_its_topics_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str, **content: Any) -> None:
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)

    kinds = {name: object for name in ("Image", "RegionOfInterest", "Empty")}
    messages = {"sensor_msgs": kinds, "std_msgs": kinds, "vision_msgs": vars(HUMBLE)}
    for package, content in messages.items():
        module(package, msg=space(**content))
        module(f"{package}.msg", **content)
    policy = space(KEEP_LAST=1, BEST_EFFORT=2)
    module("rclpy")
    module("rclpy.executors", ExternalShutdownException=type("ExternalShutdownException", (Exception,), {}))
    module("rclpy.node", Node=FakeNode)
    module("rclpy.qos", HistoryPolicy=policy, ReliabilityPolicy=policy, QoSProfile=lambda **_: None)
    monkeypatch.delitem(sys.modules, "asymtrack_edge.runtime.ros.node", raising=False)
    ros_node = importlib.import_module("asymtrack_edge.runtime.ros.node")
    opened: List[Any] = []

    def load(*arguments: Any, recover: bool) -> MultiTracker:
        opened.append((*arguments, recover))
        return MultiTracker(ColourBackend())

    monkeypatch.setattr(ros_node.MultiTracker, "load", load)
    frames = list(coloured_patches(4, 2))
    monkeypatch.setattr(FakeNode, "parameters", {"boxes": [",".join(map(str, frames[0][1][0]))]})
    node = ros_node.TrackerNode()
    receive = node.callbacks["image"]
    receive(image("bgr8", frames[0][0]))
    x, y, w, h = frames[1][1][1]
    node.callbacks["~/target"](space(x_offset=x, y_offset=y, width=w, height=h))
    receive(image("bgr8", frames[1][0]))
    receive(image("bgr8", frames[2][0]))
    receive(image("16UC1", frames[2][0]))
    node.callbacks["~/clear"](None)
    receive(image("bgr8", frames[3][0]))
    counts = [len(array.detections) for array in node.published]
    assert counts == [0, 1, 2, 0]
    for detection, truth in zip(node.published[2].detections, frames[2][1]):
        centre = detection.bbox.center.position
        assert (centre.x, centre.y) == pytest.approx(truth.centre, abs=0.1)
    assert any("16UC1" in line for line in node.lines)
    monkeypatch.setattr(FakeNode, "parameters", {"recover": False})
    ros_node.TrackerNode()
    assert opened == [("T", "auto", "auto", None, True), ("T", "auto", "auto", None, False)]
    sys.modules.pop("asymtrack_edge.runtime.ros.node")
