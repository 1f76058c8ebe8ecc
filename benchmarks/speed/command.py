"""``asymtrack-bench``: speed, comparisons, profile, start-up, memory, energy, and the paper's tables."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.speed import plan as planning
from asymtrack_edge.benchmarks.speed.facts import collect, conditions
from asymtrack_edge.benchmarks.speed.models import export_folder, say_on_stderr
from asymtrack_edge.benchmarks.speed.protocols import Bench
from asymtrack_edge.benchmarks.speed.report.document import (
    Document,
    layer_entries,
    load_document,
    make_document,
    merge,
    save_document,
)
from asymtrack_edge.benchmarks.speed.report.folder import write_report
from asymtrack_edge.benchmarks.speed.report.tables import as_text
from asymtrack_edge.benchmarks.speed.rows import Findings, Row
from asymtrack_edge.benchmarks.speed.subjects import engine_subject
from asymtrack_edge.errors import UsageError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.loading import BACKENDS, model_folder, open_engine
from asymtrack_edge.runtime.progress import Progress
from asymtrack_edge.variants import get_variant

EXAMPLES = """
asymtrack-bench speed --variant T                             everything measurable, under two minutes
asymtrack-bench speed --variant T,S,B --threads 1,2 --protocol P1,P2 --output report
asymtrack-bench speed --backend tensorrt --precision fp16 --full
asymtrack-bench speed --peer opencv:MIL --peer nano=models/nanotrack --protocol P5
asymtrack-bench ab exports/plain exports/merged               which of two exports is faster
asymtrack-bench targets --counts 1,2,4,8                      several targets in one frame
asymtrack-bench profile --variant T                           where the time goes, layer by layer
asymtrack-bench startup --variant T                           start-up time and memory of a fresh process
asymtrack-bench paper                                         measured beside the paper's Tables 1, 2 and 4
asymtrack-bench energy --variant T                            joules per frame (Jetson, or readable counters)
asymtrack-bench report a.json b.json --output report          one report of several machines
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser(
        "asymtrack-bench", "Measure speed by named protocols (docs/benchmarks.md explains them).", EXAMPLES
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    speed = _add(commands, "speed", _speed, "protocols P1 to P7 on any backends, side by side")
    _model_options(speed, several=True)
    speed.add_argument("--backend", metavar="A,B", help=f"of {', '.join(planning.ALL_BACKENDS)} (default: all here)")
    speed.add_argument("--precision", default="fp32", metavar="A,B", help="of exported models: fp32, fp16")
    speed.add_argument("--threads", metavar="N,M", help="CPU threads to try (default: the runtime's own choice)")
    speed.add_argument("--batch", default="1", metavar="N,M", help="crops in one call to try (default: 1)")
    speed.add_argument("--protocol", default="P1,P2,P3,P4,P5,P6,P7", metavar="A,B", help="default: P1 to P7")
    speed.add_argument("--peer", action="append", default=[], metavar="NAME", help="opencv:MIL, name=DIR or name=FILE")
    speed.add_argument("--video", metavar="SOURCE", help="for P5 and P6 (default: a synthetic 1280x720 clip)")
    speed.add_argument("--box", metavar="x,y,w,h", help="the target in the video's first frame")
    speed.add_argument("--dataset", metavar="NAME=DIR", help="for P7, for example otb=/data/OTB100")
    speed.add_argument("--full", action="store_true", help="all calls of the protocols, however long it takes")
    _time_options(speed, 15.0, "per group of candidates")

    ab = _add(commands, "ab", _ab, "which of several exports is faster, taking turns")
    ab.add_argument("models", nargs="+", type=Path, metavar="DIR", help="export directories, the first is the base")
    ab.add_argument("--backend", default="onnxruntime", choices=BACKENDS, help="default: onnxruntime")
    ab.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    ab.add_argument("--device", type=int, default=0, metavar="N", help="GPU index")
    ab.add_argument("--reference", action="store_true", help="put the published form in PyTorch first")
    _time_options(ab, 30.0, "in all")

    targets = _add(commands, "targets", _targets, "several targets: one call for all against one each")
    _model_options(targets)
    targets.add_argument("--counts", default="1,2,4,8", metavar="N,M", help="default: 1,2,4,8")
    _one_backend(targets)
    targets.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    _time_options(targets, 40.0, "in all")

    profile = _add(commands, "profile", _profile, "time of each layer of the search network")
    _model_options(profile)
    profile.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    profile.add_argument("--trtexec", type=Path, metavar="FILE", help="read what trtexec --exportProfile wrote instead")
    _outputs(profile)

    startup = _add(commands, "startup", _startup, "start-up time and memory of a fresh tracking process")
    _model_options(startup)
    _one_backend(startup)
    startup.add_argument("--runs", type=int, default=5, metavar="N", help="processes to start (default: 5)")
    _outputs(startup)

    paper = _add(commands, "paper", _paper, "measured speeds beside the paper's tables")
    paper.add_argument("--variant", default="T,S,B", metavar="A,B", help="default: T,S,B")
    paper.add_argument("--table", default="1,4", metavar="A,B", help="to measure: 1 (with 2) and 4 (default: both)")
    paper.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    paper.add_argument("--published", action="store_true", help="only print the paper's Tables 1 to 5")
    paper.add_argument("--from", dest="source", type=Path, metavar="FILE", help="rows measured before, for Table 1")
    _time_options(paper, 40.0, "per table and form")

    energy = _add(commands, "energy", _energy, "joules per frame by rail (P8)")
    _model_options(energy)
    _one_backend(energy)
    energy.add_argument("--fps", type=float, default=30.0, metavar="N", help="camera to imitate (default: 30)")
    _time_options(energy, 20.0, "for each way of running")

    report = _add(commands, "report", _report, "one report of files written with --json")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _outputs(report)
    return parser


Handler = Callable[[argparse.Namespace], Document]


def _add(commands: Any, name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    made.set_defaults(handler=handler)
    return made


def _model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    what = "which models" if several else "which model"
    parser.add_argument("--variant", default="T", metavar="A,B" if several else "{T,S,B}", help=f"{what} (default: T)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="an export directory instead")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="GPU index (default: 0)")


def _one_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="onnxruntime", choices=BACKENDS, help="default: onnxruntime")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def _time_options(parser: argparse.ArgumentParser, default: float, what: str) -> None:
    parser.add_argument("--seconds", type=float, default=default, metavar="S", help=f"{what} (default: {default:g})")
    _outputs(parser)


def _outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the document to FILE, or print it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write a report: JSON, CSV, Markdown, plots, HTML")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    arguments = make_parser().parse_args(argv)
    arguments.line = shlex.join(["asymtrack-bench", *(sys.argv[1:] if argv is None else argv)])
    return cli.run(_main, arguments)


def _main(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "published", False):
        from asymtrack_edge.benchmarks.speed.against_paper import published_text

        print(published_text())
        return 0
    seconds = getattr(arguments, "seconds", None)
    if seconds is not None and seconds <= 0:
        raise UsageError(f"--seconds must be positive, not {seconds:g}")
    if (getattr(arguments, "threads", None) or "1") in (0, "0"):
        raise UsageError("--threads must be at least 1")
    json_file = None if arguments.json in (None, "-") else Path(arguments.json)
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"there is no folder {json_file.parent} to write {json_file.name} into")
    document = arguments.handler(arguments)
    # Files first: a reader of our output may go away before its end.
    if json_file is not None:
        save_document(document, json_file)
    if arguments.output is not None:
        for path in write_report(document, arguments.output):
            print(f"wrote {path}", file=sys.stderr)
    print(json.dumps(document, indent=1) if arguments.json == "-" else as_text(document))
    return 0


class _TimeBar:
    """Progress of something that takes a known time, in seconds."""

    def __init__(self, seconds: float) -> None:
        self._progress = Progress(max(1, round(seconds)), "s")
        self._began = monotonic()

    def tick(self, note: str) -> None:
        """Moves the bar to now."""
        while self._progress.done < min(monotonic() - self._began, self._progress.total or 0):
            self._progress.step(note)

    def __enter__(self) -> Callable[[str], None]:
        return self.tick

    def __exit__(self, *_: Any) -> None:
        self._progress.close()


def _names(text: str) -> Tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _whole_numbers(option: str, text: str) -> Tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise UsageError(f"{option} takes whole numbers with commas between, not {text!r}") from None


def _model(arguments: argparse.Namespace, backend: str = "onnxruntime") -> Path:
    if arguments.model is not None:
        return model_folder(arguments.model)
    return export_folder(get_variant(arguments.variant), backend=backend, say=say_on_stderr)


def _speed(arguments: argparse.Namespace) -> Document:
    plan = planning.Plan(
        variants=_names(arguments.variant),
        backends=_names(arguments.backend) if arguments.backend else planning.default_backends(),
        precisions=_names(arguments.precision),
        threads=_whole_numbers("--threads", arguments.threads) if arguments.threads else (None,),
        batches=_whole_numbers("--batch", arguments.batch),
        protocols=tuple(p.upper() for p in _names(arguments.protocol)),
        seconds=None if arguments.full else arguments.seconds,
        device=arguments.device,
        model=arguments.model,
        peers=tuple(arguments.peer),
        video=arguments.video,
        box=None if arguments.box is None else cli.box_argument(arguments.box),
        dataset=arguments.dataset,
    )
    plan.resolved()
    with _TimeBar(planning.estimate(plan)) as tick:
        found = planning.run_plan(plan, tick)
    return _with_paper(found, arguments.line)


def _with_paper(found: Findings, line: str) -> Document:
    from asymtrack_edge.benchmarks.speed.against_paper import beside_tables_1_and_2

    return make_document(found, line, paper=beside_tables_1_and_2(found.rows))


def _ab(arguments: argparse.Namespace) -> Document:
    from asymtrack_edge.benchmarks.speed import comparison

    with _TimeBar(arguments.seconds) as tick:
        bench = Bench(collect(), arguments.seconds, tick)
        found = comparison.measure(
            bench, arguments.models, arguments.backend, arguments.threads, arguments.device, arguments.reference
        )
    return make_document(found, arguments.line)


def _targets(arguments: argparse.Namespace) -> Document:
    from asymtrack_edge.benchmarks.speed import scaling

    counts = _whole_numbers("--counts", arguments.counts)
    with _TimeBar(arguments.seconds * 1.2) as tick:
        found = scaling.measure(
            Bench(collect(), arguments.seconds, tick),
            get_variant(arguments.variant),
            counts,
            arguments.backend,
            arguments.precision,
            arguments.threads,
            arguments.device,
            arguments.model,
        )
    return make_document(found, arguments.line)


def _profile(arguments: argparse.Namespace) -> Document:
    from asymtrack_edge.benchmarks.speed.profile import onnxruntime_layers, parse_trtexec_profile

    if arguments.trtexec is not None:
        try:
            text = arguments.trtexec.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {arguments.trtexec}: {getattr(error, 'strerror', None) or error}") from None
        layers = parse_trtexec_profile(text)
        return make_document(Findings(), arguments.line, layer_entries(arguments.trtexec.name, layers))
    folder = _model(arguments)
    manifest = load_manifest(folder)
    name = f"AsymTrack-{manifest.variant} {manifest.precision}, onnxruntime, {arguments.threads} thread(s)"
    layers = onnxruntime_layers(folder / "search.onnx", arguments.threads)
    return make_document(Findings(), arguments.line, layer_entries(name, layers))


def _startup(arguments: argparse.Namespace) -> Document:
    from asymtrack_edge.benchmarks.speed import startup

    if arguments.runs < 1:
        raise UsageError(f"--runs must be at least 1, not {arguments.runs}")
    folder = _model(arguments, arguments.backend)
    before = conditions()
    seen = startup.measure(folder, arguments.backend, arguments.device, arguments.threads, arguments.runs)
    engine = open_engine(folder, arguments.backend, arguments.device, arguments.threads)
    subject = engine_subject(engine, arguments.backend, arguments.device, arguments.threads)
    engine.close()
    values = {
        "import (s)": seen.import_s,
        "load (s)": seen.load_s,
        "fastest load (s)": seen.load_least_s,
        "load, processor time (s)": seen.load_cpu_s,
        "first init and update (s)": seen.first_track_s,
    }
    memory = {"RSS (MB)": seen.rss_mb, "peak RSS (MB)": seen.peak_rss_mb, "GPU (MB)": seen.device_mb}
    values.update({name: value for name, value in memory.items() if value is not None})
    notes = [f"medians of {seen.runs} processes, memory their greatest"]
    notes.append(f"imported without need: {', '.join(seen.heavy)}" if seen.heavy else "torch was not imported")
    row = Row("startup", subject, collect(), before, conditions(), None, None, values=values, notes=tuple(notes))
    return make_document(Findings(rows=[row]), arguments.line)


def _paper(arguments: argparse.Namespace) -> Document:
    from asymtrack_edge.benchmarks.speed import against_paper

    tables = _names(arguments.table)
    if set(tables) - {"1", "2", "4"}:
        raise UsageError("--table takes 1 (with 2) and 4; Tables 3 and 5 hold accuracies (asymtrack-eval)")
    found = Findings()
    lines: List[Dict[str, Any]] = []
    if arguments.source is not None:
        document = load_document(arguments.source)
        return {**document, "paper": against_paper.beside_saved_rows(document["rows"]), "command": arguments.line}
    forms = 1 + (planning.default_backends() != ("onnxruntime",))
    groups = len(_names(arguments.variant)) * bool({"1", "2"} & set(tables)) + forms * ("4" in tables)
    with _TimeBar(groups * arguments.seconds * 1.1) as tick:
        if {"1", "2"} & set(tables):
            plan = planning.Plan(
                variants=_names(arguments.variant),
                backends=planning.default_backends(),
                threads=(arguments.threads,),
                protocols=("P1", "P2"),
                seconds=arguments.seconds,
            )
            found.add(planning.run_plan(plan, tick))
            lines += against_paper.beside_tables_1_and_2(found.rows)
        if "4" in tables:
            bench = Bench(collect(), arguments.seconds, tick)
            for form in against_paper.FORMS[2 - forms :]:
                part = against_paper.measure_table_4(bench, form, arguments.threads, say_on_stderr)
                lines += against_paper.beside_table_4(part)
                part.messages.append(against_paper.order_sentence(part, form))
                found.add(part)
    return make_document(found, arguments.line, paper=lines)


def _energy(arguments: argparse.Namespace) -> Document:
    import tempfile

    from asymtrack_edge.benchmarks.speed import clips, energy
    from asymtrack_edge.benchmarks.speed.subjects import UpdateStep
    from asymtrack_edge.runtime.tracker import Tracker

    energy.find_meter_or_fail()
    folder = _model(arguments, arguments.backend)
    facts = collect()
    tracker = Tracker.load(folder, arguments.backend, arguments.device, arguments.threads)
    found = Findings()
    with tempfile.TemporaryDirectory() as scratch:
        clip = clips.synthetic(Path(scratch))
    step = UpdateStep(tracker, clip.frames, clip.box)
    for paced in (arguments.fps, None):
        before = conditions()
        seen = energy.measure(step.sample, energy.find_meter(), arguments.seconds, paced)
        way = "flat out" if paced is None else f"{paced:g} fps"
        subject = engine_subject(tracker.engine, arguments.backend, arguments.device, arguments.threads)
        found.rows.append(
            Row(
                "P8",
                replace(subject, name=f"{subject.name}, {way}"),
                facts,
                before,
                conditions(),
                None,
                seen.frames / seen.seconds,
                values=energy.values(seen),
                notes=(f"power from {seen.meter}", "update() on 1280x720 frames in memory; no camera, no decoding"),
            )
        )
    return make_document(found, arguments.line)


def _report(arguments: argparse.Namespace) -> Document:
    return merge([load_document(path) for path in arguments.files])


if __name__ == "__main__":
    sys.exit(main())
