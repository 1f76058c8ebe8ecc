"""Tables of a document: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence

from asymtrack_edge.benchmarks.speed.report.document import Document
from asymtrack_edge.benchmarks.speed.rows import PROTOCOLS


@dataclass(frozen=True)
class Table:
    """Cells as text; all columns but the first are figures.

    Attributes:
        title: above it.
        header: names of the columns.
        rows: cells.
        text_columns: columns that hold text.
        note: below it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = (0,)
    note: str = ""


def device_title(device: Dict[str, Any]) -> str:
    """The device of a row in a few words."""
    parts = [device["board"] or device["cpu"] or "unknown machine"]
    if not device["board"]:
        parts.append(f"{device['cores']} cores")
    parts += [device[key] for key in ("gpu", "power_mode") if device[key]]
    return ", ".join(parts)


def tables(document: Document) -> List[Table]:
    """All tables of a document, in the order of a report."""
    made = [_protocol(p, [r for r in document["rows"] if r["protocol"] == p], document) for p in PROTOCOLS]
    found = [t for t in made if t.rows]
    if document["ratios"]:
        found.insert(0, _ratios(document))
    if document["paper"]:
        found.append(_paper(document["paper"]))
    found += _layers(document["layers"])
    return found


def _ratios(document: Document) -> Table:
    rows = [
        [r["name"], r["base"], r["protocol"], f"{r['speedup']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}",
         str(r["rounds"]), r["verdict"] + (" (see the warning)" if r["warning"] else "")]
        for r in document["ratios"]
    ]  # fmt: skip
    return Table(
        "How many times faster",
        ("candidate", "than", "protocol", "times", "middle 80 % of rounds", "rounds", "verdict"),
        rows,
        (0, 1, 2, 6),
        "Candidates took turns; a ratio is the median over the rounds.",
    )


