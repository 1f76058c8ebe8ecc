"""``docs/commands.md`` from the commands' own parsers: ``python -m tests.docs_commands`` writes it. Needs no torch."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple
from unittest.mock import patch

from asymtrack_edge.cli import Parser
from asymtrack_edge.commands import COMMANDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"

HEAD = """# Commands

`asymtrack` lists the commands; `asymtrack track ...` and `asymtrack-track ...` are the same. Every command has
`--help`, with examples, and `--version`. An option that several commands have means the same in all of them.

| exit code | meaning |
| --- | --- |
| 0 | the command did what it was asked for |
| 1 | it ran and the result is no: a backend that differs, a failed sequence |
| 2 | it was asked for something wrong; one line says what |
| 130, 143 | Ctrl-C or SIGTERM interrupted it |
"""


class _Captured(Exception):
    pass


def parsers() -> Dict[str, argparse.ArgumentParser]:
    """The parser of each command: the first that its ``main`` is about to use."""
    found = {}
    for name, (module, _) in COMMANDS.items():
        main = importlib.import_module(module).main

        def capture(parser: argparse.ArgumentParser, *_: Any) -> None:
            raise _Captured(parser)

        with patch.object(Parser, "parse_args", capture):
            try:
                main([])
            except _Captured as captured:
                found[name] = captured.args[0]
    return found


def with_parts(name: str, parser: argparse.ArgumentParser) -> Iterator[Tuple[str, argparse.ArgumentParser]]:
    """A parser, and those of its sub-commands."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part, inner in action.choices.items():
                yield f"{name} {part}", inner


def options(parser: argparse.ArgumentParser) -> List[Tuple[str, str]]:
    """Options as written, and what they mean."""
    formatter = parser._get_formatter()
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or {"-h", "--version"} & set(action.option_strings):
            continue
        if isinstance(action, argparse._SubParsersAction):
            continue
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        if action.option_strings:
            name = f"{', '.join(action.option_strings)} {value}".strip()
        else:
            name = formatter._format_args(action, formatter._get_default_metavar_for_positional(action))
        rows.append((name, formatter._expand_help(action) if action.help else ""))
    return rows


def table(head: List[str], rows: List[List[str]]) -> List[str]:
    """A Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:], ""]


def page() -> str:
    """The whole page."""
    found = parsers()
    lines = [HEAD]
    lines += table(["command", "to"], [[f"[`asymtrack {n}`](#asymtrack-{n})", COMMANDS[n][1]] for n in found])
    users: Dict[str, List[str]] = {}
    for name, parser in found.items():
        for _, inner in with_parts(name, parser):
            for option in sorted({string for a in inner._actions for string in a.option_strings[-1:]}):
                users.setdefault(option, [])
                users[option] += [name] * (name not in users[option])
    shared = sorted(o for o, names in users.items() if len(names) > 1 and o not in ("--help", "--version"))
    lines += ["## Options of several commands", ""]
    rows = [[f"`{option}`", *("x" if name in users[option] else "" for name in found)] for option in shared]
    lines += table(["option", *found], rows)
    for command, parser in found.items():
        for name, inner in with_parts(command, parser):
            description = " ".join((inner.description or "").split())
            lines += [f"{'##' if name == command else '###'} asymtrack {name}", "", description, ""]
            rows = [[f"`{option}`", " ".join(meaning.split())] for option, meaning in options(inner)]
            lines += table(["option", "meaning"], rows) if rows else []
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
