"""The published layouts, in miniature, and the pairs that are cut from disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from asymtrack_edge.datasets.training import Coco, Got10k, Lasot, TrackingNet
from asymtrack_edge.errors import DatasetError
from asymtrack_edge.training.augmentation import Augmentation
from asymtrack_edge.training.disk import DiskPairs, read_frame
from asymtrack_edge.training.pairs import PairSampler
from asymtrack_edge.training.pool import PoolBuilder
from asymtrack_edge.training.recipes import SMALL
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, Variant
from tests.training.conftest import boxes_of

CPU = torch.device("cpu")


def test_lasot_leaves_out_hidden_frames_and_other_splits(lasot: Path) -> None:
    data = Lasot(lasot)
    assert len(data) == 1
    boxes, usable = data.annotation(0)
    assert boxes.tolist() == boxes_of(6)
    assert usable.tolist() == [0, 1, 3, 4]
    assert read_frame(data.frame(0, 5)).shape == (90, 120, 3)


def test_lasot_without_class_folders_or_list_leaves_out_the_test_split(lasot: Path, tmp_path: Path) -> None:
    shutil.copytree(lasot / "airplane", tmp_path / "flat")
    # airplane-1 is of the test split, airplane-2 is not.
    assert [folder.name for folder in Lasot(tmp_path / "flat").folders] == ["airplane-2"]
    shutil.rmtree(tmp_path / "flat" / "airplane-2")
    with pytest.raises(DatasetError, match="no training sequences"):
        Lasot(tmp_path / "flat")


def test_got10k_leaves_out_absent_and_covered_frames(got10k: Path) -> None:
    for root in (got10k, got10k / "train"):
        data = Got10k(root)
        assert len(data) == 2
        assert data.annotation(1).usable.tolist() == [0, 1, 4, 5]
        assert data.frame(1, 0).name == "00000001.jpg" and data.frame(1, 0).is_file()


def test_trackingnet_finds_all_chunks(trackingnet: Path) -> None:
    data = TrackingNet(trackingnet)
    assert len(data) == 2
    assert [data.frame(t, 4).is_file() for t in (0, 1)] == [True, True]
    assert data.annotation(0).boxes[2].tolist() == [26, 32, 24, 24]


def test_coco_leaves_out_crowds_and_specks(coco: Path) -> None:
    data = Coco(coco)
    assert len(data) == 5
    assert data.annotation(0).boxes.tolist() == [[20, 30, 24, 24]]
    assert all(data.frame(t, 0).is_file() for t in range(5))


@pytest.mark.parametrize("reader", [Lasot, Got10k, TrackingNet, Coco])
def test_an_empty_or_missing_folder_is_named(reader: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=str(tmp_path)):
        reader(tmp_path)
    with pytest.raises(DatasetError, match="nowhere"):
        reader(tmp_path / "nowhere")


def test_damaged_annotations_are_named(got10k: Path, tmp_path: Path) -> None:
    root = tmp_path / "got"
    shutil.copytree(got10k, root)
    first = root / "train" / "GOT-10k_Train_000001"
    (first / "groundtruth.txt").write_text("1,2,3\n")
    with pytest.raises(DatasetError, match=r"groundtruth\.txt"):
        Got10k(root).annotation(0)
    second = root / "train" / "GOT-10k_Train_000002"
    (second / "absence.label").write_text("0\n")
    with pytest.raises(DatasetError, match=r"absence\.label"):
        Got10k(root).annotation(1)


def test_pairs_from_disk_equal_pairs_from_memory(lasot: Path, tiny: Variant) -> None:
    """The same windows on the same frames give the same pairs, whatever holds the frames."""
    aug = Augmentation(greyscale=0.0, brightness=0.0)
    data = Lasot(lasot)
    disk = DiskPairs([data], tiny, aug, CPU, workers=1, ahead=0)
    job = disk.jobs[6, 4] = disk._submit(6, 4)
    pairs = disk.draw(6, 4)
    disk.close()
    builder = PoolBuilder(128, 6)
    for i in range(6):
        builder.add_image(read_frame(data.frame(0, i))[..., ::-1])
    sampler = PairSampler(builder.build(), tiny, aug)
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGE_MEAN, IMAGE_STD))
    from_each = [sampler._cut(torch.full((6,), i), job.plan.search, tiny.search_size).float() for i in range(6)]
    chosen = []
    for i in range(6):
        errors = [(crops[i] - (pairs.search[i] * std + mean)).abs().max().item() for crops in from_each]
        assert min(errors) < 0.01
        chosen.append(errors.index(min(errors)))
    assert set(chosen) <= {0, 1, 3, 4} and len(set(chosen)) > 1


def test_disk_pairs_are_reproducible_in_any_order(got10k: Path, coco: Path, tiny: Variant) -> None:
    sources = [Got10k(got10k), Coco(coco)]
    one = DiskPairs(sources, tiny, SMALL.augmentation, CPU, seed=3, workers=2)
    two = DiskPairs(sources, tiny, SMALL.augmentation, CPU, seed=3, workers=1)
    first = [one.draw(4, step) for step in range(3)]
    for a, b in zip(first[2], two.draw(4, 2)):
        assert torch.equal(a, b)
    assert not torch.equal(first[0].search, first[1].search)
    one.close()
    two.close()


def test_data_sets_are_drawn_in_equal_parts(got10k: Path, coco: Path, trackingnet: Path, tiny: Variant) -> None:
    from asymtrack_edge.training.randomness import Random

    sources = [Got10k(got10k), Coco(coco), TrackingNet(trackingnet)]
    disk = DiskPairs(sources, tiny, Augmentation(), CPU, workers=1)
    random = Random(CPU)
    random.start(1)
    roots = [got10k, coco, trackingnet]
    count = [0, 0, 0]
    for _ in range(900):
        files, boxes, _ = disk._choose(random)
        assert boxes.shape == (2, 4)
        count[[root in files[0].parents for root in roots].index(True)] += 1
    assert all(abs(c - 300) < 60 for c in count)
    disk.close()


def test_the_gap_between_frames_is_kept(got10k: Path, tiny: Variant) -> None:
    from asymtrack_edge.training.randomness import Random

    disk = DiskPairs([Got10k(got10k)], tiny, Augmentation(max_gap=1), CPU, workers=1)
    random = Random(CPU)
    random.start(1)
    gaps = set()
    for _ in range(60):
        (a, b), *_ = disk._choose(random)
        gaps.add(int(b.stem) - int(a.stem))
    assert gaps == {-1, 0, 1}
    disk.close()


def test_a_missing_frame_is_named(got10k: Path, tiny: Variant, tmp_path: Path) -> None:
    root = tmp_path / "got"
    shutil.copytree(got10k, root)
    for path in root.rglob("*.jpg"):
        path.unlink()
    disk = DiskPairs([Got10k(root)], tiny, Augmentation(), CPU, workers=1)
    with pytest.raises(DatasetError, match=r"\.jpg does not exist"):
        disk.draw(2, 0)
    disk.close()
