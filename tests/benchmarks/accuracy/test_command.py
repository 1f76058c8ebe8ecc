"""asymtrack-eval from the command line: results, resume, processes, reports, bad sequences, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.command import main
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.files import printable
from asymtrack_edge.runtime.backends.loading import model_folder
from tests.datasets.miniature import drift, rows, save, write_frames, write_images

FAKES = "tests.benchmarks.accuracy.fake_trackers"
STILL = ("--tracker", f"python:{FAKES}:Still")
LABEL = f"{FAKES}-Still"
RAY = SimpleNamespace(init=lambda *_, **__: 0, nodes=[{"Resources": {"CPU": 2}}].copy, put=lambda _: model_folder("x"))


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def evaluate(tmp_path, output, capsys):
    """Returns a function that runs the command and returns its exit code, its output and its JSON document."""

    def run(*arguments, json_to=tmp_path / "report.json"):
        code = main(["--output", str(output), "--json", str(json_to), *map(str, arguments)])
        out, err = capsys.readouterr()
        document = json.loads(json_to.read_text()) if json_to != "-" and json_to.exists() else {"trackers": [None]}
        return SimpleNamespace(code=code, out=out, err=err, document=document, tracker=document["trackers"][0])

    return run


def row(text, name):
    """Cells of the last table row that begins with ``name``."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in lines[-1].strip("|").split("|")]


@pytest.fixture
def results(tmp_path):
    """Results for ``folder_set``: exact for a and b, wrong for c."""
    for name, count in (("a", 6), ("b", 5), ("c", 4)):
        save(tmp_path / "other" / f"{name}.txt", drift(count, x=12))
    return tmp_path / "other"


