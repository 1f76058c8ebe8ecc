"""The report of a run: a JSON document, and a Markdown page that is printed and written."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, Callable, Dict, List, Sequence

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.speed.machine import conditions, facts, title
from asymtrack_edge.benchmarks.speed.race import Case, summarise
from asymtrack_edge.benchmarks.tables import cell, markdown_table
from asymtrack_edge.errors import without_secrets
from asymtrack_edge.files import write_text

FORMAT = "asymtrack-edge-benchmark 5"

#: P1 and P2 are two figures from the same calls.
NETWORK = "P1, P2"
#: Protocols by id: what their figures mean (docs/benchmarks.md explains them in full).
PROTOCOLS: Dict[str, str] = {
    NETWORK: "search network alone, random crops, template cached; fps is P1 (as in the paper), milliseconds are P2",
    "P5": "the whole update(frame) on frames in memory; fps is 1 over the median",
    "P6": "from the encoded video to the box, by stage",
    "P8": "joules per frame by power rail",
    "startup": "import, load, first update and memory of a fresh process",
}

#: Columns for the latency in a table of figures.
_LATENCY = {"count": "calls", "median": "median ms", "p90": "p90 ms", "p99": "p99 ms", "mean": "mean ms"}

Row = Dict[str, Any]


@dataclass
class Report:
    """Everything that a run measured, as plain data.

    A row has ``protocol``, ``case`` (``race.Case.facts``), ``machine`` (``machine.facts``), ``before`` and ``after``
    (``machine.conditions``), ``latency`` (``race.summarise``, ms) or None, ``fps`` by the protocol's own definition or
    None, ``stages`` (ms per frame), ``values`` (named with their unit), and ``notes``.
    """

    command: str  # the command line, so that the run can be repeated
    rows: List[Row] = field(default_factory=list)
    ratios: List[Row] = field(default_factory=list)  # of race.compare
    paper: List[Row] = field(default_factory=list)  # measured beside published, see benchmarks.paper
    messages: List[str] = field(default_factory=list)  # remarks, such as what could not be measured and why
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def say(self, message: str) -> None:
        if without_secrets(message) not in self.messages:
            self.messages.append(without_secrets(message))

    def document(self) -> Dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Writes ``report.json`` and ``report.md`` into ``folder``."""
        write_text(folder / "report.json", json.dumps(self.document(), indent=1) + "\n")
        write_text(folder / "report.md", self.markdown())

    def markdown(self) -> str:
        lines = [f"# Speed report\n\nMade {self.created} by `{self.command}`."]
        lines += dict.fromkeys(f"- machine: {_machine(row['machine'])}" for row in self.rows)
        lines += [f"> warning: {r['protocol']} of {r['name']}: {r['warning']}" for r in self.ratios if r["warning"]]
        lines += [f"> {message}" for message in self.messages]
        ratios = [{**ratio, "warning": None} for ratio in self.ratios]
        note = "Cases took turns. Speedup is the median ratio of the rounds; low to high is the middle 80 % of ratios."
        lines.append(markdown_table("Speedups", ratios, note))
        for protocol, what in PROTOCOLS.items():
            rows = [row for row in self.rows if row["protocol"] == protocol]
            notes = dict.fromkeys(note for row in rows for note in row["notes"])
            lines.append(markdown_table(f"{protocol}: {what}", [_figures(row) for row in rows], "; ".join(notes)))
        note = "If the machine is not the paper's, the ratio compares machines as much as programs."
        lines.append(markdown_table("Beside the paper", [{**row, "machine": None} for row in self.paper], note))
        note = "Clock and temperature: before to after the measurement."
        lines.append(markdown_table("Conditions", [_conditions(row) for row in self.rows], note))
        return "\n\n".join(line for line in lines if line) + "\n"


def _figures(row: Row) -> Row:
    """A row of a protocol's table."""
    latency = row["latency"] or {}
    return {
        "name": row["case"]["name"],
        **{column: latency.get(key) for key, column in _LATENCY.items()},
        "fps": row["fps"],
        **{f"{stage} ms": value for stage, value in row["stages"].items()},
        **row["values"],
    }


def _machine(m: Dict[str, Any]) -> str:
    """What a reader must know about a machine, from its ``facts``."""
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    gpu = f", compute capability {m['compute_capability']}, driver {m['driver']}" if m["gpu"] else ""
    system = f"Jetson Linux {m['l4t']}, {m['os']}" if m["l4t"] else m["os"]
    return f"{title(m)}{gpu}; {system}; {m['power_mode'] or 'power mode unknown'}; Python {m['python']}, {versions}"


def _conditions(row: Row) -> Row:
    """What a row was measured on, and how warm and fast the machine was."""
    case, states = row["case"], (row["before"], row["after"])
    clock = "gpu_mhz" if case["device"].startswith("cuda") else "cpu_mhz"
    return {
        "name": case["name"],
        "protocol": row["protocol"],
        **{key: case[key] for key in ("tracker", "backend", "precision", "device", "threads", "batch")},
        "model sha256": case["model_sha256"][:12],
        "MHz": " to ".join(cell(state[clock]) for state in states),
        "warmest °C": " to ".join(cell(max(state["temperatures"].values(), default=None)) for state in states),
        "load": row["before"]["load"],
    }


class Bench:
    """The state that all protocols of a run share."""

    def __init__(self, report: Report, gpu: int = 0) -> None:
        self.report = report  # gets the rows
        self.gpu = gpu  # index of the CUDA device that is used, if any
        self.left_out = False  # whether a requested case could not be measured
        self.stack = ExitStack()  # closes everything that the run opened
        self.folder = Path(self.stack.enter_context(TemporaryDirectory()))
        self.tick: Callable[[str], None] = lambda name: None  # called regularly with a case's name

    def expect(self, total: float) -> None:
        """Shows a progress bar over ``total`` seconds."""
        shape = "{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}"
        bar = self.stack.enter_context(cli.progress(total=total, bar_format=shape))
        began = monotonic()

        def tick(name: str) -> None:
            bar.set_description_str(name[:40], refresh=False)
            bar.update(min(monotonic() - began, total) - bar.n)

        self.tick = tick

    def keep(self, case: Case) -> Case:
        """Registers a case to be closed at the end, and returns it."""
        self.stack.callback(case.close)
        return case

    def add(
        self, protocol: str, case: Case, before: Row, *notes: str, samples: Sequence[float] = (), **figures: Any
    ) -> None:
        """Adds the row of a measurement that ends now; ``samples`` are the seconds of single calls."""
        row = {
            "protocol": protocol,
            "case": case.facts(),
            "before": before,
            "after": conditions(self.gpu),  # at once: the first call of facts() takes a second
            "machine": facts(self.gpu),
            "latency": summarise(samples) if samples else None,
            "notes": [*case.notes, *notes],
        }
        self.report.rows.append({**row, "fps": None, "stages": {}, "values": {}, **figures})
