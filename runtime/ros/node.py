"""A ROS 2 node that follows targets in an image topic.

``python3 -m asymtrack_edge.runtime.ros.node --ros-args -r image:=/camera/image_raw``

Topics: ``image`` (``sensor_msgs/Image``) in; ``~/detections`` (``vision_msgs/Detection2DArray``) out,
with the image's stamp; ``~/target`` (``sensor_msgs/RegionOfInterest``) marks a target in the next
image; ``~/remove`` (``std_msgs/UInt32``) removes the target with that id, and ``~/clear``
(``std_msgs/Empty``) removes all.

Parameters, all read-only: ``model``, ``backend``, ``device``, ``threads`` (0: one per core that this process may
use), ``precision`` (``""`` for the model's own), ``recover`` (search for lost targets; true), and ``boxes``, a list
of ``"x,y,w,h"`` to follow from the first image on.

ROS is imported only when the node starts, and message fields are inspected rather than assumed. So this
module can be tested without ROS, and works with the layouts of ``vision_msgs`` from Foxy to today.
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from typing import Any, List, Optional, Sequence

import cv2
import numpy as np

from asymtrack_edge.cli import box_argument
from asymtrack_edge.errors import AsymTrackError, FrameError, ServerError, UsageError
from asymtrack_edge.runtime.tracker import MultiTracker, Track

#: By image encoding: number of channels, and OpenCV's conversion to BGR (None: it is BGR already).
_ENCODINGS = {
    "bgr8": (3, None),
    "8UC3": (3, None),
    "rgb8": (3, cv2.COLOR_RGB2BGR),
    "bgra8": (4, cv2.COLOR_BGRA2BGR),
    "rgba8": (4, cv2.COLOR_RGBA2BGR),
    "mono8": (1, cv2.COLOR_GRAY2BGR),
    "8UC1": (1, cv2.COLOR_GRAY2BGR),
    # Each has two names; the first is the newer one.
    **dict.fromkeys(("yuyv", "yuv422_yuy2"), (2, cv2.COLOR_YUV2BGR_YUYV)),
    **dict.fromkeys(("uyvy", "yuv422"), (2, cv2.COLOR_YUV2BGR_UYVY)),
}


def image_to_bgr(message: Any) -> np.ndarray:
    """A frame from a ``sensor_msgs/Image``: BGR uint8 ``(H, W, 3)``; bgr8 is not copied."""
    if message.encoding not in _ENCODINGS:
        raise FrameError(f"cannot use images of encoding {message.encoding!r}: publish one of {', '.join(_ENCODINGS)}")
    channels, conversion = _ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, np.uint8)
    if step < width * channels or data.size < height * step:
        raise FrameError(f"an image of {width}x{height} has only {data.size} bytes")
    pixels = data[: height * step].reshape(height, step)[:, : width * channels].reshape(height, width, channels)
    try:
        return pixels if conversion is None else cv2.cvtColor(pixels, conversion)
    except cv2.error:  # an empty image, or YUV with an odd width
        raise FrameError(f"cannot use an image of {width}x{height} in {message.encoding}") from None


def detection(target: int, track: Track, header: Any, messages: Any) -> Any:
    """A ``Detection2D`` from ``messages`` (``vision_msgs.msg``): the target's id, box, score, and state as class."""
    made = messages.Detection2D()
    made.header = header
    if hasattr(made, "id"):  # since Galactic
        made.id = str(target)
    else:
        made.is_tracking, made.tracking_id = True, str(target)
    box, (x, y) = made.bbox, track.box.centre
    # geometry_msgs/Pose2D until Galactic, vision_msgs/Pose2D with a position since Humble.
    centre = box.center.position if hasattr(box.center, "position") else box.center
    centre.x, centre.y = float(x), float(y)
    box.size_x, box.size_y = float(track.box.w), float(track.box.h)
    result = messages.ObjectHypothesisWithPose()
    hypothesis = getattr(result, "hypothesis", result)  # a message of its own since Galactic
    setattr(hypothesis, "class_id" if hasattr(hypothesis, "class_id") else "id", track.state.value)
    hypothesis.score = float(track.score)
    made.results = [result]
    return made


