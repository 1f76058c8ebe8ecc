"""Tests of a model outside any data set's protocol: tracks from many starts, and the score's meaning.

They test the weights alone, so lost targets are not searched for.
"""

from __future__ import annotations

import argparse
from typing import Any, Dict, List

import cv2
import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.accuracy.metrics import is_box, success_curve
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.datasets import Dataset, Sequence
from asymtrack_edge.errors import BoxError, DatasetError, UsageError
from asymtrack_edge.geometry import check_box, overlaps

#: Where tracks begin, as a fraction of the sequence.
STARTS = (0.0, 0.25, 0.5)
#: Frames used with and without the target, counted from 0; so near the first that the target is still in view.
PRESENT, ABSENT = 4, 6
#: Offsets, in the list of sequences, of the sequences that serve as scenes without the target.
OTHERS = (1, 2, 3, 5)
PERCENTILES = (5, 10, 25, 50, 75, 95)


def track_aucs(tracker: Any, sequence: Sequence) -> List[float]:
    """Success AUC of each track of a sequence, without its start frame; raises DatasetError if there is no track."""
    found = []
    for step in (1, -1):  # as is, and mirrored
        truth = sequence.truth.copy()
        if step < 0:
            truth[:, 0] = sequence.read(0).shape[1] - truth[:, 0] - truth[:, 2]
        # A track starts on a frame with a box and needs a later frame with one.
        known = np.flatnonzero(is_box(truth) & sequence.visible)
        for part in STARTS:
            later = known[known >= int(part * len(sequence))]
            if len(later) < 2:
                continue
            start, judged = later[0], later[1:]
            frames = (np.ascontiguousarray(sequence.read(i)[:, ::step]) for i in range(start, len(sequence)))
            tracker.init(next(frames), truth[start])
            boxes = np.array([tracker.update(frame).box for frame in frames])
            found.append(float(success_curve(overlaps(boxes[judged - start - 1], truth[judged])).mean()))
    if not found:
        raise DatasetError("fewer than two frames have a box: tracks need two")
    return found


def starts(args: argparse.Namespace) -> int:
    """Success AUC over many tracks of few sequences, for comparing weights.

    With a handful of sequences, one lost track moves the mean by 0.01 or more. Here every sequence
    gives up to six tracks: from its start, from a quarter and from half of its length, each unmirrored
    and mirrored (left to right). Lost targets are not searched for. No published protocol does this.
    """
    sequences, left_out = Dataset("folder", args.root).read()
    tracker = TrackerSpec.of(args.model, args, recover=False).build()
    means, tracks = {}, 0
    for sequence in sequences:
        try:
            aucs = track_aucs(tracker, sequence)
        except (BoxError, DatasetError) as error:
            left_out[sequence.name] = f"sequence {sequence.name}: {error}"
            continue
        tracks += len(aucs)
        means[sequence.name] = round(float(np.mean(aucs)), 4)
        cli.say(f"{sequence.name}: {means[sequence.name]:.3f} over {len(aucs)} tracks")
    mean = round(float(np.mean([*means.values()])), 4) if means else None
    text = "no track" if mean is None else f"success AUC {mean:.3f} over {tracks} tracks of {len(means)} sequences"
    return _finish(args, {"tracks": tracks, "success AUC": mean, "sequences": means}, text, left_out)


def presence(args: argparse.Namespace) -> int:
    """Does the score tell whether the target is in view? Percentiles of the score with and without the target.

    Each sequence gives one score with its target in view (its fifth frame) and four without (the seventh
    frames of four other sequences, resized to its frame size).
    """
    sequences, left_out = Dataset("folder", args.root).read()
    listed, sequences = sequences, []
    for sequence in listed:
        try:
            if len(sequence) <= ABSENT or not sequence.visible[PRESENT]:
                raise DatasetError(f"it has fewer than {ABSENT + 1} frames, or no target in frame {PRESENT + 1}")
            for i in (0, PRESENT, ABSENT):
                check_box(sequence.start, sequence.read(i).shape)
            sequences.append(sequence)
        except (BoxError, DatasetError) as error:
            left_out[sequence.name] = f"sequence {sequence.name}: {error}"
    if len(sequences) <= max(OTHERS):
        need = f"{max(OTHERS) + 1} sequences of {ABSENT + 1} readable frames, with the target in frame {PRESENT + 1}"
        raise UsageError(f"presence needs at least {need}: {args.root} has {len(sequences)}")
    tracker = TrackerSpec.of(args.model, args, recover=False).build()
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
    table = {
        kind: dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).round(3).tolist()))
        for kind, values in found.items()
    }
    text = "\n".join(f"{kind:8}" + "".join(f" {value:7.3f}" for value in row.values()) for kind, row in table.items())
    text = "score  " + "".join(f" {percentile:5} %" for percentile in PERCENTILES) + f"\n{text}"
    return _finish(args, {"sequences": len(sequences), "percentiles of the score": table}, text, left_out)


def _finish(args: argparse.Namespace, answer: Dict[str, Any], text: str, left_out: Dict[str, str]) -> int:
    cli.write_json(args.json, {**answer, "left_out": left_out})
    if args.json != "-":
        print(text)
    for error in left_out.values():
        cli.say(f"error: left out: {error}")
    return 1 if left_out else 0


#: Name -> the text for ``--help``, and the function.
COMMANDS = {
    "starts": ("success AUC over many tracks of few sequences", starts),
    "presence": ("does the score tell whether the target is in view? (six sequences or more)", presence),
}
