"""Coverage-guided fuzzing of everything that reads what others wrote.

``python -m tests.fuzz [TARGET ...] [--runs N]`` needs atheris (``pip install atheris``). Every input
must be read, or refused with this package's own error: anything else stops the run and is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, Tuple

from asymtrack_edge.errors import AsymTrackError

Target = Callable[[bytes], object]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _checkpoint(folder: Path) -> Target:
    from asymtrack_edge.checkpoints import load_weights

    path = folder / "weights.pth"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_weights(path)

    return read


def _manifest(folder: Path) -> Target:
    from asymtrack_edge.manifest import FILE_NAME, load_manifest

    def read(data: bytes) -> None:
        (folder / FILE_NAME).write_bytes(data)
        load_manifest(folder)

    return read


def _groundtruth(folder: Path) -> Target:
    from asymtrack_edge.datasets.sequences import read_boxes, read_labels

    path = folder / "groundtruth.txt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_labels(path)
        read_boxes(path)

    return read


def _box(folder: Path) -> Target:
    from asymtrack_edge.cli import box_argument
    from asymtrack_edge.geometry import check_box

    return lambda data: check_box(box_argument(_text(data)), (480, 640, 3))


def _message(folder: Path) -> Target:
    from asymtrack_edge.runtime.web.protocol import parse_wish

    return lambda data: parse_wish(_text(data))


def _checkpoint_seeds() -> List[bytes]:
    import torch

    def saved(legacy: bool) -> bytes:
        file = io.BytesIO()
        weights = {"net": {"bottleneck.weight": torch.zeros(2, 2), "box_head.n": torch.tensor(3)}, "epoch": 1}
        torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
        return file.getvalue()

    from safetensors.torch import save

    return [saved(True), saved(False), save({"bottleneck.weight": torch.zeros(2, 2)})]


def _manifest_seeds() -> List[bytes]:
    from asymtrack_edge.runtime.backends.loading import model_folder

    return [(model_folder("T") / "manifest.json").read_bytes()]


#: What is fuzzed: how the reader is made, in a folder of its own, and inputs to begin with.
TARGETS: Dict[str, Tuple[Callable[[Path], Target], Callable[[], List[bytes]]]] = {
    "checkpoint": (_checkpoint, _checkpoint_seeds),
    "manifest": (_manifest, _manifest_seeds),
    "groundtruth": (_groundtruth, lambda: [b"1,2,3,4\n5.5\t6 7 nan\n", b"1\n0\n"]),
    "box": (_box, lambda: [b"10,20,30,40", b"-1.5,nan,1e9,inf"]),
    "message": (_message, lambda: [json.dumps({"action": "mark", "frame": 3, "box": [1, 2, 3, 4]}).encode()]),
}


def fuzz(name: str, runs: int) -> None:
    """Fuzzes one target in this process, which ends with it."""
    import atheris

    with tempfile.TemporaryDirectory() as work:
        make, seeds = TARGETS[name]
        # First: what is imported before cannot be instrumented any more.
        with atheris.instrument_imports(include=["asymtrack_edge"]):
            read = make(Path(work))
        corpus = Path(work) / "corpus"
        corpus.mkdir()
        for i, seed in enumerate(seeds()):
            (corpus / str(i)).write_bytes(seed)

        def once(data: bytes) -> None:
            with contextlib.suppress(AsymTrackError):
                read(data)

        limits = [f"-runs={runs}", "-max_len=4096", "-rss_limit_mb=4096"]
        crashes = f"-artifact_prefix={tempfile.gettempdir()}/"
        atheris.Setup([sys.argv[0], *limits, crashes, str(corpus)], once)
        atheris.Fuzz()


def main() -> int:
    """Fuzzes the targets named, or all, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000, help="inputs per target (default 100,000)")
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    if len(names) == 1:
        fuzz(names[0], arguments.runs)
        return 0
    failed = []
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz", name, "--runs", str(arguments.runs)]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
        done = [line for line in ran.stderr.splitlines() if line.startswith("Done ")]
        print(f"{name}: {done[-1] if done and ran.returncode == 0 else ran.stdout[-2000:] + ran.stderr[-2000:]}")
        failed += [name] * (ran.returncode != 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
