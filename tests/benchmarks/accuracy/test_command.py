"""asymtrack-eval from the command line: results, resume, processes, reports, mistakes."""

from __future__ import annotations

import builtins
import json
import sys
import zipfile

import cv2
import fake_trackers
import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy import trackers
from asymtrack_edge.benchmarks.accuracy.command import main
from asymtrack_edge.benchmarks.accuracy.results import ResultStore
from asymtrack_edge.benchmarks.accuracy.run import run
from asymtrack_edge.benchmarks.accuracy.trackers import TrackerSpec
from asymtrack_edge.datasets import Sequence, open_dataset
from asymtrack_edge.datasets.sequences import Frames
from tests.datasets.miniature import drift, rows, write_frames

STILL = "python:fake_trackers:Still"
LABEL = "fake_trackers-Still"


def evaluate(*arguments) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_results_report_and_speed(folder_set, output, tmp_path, capsys):
    report = tmp_path / "sub" / "report.json"
    code = evaluate("folder", folder_set, "--tracker", STILL, "--output", output, "--json", report, "--per-sequence")
    assert code == 0
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
    assert "by sequence" in text and "frames/total time" in text and "frame 0 left out" in text


def test_resume_runs_only_what_is_missing(folder_set, output, monkeypatch, capsys):
    monkeypatch.setattr(fake_trackers.Counting, "begun", 0)
    arguments = ("folder", folder_set, "--tracker", "python:fake_trackers:Counting", "--output", output)
    assert evaluate(*arguments) == 0 and fake_trackers.Counting.begun == 3
    results = output / "folder" / "fake_trackers-Counting"
    (results / "b.txt").write_text("1,2,3,4\n")  # not whole
    assert evaluate(*arguments) == 0 and fake_trackers.Counting.begun == 4
    assert "2 sequences already have results" in capsys.readouterr().out
    assert len(np.loadtxt(results / "b.txt", delimiter=",")) == 5
    assert evaluate(*arguments, "--fresh") == 0 and fake_trackers.Counting.begun == 7


def test_results_of_another_tracker_are_not_taken_over(folder_set, output, capsys):
    arguments = ("folder", folder_set, "--tracker", STILL, "--output", output)
    assert evaluate(*arguments) == 0
    assert evaluate(*arguments, "--threads", "2") == 2
    assert "threads was None, is 2" in capsys.readouterr().err
    identity = output / "folder" / LABEL / "tracker.json"
    identity.write_text("{")
    assert evaluate(*arguments) == 2 and "--fresh" in capsys.readouterr().err
    assert evaluate(*arguments, "--fresh") == 0
    assert json.loads(identity.read_text())["tracker"] == STILL


def test_processes_give_the_same_results(folder_set, output):
    for jobs in (1, 2):
        folder = output / str(jobs)
        assert evaluate("folder", folder_set, "--tracker", STILL, "--output", folder, "--jobs", jobs) == 0
    for name in "abc":
        files = [output / str(jobs) / "folder" / LABEL / f"{name}.txt" for jobs in (1, 2)]
        assert files[0].read_text() == files[1].read_text()


def test_progress_reports_every_frame_once(folder_set, tmp_path):
    sequences = list(open_dataset("folder", folder_set).sequences())
    long = Sequence("long", Frames(folder_set / "a", ["00000001.jpg"] * 45), np.full((45, 4), 5.0))
    for jobs in (1, 2):
        counts = []
        store = ResultStore(tmp_path / str(jobs))
        outcomes = run(TrackerSpec(STILL), [*sequences, long], store, jobs, counts.append)
        assert sum(counts) == 15 + 45 and max(counts) == 20
        assert [o.error for o in outcomes] == [None] * 4


def test_an_exception_costs_its_sequence_alone(folder_set, output, capsys):
    tracker = "python:fake_trackers:FailsOnBlack"
    assert evaluate("folder", folder_set, "--tracker", tracker, "--output", output) == 1
    error = capsys.readouterr().err
    assert "failed on b: ZeroDivisionError: nothing to see" in error
    results = output / "folder" / "fake_trackers-FailsOnBlack"
    assert sorted(p.name for p in results.glob("?.txt")) == ["a.txt", "c.txt"]
    assert "in update" in (results / "errors" / "b.txt").read_text()


