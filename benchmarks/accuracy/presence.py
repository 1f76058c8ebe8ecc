"""Does the score tell whether the target is there? Measured on sequences, as their own counter-examples.

    python -m asymtrack_edge.benchmarks.accuracy.presence SEQUENCES --model T

Each sequence gives one score with its target in view (its fifth frame) and four without (the seventh
frame of four other sequences, resized to its own).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Dict, List, Optional
from typing import Sequence as Arguments

import cv2
import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.datasets import Sequence, open_dataset
from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime import Tracker

#: Frames used, counted from 0: near enough to the first to show the target still.
PRESENT, ABSENT = 4, 6
#: Distances, in the list of sequences, of those that stand in for a scene without the target.
OTHERS = (1, 2, 3, 5)
PERCENTILES = (5, 10, 25, 50, 75, 95)


def scores(tracker: Tracker, sequences: List[Sequence]) -> Dict[str, List[float]]:
    """Scores with (``"present"``) and without (``"absent"``) the target in view."""
    found: Dict[str, List[float]] = {"present": [], "absent": []}
    for i, sequence in enumerate(sequences):
        first, later = sequence.read(0), sequence.read(PRESENT)
        tracker.init(first, sequence.start)
        found["present"].append(tracker.update(later).score)
        for distance in OTHERS:
            other = sequences[(i + distance) % len(sequences)].read(ABSENT)
            tracker.init(first, sequence.start)
            tracker.update(later)
            found["absent"].append(tracker.update(cv2.resize(other, first.shape[1::-1])).score)
    return found


def main(argv: Optional[Arguments[str]] = None) -> int:
    """Entry point."""
    parser = cli.parser(
        "asymtrack_edge.benchmarks.accuracy.presence",
        "Scores with and without the target in view.",
        "python -m asymtrack_edge.benchmarks.accuracy.presence sequences/ --model T",
    )
    parser.add_argument("sequences", type=Path, help="a folder of sequences in GOT-10k layout")
    parser.add_argument("--model", default="T", metavar="T|S|B|DIR")
    return cli.run(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    sequences = [s for s in open_dataset("folder", arguments.sequences).sequences() if len(s.frames) > ABSENT]
    if len(sequences) <= max(OTHERS):
        need = f"more than {max(OTHERS)} sequences of more than {ABSENT} frames"
        raise UsageError(f"{arguments.sequences} has {len(sequences)} that can be used: this needs {need}")
    found = scores(Tracker.load(arguments.model), sequences)
    table = {
        kind: dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).round(3).tolist()))
        for kind, values in found.items()
    }
    print(json.dumps({"sequences": len(sequences), "percentiles of the score": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
