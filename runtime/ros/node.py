"""A ROS 2 node that follows targets in an image topic.

``python3 -m asymtrack_edge.runtime.ros.node --ros-args -r image:=/camera/image_raw``

Topics: ``image`` (``sensor_msgs/Image``) in; ``~/detections`` (``vision_msgs/Detection2DArray``) out,
stamped as the image; ``~/target`` (``sensor_msgs/RegionOfInterest``) starts to follow what is in it
in the next image; ``~/clear`` (``std_msgs/Empty``) stops to follow anything.

Parameters: ``model``, ``backend``, ``device``, ``threads`` (0: as many as this process may use),
``recover`` (look for lost targets; true), and ``boxes``, a list of ``"x,y,w,h"`` to follow from the first
image on.
"""

from __future__ import annotations

import sys
from typing import Any, List, Optional, Sequence

from asymtrack_edge.cli import box_argument
from asymtrack_edge.errors import AsymTrackError, MissingDependencyError
from asymtrack_edge.runtime.ros.messages import detections, image_to_bgr
from asymtrack_edge.runtime.tracker import MultiTracker


class RosMissingError(MissingDependencyError):
    """ROS 2 is not here, or its environment is not set."""

    def __init__(self, package: str) -> None:
        # Not the parent's message: no extra of ours brings ROS.
        Exception.__init__(
            self,
            f"the ROS 2 node needs {package}: source /opt/ros/$ROS_DISTRO/setup.bash, and install "
            "ros-$ROS_DISTRO-vision-msgs",
        )


try:
    import rclpy
    import sensor_msgs.msg
    import std_msgs.msg
    import vision_msgs.msg
    from rclpy.executors import ExternalShutdownException
    from rclpy.node import Node
    from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
except ImportError as error:
    missing = RosMissingError(error.name or "rclpy")
    if __name__ == "__main__":
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
    raise missing from None


class TrackerNode(Node):  # type: ignore[misc]
    """Follows targets in an image topic; see the module for topics and parameters."""

    def __init__(self) -> None:
        super().__init__("asymtrack")
        value = {
            name: self.declare_parameter(name, default).value
            for name, default in (
                ("model", "T"),
                ("backend", "auto"),
                ("device", "auto"),
                ("threads", 0),
                ("recover", True),
                ("boxes", [""]),
            )
        }
        self._tracker = MultiTracker.load(
            value["model"], value["backend"], value["device"], value["threads"] or None, recover=value["recover"]
        )
        self._waiting: List[Sequence[float]] = [box_argument(text) for text in value["boxes"] if text]
        # One image deep and best effort: the newest image, not a queue of old ones.
        newest = QoSProfile(depth=1, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.BEST_EFFORT)
        self._publisher = self.create_publisher(vision_msgs.msg.Detection2DArray, "~/detections", 10)
        self.create_subscription(sensor_msgs.msg.Image, "image", self._on_image, newest)
        self.create_subscription(sensor_msgs.msg.RegionOfInterest, "~/target", self._on_target, 10)
        self.create_subscription(std_msgs.msg.Empty, "~/clear", self._on_clear, 10)

    def _on_image(self, message: Any) -> None:
        try:
            frame = image_to_bgr(message)
            tracks = self._tracker.update(frame)
        except AsymTrackError as problem:
            self.get_logger().warning(str(problem), throttle_duration_sec=5.0)
            return
        waiting, self._waiting = self._waiting, []
        for box in waiting:
            try:
                number = self._tracker.add(frame, box)
                self.get_logger().info(f"target {number} at {box}")
            except AsymTrackError as problem:
                self.get_logger().error(str(problem))
        self._publisher.publish(detections(tracks, message.header, vision_msgs.msg))

    def _on_target(self, region: Any) -> None:
        self._waiting.append((region.x_offset, region.y_offset, region.width, region.height))

    def _on_clear(self, _: Any) -> None:
        for number in self._tracker.ids:
            self._tracker.remove(number)


def main(arguments: Optional[List[str]] = None) -> int:
    """Runs the node until ROS shuts it down."""
    rclpy.init(args=arguments)
    try:
        rclpy.spin(TrackerNode())
    except AsymTrackError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, ExternalShutdownException):
        pass  # the second is SIGTERM
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
