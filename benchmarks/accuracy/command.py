"""``asymtrack-eval``: runs trackers on a data set and scores them as the data set's own toolkit does."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional
from typing import Sequence as Items

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.accuracy import metrics, probes, report
from asymtrack_edge.benchmarks.accuracy.executors import Executor, join_cluster, local_executor, ray_executor
from asymtrack_edge.benchmarks.accuracy.report import Evaluation
from asymtrack_edge.benchmarks.accuracy.results import Results, speed
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.datasets import DATASETS, Dataset, Sequence
from asymtrack_edge.datasets.readers import Kind
from asymtrack_edge.errors import DatasetError, UsageError
from asymtrack_edge.files import check_folder, printable, read_lines

_NAMES = [name for name, kind in DATASETS.items() if kind.protocol]

_EXAMPLES = """\
asymtrack-eval folder my-sequences --model T exports/mine --tracker opencv:MIL --plots plots
asymtrack-eval lasot /data/LaSOT --model exports/asymtrack-b --jobs 4 --json lasot.json
asymtrack-eval got10k-test /data/GOT-10k --model T          (writes the zip for the server)
asymtrack-eval otb /data/OTB100 --results other/OTB100      (scores existing result files)
"""

_DESCRIPTION = f"""\
Runs trackers over a data set in one pass and scores them as the data set's toolkit does.
All options: asymtrack-eval DATASET --help

data sets (their layouts and metrics: docs/evaluation.md):
  {", ".join(_NAMES[:7])},
  {", ".join(_NAMES[7:])}
"""

_TRACKERS = """\
trackers:
  --model T                   this package's bundled weights
  --model exports/t-fp16      a directory written by asymtrack-export
  --tracker opencv:MIL        OpenCV's own; also KCF, CSRT (opencv-contrib-python),
                              nano=BACKBONE.onnx,HEAD.onnx and vit=MODEL.onnx
  --tracker python:mod:name   your own: returns an object with init(frame, box) and update(frame)
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. A command line that begins with a data set means ``run``."""
    parser = cli.parser("asymtrack-eval", _DESCRIPTION, _EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="DATASET | COMMAND")

    run = commands.add_parser(
        "run",
        help="evaluate on DATASET; the word run may be omitted",
        description=f"{_DESCRIPTION}\n{_TRACKERS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("dataset", choices=_NAMES, metavar="DATASET", help="name of the data set (see above)")
    run.add_argument("root", type=Path, metavar="FOLDER", help="folder of the data set")
    run.add_argument("--sequences", metavar="A,B|FILE", help="evaluate only these: names, or a file with one per line")
    run.add_argument("--attributes", type=Path, metavar="DIR", help="folder of the toolkit's attribute files")
    cli.add_json(run)
    cli.add_model(run, several=True)
    several: Dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    run.add_argument("--tracker", metavar="NAME", help="opencv:... and python:... (see above)", **several)
    run.add_argument("--results", type=Path, metavar="DIR", help="score the result files in DIR", **several)
    cli.add_backend(run)
    run.add_argument("--no-recover", dest="recover", action="store_false", help="do not search for lost targets")
    text = "number of processes (default: 1; measure speed with 1)"
    run.add_argument("--jobs", type=cli.positive, default=1, metavar="N", help=text)
    run.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, auto or local")
    run.add_argument("--fresh", action="store_true", help="run sequences again that already have results")
    text = "folder for results (default: results)"
    run.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help=text)
    run.add_argument("--per-sequence", action="store_true", help="print a table of sequences too")
    run.add_argument("--plots", type=Path, metavar="DIR", help="draw success and precision plots, PNG and SVG")
    run.set_defaults(body=_run)

    for name, (text, body) in probes.COMMANDS.items():
        probe = commands.add_parser(name, help=text, description=inspect.getdoc(body), allow_abbrev=False)
        probe.add_argument("root", type=Path, metavar="FOLDER", help="sequences in GOT-10k's layout")
        cli.add_model(probe)
        cli.add_backend(probe)
        cli.add_json(probe)
        probe.set_defaults(body=body)
    return parser


def main(argv: Optional[Items[str]] = None) -> int:
    """Runs the command. Returns 1 if a sequence is not as published or has no score, 2 if the command is misused."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in ("run", *probes.COMMANDS, "-h", "--help", "--version"):
        words.insert(0, "run")
    args = make_parser().parse_args(words)
    return cli.run(args.body, args)


