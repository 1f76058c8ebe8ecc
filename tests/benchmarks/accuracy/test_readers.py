"""Every reader on a miniature of the published layout, and on what is not that layout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymtrack_edge.benchmarks.accuracy import DATASETS, read_dataset
from asymtrack_edge.datasets.lasot import LASOT_TEST
from asymtrack_edge.datasets.sequences import read_boxes, read_labels
from asymtrack_edge.datasets.splits import UAV123_PARTS
from asymtrack_edge.errors import DatasetError, UsageError
from tests.benchmarks.accuracy.miniature import drift, rows, write_frames


def names(sequences):
    return [s.name for s in sequences]


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_other_layouts_are_refused_with_what_was_looked_for(name, tmp_path):
    with pytest.raises(DatasetError, match="looked for"):
        read_dataset(name, tmp_path)
    with pytest.raises(DatasetError, match="no such folder"):
        read_dataset(name, tmp_path / "absent")


def test_folder_with_nan_rows_and_unsorted_numbers(tmp_path):
    write_frames(tmp_path / "one", 12, "{}.png")
    truth = [*drift(11), ("nan", "nan", "nan", "nan")]
    (tmp_path / "one" / "groundtruth.txt").write_text(rows(truth, "\t"))
    (one,) = read_dataset("folder", tmp_path)
    assert [p.name for p in one.frames[8:]] == ["9.png", "10.png", "11.png", "12.png"]
    assert np.isnan(one.truth[11]).all() and np.array_equal(one.truth[10], [14, 5, 10, 8])
    assert one.start == (4, 5, 10, 8) and one.absent is None and one.frame_size() == (32, 24)
    assert one.read(0).shape == (24, 32, 3)


def test_got10k_val_labels_size_and_order(tmp_path):
    for name in ("GOT-10k_Val_000001", "GOT-10k_Val_000002"):
        folder = tmp_path / "val" / name
        write_frames(folder, 4)
        (folder / "groundtruth.txt").write_text(rows(drift(4)))
        (folder / "cover.label").write_text("8\n8\n0\n3\n")
        (folder / "absence.label").write_text("0\n0\n1\n0\n")
        (folder / "cut_by_image.label").write_text("0\n0\n0\n0\n")
        (folder / "meta_info.ini").write_text(
            "[METAINFO]\nurl: https://example.org/100%25\nobject_class: dog\nmotion_class: run\n"
            "resolution: (1920, 1080)\n"
        )
    (tmp_path / "val" / "list.txt").write_text("GOT-10k_Val_000002\nGOT-10k_Val_000001\n")
    first, second = read_dataset("got10k-val", tmp_path)
    assert (first.name, second.name) == ("GOT-10k_Val_000002", "GOT-10k_Val_000001")
    assert first.absent.tolist() == [False, False, True, False]
    assert first.frame_size() == (1920, 1080)
    assert first.attributes == ("absence", "occlusion")
    assert names(read_dataset("got10k-val", tmp_path / "val")) == names([first, second])


def test_got10k_test_has_only_start_boxes(tmp_path):
    folder = tmp_path / "test" / "GOT-10k_Test_000001"
    write_frames(folder, 3)
    (folder / "groundtruth.txt").write_text("4,5,10,8\n")
    (tmp_path / "test" / "list.txt").write_text("GOT-10k_Test_000001\n")
    (one,) = read_dataset("got10k-test", tmp_path)
    assert len(one) == 3 and one.start == (4, 5, 10, 8) and np.isnan(one.truth[1:]).all()


def test_otb_delimiters_ranges_and_two_targets(tmp_path):
    write_frames(tmp_path / "Boy" / "img", 3, "{:04d}.jpg")
    (tmp_path / "Boy" / "groundtruth_rect.txt").write_text(rows(drift(3), "\t"))
    write_frames(tmp_path / "Football1" / "img", 76, "{:04d}.jpg")
    (tmp_path / "Football1" / "groundtruth_rect.txt").write_text(rows(drift(74)))
    write_frames(tmp_path / "Jogging" / "img", 2, "{:04d}.jpg")
    for target in (1, 2):
        (tmp_path / "Jogging" / f"groundtruth_rect.{target}.txt").write_text(rows(drift(2, x=target)))
    write_frames(tmp_path / "Human4" / "img", 2, "{:04d}.jpg")
    (tmp_path / "Human4" / "groundtruth_rect.1.txt").write_text("")
    (tmp_path / "Human4" / "groundtruth_rect.2.txt").write_text(rows(drift(2)))
    write_frames(tmp_path / "Tiger1" / "img", 8, "{:04d}.jpg")
    (tmp_path / "Tiger1" / "groundtruth_rect.txt").write_text(rows(drift(8)))
    att = tmp_path / "att"
    att.mkdir()
    (att / "Boy.txt").write_text("1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1\n")
    boy, football, human, jogging1, jogging2, tiger = read_dataset("otb", tmp_path)
    assert boy.attributes == ("IV", "SV", "LR")
    assert (football.frames[-1].name, len(football)) == ("0074.jpg", 74)
    assert human.name == "Human4"
    assert (jogging1.name, jogging2.name) == ("Jogging.1", "Jogging.2")
    assert (jogging1.start[0], jogging2.start[0]) == (1, 2)
    assert (tiger.frames[0].name, tiger.start[0], len(tiger)) == ("0006.jpg", 9, 3)
    (att / "Boy.txt").write_text("1,0\n")
    with pytest.raises(DatasetError, match="expected 11 attributes"):
        read_dataset("otb", tmp_path)


def write_lasot(folder, count=3):
    write_frames(folder / "img", count)
    (folder / "groundtruth.txt").write_text(rows(drift(count)))
    (folder / "full_occlusion.txt").write_text(",".join(["0"] * (count - 1) + ["1"]))
    (folder / "out_of_view.txt").write_text(",".join(["0", "1"] + ["0"] * (count - 2)))


def test_lasot_takes_the_test_split_in_both_layouts(tmp_path):
    write_lasot(tmp_path / "airplane" / "airplane-1")
    write_lasot(tmp_path / "airplane" / "airplane-2")
    write_lasot(tmp_path / "zebra-10")
    airplane, zebra = read_dataset("lasot", tmp_path)
    assert (airplane.name, zebra.name) == ("airplane-1", "zebra-10")
    assert airplane.absent.tolist() == [False, True, True]
    assert names(read_dataset("lasotext", tmp_path)) == ["airplane-1", "airplane-2", "zebra-10"]
    (tmp_path / "testing_set.txt").write_text("airplane-2\n")
    assert names(read_dataset("lasot", tmp_path)) == ["airplane-2"]
    (tmp_path / "airplane" / "airplane-2" / "out_of_view.txt").write_text("0,0")
    with pytest.raises(DatasetError, match="2 labels for 3 frames"):
        read_dataset("lasot", tmp_path)


def test_published_sizes_of_the_splits():
    assert len(LASOT_TEST) == len(set(LASOT_TEST)) == 280
    assert sum(len(parts) for parts in UAV123_PARTS.values()) == 51


def test_trackingnet_orders_frames_by_number(tmp_path):
    write_frames(tmp_path / "TEST" / "frames" / "-abc_0", 12, "{}.jpg", first=0)
    (tmp_path / "TEST" / "anno").mkdir()
    (tmp_path / "TEST" / "anno" / "-abc_0.txt").write_text("4,5,10,8\n")
    (one,) = read_dataset("trackingnet", tmp_path)
    assert [p.name for p in one.frames[1:3]] == ["1.jpg", "2.jpg"] and one.frames[-1].name == "11.jpg"
    assert np.isnan(one.truth[1:]).all()


@pytest.mark.parametrize(("annotated", "frames", "expected"), [(3, 3, 3), (24, 3, 3), (4, 3, 3), (3, 4, 3)])
def test_nfs_at_30_fps(tmp_path, annotated, frames, expected):
    write_frames(tmp_path / "bee" / "30" / "bee", frames, "{:05d}.jpg")
    lines = [f'0 {i} 5 {i + 10} 13 {i} 0 0 1 "bee"\n' for i in range(annotated)]
    (tmp_path / "bee" / "30" / "bee.txt").write_text("".join(lines))
    (bee,) = read_dataset("nfs30", tmp_path)
    step = 8 if annotated == 24 else 1
    assert np.array_equal(bee.truth, [[i * step, 5, 10, 8] for i in range(expected)])
    assert len(bee) == expected


def test_nfs_refuses_a_real_mismatch(tmp_path):
    write_frames(tmp_path / "bee" / "30" / "bee", 3, "{:05d}.jpg")
    (tmp_path / "bee" / "30" / "bee.txt").write_text('0 1 5 11 13 1 0 0 1 "bee"\n' * 6)
    with pytest.raises(DatasetError, match="3 frames but 6 boxes"):
        read_dataset("nfs30", tmp_path)


def test_uav123_parts_start_where_the_toolkit_says(tmp_path):
    anno = tmp_path / "anno" / "UAV123"
    (anno / "att").mkdir(parents=True)
    write_frames(tmp_path / "data_seq" / "UAV123" / "car1", 754, "{:06d}.jpg")
    write_frames(tmp_path / "data_seq" / "UAV123" / "bike1", 2, "{:06d}.jpg")
    (anno / "car1_2.txt").write_text(rows([(4, 5, 10, 8), ("NaN",) * 4, (6, 5, 10, 8)]))
    (anno / "bike1.txt").write_text(rows(drift(2)))
    (anno / "att" / "bike1.txt").write_text("0,0,0,1,0,0,0,0,0,0,0,1")
    bike, car = read_dataset("uav123", tmp_path)
    assert bike.attributes == ("FM", "SOB")
    assert [p.name for p in car.frames] == ["000751.jpg", "000752.jpg", "000753.jpg"]
    assert np.isnan(car.truth[1]).all()


def test_selection_and_its_mistakes(folder_set):
    assert names(read_dataset("folder", folder_set, only=["c", "a"])) == ["a", "c"]
    with pytest.raises(UsageError, match="no sequence called x"):
        read_dataset("folder", folder_set, only=["a", "x"])
    with pytest.raises(UsageError, match="has no attribute files"):
        read_dataset("folder", folder_set, attributes=folder_set)
    with pytest.raises(UsageError, match="unknown data set"):
        read_dataset("tlp", folder_set)


def test_broken_files_are_named(folder_set):
    path = folder_set / "a" / "groundtruth.txt"
    path.write_text("1,2,3\n" * 6)
    with pytest.raises(DatasetError, match="found 3 values a row"):
        read_dataset("folder", folder_set)
    path.write_text("1,2,3,x\n" * 6)
    with pytest.raises(DatasetError, match="not a table of numbers"):
        read_dataset("folder", folder_set)
    path.write_text("nan,nan,nan,nan\n" * 6)
    with pytest.raises(DatasetError, match="no ground-truth box to start from"):
        read_dataset("folder", folder_set)
    path.write_text(rows(drift(6)))
    (folder_set / "a" / "00000003.jpg").write_bytes(b"not an image")
    sequence = read_dataset("folder", folder_set)[0]
    with pytest.raises(DatasetError, match="cannot read the frame"):
        sequence.read(2)


@given(st.one_of(st.binary(max_size=200), st.text("0123456789.,-+ \t\n\rnaife", max_size=200).map(str.encode)))
@settings(max_examples=300, deadline=None)
def test_any_ground_truth_file_is_a_table_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "groundtruth.txt"
    path.write_bytes(data)
    for read in (read_boxes, read_labels):
        try:
            table = read(path)
        except DatasetError as error:
            assert str(path) in str(error)
        else:
            assert table.dtype == np.float64 and table.shape[1:] in ((4,), ())
