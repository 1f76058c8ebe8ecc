"""Evaluation on a Ray cluster of this machine."""

from __future__ import annotations

import sys

import pytest

from asymtrack_edge.benchmarks.accuracy.command import main


@pytest.mark.parametrize(
    ("module", "address", "said"),
    [
        (None, "local", "error: --ray needs ray, which is not installed: pip install 'asymtrack-edge[ray]'\n"),
        (object(), "ray://127.0.0.1:1", "error: cannot join a Ray cluster at ray://127.0.0.1:1: "),
    ],
)
def test_mistakes_are_one_line(folder_set, tmp_path, capsys, monkeypatch, module, address, said):
    monkeypatch.setitem(sys.modules, "ray", module)
    tracker = ["--tracker", "python:fake_trackers:Still", "--output", str(tmp_path / "out")]
    assert main(["folder", str(folder_set), *tracker, "--ray", address]) == 2
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.slow
def test_results_are_those_of_local_processes_even_where_a_worker_dies(folder_set, tmp_path, capsys, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray, of the extra 'ray', is not installed")
    monkeypatch.setenv("DIES_ONCE", str(tmp_path / "died"))
    try:
        for tracker, code in (("DiesOnce", 0), ("FailsOnBlack", 1)):
            files = []
            for name, options in (("ray", ["--ray", "local", "--jobs", "2"]), ("local", [])):
                output = ["--output", str(tmp_path / name)]
                spec = ["--tracker", f"python:fake_trackers:{tracker}"]
                assert main(["folder", str(folder_set), *spec, *output, *options]) == code
                folder = tmp_path / name / "folder" / f"fake_trackers-{tracker}"
                files.append({path.name: path.read_bytes() for path in folder.glob("*.*")})
            assert files[0] == files[1] and "a.txt" in files[0] and ("b.txt" in files[0]) is (code == 0)
        assert (tmp_path / "died").exists()
        assert capsys.readouterr().err.count("failed on b: ZeroDivisionError") == 2
    finally:
        ray.shutdown()