class TrackerNode:
    """Makes a node (``rclpy.node.Node``) track targets; see the module for topics and parameters.

    A lost target stays among the detections, with its score and the class ``lost`` instead of ``tracking``,
    so that a controller sees at once which boxes to trust. ``newest`` is the quality of service of the
    image subscription, ``fixed`` the parameters' descriptor; ``sensor`` is the module ``sensor_msgs.msg``, and so on.
    """

    def __init__(self, node: Any, newest: Any, fixed: Any, sensor: Any, standard: Any, vision: Any) -> None:
        defaults = {"model": "T", "backend": "auto", "device": "auto", "threads": 0, "precision": "", "recover": True}
        value = {name: node.declare_parameter(name, default, fixed).value for name, default in defaults.items()}
        unset = {name: None for name in ("threads", "precision") if not value[name]}
        self._tracker = MultiTracker.load(**{**value, **unset})
        boxes = node.declare_parameter("boxes", [""], fixed).value or ()  # None for an empty list
        self._waiting: List[Sequence[float]] = [box_argument(text) for text in boxes if text]
        self._log = node.get_logger()
        self._vision = vision
        self._publisher = node.create_publisher(vision.Detection2DArray, "~/detections", 10)
        node.create_subscription(sensor.Image, "image", self._on_image, newest)
        node.create_subscription(sensor.RegionOfInterest, "~/target", self._on_target, 10)
        node.create_subscription(standard.UInt32, "~/remove", self._on_remove, 10)
        node.create_subscription(standard.Empty, "~/clear", self._on_clear, 10)

    def _on_image(self, message: Any) -> None:
        try:
            frame = image_to_bgr(message)
            tracks = self._tracker.update(frame)
        except AsymTrackError as problem:
            self._log.warning(str(problem), throttle_duration_sec=5.0)
            return
        while self._waiting:
            try:
                self._log.info(f"target {self._tracker.add(frame, self._waiting[0])} at {self._waiting[0]}")
            except ServerError as problem:  # the server may be back for the next image
                self._log.warning(str(problem), throttle_duration_sec=5.0)
                break
            except AsymTrackError as problem:
                self._log.error(str(problem))
            self._waiting.pop(0)
        array = self._vision.Detection2DArray()
        array.header = message.header
        array.detections = [detection(target, track, message.header, self._vision) for target, track in tracks.items()]
        self._publisher.publish(array)

    def _on_target(self, region: Any) -> None:
        self._waiting.append((region.x_offset, region.y_offset, region.width, region.height))

    def _on_remove(self, target: Any) -> None:
        if target.data in self._tracker:
            self._tracker.remove(target.data)

    def _on_clear(self, _: Any) -> None:
        self._waiting.clear()
        for target in self._tracker.ids:
            self._tracker.remove(target)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the node until ROS shuts it down."""
    try:
        import rclpy
        import sensor_msgs.msg
        import std_msgs.msg
        import vision_msgs.msg
        from rcl_interfaces.msg import ParameterDescriptor
        from rclpy.exceptions import ParameterException
        from rclpy.executors import ExternalShutdownException
        from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
    except ImportError as error:
        needed = "source /opt/ros/$ROS_DISTRO/setup.bash, and install ros-$ROS_DISTRO-vision-msgs"
        print(f"error: the ROS 2 node needs {error.name or 'rclpy'}: {needed}", file=sys.stderr)
        return 2
    # One image deep and best effort: the newest image, not a queue of old ones.
    newest = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
    fixed = ParameterDescriptor(read_only=True)  # else ROS reports that it has changed them, without effect
    try:
        try:
            rclpy.init(args=arguments)
        except RuntimeError as problem:
            raise UsageError(f"ROS cannot use the arguments: {problem}") from None
        node = rclpy.create_node("asymtrack")
        TrackerNode(node, newest, fixed, sensor_msgs.msg, std_msgs.msg, vision_msgs.msg)  # its callbacks keep it alive
        rclpy.spin(node)
    except (AsymTrackError, ArgumentTypeError, ParameterException) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, ExternalShutdownException):
        pass  # the second is SIGTERM
    except RuntimeError:  # ROS was shut down during a callback, which then cannot publish
        if rclpy.ok():
            raise
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
