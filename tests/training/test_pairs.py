"""Crops, augmentation and pairs: the geometry is checked on images whose content reveals positions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from asymtrack_edge.datasets import Dataset
from asymtrack_edge.errors import DatasetError
from asymtrack_edge.geometry import Box, crop_window
from asymtrack_edge.training import crops, run
from asymtrack_edge.training.crops import Augmentation, Random, Windows, colour, cut, deform, inside, windows_around
from asymtrack_edge.training.distributed import World
from asymtrack_edge.training.imagery import CLIP, STILL, LeftOut, load_pool
from asymtrack_edge.training.pairs import STRANGER, DiskPairs, Pairs, PairSampler, finish_pairs, plan_windows
from asymtrack_edge.training.recipes import SMALL
from asymtrack_edge.training.run import RunConfig
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, VARIANTS
from tests.datasets.miniature import save, write_images, write_tree
from tests.training.conftest import BOXES, CPU, moving, picture

TINY = replace(VARIANTS["T"], template_size=64, search_size=128)
PLAIN = Augmentation(centre_jitter=0.0, size_jitter=0.0, greyscale=0.0, flip=0.0, brightness=0.0)


def rng(*key: int) -> Random:
    random = Random(CPU)
    random.start(*key)
    return random


def pixels(image: torch.Tensor) -> torch.Tensor:
    """Undoes the network's normalisation."""
    return (image * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)) * 255


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("corner", "side"), [((10.0, 12.0), 40.0), ((-15.0, -9.0), 60.0), ((30.0, 20.0), 30.0)])
def test_batched_sampling_agrees_with_the_trackers_crop(corner: tuple, side: float, flip: bool) -> None:
    canvas = F.pad(torch.from_numpy(cv2.GaussianBlur(picture(3), (0, 0), 4)), (0, 0, 0, 8, 0, 38))[None]
    one = Windows(torch.tensor([corner], dtype=torch.float32), torch.tensor([side]), torch.tensor([flip]))
    index, sizes = torch.zeros(1, dtype=torch.int64), torch.tensor([[120.0, 90.0]])
    by_cropper = cut(canvas, index, sizes, one, 64)
    sampled = crops.cut_together(canvas, index, one, 64)
    seen = inside(one, sizes, 64)
    # At the image border both fade to black, half a pixel apart.
    core = -F.max_pool2d(-seen.float(), 9, 1, 4) > 0
    assert core.any() and ((by_cropper.float() - sampled.float()).abs() * core).max() <= 2
    assert (by_cropper * (F.max_pool2d(seen.float(), 3, 1, 1) == 0)).sum() == 0


def test_windows_and_targets_follow_the_published_formula() -> None:
    box = Box(10.3, 20.7, 31.0, 17.0)
    own = windows_around(torch.tensor([box.centre]), torch.tensor([(31 * 17) ** 0.5 * 4]), torch.tensor([False]))
    published = crop_window(box, 4.0)
    assert own.corner.tolist() == [[published.left, published.top]] and own.side.item() == published.side
    boxes = torch.tensor([[400.0, 300.0, 40.0, 20.0]]).expand(2000, 4)
    template, search, corners, _ = plan_windows(boxes, boxes, VARIANTS["T"], Augmentation(), rng(1))
    # The published window is rounded but its target is not, so they differ by up to half a pixel of the frame.
    side = search.side[:, None]
    low, extent = (boxes[:, :2] - search.corner) / side - 0.5 / 256, boxes[:, 2:] / side
    left = torch.where(search.flip, 255 / 256 - low[:, 0] - extent[:, 0], low[:, 0])
    assert search.flip.float().mean() == pytest.approx(0.5, abs=0.05)
    assert ((corners[:, :2] - torch.stack([left, low[:, 1]], 1)).abs() <= 0.51 / side + 1e-4).all()
    torch.testing.assert_close(corners[:, 2:] - corners[:, :2], extent)
    # Jitter: the size's logarithm is normally distributed per axis; the centre moves by at most half of 3.5 scales.
    scale = search.side / 4
    assert scale.log().std() == pytest.approx(0.5 / 2**0.5, rel=0.1)
    moved = (search.corner + side / 2 - torch.tensor([420.0, 310.0])) / scale[:, None]
    assert 1.6 < moved.abs().max() <= 1.75 + 0.05
    assert (template.side == 57).all()


