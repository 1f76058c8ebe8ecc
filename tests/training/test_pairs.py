"""Crops, augmentation and pairs: geometry is checked on pictures whose content tells positions."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from asymtrack_edge.errors import DatasetError
from asymtrack_edge.geometry import Box, crop_window
from asymtrack_edge.training.crops import (
    Augmentation,
    Random,
    Windows,
    colour,
    cut,
    deform,
    inside,
    motion_blur,
    occlude,
    windows_around,
)
from asymtrack_edge.training.imagery import CLIP, STILL, load_pool
from asymtrack_edge.training.pairs import STRANGER, PairSampler, finish_pairs, plan_windows
from asymtrack_edge.training.recipes import SMALL
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, VARIANTS, Variant
from tests.training.conftest import boxes_of, moving, picture

PLAIN = Augmentation(centre_jitter=0.0, size_jitter=0.0, greyscale=0.0, flip=0.0, brightness=0.0)


def rng(*key: int) -> Random:
    random = Random(torch.device("cpu"))
    random.start(*key)
    return random


def pixels(image: torch.Tensor) -> torch.Tensor:
    """Undoes the network's normalisation."""
    return (image * torch.tensor(IMAGE_STD).view(3, 1, 1) + torch.tensor(IMAGE_MEAN).view(3, 1, 1)) * 255


def windows(corner: tuple, side: float, flip: bool = False) -> Windows:
    return Windows(torch.tensor([corner], dtype=torch.float32), torch.tensor([side]), torch.tensor([flip]))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("corner", "side"), [((10.0, 12.0), 40.0), ((-15.0, -9.0), 60.0), ((30.0, 20.0), 30.0)])
def test_batched_sampling_agrees_with_the_trackers_crop(corner: tuple, side: float, flip: bool) -> None:
    smooth = cv2.GaussianBlur(picture(3), (0, 0), 4)
    canvas = torch.zeros(1, 128, 128, 3, dtype=torch.uint8)
    canvas[0, :90, :120] = torch.from_numpy(smooth)
    one = windows(corner, side, flip)
    sizes = torch.tensor([[120.0, 90.0]])
    index = torch.zeros(1, dtype=torch.int64)
    by_cropper = cut(canvas, index, sizes, one, 64)
    # A fourth channel takes the batched way, which GPUs use.
    sampled = cut(torch.cat([canvas, canvas[..., :1]], -1), index, sizes, one, 64)[:, :3]
    seen = inside(one, sizes, 64)
    # At the picture's rim both fade to black, half a pixel apart.
    core = -torch.nn.functional.max_pool2d(-seen.float(), 9, 1, 4) > 0
    difference = (by_cropper.float() - sampled.float()).abs() * core
    assert core.any()
    assert difference.max() <= 2
    near = torch.nn.functional.max_pool2d(seen.float(), 3, 1, 1) > 0
    assert (by_cropper * ~near).sum() == 0


def test_windows_are_rounded_like_the_trackers() -> None:
    box = Box(10.3, 20.7, 31.0, 17.0)
    side = torch.tensor([(31.0 * 17.0) ** 0.5 * 4])
    own = windows_around(torch.tensor([box.centre]), side, torch.tensor([False]))
    published = crop_window(box, 4.0)
    assert own.corner.tolist() == [[published.left, published.top]]
    assert own.side.item() == published.side


def test_targets_follow_the_published_formula_and_mirror() -> None:
    box = torch.tensor([[40.0, 30.0, 20.0, 10.0]]).expand(64, 4)
    _, search, corners = plan_windows(box, box, VARIANTS["T"], Augmentation(), rng(4))
    flipped = search.flip
    assert flipped.any() and not flipped.all()
    # The published window is rounded, its target is not: up to half a pixel of the frame between them.
    low = (box[:, :2] - search.corner - 0.5 * search.side[:, None] / 256) / search.side[:, None]
    extent = box[:, 2:] / search.side[:, None]
    left = torch.where(flipped, 255 / 256 - low[:, 0] - extent[:, 0], low[:, 0])
    slack = 0.51 / search.side + 1e-4
    assert ((corners[:, 0] - left).abs() <= slack).all()
    assert ((corners[:, 1] - low[:, 1]).abs() <= slack).all()
    torch.testing.assert_close(corners[:, 2:] - corners[:, :2], extent)


