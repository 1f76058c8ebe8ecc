"""The command line: shared options, mistakes, imports."""

from __future__ import annotations

import configparser
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, List
from unittest.mock import Mock

import pytest

import asymtrack_edge
from asymtrack_edge import __main__ as commands
from asymtrack_edge import cli
from asymtrack_edge.errors import MissingDependencyError
from tests.helpers import refusal

ROOT = Path(__file__).resolve().parent.parent


def test_negative_numbers_are_values_and_spaces_end_a_box(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.parser("asymtrack-x", "Does x.", "asymtrack-x T")
    cli.add_clip(parser)
    assert parser.parse_args(["--box", "-5,-2.5,40,60"]).box == [-5, -2.5, 40, 60]
    for wrong in (["1,2,3"], ["a,b,c,d"], [""], ["187", "52", "205", "116"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["--box", *wrong])
        assert f"with commas, no spaces, such as 120,80,40,60, not {wrong[0]!r}" in capsys.readouterr().err


def test_a_missing_camera_is_reported_in_one_line() -> None:
    program = "import sys; from asymtrack_edge.runtime.commands.track import main; sys.exit(main(sys.argv[1:]))"
    for source in ("99", "rtsp://127.0.0.1:9/x"):
        command = [sys.executable, "-c", program, source, "--box", "1,2,30,40"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and ended.stderr.startswith("error: cannot open")
        assert len(ended.stderr.splitlines()) == 1, ended.stderr


def test_the_progress_bar_needs_a_terminal_and_survives_its_end(monkeypatch: Any, capsys: Any) -> None:
    assert list(cli.progress(range(3))) == [0, 1, 2] and not capsys.readouterr().err
    ours, theirs = os.openpty()
    with suppress(OSError), open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = cli.progress(total=9, mininterval=0)
        cli.say("a\x1b[2J line")
        with open(ours, "rb") as screen:  # closes it
            shown = screen.readline()
        bar.update(2)
        bar.close()
    assert b"0/9" in shown and b" \ra\\x1b[2J line\r\n" in shown and bar.n == 2


def test_asymtrack_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(commands.COMMANDS)
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"asymtrack-edge {asymtrack_edge.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trakc"], "there is no command 'trakc': choose among export, build, check, track"),
        (["export", "--variant", "X"], "unknown variant 'X'"),
        (["build", "t"], "asymtrack-export --variant T --target orin"),
        (["train"], "name what to train on, for example --preset small --data"),
        (["check", "T", "--backend", "tensorflow"], "'tensorflow' is not a backend: choose among auto, onnxruntime"),
        (["check", "T", "--precision", "fp8"], "'fp8' is not a precision"),
        (["check", "T", "--device", "1"], "'1' is not a device: choose auto, cpu, cuda or cuda:N"),
        (["check", "T", "--threads", "0"], "'0' is not a number of threads from 1 to 1024"),
        (["check", "T", "--dev", "cpu"], "unrecognized arguments: --dev cpu (see asymtrack-check --help)"),
    ],
)
def test_mistakes_in_commands(arguments: List[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(commands.main, arguments, capsys)


def test_a_command_names_the_extra_that_it_lacks() -> None:
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('asymtrack_edge', run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", code, "export"], cwd=ROOT, capture_output=True, text=True)
    wanted = "error: an export needs torch, which is not installed: pip install 'asymtrack-edge[export]'\n"
    assert (ran.returncode, ran.stderr) == (2, wanted)
    error = MissingDependencyError("torch", "export", "an export")  # worker processes send it back by pickle
    assert f"error: {pickle.loads(pickle.dumps(error))}\n" == wanted


def test_entry_points_are_the_commands() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    entries = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].split("\n") if line)
    assert entries.pop("asymtrack") == "asymtrack_edge.__main__:main"
    assert entries == {f"asymtrack-{name}": f"asymtrack_edge.__main__:scripts.{name}" for name in commands.COMMANDS}


def test_a_command_names_the_system_library_that_opencv_lacks(monkeypatch: Any, capsys: Any) -> None:
    missing = ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
    monkeypatch.setattr(commands.importlib, "import_module", Mock(side_effect=missing))
    assert commands.scripts.track() == 2 and "apt install libgl1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import asymtrack_edge", "numpy"),
        ("from asymtrack_edge import Box, Track, Tracker", "torch onnx onnxruntime openvino asymtrack_edge.cli"),
        ("import asymtrack_edge.runtime.commands.track", "torch starlette uvicorn asyncio"),
        ("from asymtrack_edge.benchmarks.speed import command; command.make_parser()", "torch onnxruntime"),
        ("import asymtrack_edge.__main__ as c; c.main([])", "numpy cv2 torch onnxruntime"),
    ],
)
def test_unneeded_packages_are_not_imported(code: str, absent: str) -> None:
    code = f"{code}; import sys; assert not set({absent.split()}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def test_the_page_of_commands_is_up_to_date() -> None:
    """``make commands`` writes the page, which must not need torch."""
    code = "import sys; sys.modules['torch'] = None; from tests.docs_commands import page; print(page(), end='')"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), "run: make commands"
