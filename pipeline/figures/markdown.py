"""The papers' tables as Markdown, a run's lines among them; the papers' are of other images."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.figures.source import Source, no_table
from pipeline.papers.beside import Beside, Grid, beside


def write(source: Source) -> tuple[str, list[str]]:
    """The text, empty where the run has measured nothing of it, and what is missing."""
    found = beside(source.run)
    text = [_section(one) for one in found if one.measured]
    missing = [
        f"{one.paper.title}: {no_table(source.run, one.paper.ours[0].table)}" for one in found if not one.measured
    ]
    return "\n\n".join(["# The papers' tables beside this run's", *text]) + "\n" if text else "", missing


def _section(one: Beside) -> str:
    grids = [_table(one.paper.lines, grid) for grid in one.grids]
    return "\n\n".join([f"## {one.paper.title}", one.paper.note, *grids])


def _table(lines: str, grid: Grid) -> str:
    rows: list[Sequence[str]] = [[lines, *grid.heads], ["---"] * (1 + len(grid.heads))]
    rows += [[line.name, *line.cells] for line in grid.lines]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