def test_results_report_and_speed(folder_set, output, tmp_path, evaluate):
    ran = evaluate("folder", folder_set, *STILL, "--per-sequence", "--plots", tmp_path / "plots")
    assert ran.code == 0
    np.testing.assert_array_equal(np.loadtxt(output / "folder" / LABEL / "a.txt", delimiter=","), drift(6, x=12))
    times = np.loadtxt(output / "folder" / LABEL / "times" / "a_time.txt")
    assert times.shape == (6,) and (times > 0).all()
    tracker, metrics, sequences = ran.tracker, ran.tracker["metrics"], ran.tracker["sequences"]
    assert tracker["identity"]["tracker"] == LABEL and len(tracker["identity"]["sha256"][0]) == 64
    # a and b are followed exactly (20 of 21 thresholds); on c the box, 10 wide, drifts off by 4 pixels per frame.
    c = np.mean([(np.linspace(0, 1, 21) < o).mean() for o in (6 / 14, 2 / 18, 0)])
    assert [sequences[name]["auc"] for name in "abc"] == pytest.approx([20 / 21, 20 / 21, c])
    assert metrics["auc"] == pytest.approx((40 / 21 + c) / 3)
    assert metrics["ao"] == pytest.approx((5 + 4 + 6 / 14 + 2 / 18) / 12, abs=1e-3)
    assert tracker["speed"]["frames"] == 15
    assert 0 < tracker["speed"]["frames_over_total_time"] <= tracker["speed"]["mean_of_rates"]
    assert "by sequence" in ran.out and "frames over total time" in ran.out and "frame 0 left out" in ran.out
    drawn = {f"{curve}.{kind}" for curve in ("norm_precision", "precision", "success") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == drawn
    assert cv2.imread(str(tmp_path / "plots" / "success.png")).std() > 0
    # With JSON on standard output, nothing else is printed there.
    assert json.loads(evaluate("folder", folder_set, *STILL, json_to="-").out)["trackers"] == [tracker]


def test_plots_take_names_with_dollars_and_leading_underscores(folder_set, results, tmp_path, evaluate):
    names = [str(shutil.copytree(folder_set, tmp_path / "a$b_{")), str(results.rename(tmp_path / "_c$d_{$\udcff"))]
    evaluate("folder", names[0], "--results", names[1], "--plots", tmp_path)
    assert all(printable(Path(name).name) in (tmp_path / "success.svg").read_text() for name in names)


def test_problems_of_any_tracker_are_reported_before_tracking(folder_set, output, tmp_path, evaluate):
    export = shutil.copytree(model_folder("T"), tmp_path / "export")
    (export / "search.onnx").write_bytes(b"half")
    for more, words in (("--results", "no folder of results"), ("--model", "altered or damaged")):
        ran = evaluate("folder", folder_set, *STILL, more, tmp_path / "none" if more == "--results" else export)
        assert ran.code == 2 and words in ran.err and not output.exists()


def test_resuming_runs_only_missing_sequences_and_only_for_the_same_tracker(folder_set, output, evaluate):
    arguments = ("folder", folder_set, *STILL)
    assert evaluate(*arguments, "--jobs", 2).code == 0
    results = output / "folder" / LABEL
    (results / "b.txt").write_text("1,2,3,4\n")  # too short
    (results / "a.txt").write_text(rows(drift(6, x=3)))  # another start box
    assert "1 sequences already have results" in evaluate(*arguments).out
    (results / "a.txt").write_text(rows(drift(6, x=12, step=2)))
    assert "3 sequences already have results" in evaluate(*arguments).out
    assert len(np.loadtxt(results / "b.txt", delimiter=",")) == 5
    ran = evaluate(*arguments, "--threads", "2")
    assert ran.code == 2 and "threads was None, is 2" in ran.err
    assert TrackerSpec("t").identity() == TrackerSpec("T").identity() != TrackerSpec("T", recover=False).identity()
    (results / "tracker.json").write_text("[" * 99_999)
    ran = evaluate(*arguments)
    assert ran.code == 2 and "--fresh" in ran.err
    assert evaluate(*arguments, "--fresh").code == 0
    np.testing.assert_array_equal(np.loadtxt(results / "a.txt", delimiter=","), drift(6, x=12))
    save(output / "folder" / "asymtrack-t" / "a.txt", drift(6, x=12))
    assert evaluate("folder", folder_set, "--device", "cuda:99", "--fresh").code == 2
    # Other data with the same names and boxes is refused, and so is part of another tracker's results.
    (results / "a.txt").unlink()
    for more in (("--fresh", "--sequences", "b"), ("--sequences", "a")):
        ran = evaluate(*arguments, "--threads", 2, *more)
        assert ran.code == 2 and "threads was None, is 2" in ran.err
    ran = evaluate("folder", folder_set.rename(folder_set.with_name("elsewhere")), *STILL)
    assert ran.code == 2 and "data was " in ran.err
    assert [path.name for path in (output / "folder" / "asymtrack-t").iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("tracker", "jobs", "said"),
    [("FailsOnBlack", 1, "ZeroDivisionError: nothing to see"), ("DiesOnBlack", 2, "process died (exit code 7)")],
)
def test_a_tracker_failure_loses_only_its_sequence(folder_set, output, evaluate, tracker, jobs, said):
    ran = evaluate("folder", folder_set, "--tracker", f"python:{FAKES}:{tracker}", "--jobs", jobs)
    assert ran.code == 1 and f"{FAKES}-{tracker} failed on b: " in ran.err and said in ran.err
    assert sorted(ran.tracker["sequences"]) == ["a", "c"] and list(ran.tracker["failures"]) == ["b"]
    log = output / "folder" / f"{FAKES}-{tracker}" / "errors" / "b.log"
    assert ("in update" in log.read_text()) if tracker == "FailsOnBlack" else not log.exists()


def test_a_tracker_that_never_returns_can_be_ended(folder_set, output):
    command = [sys.executable, "-m", "asymtrack_edge", "eval", "folder", str(folder_set)]
    command += ["--tracker", f"python:{FAKES}:NeverReturns", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        done = output / "folder" / f"{FAKES}-NeverReturns" / "a.txt"
        while process.poll() is None and not done.exists():
            time.sleep(0.1)
        time.sleep(0.5)  # by then it tracks b, the next longest
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=10)
    assert process.returncode == 143 and f"{FAKES}-NeverReturns was interrupted in b" in error


@pytest.mark.parametrize(
    ("module", "address", "said"),
    [
        (None, "local", "error: --ray needs ray, which is not installed: pip install 'asymtrack-edge[ray]'\n"),
        (object(), "ray://127.0.0.1:1", "error: cannot join a Ray cluster at ray://127.0.0.1:1: "),
        (SimpleNamespace(init=lambda _, num_cpus, **__: {}[num_cpus]), "local", "join a Ray cluster at local: 6"),
        (RAY, "auto", "a task needs CPUs: 3, GPUs: 0. No node of the Ray cluster has them: waiting for one"),
    ],
)
def test_mistakes_with_ray_are_one_line(folder_set, evaluate, monkeypatch, module, address, said):
    monkeypatch.setitem(sys.modules, "ray", module)
    ran = evaluate("folder", folder_set, *STILL, "--ray", address, "--jobs", 2, "--threads", 3)
    assert ran.code == 2 and said in ran.err


@pytest.mark.slow
def test_results_on_ray_equal_those_of_local_processes_even_if_a_worker_dies(
    folder_set, output, tmp_path, evaluate, monkeypatch
):
    ray = pytest.importorskip("ray", reason="Ray, of the extra 'ray', is not installed")
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    try:
        for tracker, code in (("DiesOnBlack", 0), ("FailsOnBlack", 1)):
            files = []
            for options in (("--ray", "local", "--jobs", "2"), ("--fresh",)):
                ran = evaluate("folder", folder_set, "--tracker", f"python:{FAKES}:{tracker}", *options)
                assert ran.code == code and ran.err.count("failed on b: ZeroDivisionError") == code
                folder = output / "folder" / f"{FAKES}-{tracker}"
                files.append({path.name: path.read_bytes() for path in folder.glob("*.*")})
            assert files[0] == files[1] and "a.txt" in files[0] and ("b.txt" in files[0]) is (code == 0)
        assert (tmp_path / "died").exists()
    finally:
        ray.shutdown()


def test_results_of_other_toolkits_are_found_by_their_names(tmp_path, evaluate):
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
        ("runs/dimp_000", "uav123", {"uav_Bike1": drift(3), "bike1": drift(2), "uav_Bike1_time": "0.1\n" * 3}),
        ("nested", "uav123", {"Bike1/Bike1_001": drift(3), "Bike1/Bike1_time": "0.1,0.5\n" * 3}),
    ):
        for name, text in {**files, "Tiger1": drift(8)}.items():
            save(tmp_path / style / f"{name}.txt", text)
        ran = evaluate(dataset, tmp_path / dataset, "--results", tmp_path / style.split("/")[0])
        # All results are perfect: those of Tiger1 have five more frames at the start, which are dropped.
        assert ran.code == 0 and len(ran.tracker["sequences"]) == (3 if dataset == "otb" else 1)
        assert ran.tracker["metrics"]["auc"] == pytest.approx(20 / 21) and ran.tracker["metrics"]["precision"] == 1
    save(tmp_path / "nested" / "Bike1" / "Bike1_002.txt", drift(3))
    ran = evaluate("uav123", tmp_path / "uav123", "--results", tmp_path / "nested")
    assert ran.code == 1 and "several repetitions in the results: the first is scored" in ran.err
    assert ran.tracker["speed"]["frames_over_total_time"] == pytest.approx(10)
    save(tmp_path / "runs" / "dimp_001" / "uav_bike1.txt", drift(3))
    ran = evaluate("uav123", tmp_path / "uav123", "--results", tmp_path / "runs")
    assert ran.code == 2 and "several runs: name one, such as" in ran.err