def test_jitter_stays_within_the_published_range() -> None:
    box = torch.tensor([[400.0, 300.0, 40.0, 40.0]]).expand(2000, 4)
    template, search, _ = plan_windows(box, box, VARIANTS["T"], Augmentation(), rng(1))
    scale = search.side / 4 / 40
    assert scale.log().std() == pytest.approx(0.5 / 2**0.5, rel=0.1)
    centre = search.corner + search.side[:, None] / 2
    offset = (centre - torch.tensor([420.0, 320.0])) / (search.side[:, None] / 4)
    assert offset.abs().max() <= 1.75 + 0.05
    assert offset.abs().max() > 1.6
    assert (template.side == 80).all()


def test_pairs_show_the_object_where_the_target_says(collection: Path, tiny: Variant) -> None:
    pool = load_pool([collection], 128)
    pairs = PairSampler(pool, tiny, replace(PLAIN, centre_jitter=2.0, flip=0.5)).draw(32, 3)
    assert pairs.template.shape == (32, 3, 64, 64)
    assert pairs.present.all()
    for template, search, corners in zip(pixels(pairs.template), pixels(pairs.search), pairs.corners):
        # The object fills the middle half of the template; cut it out of the search crop, compare.
        x0, y0, x1, y1 = ((corners + 0.5 / 128) * 128).round().int().tolist()
        if min(x0, y0) < 0 or max(x1, y1) > 128:
            continue
        found = torch.nn.functional.interpolate(search[None, :, y0:y1, x0:x1], size=(32, 32), mode="area")[0]
        wanted = template[:, 16:48, 16:48]
        assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.75


def test_small_preset_draws_all_kinds_and_negatives_and_ranks_differ(collection: Path, tiny: Variant) -> None:
    pool = load_pool([collection], 128)
    sampler, other = (PairSampler(pool, tiny, SMALL.augmentation, seed=5, rank=rank) for rank in (0, 1))
    pairs = sampler.draw(200, 11)
    assert not torch.equal(pairs.search, other.draw(200, 11).search)
    assert torch.isfinite(pairs.search).all() and torch.isfinite(pairs.template).all()
    share = 1 - pairs.present.float().mean().item()
    assert abs(share - SMALL.augmentation.negatives) < 0.08
    image = pixels(pairs.search)
    assert image.min() > -0.01 and image.max() < 255.01


def test_pool_holds_what_the_collection_says(collection: Path) -> None:
    pool = load_pool([collection], 100)
    assert pool.canvases.shape == (16, 100, 100, 3)
    assert pool.kind.tolist() == [STILL] * 4 + [CLIP] * 2
    assert pool.length.tolist() == [1, 1, 1, 1, 5, 5]  # the unknown box is left out
    scale = 100 / 120
    assert pool.box[pool.start[4] + 3].tolist() == pytest.approx([32 * scale, 34 * scale, 24 * scale, 24 * scale])
    assert pool.cutouts.shape == (1, 41, 41, 4)
    learnt, held = pool.split(3)
    assert len(learnt) + len(held) == len(pool) and set(learnt.groups().tolist()).isdisjoint(held.groups().tolist())


def test_boxes_too_small_on_the_canvas_are_left_out(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "large.png"), np.full((600, 800, 3), 90, np.uint8))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "large.png", "large.png")
    record = {"file": "large.png", "shard": "a.tar", "boxes": [[0, 0, 12, 12], [0, 0, 80, 40]]}
    (tmp_path / "stills.json").write_text(json.dumps([record]))
    # At an eighth 12 pixels are 1.5: nothing can be learnt from them.
    assert load_pool([tmp_path], 100).box.tolist() == [[0, 0, 10, 5]]


def test_any_folder_of_images_gives_pairs(tmp_path: Path, tiny: Variant) -> None:
    (tmp_path / "deep").mkdir()
    for i in range(3):
        cv2.imwrite(str(tmp_path / "deep" / f"{i}.png"), picture(i))
    cv2.imwrite(str(tmp_path / "grey.jpg"), picture(7)[..., 0])
    rgba = np.dstack([picture(8, 40, 40), np.zeros((40, 40), np.uint8)])
    rgba[10:30, 10:30, 3] = 255
    cv2.imwrite(str(tmp_path / "cutout.png"), rgba)
    cv2.imwrite(str(tmp_path / "._0.png"), rgba)
    pool = load_pool([tmp_path], 96)
    assert len(pool) == 0 and len(pool.canvases) == 4 and len(pool.cutouts) == 1
    pairs = PairSampler(pool, tiny, SMALL.augmentation).draw(16, 0)
    assert torch.isfinite(pairs.search).all()
    assert (pairs.corners[:, 2:] > pairs.corners[:, :2]).all()


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"bad\.jpg"):
        load_pool([tmp_path])