def test_pairs_show_the_object_where_the_target_says(collection: Path) -> None:
    pool = load_pool([collection], 128)
    pairs = PairSampler(pool, TINY, replace(PLAIN, centre_jitter=2.0, flip=0.5, fill=1.0)).draw(32, 3)
    assert pairs.template.shape == (32, 3, 64, 64) and pairs.present.all()
    assert (pixels(pairs.search).amax(1) < 1).float().mean() < 0.05, "black instead of another picture"
    for template, search, corners in zip(pixels(pairs.template), pixels(pairs.search), pairs.corners):
        # The object fills the middle half of the template: compare it with the box in the search crop.
        x0, y0, x1, y1 = ((corners + 0.5 / 128) * 128).round().int().tolist()
        if min(x0, y0) >= 0 and max(x1, y1) <= 128:
            found = F.interpolate(search[None, :, y0:y1, x0:x1], size=(32, 32), mode="area")[0]
            assert torch.corrcoef(torch.stack([found.flatten(), template[:, 16:48, 16:48].flatten()]))[0, 1] > 0.75


def test_a_pool_has_the_content_of_the_collection(collection: Path) -> None:
    pool = load_pool([collection.parent], 100)  # collections are also found in subfolders
    assert pool.canvases.shape == (16, 100, 100, 3)
    assert pool.kind.tolist() == [STILL] * 4 + [CLIP] * 2
    assert pool.length.tolist() == [1, 1, 1, 1, 5, 5]  # the unknown box is left out
    scale = 100 / 120
    weight = PairSampler(pool, TINY, replace(PLAIN, stills=0.3, patches=0.25)).weight
    assert weight[:4].sum().item() == pytest.approx(0.4)  # 0.3 of all pairs; a quarter comes from regions
    assert pool.box[pool.start[4] + 3].tolist() == pytest.approx([32 * scale, 34 * scale, 24 * scale, 24 * scale])


def test_a_damaged_collection_is_refused_and_an_image_left_out(collection: Path, tmp_path: Path, capsys: Any) -> None:
    root = shutil.copytree(collection, tmp_path / "set")
    stills = json.loads((root / "stills.json").read_text())
    chain = b"x".ljust(148, b"\0") + b"760".ljust(8, b"\0") + b"x".ljust(356, b"\0")  # a header for the next header
    (root / "chain.tar").write_bytes(2000 * chain)
    # On a canvas of 10 pixels, the boxes of 24 pixels shrink to 2, which is too small to learn from.
    with pytest.raises(DatasetError, match="give a larger --canvas"):
        load_pool([root], 10)
    for text, says in (
        (json.dumps([{**stills[0], "file": "lost.png"}]), r"lacks 'lost\.png'"),
        (json.dumps([{**stills[0], "shard": "../all.tar"}, {**stills[0], "shard": "lost.tar"}]), r"set/lost\.tar"),
        (json.dumps([{**stills[0], "shard": "chain.tar"}]), r"cannot read the shard .*set/chain\.tar"),
        (json.dumps([{**stills[0], "boxes": [[1, 2, 3]]}]), "x, y, w, h"),
        (json.dumps([{**stills[0], "boxes": [[1, 2, 3, 10**400]]}]), "x, y, w, h"),
        (json.dumps([{**stills[0], "source": None}]), "source is not text"),
        ("[{}]", "lacks 'file'"),
        ("{", "not valid JSON"),
        ("{}", "not a list"),
    ):
        (root / "stills.json").write_text(text)
        with pytest.raises(DatasetError, match=says):
            load_pool([root])
    huge = bytearray(cv2.imencode(".png", picture(0))[1].tobytes())
    huge[16:24] = b"\0\3\0\0\0\3\0\0"  # a header that claims 196,608 pixels in width and height
    write_tree(tmp_path / "bad", {"1.png": b"no image", "2.png": b"", "3.png": bytes(huge)})
    with pytest.raises(DatasetError, match="no image can be read"):
        load_pool([tmp_path / "bad"])
    cv2.imwrite(str(tmp_path / "bad" / "good.png"), picture(0))
    assert load_pool([tmp_path / "bad"]).scenery.tolist() == [3]
    assert capsys.readouterr().err.count("left out: cannot decode the training image") == 6


