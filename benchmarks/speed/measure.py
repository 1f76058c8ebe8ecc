"""What the subcommands of ``asymtrack-bench`` do."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any, Callable, Dict, List, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.benchmarks import paper
from asymtrack_edge.benchmarks.speed import against_paper, energy, layers, protocols, startup
from asymtrack_edge.benchmarks.speed.cases import (
    Clip,
    Setting,
    gpu_index,
    make_clip,
    network_case,
    peak_case,
    peer_case,
    settings,
    tracker_case,
)
from asymtrack_edge.benchmarks.speed.machine import conditions, missing, package
from asymtrack_edge.benchmarks.speed.protocols import Bench
from asymtrack_edge.benchmarks.speed.race import Case
from asymtrack_edge.benchmarks.speed.report import Report, markdown_table
from asymtrack_edge.benchmarks.speed.torch_process import reference_case
from asymtrack_edge.errors import BackendError, MissingDependencyError, UsageError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends.loading import model_folder
from asymtrack_edge.variants import VARIANTS, get_variant


class Run:
    """One call of the command.

    Args:
        arguments: parsed; ``line`` is the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.report = Report(arguments.line)
        self.stack = ExitStack()

    def main(self) -> int:
        """Measures, writes and prints."""
        arguments = self.arguments
        if getattr(arguments, "published", False):
            for title, header, rows in paper.tables():
                print(markdown_table(title, [dict(zip(header, row)) for row in rows]) + "\n")
            return 0
        with self.stack:
            getattr(self, {"report": "merge"}.get(arguments.command, arguments.command))()
        # Files first: a reader of our output may go away before its end.
        if arguments.output is not None:
            self.report.write(arguments.output)
        if arguments.json != "-":
            print(self.report.markdown())
        cli.write_json(arguments.json, self.report.document())
        return 0

    def bench(self, seconds: Optional[float], total: float) -> Bench:
        """Shared settings of the protocols, with a progress bar over ``total`` seconds where tqdm is installed."""
        bench = Bench(self.report, seconds, gpu_index(self.arguments.device))
        for line in missing(bench.gpu):
            self.report.say(line)
        tqdm = package("tqdm")
        if tqdm is not None:
            shape = "{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}"
            bar = self.stack.enter_context(tqdm.tqdm(total=total, bar_format=shape, leave=False, disable=None))
            began = monotonic()

            def tick(name: str) -> None:
                bar.set_description_str(name[:40], refresh=False)
                bar.update(min(monotonic() - began, total) - bar.n)

            bench.tick = tick
        return bench

    def keep(self, case: Case) -> Case:
        """A case that is closed at the end."""
        self.stack.callback(case.step.close)
        return case

    def setting(self) -> Setting:
        """The one model and backend of the arguments."""
        a = self.arguments
        return Setting(a.model, a.backend, a.precision, a.device, a.threads)

    def settings(self) -> Dict[str, Setting]:
        """All combinations of the arguments."""
        a = self.arguments
        return settings(a.model, a.backend, a.precision, a.threads, a.device)

    def open(self, wanted: Dict[str, Setting], make: Callable[[str, Setting], Case]) -> List[Case]:
        """Makes a case of every setting; of several, those that cannot be here are left out and named."""
        made = []
        for name, setting in wanted.items():
            try:
                made.append(self.keep(make(name, setting)))
            except (BackendError, MissingDependencyError, UsageError) as error:
                if len(wanted) == 1:
                    raise
                self.report.say(f"{name} was left out: {error}")
        if not made:
            raise UsageError("; ".join(self.report.messages))
        return made

    def networks(self) -> List[Case]:
        """Search networks of all settings, after the published form of the first where it is asked for."""
        cases = self.open(self.settings(), network_case)
        if self.arguments.reference:
            variant = get_variant(cases[0].tracker.replace("AsymTrack-", ""))
            multiply_adds = cases[0].multiply_adds
            case = reference_case(variant, cases[0].device, cases[0].threads, multiply_adds=multiply_adds)
            cases.insert(0, self.keep(case))
        return cases

    def peak(self, cases: Sequence[Case]) -> Optional[Case]:
        """The matrix product that CPU networks are held against; None, and a message, without onnx."""
        threads = {case.threads for case in cases if not case.on_gpu}
        if len(threads) != 1:
            return None
        try:
            return peak_case(threads.pop())
        except MissingDependencyError as error:
            self.report.say(str(error))
            return None

    def clip(self, source: Optional[str] = None, box: Optional[str] = None) -> Clip:
        """Frames to track on."""
        return make_clip(source, box, Path(self.stack.enter_context(tempfile.TemporaryDirectory())))

    def speed(self) -> None:
        """P1 to P6 of all settings."""
        a, wanted = self.arguments, set(self.arguments.protocol)
        seconds = None if a.full else a.seconds
        clip = self.clip(a.clip, a.box) if wanted & {"P5", "P6"} else None
        groups = bool(wanted & {"P1", "P2"}) + ("P5" in wanted) + 0.5 * ("P6" in wanted) * len(self.settings())
        bench = self.bench(seconds, (seconds or 60.0) * groups)
        if wanted & {"P1", "P2", "P4"}:
            cases = self.networks()
            if wanted & {"P1", "P2"}:
                protocols.networks(bench, cases, self.peak(cases))
                self.report.paper += against_paper.beside_table_1(self.report.rows)
            for case in cases if "P4" in wanted else ():
                if case.backend == "tensorrt":
                    folder = model_folder(self.settings()[case.name].model)
                    protocols.trtexec(bench, case, folder, load_manifest(folder))
        if clip is not None:
            trackers = self.open(self.settings(), lambda name, setting: tracker_case(name, setting, clip))
            peers = [self.keep(peer_case(peer, trackers[0].threads, clip)) for peer in a.peer]
            if "P5" in wanted:
                protocols.update(bench, [*trackers, *peers])
            for case in trackers if "P6" in wanted else ():
                protocols.end_to_end(bench, case, clip)

    def ab(self) -> None:
        """P2 of several networks."""
        if len(self.settings()) + self.arguments.reference < 2:
            raise UsageError("a comparison needs two: name another model, --backend A,B or --reference")
        bench = self.bench(self.arguments.seconds, self.arguments.seconds)
        cases = self.networks()
        protocols.networks(bench, cases, self.peak(cases))

    def targets(self) -> None:
        """P2 for several numbers of targets; the two ways take turns at each."""
        counts, seconds = self.arguments.counts, self.arguments.seconds
        bench = self.bench(seconds / len(counts), seconds)
        for count in counts:
            title = f"({count} target{'s' * (count > 1)})"
            ways = {f"one by one {title}": False, f"together {title}": True}
            cases = [self.keep(network_case(name, self.setting(), count, way)) for name, way in ways.items()]
            protocols.networks(bench, cases, calls=300)
            for row in self.report.rows[-2:]:
                row["values"]["ms per target"] = row["latency"]["median"] / count

    def profile(self) -> None:
        """Layers of the search network."""
        a = self.arguments
        if a.trtexec is not None:
            name, found = f"{a.model}, TensorRT", layers.trtexec_layers(a.trtexec)
        else:
            name = f"{a.model}, ONNX Runtime, {a.threads} thread{'s' * (a.threads > 1)}"
            found = layers.onnxruntime_layers(model_folder(a.model) / "search.onnx", a.threads)
        self.report.layers += [{"model": name, **layer} for layer in found]

    def startup(self) -> None:
        """Start-up time and memory."""
        runs = self.arguments.runs
        bench = self.bench(None, 3.0 * runs)
        before = conditions(bench.gpu)
        values = startup.measure(self.setting(), runs, bench.gpu)
        heavy = values.pop("heavy")
        notes = [f"medians of {runs} processes, memory their greatest"]
        notes.append(f"imported without need: {', '.join(heavy)}" if heavy else "torch was not imported")
        case = self.keep(network_case(self.arguments.model, self.setting()))
        bench.add("startup", case, before, values=values, notes=notes)

    def paper(self) -> None:
        """T, S and B beside Tables 1 and 2, the models of Table 4 beside it."""
        a, torch = self.arguments, package("torch") is not None
        bench = self.bench(a.seconds, a.seconds * (1 + torch))
        cases = [
            self.keep(network_case(name, Setting(name, a.backend, a.precision, a.device, a.threads)))
            for name in VARIANTS
        ]
        device = cases[0].device
        for variant in VARIANTS.values() if torch else ():
            name = f"{variant.name}, reference form, PyTorch"
            cases.append(self.keep(reference_case(variant, device, a.threads, name)))
        protocols.networks(bench, cases)
        self.report.paper += against_paper.beside_table_1(self.report.rows)
        if torch:
            against_paper.measure_table_4(bench, device, a.threads)
        else:
            self.report.say("without PyTorch (extra export) there is no reference form and no Table 4")

    def energy(self) -> None:
        """P8 at the pace of a camera and flat out."""
        a = self.arguments
        bench = self.bench(None, 2 * (a.seconds + energy.IDLE_SECONDS))
        sensors = energy.find_sensors(bench.gpu)
        clip = self.clip()
        for paced in (a.fps, None):
            way = "flat out" if paced is None else f"{paced:g} fps"
            case = self.keep(tracker_case(f"{a.model}, {way}", self.setting(), clip))
            before = conditions(bench.gpu)

            def step(case: Case = case) -> Any:
                bench.tick(case.name)
                return case.step.sample()

            values = energy.measure(step, energy.sampling(sensors), a.seconds, paced, energy.IDLE_SECONDS)
            notes = [f"power from {', '.join(sensors)}", "update() on frames in memory; no camera, no decoding"]
            bench.add("P8", case, before, fps=values.pop("fps"), values=values, notes=notes)

    def merge(self) -> None:
        """One report of several files."""
        self.report = Report.merge([Report.load(path) for path in self.arguments.files])
