"""Rows of a report: one subject under one protocol, with everything needed to judge the figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from asymtrack_edge.benchmarks.speed.facts import Conditions, Facts
from asymtrack_edge.benchmarks.speed.ratios import Ratio
from asymtrack_edge.benchmarks.speed.subjects import Subject
from asymtrack_edge.benchmarks.speed.timing import Summary

#: Protocols by id: what a figure means (docs/benchmarks.md has them in full).
PROTOCOLS: Dict[str, str] = {
    "P1": "paper: search network alone, random tensors, template cached, 100 warm-up + 1000 timed, throughput",
    "P2": "latency: the same, synchronised call by call",
    "P3": "host arrays: ONNX Runtime run() on host arrays, copies inside",
    "P4": "trtexec: 200 ms warm-up, at least 3 s and 10 calls",
    "P5": "update(): the whole update(frame) on 1280x720 frames in memory",
    "P6": "end to end: from the encoded video to the box, by stage",
    "P7": "data set: frames / total time, and GOT-10k's mean(1/t)",
    "P8": "energy: joules a frame, rail by rail",
    "startup": "start-up: import, load, first track and memory of a fresh process",
}


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        protocol: key of ``PROTOCOLS``.
        subject: what was measured.
        device: where.
        before, after: conditions at the start and the end.
        latency: statistics of single calls (a call handles ``subject.batch`` targets).
        fps: frames per second by the protocol's own definition.
        stages: milliseconds per frame by stage.
        values: figures that only this protocol has, named with their unit.
        share_of_peak: of the multiply-add rate that a large matrix product reached in the same
            rounds; None where unknown.
        notes: departures from the protocol and whatever else a reader must know.
        samples: milliseconds of single calls (at most ``KEPT``, evenly picked), for plots.
    """

    protocol: str
    subject: Subject
    device: Facts
    before: Conditions
    after: Conditions
    latency: Optional[Summary]
    fps: Optional[float]
    stages: Dict[str, float] = field(default_factory=dict)
    values: Dict[str, float] = field(default_factory=dict)
    share_of_peak: Optional[float] = None
    notes: Tuple[str, ...] = ()
    samples: Tuple[float, ...] = ()

    def to_dict(self) -> Dict[str, Any]:
        """As plain data, for the report."""
        return asdict(self)


#: Samples of a row that go into the report.
KEPT = 400


def kept_samples(seconds: List[float]) -> Tuple[float, ...]:
    """At most ``KEPT`` of the samples, evenly picked, in milliseconds."""
    step = max(1, -(-len(seconds) // KEPT))
    return tuple(round(1000 * s, 4) for s in seconds[::step])


@dataclass
class Findings:
    """What a command measured.

    Attributes:
        rows: measurements.
        ratios: comparisons from interleaved rounds, with the protocol they belong to.
        values: figures of the whole run, for example the peak multiply-add rate.
        messages: what could not be measured and why.
    """

    rows: List[Row] = field(default_factory=list)
    ratios: List[Tuple[str, Ratio]] = field(default_factory=list)
    values: Dict[str, float] = field(default_factory=dict)
    messages: List[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Takes over another's findings."""
        self.rows += other.rows
        self.ratios += other.ratios
        self.values.update(other.values)
        self.messages += [m for m in other.messages if m not in self.messages]