def test_any_folder_of_images_gives_pairs(tmp_path: Path) -> None:
    write_images(tmp_path / "deep", map(picture, range(3)))
    cv2.imwrite(str(tmp_path / "grey.jpg"), picture(7)[..., 0])
    cv2.imwrite(str(tmp_path / "transparent.png"), np.dstack([picture(8), np.zeros((90, 120), np.uint8)]))
    cv2.imwrite(str(tmp_path / "._0.png"), picture(0))
    pool = load_pool([tmp_path], 96)
    assert len(pool) == 0 and len(pool.canvases) == 5
    pairs, other = (PairSampler(pool, TINY, SMALL.augmentation, rank=rank).draw(200, 0) for rank in (0, 1))
    assert not torch.equal(pairs.search, other.search)  # each process draws its own pairs
    assert pixels(pairs.search).min() > -0.01 and pixels(pairs.search).max() < 255.01
    assert (pairs.corners[:, 2:] > pairs.corners[:, :2]).all()
    assert 1 - pairs.present.float().mean().item() == pytest.approx(SMALL.augmentation.negatives, abs=0.08)


def test_annotated_clips_give_targets_and_other_images_do_not(tmp_path: Path, capsys: Any) -> None:
    data, there = tmp_path / "data", tmp_path / "elsewhere"
    for images in (there, data / "b" / "img"):
        write_images(images, moving(1, 4))
    (data / "a").symlink_to(there)
    (data / "b" / "circle").symlink_to(data)
    save(data / "b" / "groundtruth_rect.1.txt", "")  # as of OTB's Human4
    save(data / "b" / "groundtruth_rect.2.txt", BOXES[1:5])
    save(there / "groundtruth.txt", [*BOXES[:2], ["nan"] * 4, BOXES[3]])
    save(data / "b" / "groundtruth_rect.txt", BOXES[:4])
    cv2.imwrite(str(data / "still.png"), picture(0))
    pool = load_pool([data], 120)
    assert pool.kind.tolist() == [CLIP] * 3 and pool.length.tolist() == [3, 4, 4] and len(pool.canvases) == 9
    assert pool.box[0].tolist() == [20, 30, 24, 24] and pool.box[7].tolist() == [19, 29, 24, 24]
    assert pool.image[pool.start[1] :].tolist() == [4, 5, 6, 7] * 2  # two targets of one clip
    write_tree(there, {"absence.label": "0\n1\n0\n0\n", "cover.label": "8\n8\n8\n0\n"})
    assert load_pool([data], 120).length.tolist() == [1, 4, 4] and not capsys.readouterr().err
    save(there / "groundtruth.txt", BOXES[:1])
    assert len(load_pool([data], 120)) == 2 and "1 boxes for 4 images" in capsys.readouterr().err


def test_each_process_reads_its_own_share(tmp_path: Path) -> None:
    write_images(tmp_path, (np.full((20, 20, 3), 10 * i, np.uint8) for i in range(20)))
    pools = [load_pool([tmp_path], 32, share) for share in ((0, 1), (0, 2), (1, 2))]
    whole, *parts = (set(pool.canvases[:, 5, 5, 0].tolist()) for pool in pools)
    assert whole == parts[0] | parts[1] and not parts[0] & parts[1]
    # If there are too few images to divide, each process reads all of them.
    assert len(load_pool([tmp_path], 32, share=(3, 4)).canvases) == 20


def test_a_deformed_target_lies_where_its_corners_say() -> None:
    """An ellipse that fills its box still does so after the deformation."""
    size, box = 128, (40, 30, 84, 70)
    image = np.zeros((size, size, 3), np.uint8)
    middle = ((box[0] + box[2] - 1) / 2, (box[1] + box[3] - 1) / 2)
    cv2.ellipse(image, (middle, (box[2] - box[0], box[3] - box[1]), 0), (255, 255, 255), -1)
    search = torch.from_numpy(image).permute(2, 0, 1)[None].repeat(16, 1, 1, 1)
    # In the published convention, a pixel's index in the crop is its position minus half a pixel.
    corners = ((torch.tensor([box], dtype=torch.float32) - 0.5) / size).repeat(16, 1)
    turned, moved = deform(search, corners, Augmentation(deformation=1.0), rng(4))
    assert (moved - corners).abs().max() > 0.05
    for shown, expected in zip(turned, moved):
        rows, columns = np.nonzero(shown[0].numpy() > 127)
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) - 0.5
        assert torch.allclose(seen, expected * size, atol=1.6)


