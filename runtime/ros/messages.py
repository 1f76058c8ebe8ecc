"""ROS 2 messages from tracks, and frames from ROS 2 messages; imports nothing of ROS.

The message classes come in as arguments, so that all of this can be tested where there is no ROS,
and fits the layouts of ``vision_msgs`` from Foxy to today.
"""

from __future__ import annotations

from typing import Any, Dict

import cv2
import numpy as np

from asymtrack_edge.errors import FrameError
from asymtrack_edge.runtime.target import State, Track

#: How to make BGR of an image's encoding: channels, and OpenCV's conversion (None: it is BGR).
_ENCODINGS = {
    "bgr8": (3, None),
    "8UC3": (3, None),
    "rgb8": (3, cv2.COLOR_RGB2BGR),
    "bgra8": (4, cv2.COLOR_BGRA2BGR),
    "rgba8": (4, cv2.COLOR_RGBA2BGR),
    "mono8": (1, cv2.COLOR_GRAY2BGR),
    "8UC1": (1, cv2.COLOR_GRAY2BGR),
    "yuv422_yuy2": (2, cv2.COLOR_YUV2BGR_YUYV),
}


def image_to_bgr(message: Any) -> np.ndarray:
    """A frame from a ``sensor_msgs/Image``: BGR uint8 ``(H, W, 3)``; bgr8 is not copied.

    Raises:
        FrameError: another encoding, or fewer bytes than its size needs.
    """
    if message.encoding not in _ENCODINGS:
        known = ", ".join(_ENCODINGS)
        raise FrameError(f"cannot use images of encoding {message.encoding!r}: publish one of {known}")
    channels, conversion = _ENCODINGS[message.encoding]
    width = message.width * channels
    data = np.frombuffer(message.data, np.uint8)
    if message.step < width or data.size < message.height * message.step:
        raise FrameError(f"an image of {message.width}x{message.height} has only {data.size} bytes")
    rows = data[: message.height * message.step].reshape(message.height, message.step)[:, :width]
    pixels = rows.reshape(message.height, message.width, channels)
    return pixels if conversion is None else cv2.cvtColor(pixels, conversion)


def detections(tracks: Dict[int, Track], header: Any, messages: Any) -> Any:
    """A ``vision_msgs/Detection2DArray`` of all targets.

    A lost target keeps its place in the list, with class ``lost`` instead of ``tracking`` and its
    score, so that a controller sees at once which to trust.

    Args:
        tracks: by target.
        header: of the image, whose stamp and frame_id they take.
        messages: the module ``vision_msgs.msg``.
    """
    array = messages.Detection2DArray()
    array.header = header
    array.detections = [_detection(number, track, header, messages) for number, track in tracks.items()]
    return array


def _detection(number: int, track: Track, header: Any, messages: Any) -> Any:
    detection = messages.Detection2D()
    detection.header = header
    if hasattr(detection, "id"):  # since Galactic
        detection.id = str(number)
    box, (x, y) = detection.bbox, track.box.centre
    # geometry_msgs/Pose2D until Galactic, vision_msgs/Pose2D with a position since Humble.
    centre = box.center.position if hasattr(box.center, "position") else box.center
    centre.x, centre.y = float(x), float(y)
    box.size_x, box.size_y = float(track.box.w), float(track.box.h)
    result = messages.ObjectHypothesisWithPose()
    hypothesis = getattr(result, "hypothesis", result)  # a message of its own since Galactic
    name = "lost" if track.state is State.LOST else "tracking"
    if hasattr(hypothesis, "class_id"):
        hypothesis.class_id = name
    else:
        hypothesis.id = name
    hypothesis.score = float(track.score)
    detection.results = [result]
    return detection
