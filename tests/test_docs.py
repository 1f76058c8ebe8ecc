"""What README and docs tell users to type works: commands parse, the README's examples run, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any, Iterator, List, Tuple
from unittest.mock import patch

import cv2
import pytest

from asymtrack_edge.cli import Parser
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests import docs_commands

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class _Parsed(Exception):
    pass


def blocks(page: Path, language: str = "") -> Iterator[str]:
    """The fenced blocks of a page in one language."""
    for found, body in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        if found == language:
            yield body


def commands(page: Path) -> Iterator[List[str]]:
    """Every command line of ours in a page's blocks, and benchmarks in its text, as words."""
    for language in ("", "sh", "bash", "shell"):
        for block in blocks(page, language):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(re.sub(r"^\$ ", "", line.strip()), comments=True) if "asymtrack" in line else []
                if words and re.fullmatch(r"asymtrack(-\w+)?", words[0]):
                    yield words
    yield from map(shlex.split, re.findall(r"`(asymtrack-bench \w+ [^`]+)`", page.read_text(encoding="utf-8")))


EXAMPLES: List[Tuple[str, List[str]]] = [(page.name, words) for page in PAGES for words in commands(page)]


def test_the_pages_show_every_command() -> None:
    shown = {words[0] if "-" in words[0] else f"asymtrack-{words[1]}" for _, words in EXAMPLES if len(words) > 1}
    assert shown >= {f"asymtrack-{name}" for name in docs_commands.COMMANDS}


@pytest.mark.parametrize(("page", "words"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_command_in_the_pages_parses(page: str, words: List[str]) -> None:
    if words[0] in ("asymtrack", "asymtrack-edge"):
        if len(words) == 1 or words[1] not in docs_commands.COMMANDS:
            return
        name, rest = words[1], words[2:]
    else:
        name, rest = words[0][len("asymtrack-") :], words[1:]
    # What runs on: output lines, pipes and placeholders such as "...".
    if "..." in rest:
        return
    for stop in ("|", ">", ">>", "&&", "2>", "&"):
        if stop in rest:
            rest = rest[: rest.index(stop)]
    main = importlib.import_module(docs_commands.COMMANDS[name][0]).main
    parse = Parser.parse_args

    def parse_only(parser: Parser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise _Parsed

    with patch.object(Parser, "parse_args", parse_only), pytest.raises(_Parsed):
        main(rest)


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer's first steps: the README's first command, then its Python, on a video called as there."""
    monkeypatch.chdir(tmp_path)
    writer = cv2.VideoWriter("video.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 25, (360, 270))
    for frame, _ in synthetic_clip(8):
        writer.write(frame)
    writer.release()
    from asymtrack_edge.runtime.commands.track import main

    first = next(words for words in commands(ROOT / "README.md") if words[:2] == ["asymtrack-track", "video.mp4"])
    assert main(first[1:]) == 0
    assert Path("boxes.csv").read_text().count("\n") == 9
    assert cv2.VideoCapture("tracked.mp4").read()[0]
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:", "mailto:")):
            continue
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor and linked.suffix == ".md":
            heads = re.findall(r"^#+ +(.*)$", linked.read_text(encoding="utf-8"), re.M)
            slugs = {
                re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head.replace("`", "")).strip().lower()) for head in heads
            }
            assert anchor in slugs, f"{page.name}: {target}"