def test_greyscale_keeps_luminance_and_contrast_and_blur_keep_the_mean() -> None:
    image = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    grey = pixels(colour(image, torch.tensor([True]), PLAIN, rng(1)))
    assert (grey - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)).abs().max() < 0.1
    even = torch.full((1, 3, 8, 8), 120, dtype=torch.uint8)
    same = colour(even, torch.tensor([False]), replace(PLAIN, contrast=0.5), rng(1))
    assert (pixels(crops.motion_blur(same, 1.0, rng(1))[0]) - even).abs().max() < 0.1
    coarse = crops.coarsen(torch.tensor([0, 255], dtype=torch.uint8).repeat(2, 3, 32, 16), 1.0, rng(0)).float()
    assert coarse.std() < 60 and (coarse.mean() - 127.5).abs() < 3  # 127.5 before


def test_targets_that_change_their_shape_are_drawn_more_often(collection: Path) -> None:
    pool = load_pool([collection], 100)
    clip = int((pool.kind == CLIP).nonzero()[0])
    pool.box[pool.start[clip] : pool.start[clip] + 2, 2] = torch.tensor([8.0, 40.0])
    shares = []
    for changes in (False, True):
        sampler = PairSampler(pool, TINY, replace(PLAIN, shape_changes=changes))
        second = sampler._second(torch.full((300,), clip), torch.zeros(300, dtype=torch.long))
        shares += [sampler.weight[clip] / sampler.weight[pool.kind == CLIP].sum(), (second == 1).float().mean()]
    assert shares[2] > 1.2 * shares[0] and shares[3] > 1.5 * shares[1]


def test_negatives_have_the_template_of_another_pair() -> None:
    level = (20 * torch.arange(12)).to(torch.uint8).view(-1, 1, 1, 1)
    template, search = level.expand(-1, 3, 32, 32), level.expand(-1, 3, 64, 64)
    corners, known = torch.tensor([[0.4, 0.4, 0.6, 0.6]]).expand(12, -1), torch.ones(12, dtype=torch.bool)
    lively = replace(PLAIN, occlusion=1.0, negatives=0.5)
    drawn = Pairs(template, search, corners, known, known, 20.0 * torch.arange(12))
    pairs = finish_pairs(drawn, torch.arange(12), lively, rng(4))
    assert (~pairs.present).any() and pairs.present.any() and pairs.known.all()
    for i in range(12):
        own = i if pairs.present[i] else (i + STRANGER) % 12
        assert pixels(pairs.template)[i].round().unique().tolist() == [20 * own] == [pairs.aspect[i]]
        seen = set(pixels(pairs.search)[i].round().unique().tolist())
        assert 20 * i in seen and (pairs.present[i] or 20 * own not in seen)
    assert finish_pairs(drawn, torch.zeros(12, dtype=torch.int64), lively, rng(4)).present.all()


def test_with_a_teacher_regions_are_searched_in_other_frames_of_their_clip(collection: Path) -> None:
    pool = load_pool([collection], 128)
    sampler = PairSampler(pool, TINY, replace(PLAIN, max_gap=2), teacher=True)
    image, box, known = sampler._regions(200)
    assert torch.equal(pool.group[image[:, 0]], pool.group[image[:, 1]])
    assert (image[:, 0] - image[:, 1]).abs().max() == 2 and torch.equal(known, image[:, 0] == image[:, 1])
    assert known[image[:, 0] < 4].all() and torch.equal(box[:, 0], box[:, 1])
    assert PairSampler(pool, TINY, PLAIN)._regions(50)[2].all() and sampler._targets(50)[2].all()


def test_pairs_from_disk_equal_pairs_from_memory(got10k: Path, tmp_path: Path) -> None:
    aug = Augmentation(greyscale=0.0, brightness=0.0)
    root = tmp_path / "train"
    shutil.copytree(got10k / "train" / "GOT-10k_Train_000001", root / "a")
    save(root / "list.txt", "a\nabsent\n")  # a part of the data set is enough
    disk = DiskPairs([Dataset("got10k-train", tmp_path)], TINY, aug, CPU, workers=1)
    assert len(disk.datasets[0]) == 1
    region = disk._submit(6, 4)[0][1]
    pairs = disk.draw(6, 4)
    (root / "a" / "groundtruth.txt").unlink()
    sampler = PairSampler(load_pool([root], 128), TINY, aug)
    frames = torch.stack([sampler._cut(torch.full((6,), i), region, 128).float() for i in range(6)])
    errors, chosen = (frames - pixels(pairs.search)).abs().flatten(2).amax(2).min(0)
    assert errors.max() < 0.01 and len(set(chosen.tolist())) > 1 and set(chosen.tolist()) <= {0, 1, 4, 5}
    data = [Dataset("got10k-train", got10k)]
    plain, filled = (DiskPairs(data, TINY, replace(aug, fill=f), CPU, workers=1).draw(6, 4).search for f in (0.0, 1.0))
    region = DiskPairs(data, TINY, aug, CPU, workers=1)._submit(6, 4)[0][1]
    seen = inside(region, torch.tensor([[120.0, 90.0]] * 6), 128).expand(-1, 3, -1, -1)
    assert torch.equal(plain[seen], filled[seen]) and not torch.equal(plain[~seen], filled[~seen])


