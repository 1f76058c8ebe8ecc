"""The published form in PyTorch, timed in a process of its own that has done nothing else.

Eager PyTorch allocates every intermediate result anew. What this costs depends on what the process has
done before: glibc gives large blocks back to the system after use, each call then pays for its pages
again, unless the process once freed a still larger block. In the process of the benchmark, which has
loaded other models, the same step can be a third faster than in the script of somebody who runs just
this network. A process of its own, that has loaded its weights and nothing else, is what they have.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, Callable, List, Optional

from asymtrack_edge.benchmarks.speed.cases import UNTRAINED
from asymtrack_edge.benchmarks.speed.race import Case, settle
from asymtrack_edge.errors import AsymTrackError, BackendError, CheckpointError, MissingDependencyError
from asymtrack_edge.variants import VARIANTS, Variant


def reference_case(
    variant: Variant,
    device: str = "cpu",
    threads: Optional[int] = None,
    name: str = "reference form, PyTorch",
) -> Case:
    """The search network in the form in which its authors publish and time it (``reference_form``).

    Args:
        variant: published or changed; without bundled weights it is untrained.
        device: ``"cpu"`` or ``"cuda:N"``.
        threads: None for PyTorch's choice.
        name: of the case.

    Raises:
        AsymTrackError: PyTorch or the device is not there.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "export", "timing the reference form")
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def ask(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise BackendError("the process that times PyTorch has died") from None
        except Exception as error:
            process.shutdown()
            kind = "" if isinstance(error, AsymTrackError) else f"{type(error).__name__}: "
            raise BackendError(f"{kind}{error}") from None

    trained = ask(_build, variant, device, threads)
    return Case(
        name,
        partial(ask, _run),
        process.shutdown,
        burst=None if device == "cpu" else partial(ask, _burst),
        tracker=f"AsymTrack-{variant.name}",
        backend="torch",
        device=device,
        threads=threads,
        notes=() if trained else (UNTRAINED,),
    )


#: In the other process: makes calls back to back; seconds until the last result was there.
_burst_here: Callable[[int], float]


def _build(variant: Variant, device: str, threads: Optional[int]) -> bool:
    """Prepares the other process; returns whether the weights are trained."""
    os.dup2(2, 1)  # stdout belongs to the results
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what an interrupt ends is for the command to decide
    with suppress(OSError, AttributeError):  # Linux: ends with the command, even where that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    import torch

    from asymtrack_edge.benchmarks.reference_form import ReferenceForm
    from asymtrack_edge.checkpoints import load_model
    from asymtrack_edge.network import AsymTrack

    global _burst_here
    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device here: use --device cpu")
    torch.manual_seed(0)
    model, trained = AsymTrack(variant), False
    if VARIANTS.get(variant.name) == variant:
        with suppress(CheckpointError):  # none are bundled
            model, trained = load_model(None, variant), True
    reference = ReferenceForm(model.to(device)).eval()
    z, x = (torch.randn(1, 3, side, side).to(device) for side in (variant.template_size, variant.search_size))
    with torch.inference_mode():
        template = reference.template(z)

    def burst(calls: int) -> float:
        with torch.inference_mode():
            began = perf_counter()
            for _ in range(calls):
                reference(x, template)
            if device != "cpu":
                torch.cuda.synchronize(device)
            return perf_counter() - began

    _burst_here = burst
    return trained


def _burst(calls: int) -> float:
    return _burst_here(calls)


def _run(calls: int) -> List[float]:
    """Seconds of each call."""
    if calls > 1:
        _burst_here(1)  # wakes the threads, fills the caches: the first call of a turn does not count
    seconds = [_burst_here(1) for _ in range(calls)]
    settle()  # the next case's turn comes when the threads here have come to rest
    return seconds
