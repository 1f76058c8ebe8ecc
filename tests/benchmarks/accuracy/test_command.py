"""asymtrack-eval from the command line: results, resume, processes, reports, bad sequences, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import cv2
import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.command import main
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from tests.datasets.miniature import drift, rows, save, write_frames

STILL = "python:fake_trackers:Still"
LABEL = "fake_trackers-Still"


def evaluate(*arguments) -> int:
    return main([str(a) for a in arguments])


def row(text, name):
    """Cells of the last printed row that begins with ``name``."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in lines[-1].strip("|").split("|")]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def results(tmp_path):
    """Results of ``folder_set``: of a and b exact, of c not at all."""
    for name, count in (("a", 6), ("b", 5), ("c", 4)):
        save(tmp_path / "other" / f"{name}.txt", drift(count, x=12))
    return tmp_path / "other"


def test_results_report_and_speed(folder_set, output, tmp_path, capsys):
    report, shown = tmp_path / "report.json", tmp_path / "plots"
    options = ("--output", output, "--json", report, "--per-sequence", "--plots", shown)
    assert evaluate("folder", folder_set, "--tracker", STILL, *options) == 0
    boxes = np.loadtxt(output / "folder" / LABEL / "a.txt", delimiter=",")
    np.testing.assert_array_equal(boxes, drift(6, x=12))
    times = np.loadtxt(output / "folder" / LABEL / "times" / "a_time.txt")
    assert times.shape == (6,) and (times > 0).all()
    (tracker,) = json.loads(report.read_text())["trackers"]
    assert tracker["identity"]["tracker"] == STILL and len(tracker["identity"]["sha256"][0]) == 64
    # a and b are followed exactly (20 of 21 thresholds), c drifts 4 pixels a frame with a box 10 wide.
    per_sequence = tracker["sequences"]
    assert per_sequence["a"]["auc"] == per_sequence["b"]["auc"] == pytest.approx(20 / 21)
    c = [(np.linspace(0, 1, 21) < o).mean() for o in (6 / 14, 2 / 18, 0)]
    assert per_sequence["c"]["auc"] == pytest.approx(np.mean(c))
    assert tracker["metrics"]["auc"] == pytest.approx((40 / 21 + np.mean(c)) / 3)
    assert tracker["metrics"]["ao"] == pytest.approx((5 + 4 + 6 / 14 + 2 / 18) / 12, abs=1e-3)
    assert tracker["speed"]["frames"] == 15
    assert 0 < tracker["speed"]["frames_over_total_time"] <= tracker["speed"]["mean_of_rates"]
    assert len(tracker["curves"]["success"]["values"]) == 21
    text = capsys.readouterr().out
    assert "by sequence" in text and "frames over total time" in text and "frame 0 left out" in text
    curves = ("norm_precision", "precision", "success")
    assert sorted(path.name for path in shown.iterdir()) == [f"{c}.{s}" for c in curves for s in ("png", "svg")]
    assert cv2.imread(str(shown / "success.png")).std() > 0
    # JSON on standard output stands there alone.
    assert evaluate("folder", folder_set, *options[:2], "--tracker", STILL, "--json") == 0
    assert json.loads(capsys.readouterr().out)["trackers"] == [tracker]


def test_resume_runs_only_what_is_missing_and_is_whose_it_is(folder_set, output, capsys):
    arguments = ("folder", folder_set, "--tracker", STILL, "--output", output)
    assert evaluate(*arguments, "--jobs", 2) == 0
    results = output / "folder" / LABEL
    (results / "b.txt").write_text("1,2,3,4\n")  # not whole
    (results / "a.txt").write_text(rows(drift(6, x=3)))
    assert evaluate(*arguments) == 0
    assert "2 sequences already have results" in capsys.readouterr().out
    assert (results / "a.txt").read_text() == rows(drift(6, x=3))
    assert len(np.loadtxt(results / "b.txt", delimiter=",")) == 5
    assert evaluate(*arguments, "--threads", "2") == 2
    assert "threads was None, is 2" in capsys.readouterr().err
    (results / "tracker.json").write_text("{")
    assert evaluate(*arguments) == 2 and "--fresh" in capsys.readouterr().err
    assert evaluate(*arguments, "--fresh") == 0
    assert json.loads((results / "tracker.json").read_text())["tracker"] == STILL
    np.testing.assert_array_equal(np.loadtxt(results / "a.txt", delimiter=","), drift(6, x=12))