def _number(value: Any, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _protocol(protocol: str, rows: List[Dict[str, Any]], document: Document) -> Table:
    title = f"{protocol}: {PROTOCOLS[protocol].partition(': ')[2] or PROTOCOLS[protocol]}"
    several = len({device_title(r["device"]) for r in document["rows"]}) > 1
    stages = list(dict.fromkeys(s for r in rows for s in r["stages"]))
    values = list(dict.fromkeys(v for r in rows for v in r["values"]))
    timed = any(r["latency"] for r in rows)
    shares = any(r["share_of_peak"] is not None for r in rows)
    paced = any(r["fps"] is not None for r in rows)
    header = ["candidate", "tracker"] + (["device"] if several else []) + ["precision", "threads", "batch"]
    # P1 is a throughput and P2 the distribution of the same calls: each table shows its own.
    shown = () if protocol == "P1" else ("median", "p90", "p99", "mean")
    header += ["calls", *(f"{k} ms" for k in shown)] if timed else []
    header += (["fps"] if paced else []) + (["of peak"] if shares else [])
    header += [f"{s} ms" for s in stages] + values
    cells = []
    for row in rows:
        subject, latency = row["subject"], row["latency"] or {}
        line = [subject["name"], subject["tracker"]] + ([device_title(row["device"])] if several else [])
        line += [subject["precision"] or "-", str(subject["threads"] or "default"), str(subject["batch"])]
        line += [str(latency.get("count", "-")), *(_number(latency.get(k)) for k in shown)] if timed else []
        line += [_number(row["fps"], 1)] if paced else []
        line += [_share(row["share_of_peak"])] if shares else []
        line += [_number(row["stages"].get(s), 3) for s in stages] + [_value(row["values"].get(v)) for v in values]
        cells.append(line)
    notes = dict.fromkeys(n for r in rows for n in r["notes"])
    text = (0, 1, 2, 3) if several else (0, 1, 2)
    return Table(title, header, cells, text, "; ".join(notes))


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def _paper(lines: List[Dict[str, Any]]) -> Table:
    rows = [
        [x["table"], x["what"], x["name"], _figure(x["measured"]), _figure(x["published"]),
         _number(x["ratio"]), x["paper_device"], "the same" if x["same_device"] else f"differs: {x['device']}"]
        for x in lines
    ]  # fmt: skip
    return Table(
        "Beside the paper",
        ("table", "what", "measured with", "measured", "published", "ratio", "the paper's device", "this device"),
        rows,
        (0, 1, 2, 6, 7),
        "Where the device differs, the ratio compares machines as much as programs.",
    )


def _figure(value: Any) -> str:
    return _number(value, 1 if value is not None and value >= 10 else 2)


def _layers(entries: List[Dict[str, Any]]) -> List[Table]:
    found = []
    for model in dict.fromkeys(e["model"] for e in entries):
        own = [e for e in entries if e["model"] == model]
        total = sum(e["milliseconds"] for e in own) or 1.0
        kinds: Dict[str, List[float]] = {}
        for e in own:
            kinds.setdefault(e["operator"], []).append(e["milliseconds"])
        rows = [
            [kind, str(len(times)), f"{sum(times):.3f}", f"{100 * sum(times) / total:.1f} %"]
            for kind, times in sorted(kinds.items(), key=lambda item: -sum(item[1]))
        ]
        found.append(Table(f"Layers of {model}", ("operator", "layers", "ms", "share"), rows, (0,),
                           f"{total:.2f} ms in {len(own)} layers, with the profiler on."))  # fmt: skip
        slowest = sorted(own, key=lambda e: -e["milliseconds"])[:12]
        lines = [[e["name"], e["operator"], f"{e['milliseconds']:.3f}"] for e in slowest]
        found.append(Table(f"Slowest layers of {model}", ("layer", "operator", "ms"), lines, (0, 1)))
    return found


def as_text(document: Document) -> str:
    """For a terminal."""
    blocks = [f"device: {title}" for title in _devices(document)]
    for table in tables(document):
        widths = [max(len(str(c)) for c in column) for column in zip(table.header, *table.rows)]
        lines = [table.title]
        for cells in (table.header, *table.rows):
            aligned = [
                c.ljust(w) if i in table.text_columns else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))
            ]
            lines.append("  " + "  ".join(aligned).rstrip())
        if table.note:
            lines.append(f"  note: {table.note}")
        blocks.append("\n".join(lines))
    blocks += [f"{name}: {value:.4g}" for name, value in document["values"].items()]
    blocks += _warnings(document)
    return "\n\n".join(blocks)


def _devices(document: Document) -> List[str]:
    return list(dict.fromkeys(device_title(r["device"]) for r in document["rows"]))


def _warnings(document: Document) -> List[str]:
    found = [f"warning: {r['name']} against {r['base']}: {r['warning']}" for r in document["ratios"] if r["warning"]]
    return list(dict.fromkeys(found)) + [f"note: {m}" for m in document["messages"]]


def as_markdown(document: Document) -> str:
    """A page in Markdown."""
    lines = ["# Speed report", "", f"Made {document['created']} by `{document['command']}`.", ""]
    lines += [f"- device: {title}" for title in _devices(document)]
    lines += [f"- {name}: {value:.4g}" for name, value in document["values"].items()] + [""]
    for warning in _warnings(document):
        lines += [f"> {warning}", ""]
    for table in tables(document):
        rule = ["---" if i in table.text_columns else "---:" for i in range(len(table.header))]
        lines += [f"## {table.title}", ""]
        for cells in (table.header, rule, *table.rows):
            lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
        lines += ["", *([table.note, ""] if table.note else [])]
    return "\n".join(lines)


def as_csv(document: Document) -> str:
    """Rows as CSV, one line each; nested fields get dotted names."""
    flat = [_flat(row) for row in document["rows"]]
    header = list(dict.fromkeys(key for row in flat for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(item: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for key, value in item.items():
        if key == "samples":
            continue
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, list):
            found[prefix + key] = "; ".join(str(v) for v in value)
        else:
            found[prefix + key] = value
    return found
