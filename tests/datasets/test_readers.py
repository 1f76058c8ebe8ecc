"""Every reader on a miniature of its data set's published layout, on damaged files, and on other layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymtrack_edge.datasets import DATASETS, Dataset
from asymtrack_edge.datasets.sequences import read_boxes, read_labels
from asymtrack_edge.errors import DatasetError, UsageError
from tests.datasets.miniature import drift, rows, save, write_frames, write_tree


def read(name, root):
    """All sequences of a data set, each read on its own."""
    data = Dataset(name, root)
    return [data.sequence(one) for one in data.names]


def names(name, root):
    return Dataset(name, root).names


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_other_layouts_are_refused_and_the_expected_one_named(name, tmp_path):
    for root, said in ((tmp_path, "looked for"), (tmp_path / "absent", "there is no folder")):
        with pytest.raises(DatasetError, match=said):
            Dataset(name, root)


def test_folder_with_nan_rows_and_unsorted_numbers(tmp_path):
    write_tree(tmp_path, {"one/imgs/{:d}.jpg": 12, "one/groundtruth.txt": rows([*drift(11), ("nan",) * 4], "\t")})
    (one,) = read("folder", tmp_path)
    assert [path.name for path in one.frames][8:] == ["9.jpg", "10.jpg", "11.jpg", "12.jpg"]
    assert np.isnan(one.truth[11]).all() and np.array_equal(one.truth[10], [14, 5, 10, 8])
    assert one.start == (4, 5, 10, 8) and one.absent is None and one.read(0).shape == (24, 32, 3)


def got10k(root, name, cover="8 8 0 3"):
    labels = {"cover": cover, "absence": "0 0 1 0", "cut_by_image": "0 0 0 0"}
    texts = {f"{label}.label": values.replace(" ", "\n") for label, values in labels.items()}
    write_tree(root / name, {"{:08d}.jpg": 4, "groundtruth.txt": drift(4), **texts})


def test_got10k_val_labels_and_order(tmp_path):
    for number in (1, 2):
        got10k(tmp_path / "val", f"GOT-10k_Val_{number}")
    save(tmp_path / "val" / "list.txt", "GOT-10k_Val_2\nGOT-10k_Val_1\n")
    first, second = read("got10k-val", tmp_path)
    assert [first.name, second.name] == names("got10k-val", tmp_path / "val") == ["GOT-10k_Val_2", "GOT-10k_Val_1"]
    assert first.absent.tolist() == [False, False, True, False] and first.attributes == ("absence", "occlusion")
    (tmp_path / "val" / "GOT-10k_Val_2" / "cover.label").unlink()
    assert read("got10k-val", tmp_path)[0].absent.tolist() == [False, False, True, False]
    got10k(tmp_path / "val" / "more", "GOT-10k_Val_1")
    save(tmp_path / "val" / "list.txt", "GOT-10k_Val_1\nmore/GOT-10k_Val_1\n")
    with pytest.raises(DatasetError, match="with the same name"):
        read("got10k-val", tmp_path)


def test_got10k_train_uses_frames_that_no_label_excludes(tmp_path):
    got10k(tmp_path / "train", "GOT-10k_Train_000001", cover="8 0 3 8")
    for root in (tmp_path, tmp_path / "train"):
        boxes, usable, frames = Dataset("got10k-train", root).annotation(0)
        assert usable.tolist() == [0, 3] and boxes.dtype == np.float32
        assert boxes[3].tolist() == [7, 5, 10, 8] and frames[3].name == "00000004.jpg"
    write_tree(tmp_path / "own" / "a", {"{:d}.jpg": 3, "groundtruth.txt": [(4, 5, 10, 8), (4, 5, 10, 3), (4, 5, 3, 8)]})
    assert Dataset("folder", tmp_path / "own").annotation(0).usable.tolist() == [0]  # the other boxes are too small
    save(tmp_path / "own" / "a" / "groundtruth.txt", [(4, 5, 0, 8)] * 3)
    with pytest.raises(DatasetError, match="no ground-truth box to start"):
        read("folder", tmp_path / "own")


def test_otb_delimiters_ranges_and_two_targets(tmp_path):
    write_tree(tmp_path, {
        "Boy/img/{:04d}.jpg": 3, "Boy/groundtruth_rect.txt": rows(drift(3), "\t"),
        "Boy/groundtruth_rect (1).txt": drift(3),  # named as browsers name a second download
        "Football1/img/{:04d}.jpg": 76, "Football1/groundtruth_rect.txt": drift(74),
        "Jogging/img/{:04d}.jpg": 2,
        "Jogging/groundtruth_rect.1.txt": drift(2, x=1), "Jogging/groundtruth_rect.2.txt": drift(2, x=2),
        "Human4/img/{:04d}.jpg": 2, "Human4/groundtruth_rect.1.txt": "", "Human4/groundtruth_rect.2.txt": drift(2),
        "Tiger1/img/{:04d}.jpg": 8, "Tiger1/groundtruth_rect.txt": drift(8),
        "att/Boy.txt": "1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1\n",
    })  # fmt: skip
    boy, football, human, jogging1, jogging2, tiger = read("otb", tmp_path)
    assert boy.attributes == ("IV", "SV", "LR")
    assert (football.frames[-1].name, len(football)) == ("0074.jpg", 74)
    assert human.name == "Human4" and "Human4-2" in human.aliases
    assert (jogging1.name, jogging2.name) == ("Jogging.1", "Jogging.2")
    assert (jogging1.start[0], jogging2.start[0]) == (1, 2)
    assert (tiger.frames[0].name, tiger.start[0], len(tiger)) == ("0006.jpg", 9, 3)
    save(tmp_path / "att" / "Boy.txt", "1,0\n")
    with pytest.raises(DatasetError, match=r"Boy: .*2 attributes, but 11 are expected"):
        Dataset("otb", tmp_path).sequence("Boy")


def lasot(folder, images=3):
    labels = {"full_occlusion.txt": "0,0,1", "out_of_view.txt": "0,1,0"}
    write_tree(folder, {"img/{:08d}.jpg": images, "groundtruth.txt": drift(3), **labels})


def test_lasot_splits_in_both_layouts(tmp_path):
    lasot(tmp_path / "airplane" / "airplane-1")
    lasot(tmp_path / "airplane" / "airplane-2")
    lasot(tmp_path / "zebra-10")
    airplane, zebra = read("lasot", tmp_path)
    assert (airplane.name, zebra.name) == ("airplane-1", "zebra-10")
    assert airplane.absent.tolist() == [False, True, True]
    assert names("lasotext", tmp_path) == ["airplane-1", "airplane-2", "zebra-10"]
    assert names("lasot-train", tmp_path) == ["airplane-2"]
    assert Dataset("lasot-train", tmp_path).annotation(0).usable.tolist() == [0]
    write_tree(tmp_path, {"testing_set.txt": "airplane-2\n", "training_set.txt": "airplane-1\n"})
    assert names("lasot", tmp_path) == ["airplane-2"] and names("lasot-train", tmp_path) == ["airplane-1"]
    for labels, said in (("0,0", "2 labels for 3 frames"), ("0,0,0,0", "4 labels for 3 frames")):
        save(tmp_path / "airplane" / "airplane-2" / "out_of_view.txt", labels)
        with pytest.raises(DatasetError, match=f"airplane-2: .*{said}"):
            read("lasot", tmp_path)


def test_lasot_drops_images_beyond_the_annotation_and_says_so(tmp_path):
    for name in ("airplane-13", "airplane-15"):
        lasot(tmp_path / name, images=4)
    other, known = read("lasot", tmp_path)
    assert len(other) == len(known) == 3 and known.frames[-1].name == "00000003.jpg"
    assert other.note == "4 frames but 3 boxes of ground truth: cut to the annotation" and not known.note
    lasot(tmp_path / "zebra-10", images=2)
    with pytest.raises(DatasetError, match="2 frames but 3 boxes"):
        Dataset("lasot", tmp_path).sequence("zebra-10")


def test_trackingnet_orders_frames_by_number(tmp_path):
    for place, name in (("TEST", "-abc_0"), ("TRAIN_11", "a_1"), ("TRAIN_2", "b_1")):
        write_tree(tmp_path / place, {f"frames/{name}/{{}}.jpg": 12, f"anno/{name}.txt": drift(1)})
    (one,) = read("trackingnet", tmp_path)
    assert one.frames[2].name == "2.jpg" and one.frames[-1].name == "11.jpg"
    assert np.isnan(one.truth[1:]).all() and one.withheld
    assert names("trackingnet-train", tmp_path) == ["a_1", "b_1"]


@pytest.mark.parametrize(("annotated", "frames", "expected"), [(3, 3, 3), (24, 3, 3), (4, 3, 3), (3, 4, 3), (6, 3, 0)])
def test_nfs_at_30_fps(tmp_path, annotated, frames, expected):
    write_frames(tmp_path / "bee" / "30" / "bee", frames, "{:05d}.jpg")
    lines = (f'0 {i} 5 {i + 10} 13 {i} 0 0 1 "bee"\n' for i in range(annotated))
    save(tmp_path / "bee" / "30" / "bee.txt", "".join(lines))
    if not expected:
        with pytest.raises(DatasetError, match="3 frames but 6 boxes"):
            read("nfs30", tmp_path)
        return
    (bee,) = read("nfs30", tmp_path)
    assert np.array_equal(bee.truth, [[i * (8 if annotated == 24 else 1), 5, 10, 8] for i in range(expected)])
    assert len(bee) == expected


def test_uav123_parts_start_where_the_toolkit_says(tmp_path):
    write_tree(tmp_path, {
        "data_seq/UAV123/car1/{:06d}.jpg": 754, "data_seq/UAV123/bike1/{:06d}.jpg": 2,
        "anno/UAV123/car1_2.txt": [(4, 5, 10, 8), ("NaN",) * 4, (6, 5, 10, 8)], "anno/UAV123/bike1.txt": drift(2),
        "anno/UAV123/att/bike1.txt": "0,0,0,1,0,0,0,0,0,0,0,1",
    })  # fmt: skip
    bike, car = read("uav123", tmp_path)
    assert bike.attributes == ("FM", "SOB")
    assert [path.name for path in car.frames] == ["000751.jpg", "000752.jpg", "000753.jpg"]
    assert np.isnan(car.truth[1]).all()
    (tmp_path / "data_seq/UAV123/car1/000700.jpg").unlink()
    with pytest.raises(DatasetError, match="lacks images: number 753 is 000754"):
        read("uav123", tmp_path)


@pytest.mark.parametrize("place", ["train2017", "images/train2017"])
def test_coco_leaves_out_crowds_and_specks(place, tmp_path):
    write_frames(tmp_path / place, 1, "{:012d}.jpg", first=9)
    boxes = [([2, 3, 12, 10], 0), ([0, 0, 20, 20], 1), ([5, 5, 3, 3], 0), ([1, 1, 10, 10], 0), ([], 0)]
    objects = [{"id": i, "image_id": 9, "bbox": box, "iscrowd": crowd} for i, (box, crowd) in enumerate(boxes)]
    objects += [{**objects[0], "image_id": number} for number in (10, 77)]  # its file is missing; not in "images"
    index = {"images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in (9, 10)], "annotations": objects}
    file = tmp_path / "annotations" / "instances_train2017.json"
    save(file, json.dumps(index))
    data = Dataset("coco-train", tmp_path)
    assert [data.annotation(i).boxes.tolist() for i in range(len(data))] == [[[2, 3, 12, 10]], [[1, 1, 10, 10]]]
    assert data.annotation(1).frames[0].is_file()
    save(file, json.dumps({**index, "annotations": [[]]}))
    with pytest.raises(DatasetError, match="is not a COCO annotation file"):
        Dataset("coco-train", tmp_path)


def test_unknown_data_sets_and_attributes_are_refused(folder_set):
    for name, said in (("folder", "has no attribute files"), ("tlp", "unknown data set")):
        with pytest.raises(UsageError, match=said):
            Dataset(name, folder_set, attributes=folder_set)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rows(drift(5)) + "1,2,3\n", "found 3 values in row 6"),
        ("1,2,3,x\n" * 6, "not a table of numbers"),
        ("nan,nan,nan,nan\n" * 6, "no ground-truth box to start from"),
        (rows(drift(5)), "6 frames but 5 boxes"),
        (rows(drift(7)), "6 frames but 7 boxes"),
        ("", "6 frames but 0 boxes"),
        (None, "groundtruth.txt"),
    ],
)
def test_a_bad_sequence_is_named_and_left_out(folder_set, damage, said):
    boxes = folder_set / "a" / "groundtruth.txt"
    boxes.unlink() if damage is None else boxes.write_text(damage)
    data = Dataset("folder", folder_set)
    (c, *more), left_out = data.read(["c"])
    assert (c.name, more, left_out) == ("c", [], {})
    sequences, left_out = data.read()
    assert [s.name for s in sequences] == ["b", "c"] and list(left_out) == ["a"]
    with pytest.raises(DatasetError, match=f"no sequence can be read: sequence a: .*{said}"):
        data.read(["a"])
    with pytest.raises(UsageError, match="no sequence called x"):
        data.read(["a", "x"])
    for _ in range(2):
        assert not len(data.annotation(0).usable)
    assert [said in reason for reason in data.left_out] == [True]  # in training, recorded once


def test_hidden_files_of_other_systems_are_ignored(tmp_path):
    lasot(tmp_path / "airplane" / "airplane-1")
    hidden = ("airplane/airplane-1/img/._00000001.jpg", "._airplane/groundtruth.txt", "airplane/.x/groundtruth.txt")
    for place in (*hidden, "TEST/anno/._v.txt"):
        save(tmp_path / place, "\0\5\26\7")
    assert names("lasotext", tmp_path) == ["airplane-1"] and len(read("lasot", tmp_path)[0]) == 3
    save(tmp_path / "TEST" / "anno" / "v.txt", drift(1))
    assert names("trackingnet", tmp_path) == ["v"]


@given(st.one_of(st.binary(max_size=200), st.text("0123456789.,-+ \t\n\rnaife", max_size=200).map(str.encode)))
@settings(max_examples=300, deadline=None)
def test_any_ground_truth_file_is_read_as_a_table_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "groundtruth.txt"
    path.write_bytes(data)
    for reader in (read_boxes, read_labels):
        try:
            table = reader(path)
        except DatasetError as error:
            assert str(path) in str(error)
        else:
            assert table.dtype == np.float64 and table.shape[1:] in ((4,), ())


@pytest.mark.parametrize(
    "text",
    ["1,2,3,4\n5,6,7,nan", "1;2;3;4\n5;6;7;NaN", "1\t2\t3\t4\n5\t6\t7\tnan\n", " 1, 2, 3, 4,\r\n\r\n5 6  7 nan \r\n",
     "1,2,3,4\r5 6\t7 nan\r"],
)  # fmt: skip
def test_numbers_with_any_separator(tmp_path, text):
    (tmp_path / "boxes.txt").write_bytes(text.encode())
    np.testing.assert_array_equal(read_boxes(tmp_path / "boxes.txt"), [[1, 2, 3, 4], [5, 6, 7, np.nan]])