def test_disk_pairs_are_reproducible_and_drawn_in_equal_parts(got10k: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(got10k, other)
    save(other / "train" / "list.txt", "GOT-10k_Train_000002\n")
    data = [Dataset("got10k-train", root) for root in (got10k, other)]
    one, two = (DiskPairs(data, TINY, SMALL.augmentation, CPU, seed=3, workers=workers) for workers in (1, 2))
    first = [one.draw(4, step) for step in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first[2], two.draw(4, 2)))
    assert not torch.equal(first[0].search, first[1].search)
    disk = DiskPairs(data, TINY, replace(PLAIN, greyscale=0.5), CPU, workers=1)
    grey = [[pixels(shown).std(1).amax((1, 2)) < 1 for shown in disk.draw(8, step)[:2]] for step in (0, 1)]
    assert torch.equal(*grey[0]) and not torch.equal(grey[0][0], grey[1][0])  # both crops of other pairs in each step
    near = DiskPairs(data, TINY, Augmentation(max_gap=1), CPU, workers=1)
    near.planning.start(1)
    chosen = [near._choose(near.planning) for _ in range(900)]
    assert sum(other in files[0].parents for files, *_ in chosen) == pytest.approx(450, abs=80)
    assert {int(b.stem) - int(a.stem) for (a, b), *_ in chosen} == {0, 1}  # 0: no visible frame follows at once
    # Each process draws different targets.
    shares = (DiskPairs(data[:1], TINY, Augmentation(), CPU, share=(rank, 2), workers=1) for rank in (0, 1))
    assert [set(disk._submit(60, 0)[1].tolist()) for disk in shares] == [{0}, {1}]


def test_damaged_images_and_annotations_on_disk_are_left_out(got10k: Path, tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "got"
    shutil.copytree(got10k, root)
    min(root.glob("train/*/*.jpg")).write_bytes(b"no image")
    disk = DiskPairs([Dataset("got10k-train", root)], TINY, Augmentation(), CPU, workers=1)
    whole = [disk.draw(16, step) for step in range(3)]
    assert capsys.readouterr().err.count("left out") == 1
    assert all(len(tensor) == 16 and torch.isfinite(tensor).all() for pairs in whole for tensor in pairs)
    save(root / "train" / "GOT-10k_Train_000001" / "groundtruth.txt", "1,2,3\n")
    save(root / "train" / "GOT-10k_Train_000002" / "groundtruth.txt", "900,9,20,20\n" * 6)
    disk = DiskPairs([Dataset("got10k-train", root)], TINY, Augmentation(), CPU, workers=1)
    assert set(disk._submit(8, 0)[1].tolist()) == {1}
    with pytest.raises(DatasetError, match="lies outside the frame"):
        disk.draw(8, 0)
    assert "left out: GOT-10k train: sequence GOT-10k_Train_000001: " in capsys.readouterr().err
    save(root / "train" / "GOT-10k_Train_000002" / "absence.label", "0\n")
    disk = DiskPairs([Dataset("got10k-train", root)], TINY, Augmentation(), CPU, workers=1)
    with pytest.raises(DatasetError, match="none of 10000 targets"):
        disk.draw(2, 0)


def test_few_clips_make_no_negatives(collection: Path, tmp_path: Path) -> None:
    """All clips may show the same object. With a teacher negatives are safe, because it would notice."""
    for teacher in (None, "fear"):
        config = RunConfig(SMALL, "T", (str(collection),), teacher=teacher)
        draw, _ = run._open_data(config, tmp_path, World(), LeftOut())
        assert draw(64, 0).present.all() == (teacher is None)
