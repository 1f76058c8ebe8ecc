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
from asymtrack_edge.geometry import LARGEST_PADDED, Cropper
from asymtrack_edge.training.augmentation import (
    FADED,
    KEPT,
    STEADY,
    Augmentation,
    change_backdrop,
    colour,
    deform,
    motion_blur,
    occlude,
    paste,
)
from asymtrack_edge.training.collection import load_collection, load_images
from asymtrack_edge.training.crops import Windows, cut, cut_one, inside, windows_around
from asymtrack_edge.training.pairs import STRANGER, PairSampler, finish_pairs, plan_windows
from asymtrack_edge.training.pool import CLIP, STILL, merge_pools
from asymtrack_edge.training.randomness import Random
from asymtrack_edge.training.recipes import SMALL
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, VARIANTS, Variant
from tests.training.conftest import moving, picture

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


def test_windows_too_large_to_pad_show_the_same() -> None:
    image = cv2.GaussianBlur(picture(1, 800, 1000), (0, 0), 9)
    small, large = np.empty((64, 64, 3), np.uint8), np.empty((64, 64, 3), np.uint8)
    side = LARGEST_PADDED
    cut_one(image, windows((-1500.0, -1600.0), float(side)), 0, small, Cropper())
    cut_one(image, windows((-1500.0, -1600.0), float(side + 1)), 0, large, Cropper())
    assert small.max() > 0
    assert np.abs(small.astype(int) - large.astype(int)).mean() < 1


def test_windows_are_rounded_like_the_trackers() -> None:
    from asymtrack_edge.geometry import Box, crop_window

    box = Box(10.3, 20.7, 31.0, 17.0)
    side = torch.tensor([(31.0 * 17.0) ** 0.5 * 4])
    own = windows_around(torch.tensor([box.centre]), side, torch.tensor([False]))
    published = crop_window(box, 4.0)
    assert own.corner.tolist() == [[published.left, published.top]]
    assert own.side.item() == published.side


def test_targets_follow_the_published_formula_and_mirror() -> None:
    box = torch.tensor([[40.0, 30.0, 20.0, 10.0]]).expand(64, 4)
    plan = plan_windows(box, box, VARIANTS["T"], Augmentation(), rng(4))
    flipped = plan.search.flip
    assert flipped.any() and not flipped.all()
    # The published window is rounded, its target is not: up to half a pixel of the frame between them.
    low = (box[:, :2] - plan.search.corner - 0.5 * plan.search.side[:, None] / 256) / plan.search.side[:, None]
    extent = box[:, 2:] / plan.search.side[:, None]
    left = torch.where(flipped, 255 / 256 - low[:, 0] - extent[:, 0], low[:, 0])
    slack = 0.51 / plan.search.side + 1e-4
    assert ((plan.corners[:, 0] - left).abs() <= slack).all()
    assert ((plan.corners[:, 1] - low[:, 1]).abs() <= slack).all()
    torch.testing.assert_close(plan.corners[:, 2:] - plan.corners[:, :2], extent)


def test_jitter_stays_within_the_published_range() -> None:
    box = torch.tensor([[400.0, 300.0, 40.0, 40.0]]).expand(2000, 4)
    plan = plan_windows(box, box, VARIANTS["T"], Augmentation(), rng(1))
    scale = plan.search.side / 4 / 40
    assert scale.log().std() == pytest.approx(0.5 / 2**0.5, rel=0.1)
    centre = plan.search.corner + plan.search.side[:, None] / 2
    offset = (centre - torch.tensor([420.0, 320.0])) / (plan.search.side[:, None] / 4)
    assert offset.abs().max() <= 1.75 + 0.05
    assert offset.abs().max() > 1.6
    assert (plan.template.side == 80).all()


def test_steady_pairs_keep_near_the_middle() -> None:
    variant, box = VARIANTS["T"], torch.tensor([[50.0, 40.0, 30.0, 30.0]]).expand(400, -1)
    moving_about = replace(PLAIN, centre_jitter=2.0, steady=0.5)
    plan = plan_windows(box, box, variant, moving_about, rng(3))
    away = ((plan.corners[:, :2] + plan.corners[:, 2:]) / 2 - 0.5).abs().amax(1) * variant.search_factor
    near = (away < STEADY + 0.1).float().mean()
    assert 0.45 < near < 0.6
    assert away.max() > 0.9
    assert torch.allclose(plan.extent, torch.full((400, 2), 0.5))


