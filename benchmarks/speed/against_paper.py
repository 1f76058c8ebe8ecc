"""Measured beside published: the paper's Tables 1 and 2 by variant, and Table 4 by component."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Dict, List, Optional, Sequence

from asymtrack_edge.benchmarks.paper import MACHINES, TABLE_1, TABLE_4, Component, Speeds, column_for
from asymtrack_edge.benchmarks.speed import protocols
from asymtrack_edge.benchmarks.speed.machine import title
from asymtrack_edge.benchmarks.speed.protocols import Bench
from asymtrack_edge.benchmarks.speed.report import NETWORK
from asymtrack_edge.benchmarks.speed.torch_process import reference_case
from asymtrack_edge.variants import VARIANTS, Variant

Row = Dict[str, Any]


def beside_table_1(rows: Sequence[Row]) -> List[Row]:
    """Speeds of published variants beside Table 1 (which Table 2 repeats)."""
    lines = []
    for row in rows:
        name = row["case"]["tracker"].replace("AsymTrack-", "")
        if row["protocol"] == NETWORK and name in TABLE_1 and row["case"]["batch"] == 1:
            lines.append(_beside("1, 2", f"AsymTrack-{name}, fps", row, row["fps"], TABLE_1[name]))
    return lines


def _beside(table: str, what: str, row: Row, measured: float, speeds: Speeds, over: Optional[Speeds] = None) -> Row:
    key, same = column_for(row["machine"], row["case"]["device"])
    published = getattr(speeds, key) / (getattr(over, key) if over else 1)
    return {
        "table": table,
        "what": what,
        "name": row["case"]["name"],
        "measured": measured,
        "published": published,
        "ratio": measured / published,
        "paper_machine": MACHINES[key],
        "machine": title(row["machine"]),
        "same_machine": same,
    }


def component_variant(component: Component) -> Variant:
    """AsymTrack-S with the modules that a row of Table 4 has."""
    s = VARIANTS["S"]
    return s.with_(etm_stages=s.etm_stages if component.etm else (), ope_stages=s.ope_stages if component.ope else ())


def measure_table_4(bench: Bench, device: str, threads: Optional[int]) -> None:
    """The four models of Table 4 in the form in which the authors timed them, taking turns.

    Ratios are over model 4. Weights are untrained but for model 4: speed does not depend on them.

    Args:
        bench: shared settings.
        device: ``"cpu"`` or ``"cuda:N"``.
        threads: CPU threads.
    """
    with ExitStack() as stack:
        cases = []
        for component in TABLE_4:
            name = f"Table 4, {component.label}"
            cases.append(reference_case(component_variant(component), device, threads, name))
            stack.callback(cases[-1].step.close)
        first = len(bench.report.rows)
        protocols.networks(bench, cases, base=cases[3].name)
    bench.report.paper += beside_table_4(bench.report.rows[first:], bench.report.ratios)


def beside_table_4(rows: Sequence[Row], ratios: Sequence[Row]) -> List[Row]:
    """Speed of each model of Table 4 over that of model 4, measured and published.

    Measured ratios are medians over the rounds of a race: they hold on a busy machine too.
    """
    measured = {ratio["name"]: ratio["speedup"] for ratio in ratios}
    lines = []
    for row in rows:
        component = next(c for c in TABLE_4 if row["case"]["name"].endswith(c.label))
        what = f"{component.label}: speed over model 4's"
        share = measured.get(row["case"]["name"], 1.0)
        lines.append(_beside("4", what, row, share, component.speeds, TABLE_4[3].speeds))
    return lines
