"""Writes a report into a folder: JSON, CSV, Markdown, plots and the page."""

from __future__ import annotations

from pathlib import Path
from typing import List

from asymtrack_edge.benchmarks.speed.report.document import Document, save_document, write_text
from asymtrack_edge.benchmarks.speed.report.html import as_html
from asymtrack_edge.benchmarks.speed.report.plots import draw_plots
from asymtrack_edge.benchmarks.speed.report.tables import as_csv, as_markdown
from asymtrack_edge.errors import MissingDependencyError, UsageError


def write_report(document: Document, folder: Path) -> List[Path]:
    """Writes all forms of a report; without matplotlib all but the plots.

    Args:
        document: as ``document.make_document`` makes it.
        folder: made if need be.

    Returns:
        The files written.

    Raises:
        UsageError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    try:
        plots = draw_plots(document, folder)
    except MissingDependencyError as error:
        plots = {}
        document = {**document, "messages": [*document["messages"], str(error)]}
    files = [folder / name for name in ("report.json", "rows.csv", "report.md", "report.html")]
    save_document(document, files[0])
    write_text(files[1], as_csv(document))
    write_text(files[2], as_markdown(document))
    write_text(files[3], as_html(document, plots))
    return [*files, *plots.values()]
