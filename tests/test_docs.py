"""README and docs are correct: commands parse, the README's examples run, its links exist."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple
from unittest.mock import patch

import pytest

from asymtrack_edge.cli import Parser
from asymtrack_edge.runtime import State
from asymtrack_edge.runtime.backends.loading import model_folder
from asymtrack_edge.runtime.commands.track import main as track
from asymtrack_edge.runtime.sources.clip import default_clip
from tests import docs_commands
from tests.runtime.simulated import count_frames, write_video

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class _Parsed(Exception):
    pass


def blocks(page: Path, language: str = "") -> Iterator[str]:
    for found, body in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        if found == language:
            yield body


def commands(page: Path) -> Iterator[List[str]]:
    """Every asymtrack command in a page's blocks, and asymtrack-bench in its text, as words after ``asymtrack``."""
    lines = re.findall(r"`(asymtrack-bench \w+ [^`]+)`", page.read_text(encoding="utf-8"))
    for language in ("", "sh", "bash", "shell"):
        for block in blocks(page, language):
            lines += [re.sub(r"^\$ ", "", line.strip()) for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        if re.match(r"asymtrack(-\w+)?( |$)", line):
            words = shlex.split(re.sub(r"^asymtrack-", "asymtrack ", line), comments=True)[1:]
            # The command ends at a pipe, a redirection or "&"; lines with the placeholder "..." are skipped.
            end = next((i for i, word in enumerate(words) if re.fullmatch(r"\||2?>+|&&?", word)), len(words))
            if words and words[0] in docs_commands.COMMANDS and "..." not in words:
                yield words[:end]


EXAMPLES: List[Tuple[str, List[str]]] = [(page.name, words) for page in PAGES for words in commands(page)]


def test_the_pages_show_every_command() -> None:
    assert {words[0] for _, words in EXAMPLES} == set(docs_commands.COMMANDS)


@pytest.mark.parametrize(("page", "words"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_in_the_pages_parse(page: str, words: List[str]) -> None:
    parse = Parser.parse_args

    def parse_only(parser: Parser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise _Parsed

    with patch.object(Parser, "parse_args", parse_only), pytest.raises(_Parsed):
        importlib.import_module(docs_commands.COMMANDS[words[0]][0]).main(words[1:])


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's first command, then its Python code, run on a video of the name that they use."""
    monkeypatch.chdir(tmp_path)
    write_video(Path("video.mp4"), 8)
    first = next(words for words in commands(ROOT / "README.md") if words[:2] == ["track", "video.mp4"])
    assert track(first[1:]) == 0
    assert Path("boxes.csv").read_text().count("\n") == 9
    assert count_frames(Path("tracked.mp4")) == 8
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})


def test_the_programs_of_the_python_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(Path("video.mp4"), 4)
    (frame, next_frame), _ = default_clip(2)
    space: Dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        if "exports/" not in block:  # needs hardware
            space.update(frame=frame, next_frame=next_frame, frames=(frame, next_frame))
            space["detector"] = lambda _: [(10, 10, 40, 40), (90, 60, 40, 40)]
            exec(block, space)
    assert space["state"] in (State.TRACKING, State.LOST) and set(space["tracks"]) == {0, 1}
    assert space["tracker"].settings.patience == 30


def test_the_export_page_shows_how_to_run_a_model_without_this_package() -> None:
    page, model, names = ROOT / "docs" / "export.md", model_folder("T"), {}
    exec(next(blocks(page, "python")).replace("DIR", str(model)), names)
    assert names["prediction"].shape == (1, 5)
    fields = json.loads((model / "manifest.json").read_text())
    table = page.read_text(encoding="utf-8").partition("| field | meaning |")[2].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        for field in line.split("|")[1].replace("`", "").split(","):
            assert field.strip() in fields


def test_links_of_the_readme_exist() -> None:
    """Links of the other pages are checked when the site is built."""
    for target in re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.match("https?:", target) or (ROOT / target).exists(), target
