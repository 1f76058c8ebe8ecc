"""The ROS 2 node with stand-ins for ROS and for both layouts of vision_msgs."""

from __future__ import annotations

import sys
from itertools import product
from types import SimpleNamespace
from typing import Any
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
    Detection2D=lambda: space(is_tracking=False, tracking_id="", bbox=space(center=space())),
    ObjectHypothesisWithPose=lambda: space(id="", score=0.0),
)


@pytest.mark.parametrize("state", State)
def test_detections_in_every_layout(state: State) -> None:
    new, old = (ros_node.detection(4, Track(Box(10, 20, 30, 40), 0.9, state), "stamp", m) for m in (HUMBLE, FOXY))
    for found in (new, old):
        assert found.header == "stamp" and (found.bbox.size_x, found.bbox.size_y) == (30.0, 40.0)
    assert old.is_tracking and new.id == old.tracking_id == "4"
    assert vars(new.bbox.center.position) == vars(old.bbox.center) == {"x": 25.0, "y": 40.0}
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
    pairs = (("yuyv", [0, 1]), ("yuv422_yuy2", [0, 1]), ("uyvy", [1, 0]), ("yuv422", [1, 0]))
    first, *others = (ros_node.image_to_bgr(image(name, bgr[..., order], padding)) for name, order in pairs)
    assert all(np.array_equal(first, other) for other in others)
    short = image("bgr8", bgr, padding)
    short.data = short.data[:-1]
    for wrong, words in ((image("16UC1", bgr), "16UC1"), (short, "bytes")):
        with pytest.raises(FrameError, match=words):
            ros_node.image_to_bgr(wrong)


def test_the_node_follows_the_targets_of_its_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MultiTracker(ColourBackend())
    monkeypatch.setattr(tracker, "add", Mock(side_effect=[ServerError("away"), *[DEFAULT] * 9], wraps=tracker.add))
    load = Mock(return_value=tracker)
    monkeypatch.setattr(MultiTracker, "load", load)
    frames = list(coloured_patches(4, 2))
    given: Any = {"recover": False}
    node = Mock(spec=["create_publisher", "create_subscription", "get_logger"])  # of what a Node has, we use this,
    node.declare_parameter = lambda name, default, _: space(value=given.get(name, default))  # and this
    kinds = space(Image=object, RegionOfInterest=object, UInt32=object, Empty=object)
    for given["boxes"] in (None, [as_argument(frames[0][1][0])]):  # for ROS, an empty list has no value
        ros_node.TrackerNode(node, None, None, kinds, kinds, HUMBLE)
    callbacks = {call.args[1]: call.args[2] for call in node.create_subscription.call_args_list}
    receive = callbacks["image"]
    receive(image("bgr8", frames[0][0]))
    x, y, w, h = frames[1][1][1]
    callbacks["~/target"](space(x_offset=x, y_offset=y, width=w, height=h))
    receive(image("bgr8", frames[1][0]))
    receive(image("bgr8", frames[2][0]))
    for number in (1, 7):  # there is no target 7
        callbacks["~/remove"](space(data=number))
    receive(image("bgr8", frames[2][0]))
    receive(image("16UC1", frames[2][0]))
    callbacks["~/target"](space(x_offset=x, y_offset=y, width=w, height=h))
    callbacks["~/clear"](None)  # also clears the target that is still waiting
    receive(image("bgr8", frames[3][0]))
    receive(image("bgr8", frames[3][0]))
    published = [call.args[0] for call in node.create_publisher.return_value.publish.call_args_list]
    assert [len(array.detections) for array in published] == [0, 0, 2, 1, 0, 0]
    for found, truth in zip(published[2].detections, frames[2][1]):
        centre = found.bbox.center.position
        assert (centre.x, centre.y) == pytest.approx(truth.centre, abs=0.1)
    assert "16UC1" in node.get_logger.return_value.warning.call_args.args[0]
    load.assert_called_with(model="T", backend="auto", device="auto", threads=None, precision=None, recover=False)


def test_without_ros_one_line_says_what_is_missing(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    assert ros_node.main() == 2
    assert "rclpy: source /opt/ros" in capsys.readouterr().err


def test_how_the_node_ends(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """ROS raises ``RCLError``, a ``RuntimeError``, for bad arguments, and when a callback publishes after SIGTERM."""
    ros = Mock(**{"spin.side_effect": RuntimeError("publisher's context is invalid"), "ok.side_effect": [False, True]})
    ros.init.side_effect = [RuntimeError("Couldn't parse remap rule: '-r image'"), None, None]
    ros.ParameterException = ros.ExternalShutdownException = KeyError
    parts = ("", ".msg", ".exceptions", ".executors", ".qos")
    for package, part in product(("rclpy", "rcl_interfaces", "std_msgs", "sensor_msgs", "vision_msgs"), parts):
        monkeypatch.setitem(sys.modules, package + part, ros)
    monkeypatch.setattr(ros_node, "TrackerNode", Mock())
    assert ros_node.main([]) == 2 and "ROS cannot use the arguments: Couldn't parse" in capsys.readouterr().err
    assert ros_node.main([]) == 0
    ros.ParameterDescriptor.assert_called_with(read_only=True)
    with pytest.raises(RuntimeError):
        ros_node.main([])
