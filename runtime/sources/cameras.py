"""Cameras that are connected to this machine."""

from __future__ import annotations

import re
from typing import Callable, Dict, Tuple
from urllib.parse import parse_qsl

import cv2

from asymtrack_edge.errors import SourceError, UsageError


def split_options(text: str) -> Tuple[str, Dict[str, str]]:
    """``0?width=1280&fps=60`` as ``"0"`` and its options."""
    name, _, query = text.partition("?")
    return name, dict(parse_qsl(query))


def open_camera(device: str, options: Dict[str, str]) -> cv2.VideoCapture:
    """Opens a V4L2 camera.

    Args:
        device: its number or path.
        options: ``format`` (four characters), ``width``, ``height``, ``fps``.

    Raises:
        SourceError: it cannot be opened.
        UsageError: an option is unknown or makes no sense.
    """
    index = device if device.startswith("/dev/") else int(device)
    capture = cv2.VideoCapture(index, getattr(cv2, "CAP_V4L2", cv2.CAP_ANY))
    if not capture.isOpened():
        node = device if device.startswith("/dev/") else f"/dev/video{device}"
        raise SourceError(f"cannot open camera {device}: is it connected, free, and is {node} readable?")
    settings: Dict[str, Tuple[int, Callable[[str], float]]] = {
        # The format first: it decides which sizes and rates there are.
        "format": (cv2.CAP_PROP_FOURCC, lambda code: cv2.VideoWriter_fourcc(*code)),  # type: ignore[attr-defined]
        "width": (cv2.CAP_PROP_FRAME_WIDTH, float),
        "height": (cv2.CAP_PROP_FRAME_HEIGHT, float),
        "fps": (cv2.CAP_PROP_FPS, float),
    }
    for name in options:
        if name not in settings:
            raise UsageError(f"unknown camera option {name!r}: choose among {', '.join(settings)}")
    for name, (prop, convert) in settings.items():
        if name in options:
            try:
                capture.set(prop, convert(options[name]))
            except (TypeError, ValueError):
                raise UsageError(f"camera option {name} cannot be {options[name]!r}") from None
    return capture


def csi_pipeline(sensor: str, options: Dict[str, str]) -> str:
    """The pipeline of a Jetson's CSI camera, ending in BGRx in ordinary memory.

    Args:
        sensor: its number, ``"0"``.
        options: ``width``, ``height``, ``fps`` and ``flip`` (0..7 of ``nvvidconv``).

    Raises:
        UsageError: an option is unknown or not a number.
    """
    values = {"width": "1280", "height": "720", "fps": "30", "flip": "0"}
    for name, value in options.items():
        if name not in values:
            raise UsageError(f"unknown option {name!r} of a CSI camera: choose among {', '.join(values)}")
        values[name] = value
    for name, value in {"sensor": sensor, **values}.items():
        if not re.fullmatch(r"\d{1,5}", value):
            raise UsageError(f"{name} of a CSI camera is a number, not {value!r} (for example csi://0?fps=60)")
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! video/x-raw(memory:NVMM),width={values['width']},"
        f"height={values['height']},framerate={values['fps']}/1 ! nvvidconv flip-method={values['flip']} ! "
        "video/x-raw,format=BGRx"
    )
