"""Miniature training data, generated when the tests run."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, List

import cv2
import numpy as np
import pytest
import torch

from asymtrack_edge.training.pairs import Pairs
from asymtrack_edge.variants import Variant
from tests.datasets.miniature import save, write_images
from tests.helpers import random_inputs

CPU = torch.device("cpu")
#: The box of the square in ``moving``, frame by frame.
BOXES = [[20.0 + 3 * i, 30.0 + i, 24.0, 24.0] for i in range(24)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_pairs(variant: Variant, batch: int) -> Pairs:
    """Noise with known targets; always the same values."""
    low = 0.2 + 0.2 * torch.rand(batch, 2, generator=torch.Generator().manual_seed(0))
    yes = torch.ones(batch, dtype=torch.bool)
    return Pairs(*random_inputs(variant, batch), torch.cat([low, low + 0.3], 1), yes, yes, torch.ones(batch))


def picture(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    random = np.random.default_rng(seed)
    image = cv2.resize(random.integers(0, 255, (4, 5, 3), dtype=np.uint8), (width, height))
    for _ in range(3):
        x, y = int(random.integers(width - 30)), int(random.integers(height - 30))
        cv2.rectangle(image, (x, y), (x + 25, y + 20), random.integers(0, 255, 3).tolist(), -1)
    return image


def moving(seed: int, frames: int) -> List[np.ndarray]:
    """A textured square of 24 pixels, at (20, 30) in the first of 120 x 90 frames, that moves by (3, 1) per frame."""
    patch = np.random.default_rng(seed + 1).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    patch = cv2.resize(patch, (24, 24), interpolation=cv2.INTER_NEAREST)
    out = [picture(seed) for _ in range(frames)]
    for i, frame in enumerate(out):
        frame[30 + i : 54 + i, 20 + 3 * i : 44 + 3 * i] = patch
    return out


@pytest.fixture(scope="session")
def got10k(tmp_path_factory: Any) -> Path:
    """Two sequences of six frames; in each, the target is hidden in two frames."""
    root = tmp_path_factory.mktemp("data") / "GOT-10k"
    for n in (1, 2):
        folder = root / "train" / f"GOT-10k_Train_{n:06d}"
        save(folder / "groundtruth.txt", BOXES[:6])
        save(folder / "absence.label", "0\n0\n1\n0\n0\n0\n")
        save(folder / "cover.label", "8\n8\n8\n0\n7\n8\n")
        write_images(folder, moving(n, 6), "{:08d}.jpg", first=1)
    save(root / "train" / "list.txt", "GOT-10k_Train_000001\nGOT-10k_Train_000002\n")
    return root


@pytest.fixture(scope="session")
def collection(tmp_path_factory: Any) -> Path:
    """Four stills with one box each, two clips with one track each."""
    root = tmp_path_factory.mktemp("data") / "collection"
    images = {f"s{i}.png": moving(i, 1)[0] for i in range(4)}
    stills = [{"file": name, "boxes": BOXES[:1], "source": "a", "shard": "all.tar"} for name in images]
    clips = []
    for n in range(2):
        frames = {f"c{n}/{i}.png": frame for i, frame in enumerate(moving(10 + n, 6))}
        images.update(frames)
        tracks = [{"boxes": [*BOXES[:3], None, *BOXES[4:6]], "kind": "gt"}]
        clips.append({"frames": list(frames), "tracks": tracks, "source": f"b:{n}", "shard": ["all.tar"]})
    for name, records in (("stills", stills), ("clips", clips)):
        save(root / f"{name}.json", json.dumps(records))
    with tarfile.open(root / "all.tar", "w") as archive:
        for name, image in images.items():
            member = tarfile.TarInfo(name)
            data = cv2.imencode(".png", image)[1].tobytes()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return root
