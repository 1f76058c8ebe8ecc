"""One HTML page that stands alone: tables and plots, nothing loaded from anywhere."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any, Dict, List

from asymtrack_edge.benchmarks.speed.report.document import Document
from asymtrack_edge.benchmarks.speed.report.tables import Table, device_title, tables

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --warn: #e69f0022; --accent: #0072b2; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
.sub { opacity: .75; margin: 0; } code { background: var(--soft); padding: .1em .35em; border-radius: 4px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse;
font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; background: var(--soft); white-space: normal; vertical-align: bottom; } .t { text-align: left; }
.note { font-size: 13px; opacity: .75; margin: .35rem 0 0; max-width: 75em; }
.warn { background: var(--warn); border-left: 4px solid #e69f00; padding: .5rem .9rem; margin: .5rem 0; }
figure { margin: 2rem 0; } figure img { max-width: 100%; background: #fff; border: 1px solid var(--line);
border-radius: 6px; } figcaption { font-size: 13px; opacity: .8; max-width: 60em; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; min-width: 11rem; max-width: 24rem; }
.card b { display: block; font-size: 1.35rem; color: var(--accent); } .card span { font-size: 13px; opacity: .8; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13.5px; } dt { opacity: .7; }
dd { margin: 0; }
"""


def as_html(document: Document, plots: Dict[str, Path]) -> str:
    """The page.

    Args:
        document: as ``document.make_document`` makes it.
        plots: caption -> SVG file, to be embedded.
    """
    rows = document["rows"]
    devices = list(dict.fromkeys(device_title(r["device"]) for r in rows))
    body: List[str] = [
        "<h1>AsymTrack speed report</h1>",
        f"<p class=sub>{escape('; '.join(devices) or 'no measurement')}</p>",
        f"<p class=sub>{escape(document['created'])} &middot; <code>{escape(document['command'])}</code></p>",
        _cards(document),
    ]
    warnings = [f"{r['name']} against {r['base']}: {r['warning']}" for r in document["ratios"] if r["warning"]]
    body += [f"<div class=warn>{escape(w)}</div>" for w in [*dict.fromkeys(warnings), *document["messages"]]]
    made = tables(document)
    body += [_table(t) for t in made]
    body += [_figure(caption, path) for caption, path in plots.items()]
    for device in _distinct([r["device"] for r in rows]):
        body.append(_facts(device, [r for r in rows if r["device"] == device]))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>AsymTrack speed report</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _cards(document: Document) -> str:
    """The few figures most readers come for: whole updates, the best ratio, the peak."""
    cards = []
    for row in document["rows"]:
        if row["protocol"] == "P5" and row["subject"]["form"] == "graph":
            cards.append((f"{row['latency']['median']:.1f} ms", f"update(), {row['subject']['name']} (P5 median)"))
    ratios = [r for r in document["ratios"] if r["verdict"] == "faster" and r["protocol"] == "P2"]
    if ratios:
        best = max(ratios, key=lambda r: r["speedup"])
        cards.append((f"{best['speedup']:.2f} times", f"faster: {best['name']} than {best['base']} (P2)"))
    shares = [r for r in document["rows"] if r["share_of_peak"] is not None and r["subject"]["form"] == "graph"]
    if shares:
        row = max(shares, key=lambda r: r["share_of_peak"])
        cards.append((f"{100 * row['share_of_peak']:.0f} %", f"of the matrix-product rate, {row['subject']['name']}"))
    cards += [(f"{value:.4g}", name) for name, value in document["values"].items()]
    inner = "".join(f"<div class=card><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in cards)
    return f"<div class=cards>{inner}</div>" if cards else ""


def _table(table: Table) -> str:
    def line(cells: Any, tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=t' if i in table.text_columns else ''}>{escape(str(c))}</{tag}>"
                for i, c in enumerate(cells)
            )
            + "</tr>"
        )

    rows = "\n".join(line(cells, "td") for cells in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    body = f"<table>{line(table.header, 'th')}\n{rows}</table>"
    return f"<h2>{escape(table.title)}</h2>\n<div class=scroll>{body}</div>{note}"


def _figure(caption: str, path: Path) -> str:
    # As images, not inline: the names inside one SVG cannot clash with those of another.
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = escape(caption)
    return f"<figure><img alt='{text}' src='data:image/svg+xml;base64,{data}'><figcaption>{text}.</figcaption></figure>"


def _distinct(items: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    found: List[Dict[str, Any]] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _facts(device: Dict[str, Any], rows: List[Dict[str, Any]]) -> str:
    pairs = [(k.replace("_", " "), v) for k, v in device.items() if k != "versions" and v is not None]
    pairs += list(device["versions"].items())
    loads = [c["load"] for r in rows for c in (r["before"], r["after"]) if c["load"] is not None]
    if loads:
        pairs.append(("load average", f"{min(loads):.1f} to {max(loads):.1f}"))
    hot: Dict[str, List[float]] = {}
    for row in rows:
        for sensor in row["before"]["temperatures"]:
            after = row["after"]["temperatures"].get(sensor)
            hot.setdefault(sensor, []).extend([row["before"]["temperatures"][sensor]] + ([after] if after else []))
    pairs += [(f"temperature {s}", f"{v[0]:.0f} to {v[-1]:.0f} °C") for s, v in hot.items()]
    models = {r["subject"]["name"]: r["subject"]["model_sha256"] for r in rows if r["subject"]["model_sha256"]}
    pairs += [(f"sha256 of {name}", digest) for name, digest in models.items()]
    inner = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs)
    return f"<h2>{escape(device_title(device))}</h2><dl>{inner}</dl>"