@pytest.mark.parametrize(
    ("tracker", "jobs", "said"),
    [("FailsOnBlack", 1, "ZeroDivisionError: nothing to see"), ("DiesOnBlack", 2, "process died (exit code 7)")],
)
def test_a_failure_costs_its_sequence_alone(folder_set, output, tmp_path, capsys, tracker, jobs, said):
    report = tmp_path / "r.json"
    options = ("--output", output, "--jobs", jobs, "--json", report)
    assert evaluate("folder", folder_set, "--tracker", f"python:fake_trackers:{tracker}", *options) == 1
    error = capsys.readouterr().err
    assert f"fake_trackers-{tracker} failed on b: " in error and said in error
    (found,) = json.loads(report.read_text())["trackers"]
    assert sorted(found["sequences"]) == ["a", "c"] and list(found["failures"]) == ["b"]
    log = output / "folder" / f"fake_trackers-{tracker}" / "errors" / "b.txt"
    assert ("in update" in log.read_text()) if tracker == "FailsOnBlack" else not log.exists()


def test_a_tracker_that_never_returns_can_be_ended(folder_set, output, tmp_path):
    command = [sys.executable, "-m", "asymtrack_edge.benchmarks.accuracy.command", "folder", str(folder_set)]
    command += ["--tracker", "python:fake_trackers:NeverReturns", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        done = output / "folder" / "fake_trackers-NeverReturns" / "a.txt"
        while process.poll() is None and not done.exists():
            time.sleep(0.1)
        time.sleep(0.5)  # b, the next in length, is being tracked
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=10)
    assert process.returncode == 143
    assert "fake_trackers-NeverReturns is ended in b" in error


def test_results_of_other_toolkits_are_found_by_their_names(tmp_path, capsys):
    write_frames(tmp_path / "otb" / "Jogging" / "img", 3, "{:04d}.jpg")
    write_frames(tmp_path / "otb" / "Tiger1" / "img", 8, "{:04d}.jpg")
    save(tmp_path / "otb" / "Tiger1" / "groundtruth_rect.txt", drift(8))
    for target in (1, 2):
        save(tmp_path / "otb" / "Jogging" / f"groundtruth_rect.{target}.txt", drift(3, x=target))
    write_frames(tmp_path / "uav123" / "data_seq" / "UAV123" / "Bike1", 3, "{:06d}.jpg")
    save(tmp_path / "uav123" / "anno" / "UAV123" / "Bike1.txt", drift(3))
    jogging = {"1": drift(3, x=1), "2": rows(drift(3, x=2), "\t")}
    for style, dataset, files in (
        ("pysot", "otb", {f"Jogging-{k}": v for k, v in jogging.items()}),
        ("pytracking_000", "otb", {f"Jogging_{k}": v for k, v in jogging.items()}),
        ("got10k", "otb", {f"Jogging.{k}": v for k, v in jogging.items()}),
        ("runs/dimp_000", "uav123", {"uav_bike1": drift(3), "uav_bike1_time": "0.1\n" * 3}),
        ("nested", "uav123", {"Bike1/Bike1_001": drift(3)}),
    ):
        for name, text in {**files, "Tiger1": drift(8)}.items():
            save(tmp_path / style / f"{name}.txt", text)
        folder = tmp_path / style.split("/")[0]
        assert evaluate(dataset, tmp_path / dataset, "--results", folder) == 0
        scores = row(capsys.readouterr().out.split("## Speed")[0], folder.name)
        # All are perfect: Tiger1's first five frames, which others keep, do not shift its boxes.
        assert scores[1:4] == ["3" if dataset == "otb" else "1", "95.24", "100.00"]


def test_a_bad_sequence_costs_itself_alone(tmp_path, output, capsys):
    root = tmp_path / "lasot"
    for name, images in (("airplane-1", 4), ("airplane-15", 5), ("bird-2", 4), ("bird-3", 4)):
        folder = root / name.split("-")[0] / name
        write_frames(folder / "img", images)
        save(folder / "groundtruth.txt", "1,2,3\n" * 4 if name == "bird-3" else drift(4))
        for label in ("full_occlusion", "out_of_view"):
            save(folder / f"{label}.txt", "0,0,0,0")
    report = tmp_path / "r.json"
    assert evaluate("lasot", root, "--tracker", STILL, "--output", output, "--json", report) == 1
    document = json.loads(report.read_text())
    assert sorted(document["trackers"][0]["sequences"]) == ["airplane-1", "airplane-15", "bird-2"]
    assert document["trackers"][0]["metrics"]["auc"] == pytest.approx(20 / 21)
    assert list(document["left_out"]) == ["bird-3"] and list(document["notes"]) == ["airplane-15"]
    summary = capsys.readouterr().err[-1000:]
    assert "2 of 4 sequences are not whole: bird-3, airplane-15\n" in summary
    assert "sequence airplane-15: 5 frames but 4 boxes of ground truth: cut to the annotation" in summary
    assert "found 3 values in row 1" in summary
    asked = ("lasot", root, "--tracker", STILL, "--output", output, "--sequences")
    assert evaluate(*asked, "airplane-1") == 0
    assert evaluate(*asked, "bird-3") == 2
    assert "no sequence can be read: sequence bird-3: " in capsys.readouterr().err


