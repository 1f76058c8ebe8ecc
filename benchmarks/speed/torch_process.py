"""The published form in PyTorch, timed in a process of its own that has done nothing else.

Eager PyTorch allocates every intermediate result anew. What this costs depends on what the process has
done before: glibc gives large blocks back to the system after use, each call then pays for its pages
again, unless the process once freed a still larger block. In the process of the benchmark, which has
loaded other models, the same step can be a third faster than in the script of somebody who runs just
this network. A process of its own, that has loaded its weights and nothing else, is what they have.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from time import perf_counter
from typing import Any, Callable, List, Optional

from asymtrack_edge.benchmarks.speed.cases import UNTRAINED
from asymtrack_edge.benchmarks.speed.race import Case, settle
from asymtrack_edge.benchmarks.worker import Worker
from asymtrack_edge.errors import BackendError, ManifestError, MissingDependencyError
from asymtrack_edge.runtime.backends.loading import model_folder
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
    trained = False
    with suppress(ManifestError):
        trained = VARIANTS.get(variant.name) == variant and model_folder(variant.name).is_dir()
    worker = Worker(_make, variant, trained, device, threads)

    def timed(times: int, calls: int) -> List[float]:
        worker.send(times, calls)
        return list(worker.receive())

    return Case(
        name,
        lambda calls: timed(calls, 1),
        worker.close,
        burst=None if device == "cpu" else lambda calls: timed(1, calls)[0],
        tracker=f"AsymTrack-{variant.name}",
        backend="torch",
        device=device,
        threads=threads,
        notes=() if trained else (UNTRAINED,),
    )


def _make(variant: Variant, trained: bool, device: str, threads: Optional[int]) -> Callable[..., List[float]]:
    """In the other process: returns what times ``calls`` calls back to back, ``times`` times, in seconds."""
    import torch

    from asymtrack_edge.benchmarks.reference_form import ReferenceForm
    from asymtrack_edge.checkpoints import load_model
    from asymtrack_edge.network import AsymTrack

    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device here: use --device cpu")
    torch.manual_seed(0)
    model = load_model(None, variant) if trained else AsymTrack(variant)
    reference = ReferenceForm(model.to(device)).eval()
    z, x = (torch.randn(1, 3, side, side).to(device) for side in (variant.template_size, variant.search_size))
    with torch.inference_mode():
        template = reference.template(z)

    def timed(calls: int) -> float:
        with torch.inference_mode():
            began = perf_counter()
            for _ in range(calls):
                reference(x, template)
            if device != "cpu":
                torch.cuda.synchronize(device)
            return perf_counter() - began

    def answer(say: Any, times: int, calls: int) -> List[float]:
        if times > 1:
            timed(1)  # wakes the threads, fills the caches: the first call of a turn does not count
        seconds = [timed(calls) for _ in range(times)]
        settle()  # the next case's turn comes when the threads here have come to rest
        return seconds

    return answer
