"""``asymtrack-eval``: runs trackers on a data set and scores them as its own toolkit does."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple
from typing import Sequence as Items

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.accuracy.definitions import PROTOCOLS
from asymtrack_edge.benchmarks.accuracy.metrics import (
    SequenceScore,
    by_attribute,
    score_sequence,
    summarise,
)
from asymtrack_edge.benchmarks.accuracy.plots import draw_plots
from asymtrack_edge.benchmarks.accuracy.report import Evaluation, json_report, text_report
from asymtrack_edge.benchmarks.accuracy.results import ResultStore, speed, split_complete
from asymtrack_edge.benchmarks.accuracy.run import run
from asymtrack_edge.benchmarks.accuracy.trackers import TrackerSpec
from asymtrack_edge.datasets import DATASETS, Sequence, open_dataset
from asymtrack_edge.datasets.readers import Kind
from asymtrack_edge.errors import UsageError

_EXAMPLES = """\
asymtrack-eval folder my-sequences --tracker T --tracker opencv:MIL --plots plots
asymtrack-eval lasot /data/LaSOT --tracker exports/asymtrack-b --jobs 4 --json lasot.json
asymtrack-eval got10k-test /data/GOT-10k --tracker S        (writes the zip for the server)
asymtrack-eval otb /data/OTB100 --results other/OTB100      (scores existing <sequence>.txt files)
"""

_DESCRIPTION = f"""\
Evaluate trackers on a data set in one pass, scored as the data set's toolkit does.

data sets (layouts and metric definitions: docs/accuracy.md):
  {", ".join(DATASETS)}

trackers:
  T, S, B                     this package's bundled weights
  exports/asymtrack-t-fp16    an export directory
  opencv:MIL                  OpenCV's own; also KCF, CSRT (opencv-contrib-python),
                              nano=BACKBONE.onnx,HEAD.onnx and vit=MODEL.onnx
  python:module:callable      your own: returns an object with init(frame, box) and update(frame)
