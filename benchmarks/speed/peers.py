"""Other trackers on the same frames: OpenCV's own, and ONNX models the user points to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

from asymtrack_edge.benchmarks.accuracy.trackers import TrackerSpec
from asymtrack_edge.benchmarks.speed.subjects import Subject
from asymtrack_edge.errors import UsageError
from asymtrack_edge.manifest import FILE_NAME, file_entry


class Peer(NamedTuple):
    """A peer as the user named it.

    Attributes:
        name: in the report.
        spec: how to make it (see ``accuracy.trackers``); None where only a network can be timed.
        models: ONNX files it consists of.
    """

    name: str
    spec: Optional[TrackerSpec]
    models: List[Path]


def parse_peer(text: str) -> Peer:
    """Reads ``--peer``.

    ``opencv:MIL`` (KCF, CSRT), ``name=DIR`` or ``name=FILE.onnx``. A folder with a manifest is an export of
    this package; one with a backbone and a head in ONNX is taken for NanoTrack (``cv2.TrackerNano``); one
    with a single model for VitTrack (``cv2.TrackerVit``); of any other pair the networks alone are timed.

    Raises:
        UsageError: no such form, no such folder, or no ONNX model in it.
    """
    if text.startswith("opencv:"):
        return Peer(text[7:].partition("=")[0].upper(), TrackerSpec(text), [])
    name, separator, place = text.partition("=")
    path = Path(place)
    if not separator or not name or not place:
        raise UsageError(f"--peer takes opencv:MIL, name=DIR or name=FILE.onnx, not {text!r}")
    if path.is_file() and path.suffix == ".onnx":
        return Peer(name, None, [path])
    if not path.is_dir():
        raise UsageError(f"--peer {name}: there is no folder or ONNX file {path}")
    if (path / FILE_NAME).is_file():
        return Peer(name, TrackerSpec(str(path), "onnxruntime"), [path / "search.onnx"])
    models = sorted(path.glob("*.onnx"))
    if not models:
        raise UsageError(f"--peer {name}: there is no ONNX model in {path}")
    heads = [m for m in models if "head" in m.stem.lower()]
    bodies = [m for m in models if "backbone" in m.stem.lower()]
    if len(models) == 2 and len(heads) == 1 and len(bodies) == 1:
        spec = TrackerSpec(f"opencv:nano={bodies[0]},{heads[0]}")
        return Peer(name, spec, [bodies[0], heads[0]])
    if len(models) == 1:
        return Peer(name, TrackerSpec(f"opencv:vit={models[0]}"), models)
    return Peer(name, None, models)


def build_peer(peer: Peer, threads: Optional[int]) -> Any:
    """Makes the tracker of a peer that has one, to use so many threads.

    Raises:
        AsymTrackError: what it needs is missing.
    """
    assert peer.spec is not None
    return replace(peer.spec, threads=threads).build()


def peer_subject(peer: Peer, threads: Optional[int], model: Optional[Path] = None) -> Subject:
    """Describes a peer, or one of its networks."""
    files = [model] if model is not None else peer.models
    hashes = [file_entry(f).sha256 for f in files]
    opencv = peer.spec is not None and peer.spec.name.startswith("opencv:")
    return Subject(
        name=peer.name if model is None or len(peer.models) == 1 else f"{peer.name}/{model.stem}",
        tracker=peer.name,
        backend="opencv" if opencv and model is None else "onnxruntime",
        form="library" if model is None else "host arrays",
        precision="",
        threads=threads,
        template="its own",
        model_sha256=",".join(hashes),
    )