class _Data(NamedTuple):
    """The data to evaluate. ``left_out``: unreadable sequences; ``notes``: how other sequences are not as published."""

    kind: Kind
    title: str
    protocol: metrics.Protocol
    sequences: List[Sequence]
    left_out: Dict[str, str]
    notes: Dict[str, str]

    @property
    def withheld(self) -> bool:
        """Whether only a server can score the results."""
        return self.kind.size is not None and all(sequence.withheld for sequence in self.sequences)


def _read(args: argparse.Namespace) -> _Data:
    root = Path(os.path.abspath(args.root)) if args.ray else args.root  # workers run in other folders
    dataset = Dataset(args.dataset, root, args.attributes)
    kind, wanted = dataset.kind, args.sequences
    title = args.root.resolve().name if args.dataset == "folder" else kind.title
    if wanted is not None:
        # Not Path.is_file, which fails on a list too long for a file name.
        names = read_lines(wanted) if os.path.isfile(wanted) else wanted.split(",")
        wanted = [name.strip() for name in names if name.strip()]
        if not wanted:
            raise UsageError("--sequences names no sequence")
    data = _Data(kind, title, metrics.PROTOCOLS[kind.protocol], *dataset.read(wanted), {})
    for s in data.sequences:
        if s.note:
            data.notes[s.name] = f"sequence {s.name}: {s.note}"
        elif not data.withheld and not metrics.counted(data.protocol, s).any():
            data.notes[s.name] = f"sequence {s.name}: no frame can be scored: the target is absent or not annotated"
    _say(args, f"{kind.title}: {len(data.sequences)} sequences, {sum(map(len, data.sequences))} frames")
    if kind.size is not None and wanted is None and len(dataset) != kind.size:
        _say(args, f"note: the published set has {kind.size} sequences: do not compare with published scores")
    return data


def _say(args: argparse.Namespace, text: str) -> None:
    """Prints text, to standard error if standard output is for JSON."""
    print(text, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)


def _run(args: argparse.Namespace) -> int:
    names = [*(args.model or []), *args.tracker] or ([] if args.results else ["T"])
    specs = [TrackerSpec.of(name, args, args.recover) for name in names]
    labels = [spec.label for spec in specs] + [path.resolve().name for path in args.results]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise UsageError(f"two trackers are called {repeated[0]}: rename one folder, or evaluate them separately")
    if args.plots:
        report.figure(1, 1)  # fails before the evaluation, not after it, if plots cannot be drawn or written
        check_folder(args.plots)
        args.plots.mkdir(parents=True, exist_ok=True)
    for spec in specs:
        check_folder(args.output / args.dataset / spec.label)
    data = _read(args)
    # Problems of any tracker or result are reported before the first tracker runs for hours.
    found = [(path.resolve().name, Results.found(path, data.sequences)) for path in args.results]
    runs, evaluations = [], []
    for spec in specs:
        identity = spec.identity()
        if args.dataset == "folder":  # names and start boxes do not identify the data: the clips may be a darkened copy
            identity["data"] = os.path.realpath(args.root)
        results = Results.own(args.output / args.dataset / spec.label, data.kind.protocol, data.sequences, identity)
        if not args.fresh or args.sequences is not None:
            results.check()
        runs.append((spec, results))
    executor: Executor = partial(local_executor, args.jobs)
    if specs and args.ray is not None:
        executor = partial(ray_executor, join_cluster(args.ray, args.jobs * (args.threads or 1)))
    for spec, results in runs:
        evaluation = _score(data, spec.label, results, _track(args, data, spec, results, executor))
        partial_run = evaluation.failures or data.left_out or args.sequences is not None
        if data.withheld and not partial_run:
            evaluation.submission = str(results.submission())
        evaluations.append(evaluation)
    evaluations += [_score(data, name, results, {}) for name, results in found]
    _say(args, f"{data.protocol.definition}\n\n{report.text_report(evaluations, args.per_sequence)}")
    if args.jobs > 1 or args.ray:
        _say(args, "note: speeds were measured while several processes ran in parallel")
    return _finish(args, data, evaluations)


