"""Measured beside published: the paper's Tables 1 and 2 by variant, and Table 4 by component."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from asymtrack_edge.benchmarks.paper import (
    DEVICES,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_5A,
    TABLE_5B,
    Component,
    Speeds,
    column_for,
)
from asymtrack_edge.benchmarks.speed import models, protocols
from asymtrack_edge.benchmarks.speed.facts import Conditions, Facts
from asymtrack_edge.benchmarks.speed.own_process import torch_step
from asymtrack_edge.benchmarks.speed.protocols import Bench
from asymtrack_edge.benchmarks.speed.rows import Findings, Row
from asymtrack_edge.benchmarks.speed.subjects import EngineStep, Subject, engine_subject
from asymtrack_edge.benchmarks.speed.timing import Step
from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.variants import VARIANTS, Variant

#: How Table 4 can be measured here: as the authors did, and as exported.
FORMS = ("reference", "graph")


def component_variant(component: Component) -> Variant:
    """AsymTrack-S with the modules that a row of Table 4 has."""
    s = VARIANTS["S"]
    return s.with_(etm_stages=s.etm_stages if component.etm else (), ope_stages=s.ope_stages if component.ope else ())


def measure_table_4(
    bench: Bench, form: str, threads: Optional[int], say: Callable[[str], None], device: str = "cpu"
) -> Findings:
    """P1 and P2 of the four models of Table 4, taking turns; ratios are over model 4.

    Args:
        bench: shared settings.
        form: of ``FORMS``.
        threads: CPU threads.
        say: called before an export.
        device: ``"cpu"`` or ``"cuda:N"``, for the reference form.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}: choose one of {', '.join(FORMS)}")
    with ExitStack() as stack:
        candidates: List[Tuple[Subject, Step]] = []
        for component in TABLE_4:
            variant = component_variant(component)
            if form == "reference":
                subject, step = torch_step(variant, "reference", device, threads)
                stack.callback(step.close)
                candidates.append((replace(subject, name=f"reference {component.label}"), step))
                continue
            folder = models.export_folder(variant, say=say)
            engine = open_backend(folder, "onnxruntime", threads=threads)
            stack.callback(engine.close)
            made = engine_subject(engine, 0, threads, f"onnxruntime {component.label}")
            candidates.append((made, EngineStep(engine)))
        return protocols.network(bench, candidates, base=candidates[3][0].name)


def speed_order(findings: Findings) -> List[int]:
    """Numbers of Table 4's models from fastest to slowest, by their ratios over model 4 in the same rounds."""
    speeds = {4: 1.0}
    for _, ratio in findings.ratios:
        speeds[_number(ratio.name)] = ratio.speedup
    return sorted(speeds, key=lambda n: -speeds[n])


def _number(name: str) -> int:
    """The model's number in a name that ``measure_table_4`` gave."""
    return int(name.split()[1].rstrip(":"))


def published_order(key: str) -> List[int]:
    """The same from the paper, on the device of ``paper.DEVICES`` called ``key``."""
    return [c.number for c in sorted(TABLE_4, key=lambda c: -(c.speeds.on(key) or 0))]


def order_sentence(findings: Findings, form: str) -> str:
    """Says whether the models of Table 4 come out in the paper's order."""
    key = _column(findings.rows[0])
    measured, published = speed_order(findings), published_order(key)
    orders = [" > ".join(map(str, order)) for order in (measured, published)]
    agree = "the paper's order too" if measured == published else f"the paper's order is {orders[1]}"
    doubt = " The spread is wide: repeat on a quiet machine." if any(r.warning for _, r in findings.ratios) else ""
    return f"Table 4, {form} form: speed order {orders[0]}; {agree} (models: 1 neither, 2 ETM, 3 OPE, 4 both).{doubt}"


def _beside(
    table: str, what: str, row: Row, measured: Optional[float], published: Optional[float], digits: int = 4
) -> Dict[str, Any]:
    facts = row.device
    key, same = column_for(facts.cpu, facts.gpu, facts.board, row.subject.on_gpu)
    ratio = None if measured is None or not published else round(measured / published, digits)
    return {
        "table": table,
        "what": what,
        "name": row.subject.name,
        "measured": measured,
        "published": published,
        "ratio": ratio,
        "paper_device": DEVICES[key].name,
        "device": facts.title,
        "same_device": same,
    }