def test_colour_without_changes_is_the_networks_normalisation() -> None:
    image = torch.from_numpy(picture(2).transpose(2, 0, 1).copy())[None]
    plain = colour(image, torch.tensor([False]), PLAIN, rng(0))
    torch.testing.assert_close(pixels(plain), image.float(), atol=1e-3, rtol=0)
    grey = pixels(colour(image, torch.tensor([True]), PLAIN, rng(0)))
    torch.testing.assert_close(grey[:, 0], grey[:, 2], atol=1e-3, rtol=0)


def test_the_only_cutout_is_not_its_own_distractor(collection: Path, tiny: Variant) -> None:
    pool = load_pool([collection], 100)
    assert len(pool.cutouts) == 1
    pool.canvases = torch.zeros_like(pool.canvases)
    pairs = PairSampler(pool, tiny, replace(PLAIN, cutouts=1.0)).draw(8, 0)
    shown = (pixels(pairs.search).round() > 0).any(1).nonzero()
    corners = (pairs.corners * tiny.search_size).tolist()
    for i, y, x in shown.tolist():
        left, top, right, bottom = corners[i]
        assert left - 2 <= x <= right + 2 and top - 2 <= y <= bottom + 2
    assert len(shown)


def test_held_out_pictures_are_no_scenery(collection: Path, tiny: Variant) -> None:
    learnt, held = load_pool([collection], 100).split(3)
    seen = set(learnt.still[learnt.scenery].tolist())
    assert seen.isdisjoint(held.groups().tolist()) and seen.isdisjoint(held.still[held.scenery].tolist())
    learnt.canvases = learnt.canvases.clone()
    learnt.canvases[held.scenery] = 255
    learnt.canvases[learnt.scenery] = 0
    lively = replace(PLAIN, patches=0.5, fill=1.0, cutouts=0.0)
    pairs = PairSampler(learnt, tiny, lively).draw(64, 0)
    assert pixels(pairs.search).max() < 1 and pixels(pairs.template).max() < 1


def test_occlusion_changes_only_the_target() -> None:
    search = torch.stack([torch.full((3, 64, 64), v, dtype=torch.uint8) for v in (10, 200)] * 20)
    corners = torch.tensor([[0.25, 0.25, 0.75, 0.75]]).expand(40, 4)
    out = occlude(search, corners, 1.0, rng(0))
    changed = (out != search).any(1)
    assert changed.flatten(1).any(1).all()
    assert not changed[:, :8].any() and not changed[:, :, 56:].any()
    assert (changed[:, 16:48, 16:48].float().mean((1, 2)) < 0.5).all()
    assert torch.equal(occlude(search, corners, 0.0, rng(0)), search)


def test_motion_blur_keeps_the_mean_and_flattens() -> None:
    image = torch.randn(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    out = motion_blur(image.clone(), 1.0, rng(2))
    assert out.std() < 0.8 * image.std()
    assert out.mean().item() == pytest.approx(image.mean().item(), abs=0.02)


def test_a_deformed_target_lies_where_its_corners_say() -> None:
    """An ellipse that fills its box does so after the turn as well."""
    size, box = 128, (40, 30, 84, 70)
    image = np.zeros((size, size, 3), np.uint8)
    middle = ((box[0] + box[2] - 1) / 2, (box[1] + box[3] - 1) / 2)
    cv2.ellipse(image, (middle, (box[2] - box[0], box[3] - box[1]), 0), (255, 255, 255), -1)
    search = torch.from_numpy(image).permute(2, 0, 1)[None].repeat(16, 1, 1, 1)
    # A pixel's index in the crop is half a pixel below its place, as in the published convention.
    corners = ((torch.tensor([box], dtype=torch.float32) - 0.5) / size).repeat(16, 1)
    turned, moved = deform(search, corners, 1.0, rng(4))
    assert (moved - corners).abs().max() > 0.05
    for shown, expected in zip(turned, moved):
        rows, columns = np.nonzero(shown[0].numpy() > 127)
        seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) - 0.5
        assert torch.allclose(seen, expected * size, atol=1.6)
    same, where = deform(search, corners, 0.0, rng(4))
    assert torch.equal(same, search) and torch.equal(where, corners)


