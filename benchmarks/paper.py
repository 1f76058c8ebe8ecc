"""The paper's speeds beside measured ones. ``paper.md`` has all tables of the paper, as printed there.

The paper's speeds are frames per second of the model alone in PyTorch, fp32, batch 1.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from asymtrack_edge.benchmarks.speed.machine import title
from asymtrack_edge.benchmarks.speed.report import NETWORK, Row
from asymtrack_edge.variants import VARIANTS, Variant

#: The paper's machines, keyed by the columns of its tables.
MACHINES = {"gpu": "Nvidia GeForce RTX 2080 Ti", "cpu": "Intel i7-9700KF at 3.6 GHz", "agx": "Jetson AGX Xavier"}
#: Patterns that match the names (in lower case) that these machines report. An AGX Xavier calls itself "Jetson-AGX".
_MARKS = {"gpu": "2080 ti", "cpu": "i7-9700kf", "agx": "jetson-agx$|agx xavier"}

_S = VARIANTS["S"]
#: The models of Table 4: AsymTrack-S with and without ETM and OPE, the full model last.
TABLE_4: Dict[str, Variant] = {
    "1: neither": replace(_S, etm_stages=(), ope_stages=()),
    "2: ETM": replace(_S, ope_stages=()),
    "3: OPE": replace(_S, etm_stages=()),
    "4: ETM + OPE": _S,
}


def tables() -> str:
    """Tables 1 to 5 as a page of Markdown."""
    return Path(__file__).with_name("paper.md").read_text(encoding="utf-8")


def speeds(number: int) -> Dict[str, Dict[str, float]]:
    """Frames per second from one of the ``tables``: name in the first column -> machine -> fps."""
    lines = tables().split(f"## Table {number}:")[1].split("\n\n")[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: {key: float(row[head.index(f"{key.upper()} fps")]) for key in MACHINES} for row in rows}


def column_for(machine: Mapping[str, Any], device: str) -> Tuple[str, bool]:
    """The key in ``MACHINES`` to compare a measurement with, and whether the measurement is from that very machine.

    ``machine`` is ``machine.facts``; ``device`` is where the network ran: ``"cuda:N"``, ``"cpu"`` or ``"server"``.
    """
    on_gpu = device.startswith("cuda")
    jetson = bool(machine["l4t"]) or "jetson" in (machine["board"] or "").lower()  # not all boards' names contain it
    key = "agx" if jetson else "gpu" if on_gpu else "cpu"
    name = (machine["board" if jetson else key] or "").lower()
    return key, bool(re.search(_MARKS[key], name)) and (on_gpu or not jetson)


def beside_table_1(rows: Sequence[Row]) -> List[Row]:
    """Measured speeds of T, S and B beside Table 1."""
    lines, published = [], speeds(1)
    for row in rows:
        name = row["case"]["tracker"]
        if row["protocol"] == NETWORK and name in published and row["case"]["batch"] == 1:
            lines.append(_beside("1, 2", f"{name}, fps", row, row["fps"], published[name]))
    return lines


def beside_table_4(rows: Sequence[Row], ratios: Sequence[Row]) -> List[Row]:
    """Speed of each model of Table 4, in its order, relative to the full model: measured and published.

    Measured ratios are medians over the rounds of a race, so they hold on a busy machine too.
    """
    measured = {ratio["name"]: ratio["speedup"] for ratio in ratios}
    published = list(speeds(4).values())
    shares = [{key: model[key] / published[-1][key] for key in MACHINES} for model in published]
    return [
        _beside("4", "speed over model 4's", row, measured.get(row["case"]["name"], 1.0), share)
        for row, share in zip(rows, shares)
    ]


def _beside(table: str, what: str, row: Row, measured: float, published: Mapping[str, float]) -> Row:
    key, same = column_for(row["machine"], row["case"]["device"])
    return {
        "table": table,
        "what": what,
        "name": row["case"]["name"],
        "measured": measured,
        "published": published[key],
        "ratio": measured / published[key],
        "paper_machine": MACHINES[key],
        "machine": title(row["machine"]),
        "same_machine": same,
    }