"""


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("asymtrack-eval", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("dataset", choices=list(DATASETS), metavar="DATASET", help="which data set (above)")
    parser.add_argument("root", type=Path, metavar="FOLDER", help="where it is")
    parser.add_argument("--tracker", action="append", default=[], metavar="NAME", help="run this one (repeatable)")
    parser.add_argument(
        "--results",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="score these files (repeatable)",
    )
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--sequences", metavar="A,B|FILE", help="only these: names, or a file with one per line")
    parser.add_argument("--attributes", type=Path, metavar="DIR", help="the toolkit's <sequence>.txt attribute files")
    parser.add_argument("--backend", default="auto", help="inference backend (default: auto)")
    parser.add_argument("--device", type=cli.device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1; timings want 1)")
    parser.add_argument("--fresh", action="store_true", help="run again what already has results")
    parser.add_argument("--per-sequence", action="store_true", help="print the table of sequences too")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write success and precision plots, PNG and SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    return parser


def main(argv: Optional[Items[str]] = None) -> int:
    """Runs the command; returns 0, 1 (a sequence failed), 2 (a mistake in its use) or 130 (interrupted)."""
    return cli.run(_evaluate, _parser().parse_args(argv))


def _evaluate(args: argparse.Namespace) -> int:
    if not args.tracker and not args.results:
        raise UsageError("nothing to evaluate: give --tracker or --results")
    if args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {args.jobs}")
    dataset = DATASETS[args.dataset]
    opened = open_dataset(args.dataset, args.root, args.attributes)
    wanted = _names(args.sequences)
    sequences = [opened.sequence(name) for name in (opened.names if wanted is None else opened.select(wanted))]
    frames = sum(len(s) for s in sequences)
    print(f"{dataset.title}: {len(sequences)} sequences, {frames} frames")
    if dataset.size is not None and args.sequences is None and len(sequences) != dataset.size:
        print(f"note: the published set has {dataset.size} sequences: do not compare with published figures")
    specs = [TrackerSpec(name, args.backend, args.device, args.threads) for name in args.tracker]
    labels = [spec.label for spec in specs] + [path.resolve().name for path in args.results]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise UsageError(f"two trackers are called {repeated[0]}: rename one folder, or evaluate them apart")
    evaluations = [_run_and_score(dataset, args, sequences, spec) for spec in specs]
    for path in args.results:
        if not path.is_dir():
            raise UsageError(f"there is no folder of results {path}")
        store = ResultStore(path, dataset.layout)
        evaluations.append(_score(dataset, sequences, store, path.resolve().name, None, {}))
    protocol = PROTOCOLS[dataset.protocol]
    print(f"{protocol.definition}\n\n{text_report(evaluations, args.per_sequence)}")
    if args.jobs > 1:
        print(f"note: speeds were measured with {args.jobs} processes side by side")
    summaries = {e.tracker: e.summary for e in evaluations if e.summary is not None}
    if args.plots is not None and summaries:
        title = args.root.resolve().name if args.dataset == "folder" else dataset.title
        for path in draw_plots(title, summaries, args.plots):
            print(f"wrote {path}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = json_report(args.dataset, protocol.definition, evaluations)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for e in evaluations:
        for name, error in e.failures.items():
            print(f"error: {e.tracker} failed on {name}: {error}", file=sys.stderr)
        if e.submission is not None:
            print(f"wrote {e.submission}, ready for the {dataset.title} server")
        if e.summary is None and not e.failures:
            print(f"{e.tracker}: the ground truth of {dataset.title} is withheld: only its server can score")
    return 1 if any(e.failures for e in evaluations) else 0


def _names(option: Optional[str]) -> Optional[List[str]]:
    """Names given on the command line, or in a file of them."""
    if option is None:
        return None
    names = Path(option).read_text().split() if Path(option).is_file() else option.split(",")
    if not any(names):
        raise UsageError("--sequences names no sequence")
    return [name for name in names if name]


def _run_and_score(dataset: Kind, args: argparse.Namespace, sequences: List[Sequence], spec: TrackerSpec) -> Evaluation:
    store = ResultStore(args.output / args.dataset / spec.label, dataset.layout)
    identity = spec.identity()
    store.claim(identity, args.fresh)
    if args.fresh:
        store.forget(sequences)
    done, missing = split_complete(store, sequences)
    if done:
        print(f"{spec.label}: {len(done)} sequences already have results (--fresh runs them again)")
    with _progress(spec.label, sum(len(s) for s in missing)) as advance:
        outcomes = run(spec, missing, store, min(args.jobs, max(1, len(missing))), advance)
    failures = {}
    for outcome in outcomes:
        if outcome.error is None:
            continue
        failures[outcome.sequence.name] = outcome.error
        if outcome.detail:
            log = store.root / "errors" / f"{outcome.sequence.name}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(outcome.detail)
            failures[outcome.sequence.name] += f" (traceback: {log})"
    return _score(dataset, sequences, store, spec.label, identity, failures)


def _score(
    dataset: Kind,
    sequences: List[Sequence],
    store: ResultStore,
    label: str,
    identity: Optional[Dict[str, object]],
    failures: Dict[str, str],
) -> Evaluation:
    """Scores the result files, so that what is reported is what is written."""
    protocol = PROTOCOLS[dataset.protocol]
    there = [s for s in sequences if s.name not in failures]
    found: List[Tuple[Sequence, SequenceScore]] = []
    for sequence in there:
        score = score_sequence(protocol, sequence, store.boxes(sequence))
        if score is not None:
            found.append((sequence, score))
    scores = [score for _, score in found]
    submission = None
    if identity is not None and dataset.layout in ("got10k", "trackingnet") and not failures:
        submission = str(store.submission(there))
    return Evaluation(
        tracker=label,
        identity=identity,
        summary=summarise(protocol, scores) if scores else None,
        attributes=by_attribute(protocol, [s for s, _ in found], scores) if scores else {},
        speed=speed([store.times(s) for s in there]),
        failures=failures,
        submission=submission,
    )


@contextmanager
def _progress(label: str, frames: int) -> Iterator[Callable[[int], None]]:
    """A bar that counts frames; a plain line every thousand where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            if (done + count) // 1000 > done // 1000 or done + count == frames:
                print(f"{label}: {done + count} of {frames} frames", file=sys.stderr)
            done += count

        yield advance
        return
    with tqdm(total=frames, desc=label, unit="frame", disable=not frames) as bar:
        yield bar.update


if __name__ == "__main__":
    sys.exit(main())
