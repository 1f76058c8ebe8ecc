"""PyTorch on the CPU timed in a process of its own, as a script that runs only that would be.

Eager PyTorch allocates every intermediate result anew. What this costs depends on what the process has
done before: glibc gives large blocks back to the system after use, each call then pays for its pages
again, unless the process once freed a still larger block. In the process of the benchmark, which has
loaded other models, the same step can be a third faster than in the script of somebody who runs just
this network. A process of its own, that has loaded its weights and nothing else, is what they have.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Dict, List, Optional, Tuple

from asymtrack_edge.benchmarks.speed.subjects import Subject
from asymtrack_edge.benchmarks.speed.timing import Step
from asymtrack_edge.errors import BackendError, MissingDependencyError, UsageError
from asymtrack_edge.variants import Variant

FORMS = ("reference", "folded")
#: Imports from where this process does, and not from the working folder, as ``-m`` would.
_WORKER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from asymtrack_edge.benchmarks.speed.torch_worker import main
sys.exit(main(sys.argv[2]))
"""


class ProcessStep(Step):
    """A step that runs in another process, which also holds the clock.

    Args:
        request: arguments of ``torch_steps.build``, as JSON can hold them.
        clock: ``"wall"``, or ``"cpu"`` for processor seconds of that process.

    Attributes:
        described: what ``torch_steps.build`` says of the step.
        clock: as given.
    """

    def __init__(self, request: Dict[str, Any], clock: str = "wall") -> None:
        self.clock = clock
        self._processor = 0.0
        worker = [sys.executable, "-c", _WORKER, json.dumps(sys.path), json.dumps(request)]
        self._child = subprocess.Popen(
            worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.described = self._answer()

    def sample(self) -> float:
        """See ``Step.sample``."""
        return self.turn(1)[0]

    def turn(self, calls: int) -> List[float]:
        """See ``Step.turn``."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer says it better
            self._child.stdin.write(json.dumps({"calls": calls, "clock": self.clock}) + "\n")
            self._child.stdin.flush()
        answer = self._answer()
        self._processor += answer["processor"]
        seconds: List[float] = answer["seconds"]
        return seconds

    def processor_seconds(self) -> float:
        """See ``Step.processor_seconds``."""
        return self._processor

    def close(self) -> None:
        """See ``Step.close``: ends the process."""
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        try:
            self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def __del__(self) -> None:
        if hasattr(self, "_child"):
            self.close()

    def _answer(self) -> Dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        try:
            answer: Dict[str, Any] = json.loads(line)
        except ValueError:
            answer = {}
        if not answer:
            raise BackendError(f"the process that times PyTorch ended with exit code {self._child.wait()}")
        if "error" in answer:
            raise BackendError(answer["error"])
        return answer


def torch_step(
    variant: Variant,
    form: str,
    device: str = "cpu",
    threads: Optional[int] = None,
    batch: int = 1,
    precision: str = "fp32",
    name: str = "",
) -> Tuple[Subject, Step]:
    """Makes a step of the network in PyTorch, and its description.

    Args:
        variant: published or changed.
        form: ``"reference"`` (as its authors publish and time it) or ``"folded"``.
        device: ``"cpu"`` (in a process of its own) or ``"cuda:N"``.
        threads: None for PyTorch's choice.
        batch: crops in one call.
        precision: ``"fp16"`` only for the folded form on a GPU.
        name: of the row; empty for ``"torch-" + form``.

    Raises:
        MissingDependencyError: PyTorch is not installed.
        BackendError: the device is not there.
        UsageError: an unknown form, or a precision it does not have.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}: choose one of {', '.join(FORMS)}")
    if precision != "fp32" and (form != "folded" or device == "cpu"):
        raise UsageError(f"PyTorch is measured in fp32 here, not {precision} (fp16: the folded form on a GPU)")
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "export", "timing the network in PyTorch")
    request: Dict[str, Any] = {
        "form": form,
        "device": device,
        "threads": threads,
        "batch": batch,
        "precision": precision,
    }
    if device == "cpu":
        step: Any = ProcessStep({"variant": asdict(variant), **request})
        described = step.described
    else:
        from asymtrack_edge.benchmarks.speed.torch_steps import build

        described, step = build(variant, **request)
    untrained = described["weights"].startswith("random")
    subject = Subject(
        name=name or f"torch-{form}",
        tracker=f"AsymTrack-{variant.name}",
        backend="torch",
        form=form,
        device=device,
        precision=precision,
        threads=threads,
        batch=batch,
        notes=("untrained weights (speed does not depend on them)",) if untrained else (),
        **described,
    )
    return subject, step
