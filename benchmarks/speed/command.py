"""``asymtrack-bench``: speed, comparisons, profile, start-up, memory, energy, and the paper's tables."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.speed import plan as planning
from asymtrack_edge.benchmarks.speed.arguments import make_parser
from asymtrack_edge.benchmarks.speed.candidates import run_plan
from asymtrack_edge.benchmarks.speed.facts import collect, gpu_facts, probe
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
from asymtrack_edge.runtime.backends.loading import model_folder, open_backend
from asymtrack_edge.runtime.outputs.progress import TimeBar
from asymtrack_edge.variants import get_variant

Handler = Callable[[argparse.Namespace], Document]


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
    threads = getattr(arguments, "threads", None)
    for number in _whole_numbers("--threads", "" if threads is None else str(threads)):
        if number < 1:
            raise UsageError(f"--threads must be at least 1, not {number}")
    json_file = None if arguments.json in (None, "-") else Path(arguments.json)
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"there is no folder {json_file.parent} to write {json_file.name} into")
    document = _HANDLERS[arguments.command](arguments)
    # Files first: a reader of our output may go away before its end.
    if json_file is not None:
        save_document(document, json_file)
    if arguments.output is not None:
        for path in write_report(document, arguments.output):
            print(f"wrote {path}", file=sys.stderr)
    print(json.dumps(document, indent=1) if arguments.json == "-" else as_text(document))
    return 0


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
    with TimeBar(planning.estimate(plan)) as tick:
        found = run_plan(plan, tick)
    return _with_paper(found, arguments.line)


def _with_paper(found: Findings, line: str) -> Document:
    from asymtrack_edge.benchmarks.speed.against_paper import beside_tables_1_and_2

    return make_document(found, line, paper=beside_tables_1_and_2(found.rows))


def _ab(arguments: argparse.Namespace) -> Document:
    from asymtrack_edge.benchmarks.speed import comparison

    with TimeBar(arguments.seconds) as tick:
        bench = Bench.here(arguments.seconds, tick, arguments.device)
        found = comparison.measure(
            bench, arguments.models, _names(arguments.backend), arguments.threads, arguments.device, arguments.reference
        )
    return make_document(found, arguments.line)


def _targets(arguments: argparse.Namespace) -> Document:
    from asymtrack_edge.benchmarks.speed import scaling

    counts = _whole_numbers("--counts", arguments.counts)
    with TimeBar(arguments.seconds * 1.2) as tick:
        found = scaling.measure(
            Bench.here(arguments.seconds, tick, arguments.device),
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
    now = probe(arguments.device)
    before = now()
    seen = startup.measure(folder, arguments.backend, arguments.device, arguments.threads, arguments.runs)
    engine = open_backend(folder, arguments.backend, threads=arguments.threads)
    subject = engine_subject(engine, arguments.device, arguments.threads)
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
    facts = collect(device=arguments.device)
    row = Row("startup", subject, facts, before, now(), None, None, values=values, notes=tuple(notes))
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
    forms = against_paper.FORMS if planning.has_torch() else ("graph",)
    groups = len(_names(arguments.variant)) * bool({"1", "2"} & set(tables)) + len(forms) * ("4" in tables)
    with TimeBar(groups * arguments.seconds * 1.1) as tick:
        if {"1", "2"} & set(tables):
            plan = planning.Plan(
                variants=_names(arguments.variant),
                backends=planning.default_backends(),
                threads=(arguments.threads,),
                protocols=("P1", "P2"),
                seconds=arguments.seconds,
            )
            found.add(run_plan(plan, tick))
            lines += against_paper.beside_tables_1_and_2(found.rows)
        if "4" in tables:
            bench = Bench.here(arguments.seconds, tick)
            for form in forms:
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

    facts, now = collect(device=arguments.device), probe(arguments.device)
    gpu = gpu_facts(device=arguments.device).get("pci")
    energy.find_meter_or_fail()
    folder = _model(arguments, arguments.backend)
    tracker = Tracker.load(folder, arguments.backend, threads=arguments.threads)
    found = Findings()
    with tempfile.TemporaryDirectory() as scratch:
        clip = clips.synthetic(Path(scratch))
    step = UpdateStep(tracker, clip.frames, clip.box)
    for paced in (arguments.fps, None):
        before = now()
        seen = energy.measure(step.sample, energy.find_meter(gpu), arguments.seconds, paced)
        way = "flat out" if paced is None else f"{paced:g} fps"
        subject = engine_subject(tracker.backend, arguments.device, arguments.threads)
        found.rows.append(
            Row(
                "P8",
                replace(subject, name=f"{subject.name}, {way}"),
                facts,
                before,
                now(),
                None,
                seen.frames / seen.seconds,
                values=energy.values(seen),
                notes=(f"power from {seen.meter}", "update() on 1280x720 frames in memory; no camera, no decoding"),
            )
        )
    return make_document(found, arguments.line)


def _report(arguments: argparse.Namespace) -> Document:
    return merge([load_document(path) for path in arguments.files])


_HANDLERS: Dict[str, Handler] = {
    "speed": _speed,
    "ab": _ab,
    "targets": _targets,
    "profile": _profile,
    "startup": _startup,
    "paper": _paper,
    "energy": _energy,
    "report": _report,
}


if __name__ == "__main__":
    sys.exit(main())