def test_a_bad_sequence_is_left_out_and_the_others_are_scored(tmp_path, evaluate):
    root = tmp_path / "lasot"
    for name, images in (("airplane-1", 4), ("airplane-13", 5), ("bird-2", 4), ("bird-3", 4)):
        folder = root / name.split("-")[0] / name
        write_frames(folder / "img", images)
        save(folder / "groundtruth.txt", "1,2,3\n" * 4 if name == "bird-3" else drift(4))
        for label in ("full_occlusion", "out_of_view"):
            save(folder / f"{label}.txt", "0,0,0,0")
    ran = evaluate("lasot", root, *STILL)
    assert ran.code == 1
    assert sorted(ran.tracker["sequences"]) == ["airplane-1", "airplane-13", "bird-2"]
    assert ran.tracker["metrics"]["auc"] == pytest.approx(20 / 21)
    assert list(ran.document["left_out"]) == ["bird-3"] and list(ran.document["notes"]) == ["airplane-13"]
    assert "2 of 4 sequences have problems: bird-3, airplane-13\n" in ran.err
    assert "sequence airplane-13: 5 frames but 4 boxes of ground truth: cut to the annotation" in ran.err
    assert evaluate("lasot", root, *STILL, "--sequences", "airplane-1").code == 0
    ran = evaluate("lasot", root, *STILL, "--sequences", "bird-3")
    assert ran.code == 2 and "no sequence can be read: sequence bird-3: " in ran.err


