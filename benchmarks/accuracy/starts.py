"""Success AUC over many tracks of few sequences: several starts each, mirrored and not.

    python -m asymtrack_edge.benchmarks.accuracy.starts SEQUENCES --tracker T

With a handful of sequences, one lost track moves the mean by a hundredth or more. Here every sequence
gives six tracks: from its first frame, from a quarter and from half of its length, as it is and
mirrored left to right. The figure is no published protocol's; it is for comparing weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import List, Optional
from typing import Sequence as Arguments

import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.accuracy.metrics import overlaps, success_curve
from asymtrack_edge.datasets import Sequence, open_dataset
from asymtrack_edge.runtime import BACKENDS, Tracker

#: Where tracks begin, in parts of a sequence.
STARTS = (0.0, 0.25, 0.5)


def track_aucs(tracker: Tracker, sequence: Sequence) -> List[float]:
    """Success AUC of each track of a sequence, the frame it starts from left out."""
    frames = [sequence.read(i) for i in range(len(sequence))]
    width = frames[0].shape[1]
    found = []
    for mirrored in (False, True):
        truth = sequence.truth.copy()
        if mirrored:
            truth[:, 0] = width - truth[:, 0] - truth[:, 2]
            frames = [np.ascontiguousarray(frame[:, ::-1]) for frame in frames]
        for part in STARTS:
            start = int(part * len(frames))
            # A track begins where there is a box, and needs a frame after it.
            while start < len(frames) - 1 and not _is_box(truth[start]):
                start += 1
            if start == len(frames) - 1:
                continue
            tracker.init(frames[start], truth[start])
            boxes = np.array([tracker.update(frame).box for frame in frames[start + 1 :]])
            annotated = np.array([_is_box(row) for row in truth[start + 1 :]])
            if annotated.any():
                overlap = overlaps(boxes[annotated], truth[start + 1 :][annotated])
                found.append(float(success_curve(overlap).mean()))
    return found


def _is_box(row: np.ndarray) -> bool:
    return bool(np.isfinite(row).all() and row[2:].min() > 0)


def main(argv: Optional[Arguments[str]] = None) -> int:
    """Entry point."""
    parser = cli.parser(
        "asymtrack_edge.benchmarks.accuracy.starts",
        "Success AUC over many tracks of few sequences.",
        "python -m asymtrack_edge.benchmarks.accuracy.starts sequences/ --tracker T",
    )
    parser.add_argument("sequences", type=Path, help="a folder of sequences in GOT-10k layout")
    parser.add_argument("--tracker", default="T", metavar="T|S|B|DIR")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="inference backend (default: auto)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return cli.run(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    sequences = open_dataset("folder", arguments.sequences).sequences()
    # As published: it is the weights that are compared, not what is done about lost targets.
    tracker = Tracker.load(arguments.tracker, arguments.backend, threads=arguments.threads, recover=False)
    means, tracks = {}, 0
    for sequence in sequences:
        aucs = track_aucs(tracker, sequence)
        if not aucs:
            continue
        tracks += len(aucs)
        means[sequence.name] = round(float(np.mean(aucs)), 4)
        print(f"{sequence.name}: {means[sequence.name]:.3f} over {len(aucs)} tracks", file=sys.stderr)
    mean = float(np.mean(list(means.values()))) if means else float("nan")
    print(json.dumps({"tracks": tracks, "success AUC": round(mean, 4), "sequences": means}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