def test_results_that_do_not_fit_cost_their_sequence_alone(folder_set, results, tmp_path, capsys):
    save(results / "a.txt", drift(9, x=12))
    (results / "b.txt").unlink()
    save(results / "c.txt", drift(2, x=12))
    report = tmp_path / "r.json"
    assert evaluate("folder", folder_set, "--results", results, "--json", report) == 1
    (found,) = json.loads(report.read_text())["trackers"]
    assert found["sequences"]["a"]["auc"] == pytest.approx(20 / 21)
    assert found["notes"] == {"a": "9 boxes in the results for 6 frames: cut to the annotation"}
    assert "holds no result of it" in found["failures"]["b"] and "2 boxes for 4 frames" in found["failures"]["c"]
    assert "3 of 3 sequences are not whole: b, c, a" in capsys.readouterr().err
    (folder_set / "a" / "00000001.jpg").write_bytes(b"not an image")
    assert evaluate("folder", folder_set, "--results", results) == 1
    assert "other failed on a: the frame" in capsys.readouterr().err
    (results / "a.txt").unlink()
    (results / "c.txt").unlink()
    assert evaluate("folder", folder_set, "--results", results) == 2
    assert "holds no result of any sequence" in capsys.readouterr().err


def test_a_sequence_without_a_frame_to_score_is_named(folder_set, results, capsys):
    (folder_set / "b" / "cover.label").write_text("0\n" * 5)
    assert evaluate("folder", folder_set, "--results", results) == 1
    captured = capsys.readouterr()
    assert "sequence b: no frame can be scored" in captured.err
    assert row(captured.out, "other")[:2] == ["other", "2"]
    assert evaluate("folder", folder_set, "--results", results, "--sequences", "b") == 1
    captured = capsys.readouterr()
    assert "sequence b: no frame can be scored" in captured.err and "withheld" not in captured.out


def test_names_with_blanks_and_without_utf8(folder_set, output, tmp_path, capsys):
    odd = os.fsdecode(b"s\xe9q")
    (folder_set / "a").rename(folder_set / "seq a")
    (folder_set / "b").rename(folder_set / odd)
    listing = tmp_path / "names.txt"
    listing.write_bytes("seq a\r\nc\r\n".encode("utf-16"))
    arguments = ("folder", folder_set, "--tracker", STILL, "--output", output)
    assert evaluate(*arguments, "--sequences", listing) == 0
    assert sorted(path.stem for path in (output / "folder" / LABEL).glob("*.txt")) == ["c", "seq a"]
    assert evaluate(*arguments, "--sequences", "seq a, c" + ",c" * 2000) == 0  # longer than a name can be
    assert evaluate(*arguments, "--per-sequence") == 0
    assert r"s\udce9q" in capsys.readouterr().out and (output / "folder" / LABEL / f"{odd}.txt").is_file()


def test_what_a_server_scores_is_packed_as_it_wants_it(tmp_path, output, capsys):
    write_frames(tmp_path / "test" / "seq-1", 4)
    save(tmp_path / "test" / "seq-1" / "groundtruth.txt", drift(1))
    for name in ("v1", "v2"):
        write_frames(tmp_path / "TEST" / "frames" / name, 3, "{}.jpg", first=0)
        save(tmp_path / "TEST" / "anno" / f"{name}.txt", drift(1))
    packed = {}
    for dataset in ("got10k-test", "trackingnet"):
        assert evaluate(dataset, tmp_path, "--tracker", STILL, "--output", output) == 0
        with zipfile.ZipFile(output / dataset / f"{LABEL}.zip") as archive:
            packed[dataset] = {name: archive.read(name).decode() for name in archive.namelist()}
    text = capsys.readouterr().out
    assert "withheld" in text and "the published set has 180 sequences" in text
    assert sorted(packed["trackingnet"]) == ["v1.txt", "v2.txt"]
    assert sorted(packed["got10k-test"]) == ["seq-1/seq-1_001.txt", "seq-1/seq-1_time.txt"]
    assert packed["got10k-test"]["seq-1/seq-1_001.txt"].splitlines()[1] == "5.000,5.000,10.000,8.000"
    (output / "got10k-test" / f"{LABEL}.zip").unlink()
    save(tmp_path / "test" / "list.txt", "seq-1\nseq-2\n")
    assert evaluate("got10k-test", tmp_path, "--tracker", STILL, "--output", output) == 1
    assert not list(output.glob("got10k-test/*.zip"))


