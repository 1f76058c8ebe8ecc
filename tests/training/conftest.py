"""Miniature data, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Dict, List

import cv2
import numpy as np
import pytest
import torch

from asymtrack_edge.training.pairs import Pairs
from asymtrack_edge.variants import VARIANTS, Variant


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Variant:
    """AsymTrack-T on crops of a quarter of the area."""
    return VARIANTS["T"].with_(template_size=64, search_size=128)


@pytest.fixture(scope="session")
def mini() -> Variant:
    """The smallest crops the network takes sensibly."""
    return VARIANTS["T"].with_(template_size=32, search_size=64)


def random_pairs(variant: Variant, batch: int) -> Pairs:
    """Noise with known targets, always the same."""
    random = torch.Generator().manual_seed(0)
    template, search = (
        torch.randn(batch, 3, side, side, generator=random) for side in (variant.template_size, variant.search_size)
    )
    low = 0.2 + 0.2 * torch.rand(batch, 2, generator=random)
    yes = torch.ones(batch, dtype=torch.bool)
    return Pairs(template, search, torch.cat([low, low + 0.3], 1), yes, yes)


def picture(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    """A BGR scene of smooth colour with a few rectangles."""
    random = np.random.default_rng(seed)
    image = cv2.resize(random.integers(0, 255, (4, 5, 3), dtype=np.uint8), (width, height))
    for _ in range(3):
        x, y = int(random.integers(width - 30)), int(random.integers(height - 30))
        colour = tuple(int(v) for v in random.integers(0, 255, 3))
        cv2.rectangle(image, (x, y), (x + 25, y + 20), colour, -1)
    return image


def moving(seed: int, frames: int, height: int = 90, width: int = 120) -> List[np.ndarray]:
    """A textured square of 24 pixels that moves by 3, 1 from (20, 30) over a still scene."""
    scene = picture(seed, height, width)
    patch = np.random.default_rng(seed + 1).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    patch = cv2.resize(patch, (24, 24), interpolation=cv2.INTER_NEAREST)
    out = []
    for i in range(frames):
        frame = scene.copy()
        frame[30 + i : 54 + i, 20 + 3 * i : 44 + 3 * i] = patch
        out.append(frame)
    return out


def boxes_of(frames: int) -> List[List[float]]:
    return [[20.0 + 3 * i, 30.0 + i, 24.0, 24.0] for i in range(frames)]


@pytest.fixture(scope="session")
def got10k(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("data") / "GOT-10k"
    for n in (1, 2):
        folder = root / "train" / f"GOT-10k_Train_{n:06d}"
        folder.mkdir(parents=True)
        for i, frame in enumerate(moving(n, 6), start=1):
            assert cv2.imwrite(str(folder / f"{i:08d}.jpg"), frame)
        (folder / "groundtruth.txt").write_text("".join("{},{},{},{}\n".format(*box) for box in boxes_of(6)))
        (folder / "absence.label").write_text("0\n0\n1\n0\n0\n0\n")
        (folder / "cover.label").write_text("8\n8\n8\n0\n7\n8\n")
        (folder / "cut_by_image.label").write_text("0\n" * 6)
    (root / "train" / "list.txt").write_text("GOT-10k_Train_000001\nGOT-10k_Train_000002\n")
    return root


@pytest.fixture(scope="session")
def coco(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("data") / "COCO"
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, objects = [], []
    for i in range(3):
        name = f"{i + 9:012d}.jpg"
        cv2.imwrite(str(root / "train2017" / name), moving(i, 1)[0])
        images.append({"id": i + 9, "file_name": name, "height": 90, "width": 120})
        for box in ([20, 30, 24, 24], [0, 0, 60, 60]):
            objects.append({"id": len(objects), "image_id": i + 9, "bbox": box, "iscrowd": 0, "category_id": 1})
    index = {"images": images, "annotations": objects[:-1], "categories": []}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="session")
def collection(tmp_path_factory: Any) -> Path:
    """Four stills with a box each, two clips with a track each, a cut-out."""
    root = tmp_path_factory.mktemp("data") / "collection"
    root.mkdir()
    files: Dict[str, bytes] = {}

    def add(name: str, image: np.ndarray) -> str:
        fine, data = cv2.imencode(Path(name).suffix, image)
        assert fine
        files[name] = data.tobytes()
        return name

    stills = [
        {"file": add(f"s{i}.png", moving(i, 1)[0]), "boxes": boxes_of(1), "source": "a", "shard": "all.tar"}
        for i in range(4)
    ]
    clips = []
    for n in range(2):
        names = [add(f"c{n}/{i}.png", frame) for i, frame in enumerate(moving(10 + n, 6))]
        boxes: List[Any] = list(boxes_of(6))
        boxes[3] = None
        tracks = [{"boxes": boxes, "kind": "gt"}]
        clips.append({"frames": names, "tracks": tracks, "source": f"b:{n}", "shard": "all.tar"})
    rgba = np.zeros((60, 60, 4), np.uint8)
    cv2.circle(rgba, (30, 30), 20, (0, 0, 255, 255), -1)
    cutouts = [{"file": add("o.png", rgba), "shard": "all.tar"}]
    with tarfile.open(root / "all.tar", "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for name, records in (("stills", stills), ("clips", clips), ("cutouts", cutouts)):
        (root / f"{name}.json").write_text(json.dumps(records))
    return root
