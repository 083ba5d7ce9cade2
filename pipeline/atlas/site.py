"""The folder that an atlas is written to: what was written, names that are safe in it, and templates."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline import makers
from pipeline.atlas.pages import Link
from pipeline.storage import Location

STATIC = ("atlas.css", "atlas.js")
"""Files of the package that every atlas holds."""

_OWN_FOLDERS = ("static", "layers", "maps", "images", "tables", "assets")
_OWN_PAGES = ("maps.html", "images.html", "run.html", "comparison.html")


@dataclass
class Site:
    """An atlas under way: paths are relative to its folder and use "/"."""

    location: Location
    links: Sequence[Link] = ()
    """Pages that every page leads to."""
    written: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("pipeline.atlas"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        filters = {"number": number, "count": count, "share": share, "url": quote, "shell": shlex.quote}
        filters["maker"] = makers.command
        self._templates.filters.update(filters, zip=partial(zip, strict=True))

    def write(self, path: str, data: bytes) -> None:
        """Write one file, whole or not at all. Raises: StorageError."""
        location = self.location
        for part in path.split("/"):
            location = location / part
        location.write(data)
        self.written.add(path)

    def write_image(self, path: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Write [height, width, 3 or 4] pixels, exactly, as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        self.write(path, buffer.getvalue())

    def write_page(self, path: str, template: str, **content: Any) -> None:
        """Write a page; every string in it is escaped. `root` leads from the page to the atlas's folder."""
        root = "../" * path.count("/")
        page = self._templates.get_template(template).render(root=root, here=path, site_links=self.links, **content)
        self.write(path, page.encode())

    def write_static(self) -> None:
        """Write style and script: they are the same for every run and hold none of its data."""
        for name in STATIC:
            self.write(f"static/{name}", (files("pipeline.atlas") / "static" / name).read_bytes())

    def prune(self) -> None:
        """Delete what an earlier build left and this one did not write, in the atlas's own folders."""
        for page in set(_OWN_PAGES) - self.written:
            (self.location / page).delete()
        kept = self.written | {path.rsplit("/", depth)[0] for path in self.written for depth in (1, 2)}
        for folder in _OWN_FOLDERS:
            for name in (self.location / folder).names():
                self._prune(f"{folder}/{name}", kept)

    def _prune(self, path: str, kept: set[str]) -> None:
        location = self.location
        for part in path.split("/"):
            location = location / part
        if path not in kept:
            location.delete()
        elif path not in self.written:
            for name in location.names():
                self._prune(f"{path}/{name}", kept)


def number(value: float | None) -> str:
    """A measured value to three digits; a dash for none."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def count(value: int) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,}"


def share(value: float | None) -> str:
    """A share from 0 to 1 in per cent, on one line."""
    return "–" if value is None or not np.isfinite(value) else f"{round(100 * value, 1) + 0.0:.1f}\N{NO-BREAK SPACE}%"
