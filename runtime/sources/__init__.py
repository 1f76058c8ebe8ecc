"""Where frames come from: files, folders of images, cameras, streams and GStreamer pipelines."""

from __future__ import annotations

import os
import re
from typing import Union

from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime.sources.cameras import Pipeline, csi_pipeline, open_camera
from asymtrack_edge.runtime.sources.reader import LiveSource, Source
from asymtrack_edge.runtime.sources.videos import STREAM_SCHEMES, open_path, open_stream

__all__ = ["LiveSource", "Source", "open_source"]


def open_source(source: Union[str, int, os.PathLike[str]]) -> Source:
    """Opens the source that a user names.

    - a video file, or a folder of images;
    - a camera: ``0``, ``/dev/video0``, ``/dev/v4l/by-id/...``, with ``?width=1280&height=720&fps=60&format=MJPG``;
    - ``rtsp://...``, ``http://...`` and other URLs that FFmpeg reads;
    - ``csi://0?width=1280&height=720&fps=30&flip=0``: a ribbon-cable camera of a Jetson;
    - ``jetson://csi://0``, ``jetson://rtsp://...``, ``jetson://file.mp4``: through jetson-utils, on a Jetson's GPU;
    - a GStreamer pipeline (anything with `` ! `` in it), with or without an ``appsink`` at its end.

    ``SourceError`` if it does not exist or cannot be decoded, ``UsageError`` for an unknown option.
    """
    source = str(source) if isinstance(source, int) else os.fspath(source)
    if not source.strip():
        raise UsageError("the source is empty: name a video, a folder of images, a camera or a stream")
    if source.startswith("jetson://"):
        from asymtrack_edge.runtime.jetson import open_jetson

        return open_jetson(source)
    device = source.partition("?")[0]
    if device.startswith("csi://"):
        pipeline = csi_pipeline(source)
        return LiveSource(device, lambda: Pipeline(pipeline))
    if " ! " in source and not os.path.exists(source):
        return LiveSource("GStreamer pipeline", lambda: Pipeline(source))
    folder = os.path.isdir(source) and not os.path.exists(f"/dev/video{source}")
    names = (device, os.path.realpath(device))  # udev names cameras by links
    if any(re.fullmatch(r"\d+|/dev/(video|v4l/).+", name) for name in names) and not folder:
        return LiveSource(f"camera {device}", lambda: open_camera(source))
    if re.match(rf"({'|'.join(STREAM_SCHEMES)})://", source, re.IGNORECASE):
        return open_stream(source)
    return open_path(source)