def test_pairs_show_the_object_where_the_target_says(collection: Path, tiny: Variant) -> None:
    pool = load_collection(collection, 128)
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


def test_a_step_draws_the_same_pairs_again_and_ranks_differ(collection: Path, tiny: Variant) -> None:
    pool = load_collection(collection, 128)
    sampler = PairSampler(pool, tiny, SMALL.augmentation, seed=5)
    first = sampler.draw(8, 11)
    sampler.draw(8, 12)
    for a, b in zip(first, sampler.draw(8, 11)):
        assert torch.equal(a, b)
    other = PairSampler(pool, tiny, SMALL.augmentation, seed=5, rank=1).draw(8, 11)
    assert not torch.equal(first.search, other.search)


def test_small_preset_draws_all_kinds_and_negatives(collection: Path, tiny: Variant) -> None:
    pool = load_collection(collection, 128)
    pairs = PairSampler(pool, tiny, SMALL.augmentation).draw(200, 0)
    assert torch.isfinite(pairs.search).all() and torch.isfinite(pairs.template).all()
    share = 1 - pairs.present.float().mean().item()
    assert abs(share - SMALL.augmentation.negatives) < 0.08
    image = pixels(pairs.search)
    assert image.min() > -0.01 and image.max() < 255.01


def test_pool_holds_what_the_collection_says(collection: Path) -> None:
    pool = load_collection(collection, 100)
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
    assert load_collection(tmp_path, 100).box.tolist() == [[0, 0, 10, 5]]


def test_merged_pools_keep_their_targets(collection: Path) -> None:
    pool = load_collection(collection, 100)
    both = merge_pools([pool, pool])
    t = len(pool) + 5
    entry = both.start[t] + 2
    assert both.image[entry] == len(pool.canvases) + pool.image[pool.start[5] + 2]
    assert torch.equal(both.box[entry], pool.box[pool.start[5] + 2])
    assert len(set(both.groups().tolist())) == 2 * len(set(pool.groups().tolist()))


def test_any_folder_of_images_gives_pairs(tmp_path: Path, tiny: Variant) -> None:
    (tmp_path / "deep").mkdir()
    for i in range(3):
        cv2.imwrite(str(tmp_path / "deep" / f"{i}.png"), picture(i))
    cv2.imwrite(str(tmp_path / "grey.jpg"), picture(7)[..., 0])
    pool = load_images(tmp_path, 96)
    assert len(pool) == 0 and len(pool.canvases) == 4 and len(pool.cutouts) > 0
    pairs = PairSampler(pool, tiny, SMALL.augmentation).draw(16, 0)
    assert torch.isfinite(pairs.search).all()
    assert (pairs.corners[:, 2:] > pairs.corners[:, :2]).all()


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"bad\.jpg"):
        load_images(tmp_path)


def test_colour_without_changes_is_the_networks_normalisation() -> None:
    image = torch.from_numpy(picture(2).transpose(2, 0, 1).copy())[None]
    plain = colour(image, torch.tensor([False]), PLAIN, rng(0))
    torch.testing.assert_close(pixels(plain), image.float(), atol=1e-3, rtol=0)
    grey = pixels(colour(image, torch.tensor([True]), PLAIN, rng(0)))
    torch.testing.assert_close(grey[:, 0], grey[:, 2], atol=1e-3, rtol=0)


def test_colour_contrast_keeps_the_mean_and_brightness_its_range() -> None:
    image = torch.full((400, 3, 8, 8), 100, dtype=torch.uint8)
    aug = Augmentation(brightness=0.2, contrast=0.5)
    out = pixels(colour(image, torch.zeros(400, dtype=torch.bool), aug, rng(0)))
    # A uniform picture has no contrast to change.
    assert out.min() >= 79.9 and out.max() <= 120.1 and out.max() > 115