def _track(
    args: argparse.Namespace, data: _Data, spec: TrackerSpec, results: Results, executor: Executor
) -> Dict[str, str]:
    """Runs a tracker on the sequences without results and writes the results; returns sequence -> error."""
    missing = [sequence for sequence in data.sequences if args.fresh or not results.complete(sequence)]
    if done := len(data.sequences) - len(missing):
        _say(args, f"{spec.label}: {done} sequences already have results (--fresh runs them again)")
    failures, frames = {}, sum(map(len, missing))
    # Where stderr is no terminal, the bar is updated rarely and stays at the end.
    seldom: Dict[str, Any] = {} if sys.stderr.isatty() else {"mininterval": 30, "leave": True}
    with cli.progress(title=spec.label, total=frames, unit="frame", disable=not frames, **seldom) as bar:
        for number, (sequence, boxes, times, error, detail) in enumerate(executor(spec, missing, bar.update)):
            if number == 0:  # the tracker could be made; only now may results of another one be removed
                results.claim(args.fresh)
                if data.withheld:  # an old archive of other results must not be submitted
                    results.archive.unlink(missing_ok=True)
            if boxes is not None and times is not None:
                results.write(sequence.name, boxes, times)
                continue
            failures[sequence.name] = str(error)
            if detail:
                failures[sequence.name] += f" (traceback: {printable(results.log(sequence.name, detail))})"
    return failures


def _score(data: _Data, label: str, results: Results, failures: Dict[str, str]) -> Evaluation:
    """Scores the result files, not the results in memory, so that the scores match what is on disk."""
    scores, times, notes = [], [], {}
    for sequence in data.sequences:
        if sequence.name in failures:
            continue
        try:
            boxes, seconds, note = results.read(sequence)
            score = metrics.score_sequence(data.protocol, sequence, boxes)
        except DatasetError as error:
            failures[sequence.name] = str(error)
            continue
        times.append(seconds)
        if note:
            notes[sequence.name] = note
        if score is not None:
            scores.append(score)
    summary = metrics.summarise(data.protocol, scores) if scores else None
    tags = sorted({tag for score in scores for tag in score.attributes})
    tagged = {t: metrics.summarise(data.protocol, [score for score in scores if t in score.attributes]) for t in tags}
    return Evaluation(label, results.identity or None, summary, tagged, speed(times), failures, notes)


def _finish(args: argparse.Namespace, data: _Data, evaluations: List[Evaluation]) -> int:
    """Writes JSON and plots, and says what was written and what failed; returns the exit code."""
    document = {"dataset": args.dataset, "definition": data.protocol.definition}
    found = {"left_out": data.left_out, "notes": data.notes, "trackers": [report.plain(e) for e in evaluations]}
    cli.write_json(args.json, {**document, **found})
    summaries = {e.tracker: e.summary for e in evaluations if e.summary is not None}
    for path in report.draw_curves(data.title, summaries, args.plots) if args.plots and summaries else ():
        _say(args, f"wrote {printable(path)}")
    problems = [*data.left_out.items(), *data.notes.items()]
    for e in evaluations:
        if e.submission is not None:
            ready = "ready" if len(data.sequences) == data.kind.size else f"of {len(data.sequences)} sequences"
            _say(args, f"wrote {printable(e.submission)}, {ready} for the {data.kind.title} server")
        problems += [(name, f"{e.tracker} failed on {name}: {error}") for name, error in e.failures.items()]
        problems += [(name, f"{e.tracker} on {name}: {note}") for name, note in e.notes.items()]
    if data.withheld:
        _say(args, f"the ground truth of {data.kind.title} is withheld: only its server can score")
    if not problems:
        return 0
    names = dict.fromkeys(name for name, _ in problems)
    cli.say(f"{len(names)} of {len(data.sequences) + len(data.left_out)} sequences have problems: {', '.join(names)}")
    for _, text in problems:
        cli.say(f"error: {text}")
    return 1
