"""What a command measured: one JSON document, and one page of Markdown made from it.

Markdown, because it is read as it is in a terminal, and rendered by every forge and editor: what a
command prints and what ``--output`` writes beside its plots is the same page.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

from asymtrack_edge.benchmarks.speed.machine import title
from asymtrack_edge.errors import MissingDependencyError, UsageError
from asymtrack_edge.files import write_text

FORMAT = "asymtrack-edge-benchmark"
VERSION = 2

#: P1 and P2 are two readings of the same calls.
NETWORK = "P1, P2"
#: Protocols by id: what a figure means (docs/benchmarks.md has them in full).
PROTOCOLS: Dict[str, str] = {
    NETWORK: "search network alone, random crops, template cached; fps is P1 (the paper's), milliseconds are P2",
    "P4": "trtexec, 200 ms warm-up, at least 3 s and 10 calls",
    "P5": "the whole update(frame) on frames in memory",
    "P6": "from the encoded video to the box, by stage",
    "P8": "joules a frame, rail by rail",
    "startup": "import, load, first track and memory of a fresh process",
}

#: Title, header, rows and a note below; the columns from the given one on hold figures.
Table = Tuple[str, Sequence[str], Sequence[Sequence[str]], str, int]


@dataclass
class Report:
    """Everything a run found, as plain data.

    Attributes:
        command: the command line, so that the figures can be made again.
        rows: measurements. Each has ``protocol``, ``case`` (``race.Case.facts``), ``machine``
            (``machine.facts``), ``before`` and ``after`` (``machine.conditions``), ``latency``
            (``race.summarise``, ms) or None, ``fps`` by the protocol's own definition or None, ``stages``
            (ms per frame), ``values`` (named with their unit), ``share_of_peak`` of the multiply-add rate of
            a large matrix product or None, and ``notes``.
        ratios: of ``race.judge``, with their ``protocol``.
        layers: ``model``, ``operator``, ``name`` and ``milliseconds`` of each.
        paper: measured beside published, see ``against_paper``.
        values: figures of the whole run.
        messages: what could not be measured and why, and other remarks.
        created: date and time.
    """

    command: str
    rows: List[Dict[str, Any]] = field(default_factory=list)
    ratios: List[Dict[str, Any]] = field(default_factory=list)
    layers: List[Dict[str, Any]] = field(default_factory=list)
    paper: List[Dict[str, Any]] = field(default_factory=list)
    values: Dict[str, float] = field(default_factory=dict)
    messages: List[str] = field(default_factory=list)
    created: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )

    def say(self, message: str) -> None:
        """Adds a message, once."""
        if message not in self.messages:
            self.messages.append(message)

    def document(self) -> Dict[str, Any]:
        """As JSON holds it."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.loads(json.dumps(document, allow_nan=False))  # type: ignore[no-any-return]

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads a file that ``--json`` wrote.

        Raises:
            UsageError: it cannot be read, is no such file, or of another version.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError:
            document = None
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise UsageError(f"{path} was not written by asymtrack-bench --json")
        version = document.pop("version", None)
        if version != VERSION:
            raise UsageError(f"{path} has version {version}, this package reads {VERSION}: measure again")
        try:
            return cls(**document)
        except TypeError as error:
            raise UsageError(f"{path} is damaged: {error}") from None

    @classmethod
    def merge(cls, reports: Sequence[Report]) -> Report:
        """One report of several: their rows, ratios and the rest one after the other."""
        merged = cls("; ".join(r.command for r in reports))
        for report in reports:
            for name in ("rows", "ratios", "layers", "paper"):
                getattr(merged, name).extend(getattr(report, name))
            merged.values.update(report.values)
            for message in report.messages:
                merged.say(message)
        return merged

    def write(self, folder: Path) -> None:
        """Writes ``report.json``, ``report.md`` and, with matplotlib, ``speed-accuracy.svg`` into ``folder``."""
        from asymtrack_edge.benchmarks.speed.plots import CAPTION, draw_speed_accuracy

        folder.mkdir(parents=True, exist_ok=True)
        picture = ""
        try:
            if draw_speed_accuracy(self.rows, folder / "speed-accuracy.svg"):
                picture = f"\n![{CAPTION}](speed-accuracy.svg)\n\n{CAPTION}.\n"
        except MissingDependencyError as error:
            self.say(str(error))
        write_text(folder / "report.json", json.dumps(self.document(), indent=1) + "\n")
        write_text(folder / "report.md", self.markdown() + picture)

    def markdown(self) -> str:
        """The page."""
        lines = [f"# Speed report\n\nMade {self.created} by `{self.command}`."]
        warnings = [f"{r['name']} against {r['base']}: {r['warning']}" for r in self.ratios if r["warning"]]
        lines += _machine_lines(self.rows)
        lines += [f"- {name}: {value:.4g}" for name, value in self.values.items()]
        lines += [f"> {text}" for text in (*(f"warning: {w}" for w in warnings), *self.messages)]
        return "\n\n".join([*lines, *(markdown_table(*table) for table in self._tables())]) + "\n"

    def _tables(self) -> Iterator[Table]:
        if self.ratios:
            yield self._ratio_table()
        for protocol in PROTOCOLS:
            rows = [row for row in self.rows if row["protocol"] == protocol]
            if rows:
                yield self._protocol_table(protocol, rows)
        if self.paper:
            yield _paper_table(self.paper)
        if self.rows:
            yield _conditions_table(self.rows)
        for model in dict.fromkeys(layer["model"] for layer in self.layers):
            yield from _layer_tables(model, [layer for layer in self.layers if layer["model"] == model])

    def _ratio_table(self) -> Table:
        rows = [
            [r["name"], r["base"], r["protocol"], r["verdict"] + "*" * bool(r["warning"]), f"{r['speedup']:.2f}",
             f"{r['low']:.2f} to {r['high']:.2f}", str(r["rounds"])]
            for r in self.ratios
        ]  # fmt: skip
        header = (
            "case",
            "than",
            "protocol",
            "verdict",
            "times faster",
            "middle 80 % of rounds",
            "rounds",
        )
        note = "Cases took turns; a ratio is the median over the rounds. *: see the warning."
        return "How many times faster", header, rows, note, 4

    def _protocol_table(self, protocol: str, rows: List[Dict[str, Any]]) -> Table:
        several = len({title(r["machine"]) for r in self.rows}) > 1
        stages = list(dict.fromkeys(s for r in rows for s in r["stages"]))
        values = list(dict.fromkeys(v for r in rows for v in r["values"]))
        shown = ("median", "p90", "p99", "mean")
        timed, shares = any(r["latency"] for r in rows), any(r["share_of_peak"] is not None for r in rows)
        header = ["case", "tracker", *(["machine"] if several else []), "precision", "threads", "batch"]
        header += ["calls", *(f"{k} ms" for k in shown)] if timed else []
        header += ["fps", *(["of peak"] if shares else []), *(f"{s} ms" for s in stages), *values]
        cells = []
        for row in rows:
            case, latency = row["case"], row["latency"] or {}
            line = [case["name"], case["tracker"], *([title(row["machine"])] if several else [])]
            line += [case["precision"] or "-", str(case["threads"] or "default"), str(case["batch"])]
            line += [str(latency.get("count", "-")), *(_number(latency.get(k)) for k in shown)] if timed else []
            line += [_number(row["fps"], 1)]
            share = row["share_of_peak"]
            line += ["-" if share is None else f"{100 * share:.0f} %"] if shares else []
            line += [_number(row["stages"].get(s), 3) for s in stages] + [_value(row["values"].get(v)) for v in values]
            cells.append(line)
        notes = dict.fromkeys(n for r in rows for n in r["notes"])
        return f"{protocol}: {PROTOCOLS[protocol]}", header, cells, "; ".join(notes), 3 + several


