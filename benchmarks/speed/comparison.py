"""``asymtrack-bench ab``: exports against each other and against the published form."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import List, Optional, Sequence, Tuple, Union

from asymtrack_edge.benchmarks.speed import protocols
from asymtrack_edge.benchmarks.speed.own_process import torch_step
from asymtrack_edge.benchmarks.speed.protocols import Bench
from asymtrack_edge.benchmarks.speed.rows import Findings
from asymtrack_edge.benchmarks.speed.subjects import EngineStep, Subject, engine_subject
from asymtrack_edge.benchmarks.speed.timing import Step
from asymtrack_edge.benchmarks.speed.yardsticks import matrix_product
from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime.backends.loading import model_folder, open_backend
from asymtrack_edge.variants import get_variant


def measure(
    bench: Bench,
    folders: Sequence[Union[str, Path]],
    backends: Sequence[str],
    threads: Optional[int] = None,
    device: int = 0,
    reference: bool = False,
) -> Findings:
    """P2 of each export's search network on each backend, taking turns; ratios are over the first candidate.

    Args:
        bench: shared settings.
        folders: export directories.
        backends: each export is opened with each of them.
        threads: CPU threads.
        device: GPU index.
        reference: put the published form of the first export's variant in eager PyTorch first.

    Raises:
        UsageError: fewer than two candidates.
        MissingDependencyError: the published form is asked for and PyTorch is absent.
    """
    if len(folders) * len(backends) + reference < 2:
        raise UsageError("a comparison needs two candidates: name another export directory or backend, or --reference")
    with ExitStack() as stack:
        candidates: List[Tuple[Subject, Step]] = []
        names: List[str] = []
        for folder, backend in product(folders, backends):
            engine = open_backend(model_folder(folder), backend, threads=threads)
            name = f"{folder}, {backend}" if len(backends) > 1 else str(folder)
            name += " again" * (name in names)
            while name in names:
                name += "'"
            names.append(name)
            stack.callback(engine.close)
            candidates.append((engine_subject(engine, device, threads, name), EngineStep(engine)))
        if reference:
            variant = get_variant(candidates[0][0].tracker.replace("AsymTrack-", ""))
            subject, step = torch_step(variant, "reference", threads=threads)
            stack.callback(step.close)
            candidates.insert(0, (replace(subject, name="published form, PyTorch"), step))
        peak = matrix_product(threads, bench.facts) if any(not s.on_gpu for s, _ in candidates) else None
        return protocols.network(bench, candidates, peak=peak, protocols=("P2",))