def test_a_changed_backdrop_leaves_the_target() -> None:
    template = torch.full((4, 3, 64, 64), 200, dtype=torch.uint8)
    search = torch.full((4, 3, 128, 128), 10, dtype=torch.uint8)
    extent = torch.tensor([[0.5, 0.25]]).expand(4, -1)
    changed = change_backdrop(template, search, extent, 1.0, rng(1))
    kept_x, kept_y = int(32 * 0.5 * KEPT), int(32 * 0.25 * KEPT)
    gone_x, gone_y = round(32 * 0.5 * FADED) + 1, round(32 * 0.25 * FADED) + 1
    assert (changed[:, :, 32 - kept_y : 32 + kept_y, 32 - kept_x : 32 + kept_x] == 200).all()
    changed[:, :, 32 - gone_y : 32 + gone_y, 32 - gone_x : 32 + gone_x] = 10
    assert (changed == 10).all()
    assert (template == 200).all()
    some = change_backdrop(template, search, extent, 0.5, rng(2))
    assert 0 < (some[:, 0, 0, 0] == 10).sum() < 4
    assert change_backdrop(template, search, extent, 0.0, rng(1)) is template


@pytest.mark.parametrize("known", [True, False])
def test_a_negative_shares_no_picture_with_its_pair_and_is_of_another_target(known: bool) -> None:
    batch = 12
    # Each pair has its own grey level: template 10 i, search crop 10 i + 5.
    level = (10 * torch.arange(batch)).to(torch.uint8).view(-1, 1, 1, 1)
    template, search = level.expand(-1, 3, 32, 32), (level + 5).expand(-1, 3, 64, 64)
    extent = torch.full((batch, 2), 0.5)
    corners = torch.tensor([[0.4, 0.4, 0.6, 0.6]]).expand(batch, -1).clone()
    identity = torch.arange(batch) if known else torch.zeros(batch, dtype=torch.int64)
    lively = replace(PLAIN, backdrop=1.0, occlusion=1.0, negatives=0.5)
    pairs = finish_pairs(template, search, extent, corners, identity, lively, rng(4))
    assert known == bool((~pairs.present).any())
    numbers = (pixels(pairs.template).round() // 10).int(), (pixels(pairs.search).round() // 10).int()
    for i, (template_numbers, search_numbers) in enumerate(zip(*numbers)):
        # Of which pair is what one sees: target and backdrop of the template, anything in the search crop?
        own = i if pairs.present[i] else (i + STRANGER) % batch
        target, backdrop = template_numbers[0, 16, 16].item(), template_numbers[0, 0, 0].item()
        assert (target, backdrop) == (own, (own + 1) % batch)
        seen = set(search_numbers.unique().tolist())
        assert i in seen and (pairs.present[i] or not seen & {target, backdrop})


def test_the_only_cutout_is_not_its_own_distractor(collection: Path, tiny: Variant) -> None:
    pool = load_collection(collection, 100)
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
    learnt, held = load_collection(collection, 100).split(3)
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


def test_paste_puts_the_cutout_where_asked() -> None:
    cutout = torch.zeros(1, 10, 10, 4, dtype=torch.uint8)
    cutout[0, :, :, 0] = cutout[0, :, :, 3] = 255
    scene = torch.zeros(1, 3, 100, 100, dtype=torch.uint8)
    sizes = torch.tensor([[10.0, 10.0]])
    where, extent = torch.tensor([[0.3, 0.6]]), torch.tensor([[0.2, 0.4]])
    out = paste(scene, cutout, sizes, where, extent, torch.tensor([False]))[0]
    ys, xs = torch.nonzero(out[0] > 127, as_tuple=True)
    rim = [v.item() for v in (xs.min(), xs.max(), ys.min(), ys.max())]
    assert rim == pytest.approx([20, 39, 40, 79], abs=1)
    assert out[1:].sum() == 0


def test_weighted_choice_follows_the_weights() -> None:
    chosen = rng(0).choose(torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0]), 4000)
    count = torch.bincount(chosen, minlength=5)
    assert count[[0, 2, 4]].sum() == 0
    assert count[3] / 4000 == pytest.approx(0.75, abs=0.03)


def test_frames_of_the_fixture_move() -> None:
    frames = moving(0, 3)
    assert not np.array_equal(frames[0], frames[2])


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
