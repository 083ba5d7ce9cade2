"""All figures of a run: each where its tables are finished, and what is missing for the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from pipeline.figures import evolution, filters, invariance, markdown, masks, occlusion, sheet, top9, transfer
from pipeline.figures.source import Missing, Source
from pipeline.progress import say, suggest
from pipeline.runs import Run, RunError, require_at_least_one
from pipeline.storage import Location

FIGURES: dict[str, Callable[[Source], Iterator[tuple[str, Figure]]]] = {
    "figure 2": top9.draw,
    "figure 4": evolution.draw,
    "figure 5": invariance.draw,
    "figure 6": filters.draw,
    "figure 7": occlusion.draw,
    "figure 8": masks.draw,
    "figure 9": transfer.draw,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is drawn, and where."""

    run: str = "runs/demo"
    """Run directory with the tables: a local path, s3:// or gs://."""
    against: str | None = None
    """Another run, to compare filters (figure 6) and transfer (figure 9) with."""
    out: str | None = None
    """Folder for the figures; default RUN/figures."""
    images: int = 5
    """Images in figures 5, 7 and 8."""
    seed: int = 0
    """Decides which feature maps figures 2 and 4 show."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "images")


def draw(options: Options) -> Location:
    """Write every figure that the run's tables allow, as PNG and PDF, and tables.md. Returns their folder.

    Raises: RunError where nothing can be drawn; StorageError.
    """
    started = time.monotonic()
    run = Run.at(options.run)
    against = Run.at(options.against) if options.against else None
    source = Source(run, against, options.images, options.seed)
    folder = Location.of(options.out) if options.out else run.location / "figures"
    drawn = 0
    for title, figures in FIGURES.items():
        try:
            with sheet.style():
                for name, figure in figures(source):
                    sheet.write(figure, folder, name)
                    say(f"figures: {folder / name}.png and .pdf")
                    drawn += 1
        except Missing as error:
            say(f"figures: no {title}: {error}")
    text, missing = markdown.write(source)
    for line in missing:
        say(f"figures: no {line}")
    if not drawn and not text:
        raise RunError(f"{run.location} has none of the tables that figures are drawn from: run the jobs named above")
    if text:
        (folder / "tables.md").write(text.encode())
    say(f"figures: {drawn} figures{' and tables.md' if text else ''} in {time.monotonic() - started:.1f} s: {folder}")
    suggest("atlas.py --run {run}", run=options.run)
    return folder