def test_results_of_the_wrong_length_are_cut_or_fail(folder_set, results, evaluate):
    save(results / "a.txt", drift(9, x=12))
    (results / "b.txt").unlink()
    save(results / "c.txt", drift(2, x=12))
    ran = evaluate("folder", folder_set, "--results", results)
    assert ran.code == 1 and "3 of 3 sequences have problems: b, c, a" in ran.err
    assert ran.tracker["sequences"]["a"]["auc"] == pytest.approx(20 / 21)
    assert ran.tracker["notes"] == {"a": "9 boxes in the results for 6 frames: cut to the annotation"}
    failures = ran.tracker["failures"]
    assert "has no result for it" in failures["b"] and "2 boxes for 4 frames" in failures["c"]
    (folder_set / "a" / "00000001.jpg").write_bytes(b"not an image")
    assert "00000001.jpg is not an image" in evaluate("folder", folder_set, "--results", results).err
    for name in "ac":
        (results / f"{name}.txt").unlink()
    ran = evaluate("folder", folder_set, "--results", results)
    assert ran.code == 2 and "has no results for these sequences" in ran.err


def test_a_sequence_without_a_frame_to_score_is_named(folder_set, results, evaluate):
    (folder_set / "b" / "cover.label").write_text("0\n" * 5)
    ran = evaluate("folder", folder_set, "--results", results)
    assert ran.code == 1 and "sequence b: no frame can be scored" in ran.err and row(ran.out, "other")[1] == "2"
    save(folder_set / "b" / "groundtruth.txt", drift(1))
    ran = evaluate("folder", folder_set, "--results", results, "--sequences", "b")
    assert ran.code == 1 and "sequence b: no frame can be scored" in ran.err and "withheld" not in ran.out


def test_names_with_spaces_and_without_utf8(folder_set, output, tmp_path, evaluate):
    odd = os.fsdecode(b"s\xe9q")
    (folder_set / "a").rename(folder_set / "seq a")
    (folder_set / "b" / "00000002.jpg").rename(folder_set / "b" / f"{odd}2.jpg")
    (folder_set / "b").rename(folder_set / odd)
    arguments = ("folder", folder_set, *STILL)
    (tmp_path / "names.txt").write_text("seq a\nc\n")
    for names in (tmp_path / "names.txt", "seq a, c" + ",c" * 2000):  # longer than a file name can be
        assert sorted(evaluate(*arguments, "--sequences", names).tracker["sequences"]) == ["c", "seq a"]
    assert r"s\udce9q" in evaluate(*arguments, "--per-sequence").out
    assert (output / "folder" / LABEL / f"{odd}.txt").is_file()


def test_results_are_packed_for_the_server(tmp_path, output, evaluate):
    write_frames(tmp_path / "test" / "seq-1", 4)
    save(tmp_path / "test" / "seq-1" / "groundtruth.txt", drift(4))  # only the first box may be used
    for name in ("v1", "v2"):
        write_frames(tmp_path / "TEST" / "frames" / name, 3, "{}.jpg", first=0)
        save(tmp_path / "TEST" / "anno" / f"{name}.txt", drift(1))
    packed = {}
    for dataset in ("trackingnet", "got10k-test"):
        ran = evaluate(dataset, tmp_path, *STILL)
        with zipfile.ZipFile(output / dataset / f"{LABEL}.zip") as archive:
            packed[dataset] = {name: archive.read(name).decode() for name in archive.namelist()}
    assert ran.code == 0 and "withheld" in ran.out and "the published set has 180 sequences" in ran.out
    assert sorted(packed["trackingnet"]) == ["v1.txt", "v2.txt"]
    assert sorted(packed["got10k-test"]) == ["seq-1/seq-1_001.txt", "seq-1/seq-1_time.txt"]
    assert packed["got10k-test"]["seq-1/seq-1_001.txt"].splitlines()[1] == "5.000,5.000,10.000,8.000"
    assert evaluate("got10k-test", tmp_path, *STILL, "--sequences", "seq-1", "--fresh").code == 0
    assert not list(output.glob("got10k-test/*.zip")), "some of the sequences are not packed"
    save(tmp_path / "test" / "list.txt", "seq-1\nseq-2\n")
    assert evaluate("got10k-test", tmp_path, *STILL).code == 1 and not list(output.glob("got10k-test/*.zip"))


