"""Several targets in one frame: one call for all against one call each, as with a tracker per target."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

from asymtrack_edge.benchmarks.speed import models, protocols
from asymtrack_edge.benchmarks.speed.protocols import Bench
from asymtrack_edge.benchmarks.speed.rows import Findings, Row
from asymtrack_edge.benchmarks.speed.subjects import EngineStep, Subject, engine_subject
from asymtrack_edge.benchmarks.speed.timing import Step
from asymtrack_edge.errors import UsageError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.variants import Variant


def measure(
    bench: Bench,
    variant: Variant,
    counts: Sequence[int],
    backend: str = "onnxruntime",
    precision: str = "fp32",
    threads: Optional[int] = None,
    device: int = 0,
    model: Optional[Path] = None,
    say: Callable[[str], None] = models.say_on_stderr,
) -> Findings:
    """P2 of the network for several numbers of targets; the two ways take turns at each number.

    Args:
        bench: ``seconds`` is for all numbers together.
        variant: which model.
        counts: numbers of targets, 1..64.
        backend: of both ways.
        precision: of both exports.
        threads: CPU threads.
        device: GPU index.
        model: an export with a free batch axis instead of the variant's own.
        say: called before an export.

    Raises:
        UsageError: numbers that cannot be, or a model whose batch axis is not free.
    """
    counts = sorted(set(counts))
    if not counts or counts[0] < 1 or counts[-1] > 64:
        raise UsageError("--counts takes numbers of targets within 1..64, for example 1,2,4,8")
    if model is not None:
        most = load_manifest(model).max_batch
        if most < counts[-1]:
            raise UsageError(f"{model} takes at most {most} targets in one call: export with --batch {counts[-1]}")
    together = model or models.export_folder(variant, precision, max(2, counts[-1]), backend, say)
    alone = models.export_folder(variant, precision, 1, backend, say)
    found = Findings()
    share = replace(bench, seconds=None if bench.seconds is None else bench.seconds / len(counts))
    for count in counts:
        with ExitStack() as stack:
            candidates: List[Tuple[Subject, Step]] = []
            for name, folder in (("one by one", alone), ("together", together)):
                engine = open_backend(folder, backend, threads=threads)
                stack.callback(engine.close)
                title = f"{name} ({count} target{'s' * (count > 1)})"
                subject = engine_subject(engine, device, threads, title)
                candidates.append((replace(subject, batch=count), EngineStep(engine, count, name == "together")))
            part = protocols.network(share, candidates, protocols=("P2",), calls=300)
            single = min(_median(row) for row in part.rows if row.subject.name.startswith("one by one")) / count
            for row in part.rows:
                row.values["ms per target"] = _median(row) / count
                row.values["cost in single targets"] = _median(row) / single
            found.add(part)
    return found


def _median(row: Row) -> float:
    assert row.latency is not None
    return row.latency.median
