"""Markdown tables, readable as plain text in a terminal too."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence


def cell(value: Any, form: str = ".3g") -> str:
    """A value as text, floats in ``form``; a dash for an unknown value."""
    if value is None or value == "" or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:{form}}"
    return str(value).replace("|", "\\|")


def markdown_table(heading: str, rows: Sequence[Dict[str, Any]], note: str = "", form: str = ".3g") -> str:
    """A heading and a table, aligned as plain text too, with the note below; empty without rows.

    Each row maps column names to values. Columns without any value are left out.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    lines: List[List[str]] = [[] for _ in range(len(rows) + 2)]
    for name in names:
        values = [row.get(name) for row in rows]
        cells = [name.replace("_", " ") if name.islower() else name, *(cell(value, form) for value in values)]
        if set(cells[1:]) <= {"-", "- to -"}:
            continue
        width = max(3, *map(len, cells))
        figures = any(type(value) in (int, float) for value in values)
        cells.insert(1, "-" * (width - 1) + ("-", ":")[figures])
        for line, text in zip(lines, cells):
            line.append(text.rjust(width) if figures else text.ljust(width))
    if not lines[0]:
        return ""
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"## {heading}", "", *table, *(["", note] if note else [])])