def test_scores_by_attribute(tmp_path, evaluate):
    for name, flags in (("Boy", "1,0,0,0,0,0,0,0,0,0,0"), ("Car", "0,0,0,1,0,0,0,0,0,0,1")):
        write_frames(tmp_path / "otb" / name / "img", 4, "{:04d}.jpg")
        save(tmp_path / "otb" / name / "groundtruth_rect.txt", drift(4))
        save(tmp_path / "toolkit" / f"{name.lower()}.txt", flags)
        save(tmp_path / "strong" / f"{name}.txt", drift(4))
        save(tmp_path / "weak" / f"{name}.txt", [drift(4)[0], *[(25, 20, 2, 2)] * 3] if name == "Car" else drift(4))
    found = ("--results", tmp_path / "weak", tmp_path / "strong", "--attributes", tmp_path / "toolkit")
    tables = evaluate("otb", tmp_path / "otb", *found).out.split(" by attribute")[1:]
    # On Car, weak hits only the first of four frames: a quarter of 95.24.
    assert [[row(table, tag)[2] for tag in ("IV", "OCC")] for table in tables] == [["95.24", "23.81"], ["95.24"] * 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tracker", "opencv:BOOSTED"], "choose mil, kcf"),
        (["--tracker", "opencv:nano"], "opencv:nano=BACKBONE.onnx,HEAD.onnx"),
        (["--tracker", "opencv:vit=absent.onnx"], "there is no file absent.onnx"),
        (["--tracker", "opencv:MIL=x.onnx"], "opencv:mil alone"),
        (["--tracker", f"opencv:vit={__file__}"], "cannot load it" if hasattr(cv2, "TrackerVit") else "install 4.9"),
        (["--tracker", "opencv:KCF"], "opencv-contrib-python"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--tracker", "python:absent_module:Tracker"], "cannot import the tracker"),
        (["--tracker", f"python:{FAKES}:os"], "is not callable"),
        ([*STILL, *STILL], "two trackers are called"),
        ([*STILL, "--sequences", "z"], "no sequence called z"),
        ([*STILL, "--sequences", ","], "names no sequence"),
        ([*STILL, "--plots", "plots"], "drawing plots needs matplotlib, which"),
        ([*STILL, "--output", __file__], "test_command.py is not a writable folder"),
    ],
)
def test_mistakes_are_one_line_before_tracking(folder_set, output, evaluate, monkeypatch, arguments, said):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delattr(cv2, "TrackerKCF_create", raising=False)  # an OpenCV without contrib
    ran = evaluate("folder", folder_set, *arguments)
    error = ran.err.strip().splitlines()[-1]
    assert ran.code == 2 and error.startswith("error: ") and said in error and not output.exists()


def test_opencv_trackers_are_evaluated_in_the_same_way(tmp_path, evaluate):
    """MIL must follow a moving square; boxes on which it would loop forever are refused."""
    frames = np.repeat(np.random.default_rng(0).integers(0, 60, (1, 60, 80, 3), np.uint8), 4, axis=0)
    for i, frame in enumerate(frames):
        frame[20:36, 20 + i : 36 + i] = (40, 200, 250)
    starts = {"square": (20, 16), "thin": (20, 5), "outside": (-60, 16), "cut": (-12, 16)}
    for name, (x, w) in starts.items():
        write_images(tmp_path / "set" / name, frames)
        save(tmp_path / "set" / name / "groundtruth.txt", [(x + i, 20, w, 16) for i in range(4)])
    ran = evaluate("folder", tmp_path / "set", "--tracker", "opencv:MIL", "--threads", "1")
    assert ran.code == 1 and list(ran.tracker["sequences"]) == ["square"]
    assert ran.tracker["metrics"]["ao"] > 0.5 and ran.tracker["identity"]["opencv"] == cv2.__version__
    failures = ran.tracker["failures"]
    assert "lies outside the frame" in failures["outside"]
    assert all("too small for this OpenCV tracker" in failures[name] for name in ("thin", "cut"))


def test_a_tracker_in_the_working_directory_is_found(folder_set, tmp_path, evaluate, monkeypatch):
    """A command installed by pip has its own folder on sys.path, not the working directory."""
    (tmp_path / "my_tracker_here.py").write_text(f"from {FAKES} import Still")
    if sys.version_info >= (3, 11):  # there, a worker imports nothing else from it
        (tmp_path / "multiprocessing.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it may name the working directory
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert evaluate("folder", folder_set, "--tracker", "python:my_tracker_here:Still").code == 0
