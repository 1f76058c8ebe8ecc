"""Writes ``docs/commands.md`` from the commands' parsers: ``python -m tests.docs_commands``. Needs no torch."""

from __future__ import annotations

import argparse
import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List
from unittest.mock import patch

from asymtrack_edge.__main__ import COMMANDS
from asymtrack_edge.cli import Parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"

HEAD = """# Commands

`asymtrack` lists the commands; `asymtrack track ...` and `asymtrack-track ...` are the same. Each has `--help`,
with examples, and `--version`. `--backend`, `--precision`, `--device` and `--threads`
mean the same wherever they appear.

| exit code | meaning |
| --- | --- |
| 0 | the command did what it was asked for |
| 1 | it ran, but the answer is no or incomplete: a backend differs, a sequence failed, a frame or video is unreadable |
| 2 | it could not do what was asked; one line says why |
| 129, 130, 143 | SIGHUP (a closed terminal), Ctrl-C or SIGTERM interrupted it |
"""


def parsers() -> Dict[str, argparse.ArgumentParser]:
    """The parser of each command (the first one that its ``main`` uses), followed by those of its subcommands."""
    found = {}
    for name, (module, _) in COMMANDS.items():

        def capture(parser: argparse.ArgumentParser, *_: Any, name: str = name) -> None:
            found[name] = parser
            raise SystemExit

        with patch.object(Parser, "parse_args", capture), suppress(SystemExit):
            importlib.import_module(module).main([])
        for action in found[name]._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update({f"{name} {part}": inner for part, inner in action.choices.items()})
    return found


def options(parser: argparse.ArgumentParser) -> List[List[str]]:
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        hidden = action.help == argparse.SUPPRESS or {"-h", "--version"} & set(action.option_strings)
        if hidden or isinstance(action, argparse._SubParsersAction):
            continue
        default = formatter._get_default_metavar_for_positional(action)
        if action.option_strings:
            default = formatter._get_default_metavar_for_optional(action)
        name = f"{', '.join(action.option_strings)} {formatter._format_args(action, default)}".strip()
        rows.append([f"`{name}`", " ".join(formatter._expand_help(action).split()) if action.help else ""])
    return rows


def table(head: List[str], rows: List[List[str]]) -> List[str]:
    """A Markdown table; empty without rows."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, *rows]]
    return [lines[0], "| --- | --- |", *lines[1:], ""] if rows else []


def page() -> str:
    found = parsers()
    rows = [[f"[`asymtrack {name}`](#asymtrack-{name})", purpose] for name, (_, purpose) in COMMANDS.items()]
    lines = [HEAD, *table(["command", "to"], rows)]
    for name, parser in found.items():
        heading = f"{'##' if name in COMMANDS else '###'} asymtrack {name}"
        text = (parser.description or "").strip()
        lines += [heading, "", *(["```", text, "```"] if "\n" in text else [text]), ""]
        lines += table(["option", "meaning"], options(parser))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
