"""Runs a plan: builds its candidates group by group and measures them."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Set, Tuple

from asymtrack_edge.benchmarks.speed import clips, models, protocols, tracking
from asymtrack_edge.benchmarks.speed.facts import run_command
from asymtrack_edge.benchmarks.speed.own_process import torch_step
from asymtrack_edge.benchmarks.speed.peers import Peer, build_peer, parse_peer, peer_subject
from asymtrack_edge.benchmarks.speed.plan import TORCH_BACKENDS, Plan
from asymtrack_edge.benchmarks.speed.protocols import Bench, Tick
from asymtrack_edge.benchmarks.speed.rows import Findings
from asymtrack_edge.benchmarks.speed.subjects import (
    EngineStep,
    Subject,
    UpdateStep,
    engine_subject,
    onnx_step,
    random_inputs,
)
from asymtrack_edge.benchmarks.speed.timing import Step
from asymtrack_edge.benchmarks.speed.trtexec import find_trtexec, run_trtexec
from asymtrack_edge.benchmarks.speed.yardsticks import matrix_product
from asymtrack_edge.errors import UsageError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends.loading import model_folder, open_backend
from asymtrack_edge.runtime.tracker import Tracker
from asymtrack_edge.variants import Variant


def run_plan(plan: Plan, tick: Tick = lambda note: None, say: Callable[[str], None] = models.say_on_stderr) -> Findings:
    """Measures everything in a plan.

    Args:
        plan: what.
        tick: called now and then while measuring.
        say: called with a line before anything slow that is no measuring.

    Raises:
        AsymTrackError: something asked for is not available; nothing is skipped in silence.
    """
    bench = Bench.here(plan.seconds, tick, plan.device)
    peers = [parse_peer(text) for text in plan.peers]
    found = Findings()
    with ExitStack() as stack:
        clip = None
        if {"P5", "P6"} & set(plan.protocols):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if plan.video is not None and plan.box is not None:
                clip = clips.from_source(plan.video, plan.box)
            else:
                say("making a 1280x720 clip")
                clip = clips.synthetic(folder)
        for variant in plan.resolved():
            for threads in plan.threads:
                for batch in plan.batches:
                    found.add(_networks(bench, plan, variant, threads, batch, peers, say))
                found.add(_trackers(bench, plan, variant, threads, clip, peers, say))
    return found


def _networks(
    bench: Bench,
    plan: Plan,
    variant: Variant,
    threads: Optional[int],
    batch: int,
    peers: Sequence[Peer],
    say: Callable[[str], None],
) -> Findings:
    """P1 to P4: the network alone."""
    wanted = [p for p in ("P1", "P2") if p in plan.protocols]
    if not {"P1", "P2", "P3", "P4"} & set(plan.protocols):
        return Findings()
    suffix = _suffix(plan, variant, threads, batch)
    with ExitStack() as stack:
        candidates: List[Tuple[Subject, Step]] = []
        engines: List[Tuple[Subject, EngineStep, Path]] = []
        for backend in plan.backends:
            if backend in TORCH_BACKENDS:
                if wanted:
                    candidates.append(_torch(backend, plan, variant, threads, batch, suffix))
                    stack.callback(candidates[-1][1].close)
                continue
            for precision in plan.precisions:
                subject, step, folder = _engine(backend, precision, plan, variant, threads, batch, suffix, say)
                stack.callback(step.close)
                engines.append((subject, step, folder))
                if wanted:
                    candidates.append((subject, step))
                fits = batch <= step.engine.manifest.max_batch
                if "P3" in plan.protocols and fits and backend in ("onnxruntime", "onnxruntime-cuda"):
                    candidates.append(_host_arrays(subject, folder, backend, plan.device, threads, batch))
        found = Findings()
        if candidates:
            if "P3" in plan.protocols and batch == 1:
                candidates += _peer_networks(peers, threads, {s.name for s, _ in candidates})
            peak = matrix_product(threads, bench.facts) if any(not s.on_gpu for s, _ in candidates) else None
            found = protocols.network(bench, candidates, None, peak, tuple(wanted))
        if "P4" in plan.protocols:
            for subject, step, folder in engines:
                found.rows.append(protocols.trtexec_way(bench, subject, step))
                if subject.backend == "tensorrt":
                    found.add(_trtexec(bench, subject, folder))
    return found


def _engine(
    backend: str,
    precision: str,
    plan: Plan,
    variant: Variant,
    threads: Optional[int],
    batch: int,
    suffix: str,
    say: Callable[[str], None],
) -> Tuple[Subject, EngineStep, Path]:
    """An exported network on a backend, its description and its directory."""
    folder = _folder(plan, variant, precision, batch, backend, say)
    engine = open_backend(folder, backend, threads=threads)
    name = backend + (f" {precision}" if len(plan.precisions) > 1 else "") + suffix
    subject = replace(engine_subject(engine, plan.device, threads, name), batch=batch)
    if batch > engine.manifest.max_batch:
        subject = replace(subject, notes=(*subject.notes, f"{batch} calls of batch 1: the export is static"))
    return subject, EngineStep(engine, batch), folder


def _suffix(plan: Plan, variant: Variant, threads: Optional[int], batch: int) -> str:
    """Keeps names apart where a run has several of something."""
    parts = [f"AsymTrack-{variant.name}"] if len(plan.variants) > 1 and plan.model is None else []
    parts += [_threads(threads)] if len(plan.threads) > 1 and threads else []
    parts += [f"batch {batch}"] if len(plan.batches) > 1 else []
    return f" ({', '.join(parts)})" if parts else ""


def _threads(threads: Optional[int]) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"


def _folder(plan: Plan, variant: Variant, precision: str, batch: int, backend: str, say: Callable[[str], None]) -> Path:
    if plan.model is not None:
        return model_folder(plan.model)
    return models.export_folder(variant, precision, max(batch, 1), backend, say)


def _torch(
    backend: str, plan: Plan, variant: Variant, threads: Optional[int], batch: int, suffix: str
) -> Tuple[Subject, Step]:
    device = f"cuda:{plan.device}" if backend.endswith("-cuda") else "cpu"
    form = backend.split("-")[1]
    return torch_step(variant, form, device, threads, batch, name=backend + suffix)


def _host_arrays(
    subject: Subject, folder: Path, backend: str, device: int, threads: Optional[int], batch: int
) -> Tuple[Subject, Step]:
    providers: List[object] = ["CPUExecutionProvider"]
    if backend == "onnxruntime-cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device}))
    feeds = random_inputs(load_manifest(folder), batch)
    step = onnx_step(str(folder / "search.onnx"), feeds, threads, providers)
    return replace(subject, name=f"{subject.name} host arrays", form="host arrays"), step


def _peer_networks(peers: Sequence[Peer], threads: Optional[int], taken: Set[str]) -> List[Tuple[Subject, Step]]:
    found: List[Tuple[Subject, Step]] = []
    for peer in peers:
        for model in peer.models:
            subject = replace(peer_subject(peer, threads, model), form="host arrays")
            if subject.name in taken:
                raise UsageError(f"--peer {peer.name}: this name is taken, choose another")
            taken.add(subject.name)
            found.append((subject, onnx_step(str(model), None, threads, ["CPUExecutionProvider"])))
    return found


def _trtexec(bench: Bench, subject: Subject, folder: Path) -> Findings:
    """P4 by trtexec itself, where it is installed."""
    tool = find_trtexec()
    manifest = load_manifest(folder)
    names = [n for n in manifest.engines if n.startswith("search")]
    if tool is None or not names:
        why = "trtexec is not installed" if tool is None else "the directory has no search engine"
        return Findings(messages=[f"P4 by trtexec itself was left out: {why}"])
    specs = (manifest.search, *manifest.state) if manifest.max_batch > 1 else ()
    before = bench.probe()
    shapes = {s.name: (subject.batch, *s.shape) for s in specs}
    seen = run_trtexec(tool, folder / names[0], shapes, lambda command: run_command(command, 120))
    row = bench.row(
        "P4",
        replace(subject, name=f"{subject.name} (trtexec)"),
        before,
        latency=None,
        fps=subject.batch * seen.throughput,
        stages=seen.stages(),
        values={f"{n} median (ms)": p.median for n, p in seen.parts.items()},
        notes=("trtexec's own defaults; CUDA graph, spin wait and transfers differ between its versions",),
    )
    return Findings(rows=[row])


def _trackers(
    bench: Bench,
    plan: Plan,
    variant: Variant,
    threads: Optional[int],
    clip: Optional[clips.Clip],
    peers: Sequence[Peer],
    say: Callable[[str], None],
) -> Findings:
    """P5 to P7: whole trackers."""
    if not {"P5", "P6", "P7"} & set(plan.protocols):
        return Findings()
    suffix = _suffix(replace(plan, batches=(1,)), variant, threads, 1)
    with ExitStack() as stack:
        made: List[Tuple[Subject, Tracker]] = []
        for backend in plan.backends:
            if backend in TORCH_BACKENDS:
                continue  # P5 to P7 are about the runtime; PyTorch is a yardstick for the network
            for precision in plan.precisions:
                folder = _folder(plan, variant, precision, 1, backend, say)
                tracker = Tracker.load(folder, backend, threads=threads)
                stack.callback(tracker.close)
                name = backend + (f" {precision}" if len(plan.precisions) > 1 else "") + suffix
                subject = engine_subject(tracker.backend, plan.device, threads, name)
                if subject.weights.startswith("random"):
                    subject = replace(subject, notes=(*subject.notes, "the box wanders, so crops are not typical"))
                made.append((subject, tracker))
        found = Findings()
        if "P5" in plan.protocols and clip is not None:
            steps = [(_on(s, clip.name), UpdateStep(t, clip.frames, clip.box)) for s, t in made]
            for peer in peers:
                if peer.spec is not None:
                    described = peer_subject(peer, threads)
                    if len(plan.threads) > 1:
                        described = replace(described, name=f"{described.name} ({_threads(threads)})")
                    steps.append(
                        (_on(described, clip.name), UpdateStep(build_peer(peer, threads), clip.frames, clip.box))
                    )
            if steps:
                found.add(tracking.update(bench, steps))
        if "P6" in plan.protocols and clip is not None:
            for subject, tracker in made:
                row = tracking.end_to_end(bench, _on(subject, clip.name), tracker, clip.open, clip.box, 300)
                found.rows.append(row)
        if "P7" in plan.protocols:
            for subject, tracker in made:
                title, items = clips.sequences(plan.dataset)
                found.rows.append(tracking.data_set(bench, _on(subject, title), tracker, items))
        return found


def _on(subject: Subject, frames: str) -> Subject:
    return replace(subject, notes=(*subject.notes, f"frames: {frames}"))
