"""The published form in PyTorch, timed in a process of its own that has done nothing else.

Eager PyTorch allocates every intermediate result anew. What this costs depends on what the process has
done before: glibc gives large blocks back to the system after use, each call then pays for its pages
again, unless the process once freed a still larger block. In the process of the benchmark, which has
loaded other models, the same step can be a third faster than in the script of somebody who runs just
this network. A process of its own, that has loaded its weights and nothing else, is what they have.
"""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
from contextlib import suppress
from time import perf_counter, process_time
from typing import Any, Callable, List, Optional, Tuple

from asymtrack_edge.benchmarks.speed.race import UNTRAINED, Case, Step, settle
from asymtrack_edge.errors import AsymTrackError, BackendError, CheckpointError, MissingDependencyError
from asymtrack_edge.variants import VARIANTS, Variant


def reference_case(
    variant: Variant,
    device: str = "cpu",
    threads: Optional[int] = None,
    name: str = "reference form, PyTorch",
    multiply_adds: Optional[int] = None,
) -> Case:
    """The search network in the form in which its authors publish and time it (``reference_form``).

    Args:
        variant: published or changed; without bundled weights it is untrained.
        device: ``"cpu"`` or ``"cuda:N"``.
        threads: None for PyTorch's choice.
        name: of the case.
        multiply_adds: of the exported network, which the folded form has in common with it.

    Raises:
        MissingDependencyError: PyTorch is not installed.
        BackendError: the device is not there.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "export", "timing the reference form")
    step = ProcessStep(variant, device, threads)
    tracker = f"AsymTrack-{variant.name}"
    notes = () if VARIANTS.get(variant.name) == variant else (UNTRAINED,)
    return Case(
        name,
        step,
        tracker,
        "torch",
        device,
        threads=threads,
        model_sha256=step.model_sha256,
        multiply_adds=multiply_adds,
        notes=notes,
    )


class ProcessStep(Step):
    """A step that runs in another process, which also holds the clock; see ``reference_case``.

    Attributes:
        model_sha256: of the weights in memory.
    """

    def __init__(self, variant: Variant, device: str, threads: Optional[int]) -> None:
        self.queues = device != "cpu"
        self._processor = 0.0
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._child = context.Process(target=_serve, args=(there, variant, device, threads), daemon=True)
        self._child.start()
        there.close()
        self.model_sha256: str = self._answer()["sha256"]

    def sample(self) -> float:
        """Seconds of one call."""
        return self.turn(1)[0]

    def turn(self, calls: int) -> List[float]:
        """Seconds of each call, by the other process's clock."""
        return self._ask(calls, 1)

    def burst(self, calls: int) -> float:
        """On a GPU the other process waits for the device only after the last call."""
        return self._ask(1, calls)[0]

    def processor_seconds(self) -> float:
        """Processor time of the other process in its calls."""
        return self._processor

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._child.join(5)
        self._child.kill()

    def _ask(self, times: int, calls: int) -> List[float]:
        with suppress(BrokenPipeError):  # the missing answer says it better
            self._pipe.send((times, calls))
        seconds, used = self._answer()
        self._processor += used
        return seconds  # type: ignore[no-any-return]

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._child.join()
            raise BackendError(f"the process that times PyTorch ended with exit code {self._child.exitcode}") from None
        if isinstance(answer, str):
            raise BackendError(answer)
        return answer


def _serve(pipe: Any, variant: Variant, device: str, threads: Optional[int]) -> None:
    """The other process: builds the step and times it until the pipe is closed."""
    os.dup2(2, 1)  # stdout belongs to the results
    try:
        sha256, timed = _build(variant, device, threads)
        pipe.send({"sha256": sha256})
        while True:
            times, calls = pipe.recv()
            if times > 1:
                timed(1)  # wakes the threads, fills the caches: the first call of a turn does not count
            used = process_time()
            seconds = [timed(calls) for _ in range(times)]
            used = process_time() - used
            settle()  # the next case's turn comes when the threads here have come to rest
            pipe.send((seconds, used))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return  # nobody asks any more
    except AsymTrackError as error:
        pipe.send(str(error))
    except Exception as error:  # whatever it is, the process that waits for an answer has to tell its user
        pipe.send(f"{type(error).__name__}: {error}")


def _build(variant: Variant, device: str, threads: Optional[int]) -> Tuple[str, Callable[[int], float]]:
    """Makes the step.

    Returns:
        Hash of the weights, and a function that makes a number of calls back to back and returns
        the seconds until the last result was there.
    """
    import torch

    from asymtrack_edge.benchmarks.reference_form import ReferenceForm
    from asymtrack_edge.checkpoints import load_model
    from asymtrack_edge.network import AsymTrack

    if threads is not None:
        torch.set_num_threads(threads)
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device here: use --device cpu")
    torch.manual_seed(0)
    model = AsymTrack(variant).eval()
    if VARIANTS.get(variant.name) == variant:
        with suppress(CheckpointError):  # none are bundled: speed does not depend on the weights
            model = load_model(None, variant)
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
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

    return digest.hexdigest(), timed
