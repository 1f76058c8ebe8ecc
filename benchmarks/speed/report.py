"""What a command measured: one JSON document, and one page of Markdown made from it.

Markdown, because it is read as it is in a terminal, and rendered by every forge and editor: what a
command prints and what ``--output`` writes is the same page.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Sequence

from asymtrack_edge.benchmarks.speed.machine import title
from asymtrack_edge.errors import UsageError
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

_SHOWN = ("count", "median", "p90", "p99", "mean")

Row = Dict[str, Any]


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
    rows: List[Row] = field(default_factory=list)
    ratios: List[Row] = field(default_factory=list)
    layers: List[Row] = field(default_factory=list)
    paper: List[Row] = field(default_factory=list)
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
        """Writes ``report.json`` and ``report.md`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.json", json.dumps(self.document(), indent=1) + "\n")
        write_text(folder / "report.md", self.markdown())

    def markdown(self) -> str:
        """The page."""
        lines = [f"# Speed report\n\nMade {self.created} by `{self.command}`."]
        lines += dict.fromkeys(f"- machine: {_machine(row['machine'])}" for row in self.rows)
        lines += [f"- {name}: {value:.4g}" for name, value in self.values.items()]
        lines += [f"> warning: {r['name']} against {r['base']}: {r['warning']}" for r in self.ratios if r["warning"]]
        lines += [f"> {message}" for message in self.messages]
        ratios = [{key: value for key, value in ratio.items() if key != "warning"} for ratio in self.ratios]
        note = "Cases took turns; a ratio is the median over the rounds, the middle 80 % of them lie from low to high."
        lines.append(markdown_table("How many times faster", ratios, note))
        for protocol, what in PROTOCOLS.items():
            rows = [row for row in self.rows if row["protocol"] == protocol]
            notes = dict.fromkeys(note for row in rows for note in row["notes"])
            lines.append(markdown_table(f"{protocol}: {what}", self._figures(rows), "; ".join(notes)))
        note = "Where the machine differs, the ratio compares machines as much as programs."
        lines.append(markdown_table("Beside the paper", self.paper, note))
        note = "Clock and temperature before and after."
        lines.append(markdown_table("Conditions", [_conditions(row) for row in self.rows], note))
        for model in dict.fromkeys(layer["model"] for layer in self.layers):
            layers = [layer for layer in self.layers if layer["model"] == model]
            total = f"{sum(layer['milliseconds'] for layer in layers):.2f} ms in {len(layers)} layers"
            lines.append(markdown_table(f"Layers of {model}", _kinds(layers), f"{total}, with the profiler on."))
            slowest = [{k: layer[k] for k in ("name", "operator", "milliseconds")} for layer in layers]
            slowest.sort(key=lambda layer: -layer["milliseconds"])
            lines.append(markdown_table(f"Slowest layers of {model}", slowest[:12]))
        return "\n\n".join(line for line in lines if line) + "\n"

    def _figures(self, rows: Sequence[Row]) -> List[Row]:
        several = len({title(row["machine"]) for row in self.rows}) > 1
        return [
            {
                **{key: row["case"][key] for key in ("name", "tracker")},
                "machine": title(row["machine"]) if several else None,
                **{key: row["case"][key] for key in ("precision", "threads", "batch")},
                **{f"{k} ms".replace("count ms", "calls"): v for k, v in (row["latency"] or {}).items() if k in _SHOWN},
                "fps": row["fps"],
                "of peak %": None if row["share_of_peak"] is None else 100 * row["share_of_peak"],
                **{f"{stage} ms": value for stage, value in row["stages"].items()},
                **row["values"],
            }
            for row in rows
        ]


def _machine(m: Dict[str, Any]) -> str:
    """What a reader must know of a machine, by its ``facts``."""
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    clocks = {None: "not known whether fixed", True: "fixed", False: "free"}[m["clocks_locked"]]
    gpu = f", compute capability {m['compute_capability']}, driver {m['driver']}" if m["gpu"] else ""
    system = f"Jetson Linux {m['l4t']}, {m['os']}" if m["l4t"] else m["os"]
    power = m["power_mode"] or "power mode not known"
    return f"{title(m)}{gpu}; {system}; {power}; clocks {clocks}; Python {m['python']}, {versions}"


def _conditions(row: Row) -> Row:
    """On what a row was measured, and how warm and fast the machine was."""
    case, states = row["case"], (row["before"], row["after"])
    clock = "gpu_mhz" if case["device"].startswith("cuda") else "cpu_mhz"
    return {
        "name": case["name"],
        "protocol": row["protocol"],
        **{key: case[key] for key in ("backend", "device", "template")},
        "model sha256": case["model_sha256"][:12],
        "MHz": " to ".join(_cell(state[clock]) for state in states),
        "warmest °C": " to ".join(_cell(max(state["temperatures"].values(), default=None)) for state in states),
        "load": row["before"]["load"],
    }


def _kinds(layers: Sequence[Row]) -> List[Row]:
    """Time of the layers by operator."""
    kinds: Dict[str, List[float]] = {}
    for layer in layers:
        kinds.setdefault(layer["operator"], []).append(layer["milliseconds"])
    total = sum(map(sum, kinds.values())) or 1.0
    return [
        {"operator": kind, "layers": len(times), "ms": sum(times), "share %": 100 * sum(times) / total}
        for kind, times in sorted(kinds.items(), key=lambda item: -sum(item[1]))
    ]


def _cell(value: Any) -> str:
    """Figures to three digits, a dash for what is not known."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def markdown_table(heading: str, rows: Sequence[Row], note: str = "") -> str:
    """A heading and a table whose columns are aligned as plain text too; empty without rows.

    Args:
        heading: above it.
        rows: cells by column. Columns without any value are left out.
        note: below it.
    """
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if any(_known(row.get(c)) for row in rows)]
    if not columns:
        return ""
    figures = [any(type(row.get(c)) in (int, float) for row in rows) for c in columns]
    lines = [
        [c.replace("_", " ") if c.islower() else c for c in columns],
        *([_cell(row.get(c)) for c in columns] for row in rows),
    ]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (width - 1) + "-:"[right] for width, right in zip(widths, figures)])
    padded = ([c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, figures)] for line in lines)
    return "\n".join(
        [f"## {heading}", "", *(f"| {' | '.join(line)} |" for line in padded), *(["", note] if note else [])]
    )


def _known(value: Any) -> bool:
    return value is not None and value != ""
