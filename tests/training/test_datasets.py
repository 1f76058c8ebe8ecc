"""Pairs that are cut from data sets on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from asymtrack_edge.datasets import open_dataset
from asymtrack_edge.errors import DatasetError
from asymtrack_edge.training.crops import Augmentation
from asymtrack_edge.training.imagery import load_pool
from asymtrack_edge.training.pairs import DiskPairs, PairSampler
from asymtrack_edge.training.recipes import SMALL
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, Variant

CPU = torch.device("cpu")


def test_pairs_from_disk_equal_pairs_from_memory(got10k: Path, tiny: Variant, tmp_path: Path) -> None:
    """The same windows on the same frames give the same pairs, whatever holds the frames."""
    aug = Augmentation(greyscale=0.0, brightness=0.0)
    root = tmp_path / "train"
    shutil.copytree(got10k / "train" / "GOT-10k_Train_000001", root / "a")
    (root / "list.txt").write_text("a\n")
    data = open_dataset("got10k-train", tmp_path)
    disk = DiskPairs([data], tiny, aug, CPU, workers=1)
    region = disk._submit(6, 4)[0][1]
    pairs = disk.draw(6, 4)
    (root / "a" / "groundtruth.txt").unlink()
    sampler = PairSampler(load_pool([root], 128), tiny, aug)
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGE_MEAN, IMAGE_STD))
    from_each = [sampler._cut(torch.full((6,), i), region, tiny.search_size).float() for i in range(6)]
    chosen = []
    for i in range(6):
        errors = [(crops[i] - (pairs.search[i] * std + mean)).abs().max().item() for crops in from_each]
        assert min(errors) < 0.01
        chosen.append(errors.index(min(errors)))
    assert set(chosen) <= {0, 1, 4, 5} and len(set(chosen)) > 1


def test_disk_pairs_are_reproducible_in_any_order(got10k: Path, coco: Path, tiny: Variant) -> None:
    sources = [open_dataset("got10k-train", got10k), open_dataset("coco-train", coco)]
    one = DiskPairs(sources, tiny, SMALL.augmentation, CPU, seed=3, workers=2)
    two = DiskPairs(sources, tiny, SMALL.augmentation, CPU, seed=3, workers=1)
    first = [one.draw(4, step) for step in range(3)]
    for a, b in zip(first[2], two.draw(4, 2)):
        assert torch.equal(a, b)
    assert not torch.equal(first[0].search, first[1].search)


def test_data_sets_are_drawn_in_equal_parts_and_the_gap_is_kept(got10k: Path, coco: Path, tiny: Variant) -> None:
    sources = [open_dataset("got10k-train", got10k), open_dataset("coco-train", coco)]
    disk = DiskPairs(sources, tiny, Augmentation(max_gap=1), CPU, workers=1)
    disk.planning.start(1)
    chosen = [disk._choose(disk.planning) for _ in range(900)]
    from_clips = [files for files, *_ in chosen if got10k in files[0].parents]
    assert abs(len(from_clips) - 450) < 80
    assert {int(b.stem) - int(a.stem) for a, b in from_clips} == {-1, 0, 1}


def test_a_damaged_sequence_is_left_out(got10k: Path, tiny: Variant, tmp_path: Path) -> None:
    root = tmp_path / "got"
    shutil.copytree(got10k, root)
    (root / "train" / "GOT-10k_Train_000001" / "groundtruth.txt").write_text("1,2,3\n")
    disk = DiskPairs([open_dataset("got10k-train", root)], tiny, Augmentation(), CPU, workers=1)
    assert set(disk._submit(8, 0)[1].tolist()) == {1}
    (root / "train" / "GOT-10k_Train_000002" / "absence.label").write_text("0\n")
    disk = DiskPairs([open_dataset("got10k-train", root)], tiny, Augmentation(), CPU, workers=1)
    with pytest.raises(DatasetError, match="none of 100 targets"):
        disk.draw(2, 0)


def test_each_process_draws_its_own_targets(coco: Path, tiny: Variant) -> None:
    seen = []
    for rank in (0, 1):
        disk = DiskPairs([open_dataset("coco-train", coco)], tiny, Augmentation(), CPU, share=(rank, 2), workers=1)
        seen.append(set(disk._submit(60, 0)[1].tolist()))
    assert seen == [{0, 2, 4}, {1, 3}]