def test_annotated_clips_are_targets_and_other_images_are_not(tmp_path: Path) -> None:
    for name, frames in (("a", "."), ("b", "img")):
        (tmp_path / name / frames).mkdir(parents=True)
        for i, frame in enumerate(moving(1, 4)):
            cv2.imwrite(str(tmp_path / name / frames / f"{i}.png"), frame)
    lines = [",".join(map(str, box)) for box in boxes_of(4)]
    (tmp_path / "a" / "groundtruth.txt").write_text("\n".join([*lines[:2], "nan,nan,nan,nan", lines[3]]))
    (tmp_path / "b" / "groundtruth_rect.txt").write_text("\n".join(lines))
    cv2.imwrite(str(tmp_path / "still.png"), picture(0))
    pool = load_pool([tmp_path], 120)
    assert pool.kind.tolist() == [CLIP, CLIP] and pool.length.tolist() == [3, 4] and len(pool.canvases) == 9
    assert pool.box[0].tolist() == [20, 30, 24, 24] and pool.box[3].tolist() == [19, 29, 24, 24]
    assert pool.image[pool.start[1] :].tolist() == [4, 5, 6, 7]
    (tmp_path / "a" / "groundtruth.txt").write_text("1,2,3,4\n")
    with pytest.raises(DatasetError, match="1 boxes for 4 images"):
        load_pool([tmp_path])


def test_each_process_reads_its_own_share(tmp_path: Path) -> None:
    for i in range(20):
        cv2.imwrite(str(tmp_path / f"{i:02d}.png"), np.full((20, 20, 3), 10 * i, np.uint8))
    whole = load_pool([tmp_path], 32)
    shares = [load_pool([tmp_path], 32, share=(rank, 2)) for rank in (0, 1)]
    levels = [set(pool.canvases[:, 5, 5, 0].tolist()) for pool in (whole, *shares)]
    assert levels[0] == levels[1] | levels[2] and not levels[1] & levels[2]
    # Too little to divide: all of it for each.
    assert len(load_pool([tmp_path], 32, share=(3, 4)).canvases) == 20


def test_negatives_are_of_another_target_and_of_a_picture_not_in_the_pair() -> None:
    level = (20 * torch.arange(12)).to(torch.uint8).view(-1, 1, 1, 1)
    template, search = level.expand(-1, 3, 32, 32), level.expand(-1, 3, 64, 64)
    corners = torch.tensor([[0.4, 0.4, 0.6, 0.6]]).expand(12, -1)
    lively, known = replace(PLAIN, occlusion=1.0, negatives=0.5), torch.ones(12, dtype=torch.bool)
    pairs = finish_pairs(template, search, corners, torch.arange(12), known, lively, rng(4))
    assert (~pairs.present).any() and pairs.present.any() and pairs.known.all()
    for i in range(12):
        own = i if pairs.present[i] else (i + STRANGER) % 12
        assert pixels(pairs.template)[i].round().unique().tolist() == [20 * own]
        seen = set(pixels(pairs.search)[i].round().unique().tolist())
        assert 20 * i in seen and (pairs.present[i] or 20 * own not in seen)
    same = finish_pairs(template, search, corners, torch.zeros(12, dtype=torch.int64), known, lively, rng(4))
    assert same.present.all()


def test_a_teachers_regions_are_looked_for_in_other_frames_of_their_clip(collection: Path, tiny: Variant) -> None:
    pool = load_pool([collection], 128)
    image, box, known = PairSampler(pool, tiny, replace(PLAIN, max_gap=2), teacher=True)._regions(200)
    assert torch.equal(pool.still[image[:, 0]], pool.still[image[:, 1]])
    assert (image[:, 0] - image[:, 1]).abs().max() == 2 and torch.equal(known, image[:, 0] == image[:, 1])
    assert known[image[:, 0] < 4].all() and torch.equal(box[:, 0], box[:, 1])
    assert PairSampler(pool, tiny, PLAIN)._regions(50)[2].all()