def test_the_death_of_a_worker_costs_its_sequence_alone(folder_set, output, tmp_path, capsys):
    tracker = "python:fake_trackers:DiesOnBlack"
    report = tmp_path / "r.json"
    code = evaluate("folder", folder_set, "--tracker", tracker, "--output", output, "--jobs", 2, "--json", report)
    assert code == 1
    assert "failed on b: the worker process died (exit code 7)" in capsys.readouterr().err
    (tracker,) = json.loads(report.read_text())["trackers"]
    assert sorted(tracker["sequences"]) == ["a", "c"] and list(tracker["failures"]) == ["b"]


def test_existing_results_are_scored(folder_set, output, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for name, count in (("a", 6), ("b", 5), ("c", 4)):
        (other / f"{name}.txt").write_text(rows(drift(count, x=12, step=-3 if name == "c" else 1)))
    assert evaluate("folder", folder_set, "--results", other) == 0
    assert "95.24" in capsys.readouterr().out  # 20 of 21 thresholds everywhere
    (other / "c.txt").unlink()
    assert evaluate("folder", folder_set, "--results", other) == 2
    assert "c.txt" in capsys.readouterr().err


def got10k(root, subset, truth):
    folder = root / subset / "seq-1"
    write_frames(folder, 4)
    (folder / "groundtruth.txt").write_text(rows(truth))
    (root / subset / "list.txt").write_text("seq-1\n")


def test_got10k_submission(tmp_path, output, capsys):
    got10k(tmp_path, "test", drift(1))
    assert evaluate("got10k-test", tmp_path, "--tracker", STILL, "--output", output) == 0
    text = capsys.readouterr().out
    assert "withheld" in text and "the published set has 180 sequences" in text
    with zipfile.ZipFile(output / "got10k-test" / f"{LABEL}.zip") as archive:
        assert sorted(archive.namelist()) == ["seq-1/seq-1_001.txt", "seq-1/seq-1_time.txt"]
        assert archive.read("seq-1/seq-1_001.txt").decode().splitlines()[1] == "5.000,5.000,10.000,8.000"


def test_got10k_val_is_scored_and_its_files_are_the_toolkits(tmp_path, output, capsys):
    got10k(tmp_path, "val", drift(4))
    assert evaluate("got10k-val", tmp_path, "--tracker", STILL, "--output", output, "--plots", output) == 0
    assert "100.00   100.00   100.00" in capsys.readouterr().out
    times = np.loadtxt(output / "got10k-val" / LABEL / "seq-1" / "seq-1_time.txt")
    assert times.shape == (4,)
    assert (output / "success.svg").exists() and not (output / "precision.svg").exists()


def test_trackingnet_submission(tmp_path, output):
    for name in ("v1", "v2"):
        write_frames(tmp_path / "TEST" / "frames" / name, 3, "{}.jpg", first=0)
        (tmp_path / "TEST" / "anno").mkdir(exist_ok=True)
        (tmp_path / "TEST" / "anno" / f"{name}.txt").write_text("4,5,10,8\n")
    assert evaluate("trackingnet", tmp_path, "--tracker", STILL, "--output", output) == 0
    with zipfile.ZipFile(output / "trackingnet" / f"{LABEL}.zip") as archive:
        assert sorted(archive.namelist()) == ["v1.txt", "v2.txt"]


def test_plots_are_images_of_every_curve(folder_set, output, tmp_path):
    plots = tmp_path / "plots"
    assert evaluate("folder", folder_set, "--tracker", STILL, "--output", output, "--plots", plots) == 0
    assert sorted(p.name for p in plots.iterdir()) == [
        f"{curve}.{suffix}" for curve in ("norm_precision", "precision", "success") for suffix in ("png", "svg")
    ]
    assert cv2.imread(str(plots / "success.png")).std() > 0
    assert "<svg" in (plots / "success.svg").read_text()


def test_attributes_are_tabled(tmp_path, output, capsys):
    write_frames(tmp_path / "Boy" / "img", 3, "{:04d}.jpg")
    (tmp_path / "Boy" / "groundtruth_rect.txt").write_text(rows(drift(3)))
    attributes = tmp_path / "toolkit" / "att"
    attributes.mkdir(parents=True)
    (attributes / "Boy.txt").write_text("1,0,0,0,0,0,0,0,0,0,0")
    code = evaluate("otb", tmp_path, "--tracker", STILL, "--output", output, "--attributes", attributes)
    assert code == 0
    table = capsys.readouterr().out.split("by attribute")[1].splitlines()
    assert table[1].split() == ["IV", "1", "95.24", "100.00", "100.00", "100.00"]


def test_sequences_from_a_file(folder_set, output, tmp_path):
    listing = tmp_path / "list"
    listing.write_text("a\nc\n")
    assert evaluate("folder", folder_set, "--tracker", STILL, "--output", output, "--sequences", listing) == 0
    assert sorted(p.stem for p in (output / "folder" / LABEL).glob("?.txt")) == ["a", "c"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --tracker or --results"),
        (["--tracker", "opencv:BOOSTED"], "choose MIL, KCF"),
        (["--tracker", "opencv:nano"], "opencv:nano=BACKBONE.onnx,HEAD.onnx"),
        (["--tracker", "opencv:vit=absent.onnx"], "there is no file absent.onnx"),
        (["--tracker", "opencv:MIL=x.onnx"], "opencv:MIL alone"),
        (["--tracker", "no/such/export"], "no export directory"),
        (["--tracker", "python:absent_module:Tracker"], "cannot import the tracker"),
        (["--tracker", "python:fake_trackers:os"], "is not callable"),
        (["--tracker", STILL, "--jobs", "0"], "--jobs must be at least 1"),
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


def test_unwritable_output_is_one_line(folder_set, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert evaluate("folder", folder_set, "--tracker", STILL, "--output", tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err


def test_opencv_trackers_missing_from_this_build_are_explained(folder_set, output, capsys, monkeypatch):
    for name in ("TrackerKCF_create", "legacy"):
        monkeypatch.delattr(cv2, name, raising=False)
    assert evaluate("folder", folder_set, "--tracker", "opencv:KCF", "--output", output) == 2
    assert "opencv-contrib-python" in capsys.readouterr().err


def test_opencv_baseline_goes_through_the_same_harness(tmp_path, output):
    """MIL on a square that moves: the result must follow it."""
    noise = np.random.default_rng(0).integers(0, 60, (60, 80, 3), np.uint8)
    folder = tmp_path / "set" / "square"
    folder.mkdir(parents=True)
    for i in range(4):
        frame = noise.copy()
        frame[20:36, 20 + i : 36 + i] = (40, 200, 250)
        cv2.imwrite(str(folder / f"{i:08d}.png"), frame)
    (folder / "groundtruth.txt").write_text(rows([(20 + i, 20, 16, 16) for i in range(4)]))
    report = tmp_path / "r.json"
    code = evaluate(
        "folder",
        tmp_path / "set",
        "--tracker",
        "opencv:MIL",
        "--output",
        output,
        "--json",
        report,
        "--threads",
        "1",
    )
    assert code == 0
    (tracker,) = json.loads(report.read_text())["trackers"]
    assert tracker["metrics"]["ao"] > 0.5 and tracker["identity"]["opencv"] == cv2.__version__


def test_without_tqdm_progress_is_plain_lines(folder_set, output, capsys, monkeypatch):
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert evaluate("folder", folder_set, "--tracker", STILL, "--output", output) == 0
    assert f"{LABEL}: 15 of 15 frames" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "asymtrack-eval lasot" in capsys.readouterr().out


def test_a_tracker_of_the_folder_one_works_in_is_found(tmp_path, monkeypatch):
    """A command that pip installed has its own folder in the path, not the working one."""
    (tmp_path / "my_tracker_here.py").write_text("def make():\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert trackers._import_callable("my_tracker_here:make")() is None
