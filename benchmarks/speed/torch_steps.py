"""The network in PyTorch: in its published form, and folded. Needs torch."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from asymtrack_edge.benchmarks.reference_form import ReferenceForm
from asymtrack_edge.benchmarks.speed.models import multiply_adds, state_sha256, torch_model
from asymtrack_edge.benchmarks.speed.timing import Step
from asymtrack_edge.errors import BackendError
from asymtrack_edge.export.fold import fold, to_half
from asymtrack_edge.variants import Variant


class TorchStep(Step):
    """The search network in eager PyTorch on random tensors, the template cached.

    Args:
        call: runs it once.
        device: ``"cpu"`` or ``"cuda:0"``; a CUDA device is synchronised before the clock is read.
        threads: of PyTorch's pool; set before every burst, because candidates take turns.
    """

    def __init__(self, call: Callable[[], Any], device: str, threads: Optional[int]) -> None:
        self._call = call
        self._device = device
        self.queues = device != "cpu"
        self._threads = threads or torch.get_num_threads()

    def _prepare(self) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)

    def sample(self) -> float:
        """See ``Step.sample``."""
        return self.burst(1)

    def burst(self, calls: int) -> float:
        """See ``Step.burst``."""
        self._prepare()
        with torch.inference_mode():
            self._wait()
            began = perf_counter()
            for _ in range(calls):
                self._call()
            self._wait()
            return perf_counter() - began


def build(
    variant: Variant, form: str, device: str, threads: Optional[int], batch: int, precision: str
) -> Tuple[Dict[str, Any], TorchStep]:
    """Makes a step; see ``own_process.torch_step`` for the arguments.

    Returns:
        ``weights``, ``model_sha256`` and ``multiply_adds`` of its ``Subject``; and the step.

    Raises:
        BackendError: the device is not there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} finds no CUDA device here: use --device cpu")
    model, weights = torch_model(variant)
    described = {
        "weights": weights,
        "model_sha256": state_sha256(model),
        "multiply_adds": multiply_adds(variant),
    }
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    z, x = (torch.randn(batch, 3, s, s, generator=generator) for s in (variant.template_size, variant.search_size))
    z, x = z.to(device, dtype), x.to(device, dtype)
    with torch.inference_mode():
        if form == "reference":
            reference = ReferenceForm(model.to(device)).eval()
            features = reference.template(z)
            call: Callable[[], Any] = lambda: reference(x, features)  # noqa: E731
        else:
            folded = fold(model)
            folded = (to_half(folded) if precision == "fp16" else folded).to(device)
            state = folded.template(z)
            call = lambda: folded.search(x, state)  # noqa: E731
    return described, TorchStep(call, device, threads)
