"""What figures are held against: the machine's own multiply-add rate."""

from __future__ import annotations

from typing import Optional

import numpy as np

from asymtrack_edge.benchmarks.contenders import peak_contender
from asymtrack_edge.benchmarks.speed.facts import Facts
from asymtrack_edge.benchmarks.speed.protocols import Peak
from asymtrack_edge.benchmarks.speed.timing import CallStep
from asymtrack_edge.errors import MissingDependencyError

_SIDE = 768


def matrix_product(threads: Optional[int], facts: Facts) -> Peak:
    """A large fp32 matrix product: by ONNX Runtime, else (without the onnx package) by numpy.

    Args:
        threads: of the product; None for one per core. numpy's library follows OPENBLAS_NUM_THREADS.
        facts: for the number of cores.
    """
    used = threads or facts.cores
    try:
        contender = peak_contender(used)
    except MissingDependencyError:
        a = np.random.RandomState(0).normal(0, 1, (_SIDE, _SIDE)).astype(np.float32)
        out = np.empty_like(a)
        return Peak(CallStep(lambda: np.matmul(a, a, out=out)), _SIDE**3, None)
    assert contender.multiply_adds is not None
    return Peak(contender.timed(), contender.multiply_adds, used)
