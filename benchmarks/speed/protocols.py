"""The protocols P1 to P4, of networks: functions from steps to rows (P5 to P7: ``tracking``; P8: ``energy``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.benchmarks.speed.facts import Conditions, Facts, collect, conditions, probe
from asymtrack_edge.benchmarks.speed.rows import Findings, Row, kept_samples
from asymtrack_edge.benchmarks.speed.subjects import Subject
from asymtrack_edge.benchmarks.speed.timing import Rounds, Step, interleave, summarise, timed_loop

Tick = Callable[[str], None]
#: Of P1 and P2 (the authors' script).
WARMUP, CALLS = 100, 1000


@dataclass
class Bench:
    """What all protocols share in a run.

    Attributes:
        facts: of the device.
        seconds: time for one group of candidates; None for the protocol's full number of calls.
        tick: called with a note now and then.
        probe: reads the conditions.
    """

    facts: Facts
    seconds: Optional[float]
    tick: Tick = lambda note: None
    probe: Callable[[], Conditions] = conditions

    @classmethod
    def here(cls, seconds: Optional[float], tick: Tick, device: int = 0) -> Bench:
        """A run on this machine, and on this CUDA device where one is used."""
        return cls(collect(device=device), seconds, tick, probe(device))

    def row(self, protocol: str, subject: Subject, before: Conditions, **figures: Any) -> Row:
        """Makes a row that ends now."""
        notes = subject.notes + tuple(figures.pop("notes", ()))
        return Row(protocol, subject, self.facts, before, self.probe(), notes=notes, **figures)


@dataclass
class Peak:
    """A large matrix product that takes its turn among the candidates.

    Attributes:
        step: one product.
        multiply_adds: of it.
        threads: CPU threads it used; None where the library chose.
    """

    step: Step
    multiply_adds: int
    threads: Optional[int]


PEAK = "matrix product"


def network(
    bench: Bench,
    candidates: Sequence[Tuple[Subject, Step]],
    base: Optional[str] = None,
    peak: Optional[Peak] = None,
    protocols: Sequence[str] = ("P1", "P2"),
    calls: int = CALLS,
    warmup: int = WARMUP,
) -> Findings:
    """P1 and P2 (and P3, which differs in what a step does): candidates take turns.

    Where the device works on its own (PyTorch on CUDA), P1 is one burst after the turns, as many calls
    back to back, waited for once; everything else answers synchronously, so that P1 and P2 are two
    readings of the same calls.

    Args:
        bench: shared settings.
        candidates: with distinct names.
        base: name of the candidate the others are compared with; None for the first.
        peak: takes part, so that the share of peak holds for the same moments.
        protocols: rows to make; a subject whose form is ``host arrays`` gets P3 only.
        calls: timed, per candidate.
        warmup: calls before them.
    """
    steps = {subject.name: step for subject, step in candidates}
    if peak is not None:
        steps[PEAK] = peak.step
    before = bench.probe()
    rounds = interleave(steps, bench.seconds, calls, warmup, bench.tick)
    found = Findings()
    for subject, step in candidates:
        samples = rounds.all(subject.name)
        latency = summarise(samples)
        share = _share_of_peak(rounds, subject, peak)
        notes = _shortfall(len(samples), calls, rounds.warmup[subject.name], warmup)
        for protocol in ("P3",) if subject.form == "host arrays" else protocols:
            seconds, more = sum(samples) / len(samples), notes
            if protocol == "P1" and step.queues:
                step.burst(min(10, len(samples)))
                seconds = step.burst(len(samples)) / len(samples)
                more = (
                    *notes,
                    f"one burst of {len(samples)} calls after the turns",
                )
            values = _rates(subject, latency.median)
            if not subject.on_gpu:
                # What other programs take away lengthens the calls, hardly their processor time.
                values["processor ms"] = 1000 * float(np.median(rounds.processor[subject.name]))
            found.rows.append(
                bench.row(
                    protocol,
                    subject,
                    before,
                    fps=subject.batch / seconds,
                    values=values,
                    samples=kept_samples(samples),
                    notes=more,
                    latency=latency,
                    share_of_peak=share,
                )
            )
    base = base or candidates[0][0].name
    found.ratios = [
        ("P3" if s.form == "host arrays" else "P2", rounds.compare(s.name, base))
        for s, _ in candidates
        if s.name != base
    ]
    if peak is not None:
        rate = peak.multiply_adds / float(np.percentile(rounds.all(PEAK), 5)) / 1e9
        threads = "default threads" if peak.threads is None else f"{peak.threads} threads"
        found.values[f"peak rate, {threads} (G multiply-adds/s)"] = rate
    return found


def _share_of_peak(rounds: Rounds, subject: Subject, peak: Optional[Peak]) -> Optional[float]:
    if peak is None or subject.multiply_adds is None or subject.on_gpu or subject.precision != "fp32":
        return None
    work = subject.multiply_adds * subject.batch / peak.multiply_adds
    shares = [work * p / s for s, p in zip(rounds.medians(subject.name), rounds.medians(PEAK))]
    return float(np.median(shares))


def _rates(subject: Subject, median_ms: float) -> Dict[str, float]:
    if subject.multiply_adds is None:
        return {}
    return {"G multiply-adds/s": subject.multiply_adds * subject.batch / median_ms / 1e6}


def _shortfall(done: int, wanted: int, warmed: int, warmup: int) -> Tuple[str, ...]:
    if done >= wanted and warmed >= warmup:
        return ()
    return (f"stopped by time before {warmup} warm-up and {wanted} timed calls (--full makes them all)",)


def trtexec_way(bench: Bench, subject: Subject, step: Step, seconds: float = 3.0) -> Row:
    """P4: trtexec's warm-up, duration and percentiles, applied to any backend.

    The host's view: copies to and from a device are inside. trtexec itself reports them apart
    (``trtexec`` module) where it is installed.
    """
    before = bench.probe()
    samples, wall = timed_loop(step, seconds, least_calls=10, warmup_seconds=0.2)
    bench.tick(f"P4 {subject.name}")
    return bench.row(
        "P4",
        subject,
        before,
        latency=summarise(samples),
        fps=subject.batch * len(samples) / wall,
        values={"throughput (1/s)": len(samples) / wall},
        samples=kept_samples(samples),
        notes=("host latency; no CUDA graph or spin wait of trtexec's own",) if subject.on_gpu else (),
    )
