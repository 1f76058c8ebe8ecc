"""The process that ``own_process.ProcessStep`` times PyTorch in: requests on stdin, answers on stdout.

Both are lines of JSON. The first answer describes the step; then each request ``{"calls": N, "clock":
"wall"}`` is answered with the seconds of N calls and the processor seconds spent in all. An error is one
answer ``{"error": message}``, after which the process ends.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter, process_time
from typing import Any, Dict, List

from asymtrack_edge.errors import AsymTrackError
from asymtrack_edge.variants import Published, Variant


def variant_of(fields: Dict[str, Any]) -> Variant:
    """A variant from ``dataclasses.asdict`` of it, after JSON has made its tuples lists."""
    plain: Dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    plain["published"] = Published(**fields["published"])
    return Variant(**plain)


def main(arguments: List[str]) -> int:
    """Serves one step until stdin ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing else may get between the answers

    def answer(content: Dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        from asymtrack_edge.benchmarks.speed.timing import settle
        from asymtrack_edge.benchmarks.speed.torch_steps import build

        request = json.loads(arguments[0])
        described, step = build(variant_of(request.pop("variant")), **request)
    except (AsymTrackError, ImportError) as error:
        answer({"error": str(error)})
        return 2
    answer(described)
    for line in sys.stdin:
        request = json.loads(line)
        clock = process_time if request["clock"] == "cpu" else perf_counter
        used, seconds = process_time(), []
        for _ in range(request["calls"]):
            began = clock()
            step.sample()
            seconds.append(clock() - began)
        used = process_time() - used
        settle()  # the next candidate's turn comes when the threads here have come to rest
        answer({"seconds": seconds, "processor": used})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
