"""TraX entry point: lets the VOT toolkit drive a tracker.

``python -m asymtrack_edge.benchmarks.accuracy.vot --model T`` speaks the TraX protocol on its standard
input and output, or on the socket that the toolkit names in the environment. It answers with rectangles
and a ``confidence`` for each; every object has its own tracker. docs/evaluation.md shows the entry in the
toolkit's ``trackers.ini``.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, List, Optional, Tuple
from typing import Sequence as Items

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.trackers import TrackerSpec, box_of
from asymtrack_edge.datasets.sequences import read_frame
from asymtrack_edge.errors import SourceError, UsageError, require


def serve(spec: TrackerSpec) -> None:
    """Answers the client's requests until it quits."""
    trax = require("trax", "vot", "running in the VOT toolkit")
    # Made before the server, so that a model that fails to load gives an error message, not a dead connection.
    spare: List[Any] = [spec.build()]
    following: List[Any] = []
    server = trax.Server(
        [trax.Region.RECTANGLE],
        [trax.Image.PATH],
        tracker_name=spec.label,
        tracker_description="AsymTrack on edge devices",
        tracker_family="asymtrack-edge",
        multiobject=True,
    )
    reason = None
    try:
        while True:
            try:
                request = server.wait()
            except trax.TraxException as error:
                raise SourceError(f"the connection to the TraX client broke: {error}") from None
            if request.type not in (trax.TraxStatus.INITIALIZE, trax.TraxStatus.FRAME):
                return
            frame = read_frame(Path(request.image["color"].path()))
            if request.type == trax.TraxStatus.INITIALIZE:
                spare += following
                following = []
            answers = []
            for tracker in following:
                track = tracker.update(frame)
                confidence = f"{getattr(track, 'score', 1.0):.4f}"
                answers.append((trax.Rectangle.create(*box_of(track)), {"confidence": confidence}))
            for region, _ in request.objects or []:
                tracker = spare.pop() if spare else spec.build()
                box = _box(region)
                tracker.init(frame, box)
                following.append(tracker)
                answers.append((trax.Rectangle.create(*box), {"confidence": "1"}))
            server.status(answers)
    except Exception as error:
        reason = str(error)
        raise
    finally:
        # Tells the client the reason, unless the client has already gone.
        with suppress(trax.TraxException):
            server.quit(reason)


def _box(region: Any) -> Tuple[float, ...]:
    """x, y, w, h of a rectangle: a TraX client sends the one around a polygon or mask. UsageError for other regions."""
    if region.type != "rectangle":
        raise UsageError(f"the client marks an object with a {region.type}: a rectangle is needed")
    return tuple(float(v) for v in region.bounds())


def main(argv: Optional[Items[str]] = None) -> int:
    """Runs the entry point; returns 0, or 2 after one line on standard error."""
    parser = cli.parser(
        "python -m asymtrack_edge.benchmarks.accuracy.vot",
        "Serve a tracker over the TraX protocol, for the VOT toolkit.",
        "python -m asymtrack_edge.benchmarks.accuracy.vot --model exports/asymtrack-t-fp16",
    )
    cli.add_model(parser)
    parser.add_argument("--tracker", metavar="NAME", help="another tracker, named as for asymtrack-eval")
    cli.add_backend(parser)
    return cli.run(lambda args: serve(TrackerSpec.of(args.tracker or args.model, args)), parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