def test_the_gap_by_attribute(tmp_path, capsys):
    """Two trackers, one of which loses what is occluded: the gap is there and nowhere else."""
    for name, flags in (("Boy", "1,0,0,0,0,0,0,0,0,0,0"), ("Car", "0,0,0,1,0,0,0,0,0,0,1")):
        write_frames(tmp_path / "otb" / name / "img", 4, "{:04d}.jpg")
        save(tmp_path / "otb" / name / "groundtruth_rect.txt", drift(4))
        save(tmp_path / "toolkit" / f"{name}.txt", flags)
        save(tmp_path / "strong" / f"{name}.txt", drift(4))
        save(tmp_path / "weak" / f"{name}.txt", [drift(4)[0], *[(25, 20, 2, 2)] * 3] if name == "Car" else drift(4))
    arguments = ("attributes", "otb", tmp_path / "otb", tmp_path / "weak", tmp_path / "strong")
    assert evaluate(*arguments, "--attributes", tmp_path / "toolkit", "--output", tmp_path / "plots") == 0
    text = capsys.readouterr().out
    # Of four frames weak has the first on Car: a quarter of 95.24.
    assert "strong - weak: LR +71.43, OCC +71.43, IV +0.00" in text
    assert row(text.split("weak by attribute")[1], "IV")[:3] == ["IV", "1", "95.24"]
    assert cv2.imread(str(tmp_path / "plots" / "attributes.png")).std() > 0
    assert "gap to weak" in (tmp_path / "plots" / "attributes.svg").read_text()
    assert evaluate(*arguments) == 2 and "--attributes DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tracker", "opencv:BOOSTED"], "choose mil, kcf"),
        (["--tracker", "opencv:nano"], "opencv:nano=BACKBONE.onnx,HEAD.onnx"),
        (["--tracker", "opencv:vit=absent.onnx"], "there is no file absent.onnx"),
        (["--tracker", "opencv:MIL=x.onnx"], "opencv:mil alone"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--tracker", "python:absent_module:Tracker"], "cannot import the tracker"),
        (["--tracker", "python:fake_trackers:os"], "is not callable"),
        (["--tracker", STILL, "--tracker", STILL], "two trackers are called"),
        (["--tracker", STILL, "--sequences", "z"], "no sequence called z"),
        (["--tracker", STILL, "--sequences", ","], "names no sequence"),
        (["--results", "absent-folder"], "no folder of results"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(folder_set, output, capsys, arguments, said):
    assert evaluate("folder", folder_set, "--output", output, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_what_this_machine_lacks_is_one_line(folder_set, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert evaluate("folder", folder_set, "--tracker", STILL, "--output", tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err
    for name in ("TrackerKCF_create", "legacy"):
        monkeypatch.delattr(cv2, name, raising=False)
    assert evaluate("folder", folder_set, "--tracker", "opencv:KCF", "--output", tmp_path / "out") == 2
    assert "opencv-contrib-python" in capsys.readouterr().err


def test_opencv_baseline_goes_through_the_same_harness(tmp_path, output, capsys):
    """MIL on a square that moves: the result must follow it; boxes it loops for ever on are refused."""
    noise = np.random.default_rng(0).integers(0, 60, (60, 80, 3), np.uint8)
    starts = {"square": (20, 16), "thin": (20, 5), "outside": (-60, 16), "cut": (-12, 16)}
    for name, (x, w) in starts.items():
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for i in range(4):
            frame = noise.copy()
            frame[20:36, 20 + i : 36 + i] = (40, 200, 250)
            cv2.imwrite(str(folder / f"{i:08d}.png"), frame)
        save(folder / "groundtruth.txt", [(x + i, 20, w, 16) for i in range(4)])
    report = tmp_path / "r.json"
    options = ("--output", output, "--json", report, "--threads", "1")
    assert evaluate("folder", tmp_path / "set", "--tracker", "opencv:MIL", *options) == 1
    (tracker,) = json.loads(report.read_text())["trackers"]
    assert tracker["metrics"]["ao"] > 0.5 and tracker["identity"]["opencv"] == cv2.__version__
    assert list(tracker["sequences"]) == ["square"]
    assert "lies outside the frame" in tracker["failures"]["outside"]
    assert all("too small a box" in tracker["failures"][name] for name in ("thin", "cut"))


def test_results_with_and_without_recovery_are_told_apart():
    with_recovery, without = (TrackerSpec("T", recover=recover).identity() for recover in (True, False))
    assert with_recovery["recovers"] and not without["recovers"]


def test_a_tracker_of_the_folder_one_works_in_is_found(tmp_path, monkeypatch):
    """A command that pip installed has its own folder in the path, not the working one."""
    (tmp_path / "my_tracker_here.py").write_text("def make():\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert TrackerSpec("python:my_tracker_here:make").build() is None
