"""The process that ``own_process.ProcessStep`` times PyTorch in: requests on stdin, answers on stdout.

Both are lines of JSON. The first answer describes the step; then each request ``{"calls": N, "clock":
"wall"}`` is answered with the seconds of N calls and the processor seconds spent in all. An error is the last
answer, ``{"error": message}``.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter, process_time
from typing import Any, Dict

from asymtrack_edge.errors import AsymTrackError
from asymtrack_edge.variants import Published, Variant


def variant_of(fields: Dict[str, Any]) -> Variant:
    """A variant from ``dataclasses.asdict`` of it, after JSON has made its tuples lists."""
    plain: Dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    plain["published"] = Published(**fields["published"])
    return Variant(**plain)


def main(text: str) -> int:
    """Serves one step until stdin ends.

    Args:
        text: JSON of the arguments of ``torch_steps.build``.
    """
    # The answers keep the pipe to themselves: what libraries print goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        from asymtrack_edge.benchmarks.speed.timing import settle
        from asymtrack_edge.benchmarks.speed.torch_steps import build

        request = json.loads(text)
        described, step = build(variant_of(request.pop("variant")), **request)
        answer(described)
        for line in sys.stdin:
            request = json.loads(line)
            clock = process_time if request["clock"] == "cpu" else perf_counter
            if request["calls"] > 1:
                step.sample()  # wakes the threads, fills the caches: the first call of a turn does not count
            used, seconds = process_time(), []
            for _ in range(request["calls"]):
                began = clock()
                step.sample()
                seconds.append(clock() - began)
            used = process_time() - used
            settle()  # the next candidate's turn comes when the threads here have come to rest
            answer({"seconds": seconds, "processor": used})
    except AsymTrackError as error:
        answer({"error": str(error)})
        return 2
    except Exception as error:  # whatever it is, the process that waits for an answer has to tell its user
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0
