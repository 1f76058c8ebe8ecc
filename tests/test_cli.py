"""Option groups that all commands share."""

from __future__ import annotations

from typing import List

import pytest

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError


def parsed(arguments: List[str]) -> object:
    parser = cli.parser("asymtrack-x", "Does x.", "asymtrack-x T")
    cli.add_model(parser)
    cli.add_backend(parser)
    cli.add_clip(parser)
    cli.add_json(parser)
    return parser.parse_args(arguments)


def test_negative_numbers_are_values() -> None:
    arguments = parsed(["--box", "-5,-2.5,40,60", "--clip", "a.mp4"])
    assert cli.box_argument(arguments.box) == [-5, -2.5, 40, 60]  # type: ignore[attr-defined]


def test_defaults_mean_the_same_everywhere() -> None:
    arguments = vars(parsed([]))  # type: ignore[call-overload]
    assert arguments == {
        "model": "T", "backend": "auto", "precision": None, "device": "auto", "threads": None,
        "clip": None, "box": None, "json": None,
    }  # fmt: skip
    assert parsed(["--json"]).json == "-"  # type: ignore[attr-defined]
    assert parsed(["--json", "a.json"]).json == "a.json"  # type: ignore[attr-defined]


def test_lists_where_several_are_compared() -> None:
    parser = cli.parser("asymtrack-x", "Does x.", "asymtrack-x T")
    cli.add_backend(parser, several=True)
    arguments = parser.parse_args(["--backend", "openvino,onnxruntime", "--threads", "1,2"])
    assert arguments.backend == ("openvino", "onnxruntime") and arguments.threads == (1, 2)
    assert parser.parse_args([]).backend == ("auto",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "tensorflow"], "there is no backend 'tensorflow': choose among auto, onnxruntime"),
        (["--precision", "fp8"], "there is no precision 'fp8'"),
        (["--device", "1"], "'1' is no device: choose auto, cpu, cuda or cuda:N"),
        (["--threads", "0"], "'0' is no whole number above 0"),
        (["--dev", "cpu"], "--dev"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: List[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in error and "asymtrack-x --help" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", ""])
def test_a_box_is_four_numbers(text: str) -> None:
    with pytest.raises(UsageError, match="--box takes x,y,w,h in pixels"):
        cli.box_argument(text)