def _column(row: Row) -> str:
    return column_for(row.device.cpu, row.device.gpu, row.device.board, row.subject.on_gpu)[0]


def beside_tables_1_and_2(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    """P1 speeds of published variants at batch 1 beside Table 1 (which Table 2 repeats)."""
    lines = []
    for row in rows:
        name = row.subject.tracker.replace("AsymTrack-", "")
        if row.protocol == "P1" and name in TABLE_1 and row.subject.batch == 1 and row.subject.form != "library":
            speeds: Speeds = TABLE_1[name].speeds
            lines.append(_beside("1, 2", f"AsymTrack-{name}, fps", row, row.fps, speeds.on(_column(row))))
    return lines


def beside_saved_rows(rows: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The same for rows of a document."""
    return beside_tables_1_and_2([_row(r) for r in rows])


def _row(saved: Dict[str, Any]) -> Row:
    subject = Subject(**{**saved["subject"], "notes": tuple(saved["subject"]["notes"])})
    nothing = Conditions({}, None, None, None)
    return Row(saved["protocol"], subject, Facts(**saved["device"]), nothing, nothing, None, saved["fps"])


def beside_table_4(findings: Findings) -> List[Dict[str, Any]]:
    """Speed of each model of Table 4 over that of model 4, measured and published.

    Measured ratios are medians over interleaved rounds: they hold on a busy machine too.
    """
    lines = []
    ratios = {ratio.name: ratio.speedup for _, ratio in findings.ratios}
    for row in findings.rows:
        if row.protocol != "P1":
            continue
        component = TABLE_4[_number(row.subject.name) - 1]
        key = _column(row)
        full = TABLE_4[3].speeds.on(key)
        speed = component.speeds.on(key)
        published = None if full is None or speed is None else speed / full
        what = f"{component.label}: speed over model 4's"
        lines.append(_beside("4", what, row, ratios.get(row.subject.name, 1.0), published))
    return lines


def published_text() -> str:
    """All five tables as the paper prints them, for the terminal."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)

    blocks = []
    for title, header, rows in _published():
        widths = [max(len(cell(c)) for c in column) for column in zip(header, *rows)]
        lines = [title]
        for cells in (header, *rows):
            first, *rest = (cell(c) for c in cells)
            lines.append("  " + "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _published() -> List[Tuple[str, Sequence[Any], List[Sequence[Any]]]]:
    devices = ", ".join(f"{key.upper()}: {d.name}" for key, d in DEVICES.items())
    return [
        (
            f"Table 1: variants ({devices}; PyTorch, fp32, model only)",
            ("variant", "blocks", "crops px", "GPU fps", "CPU fps", "AGX fps", "params M", "FLOPs G"),
            [
                (f"AsymTrack-{n}", ",".join(map(str, c.blocks)), "{}/{}".format(*c.input_sizes), *c.speeds,
                 c.params_m, c.flops_g)
                for n, c in TABLE_1.items()
            ],
        ),
        (
            "Table 2: state of the art",
            ("tracker", "GOT-10k AO", "SR0.5", "SR0.75", "LaSOT AUC", "PNorm", "P", "TrackingNet AUC", "PNorm", "P",
             "GPU fps", "CPU fps", "AGX fps"),
            [(t.tracker, *t.got10k, *t.lasot, *t.trackingnet, *t.speeds) for t in TABLE_2],
        ),
        (
            "Table 3: more benchmarks (AUC)",
            ("tracker", "NFS", "UAV123", "LaSOText"),
            [(t.tracker, t.nfs, t.uav123, t.lasot_ext) for t in TABLE_3],
        ),
        (
            "Table 4: components of AsymTrack-S",
            ("model", "GPU fps", "CPU fps", "AGX fps", "GOT-10k AO", "LaSOT AUC"),
            [(c.label, *c.speeds, c.got10k_ao, c.lasot_auc) for c in TABLE_4],
        ),
        (
            "Table 5a: designs of ETM",
            ("method", "GOT-10k AO", "LaSOT AUC"),
            [tuple(a) for a in TABLE_5A],
        ),
        (
            "Table 5b: stages with OPE",
            ("method", "GOT-10k AO", "LaSOT AUC"),
            [tuple(a) for a in TABLE_5B],
        ),
    ]  # fmt: skip