def _number(value: Any, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def _machine_lines(rows: List[Dict[str, Any]]) -> List[str]:
    """What a reader must know of each machine."""
    lines = []
    for row in rows:
        m = row["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        clocks = {None: "not known whether fixed", True: "fixed", False: "free"}[m["clocks_locked"]]
        gpu = f", compute capability {m['compute_capability']}, driver {m['driver']}" if m["gpu"] else ""
        system = f"Jetson Linux {m['l4t']}, {m['os']}" if m["l4t"] else m["os"]
        power = m["power_mode"] or "power mode not known"
        lines.append(
            f"- machine: {title(m)}{gpu}; {system}; {power}; clocks {clocks}; Python {m['python']}, {versions}"
        )
    return list(dict.fromkeys(lines))


def _conditions_table(rows: List[Dict[str, Any]]) -> Table:
    """On what each case ran, and how warm and fast the machine was."""
    cells = []
    for row in rows:
        case, states = row["case"], (row["before"], row["after"])
        clock = "gpu_mhz" if case["device"].startswith("cuda") else "cpu_mhz"
        line = [
            case["name"],
            row["protocol"],
            case["backend"],
            case["device"],
            case["template"],
            case["model_sha256"][:12],
        ]
        line.append(" to ".join(_number(state[clock], 0) for state in states))
        line.append(" to ".join(_number(max(state["temperatures"].values(), default=None), 0) for state in states))
        cells.append([*line, _number(row["before"]["load"], 1)])
    header = ("case", "protocol", "backend", "on", "template", "model sha256", "MHz", "warmest °C", "load")
    return "Conditions", header, cells, "Clock and temperature before and after.", 6


def _paper_table(lines: List[Dict[str, Any]]) -> Table:
    rows = []
    for x in lines:
        digits = 2 if x["table"] == "4" else 1
        machine = "the same" if x["same_machine"] else x["machine"]
        figures = _number(x["measured"], digits), _number(x["published"], digits), _number(x["ratio"])
        rows.append([x["table"], x["what"], x["name"], x["paper_machine"], machine, *figures])
    header = ("table", "what", "measured with", "the paper's machine", "this machine", "measured", "published", "ratio")
    note = "Where the machine differs, the ratio compares machines as much as programs."
    return "Beside the paper", header, rows, note, 5


def _layer_tables(model: str, layers: List[Dict[str, Any]]) -> Iterator[Table]:
    total = sum(layer["milliseconds"] for layer in layers) or 1.0
    kinds: Dict[str, List[float]] = {}
    for layer in layers:
        kinds.setdefault(layer["operator"], []).append(layer["milliseconds"])
    rows = [
        [kind, str(len(times)), f"{sum(times):.3f}", f"{100 * sum(times) / total:.1f} %"]
        for kind, times in sorted(kinds.items(), key=lambda item: -sum(item[1]))
    ]
    note = f"{total:.2f} ms in {len(layers)} layers, with the profiler on."
    yield f"Layers of {model}", ("operator", "layers", "ms", "share"), rows, note, 1
    lines = [[layer["name"], layer["operator"], f"{layer['milliseconds']:.3f}"] for layer in layers]
    lines.sort(key=lambda line: -float(line[2]))
    yield f"Slowest layers of {model}", ("layer", "operator", "ms"), lines[:12], "", 2


def markdown_table(
    heading: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", figures: int = 1
) -> str:
    """A heading and a table whose columns are aligned as plain text too.

    Args:
        heading: above it.
        header: names of the columns.
        rows: cells.
        note: below it.
        figures: the first column that is aligned to the right.
    """
    lines = [[str(cell).replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (w - 1) + (":" if i >= figures else "-") for i, w in enumerate(widths)])
    aligned = [
        "| "
        + " | ".join(c.rjust(w) if i >= figures else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        + " |"
        for line in lines
    ]
    return "\n".join([f"## {heading}", "", *aligned, *(["", note] if note else [])])
