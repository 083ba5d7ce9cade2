"""Write docs/pictures from a run of the demo: figures of its tables and pages of its atlas.

python docs/generate/pictures.py --run runs/demo

The run needs the tables that results.md speaks of (evolution, invariance, occlusion, ...) and an atlas; the pages are
photographed by Debian's chromium. What cannot be drawn is named, and its picture stays as it is.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.figures import book  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
FIGURES = ("figure2_conv5", "figure4", "figure5", "figure6", "figure7", "figure9")
WIDEST = 1400
QUALITY = 80


@dataclass(frozen=True)
class Shot:
    """A page of the atlas, as far as it is shown."""

    name: str
    page: str
    width: int
    height: int
    above: str | None = None
    """What the picture begins with; default the page's beginning."""
    dark: bool = False


SHOTS = (
    Shot("conv4", "layers/conv4.html#sort=classcount:up", 976, 640, above="#map-list"),
    Shot("atlas-layer", "layers/conv4.html#sort=classcount:up", 1280, 800, dark=True),
    Shot("atlas-map", "maps/conv5/35.html", 1280, 1000),
    Shot("atlas-image", "images/occlusion-1.html", 1280, 800, above="#explore"),
    Shot("occlusion", "images/occlusion-1.html", 760, 820, above="h1"),
)


def main() -> None:
    """All that the run allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/demo")
    parser.add_argument("--against", help="another run, for figure 6")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        book.draw(book.Options(run=options.run, against=options.against, out=folder, images=3))
        for name in FIGURES:
            drawn = Path(folder) / f"{name}.png"
            if drawn.exists():
                save(name, drawn.read_bytes())
            else:
                print(f"{name}: the run's tables do not allow it")
    photograph(Path(options.run).resolve() / "atlas")


def photograph(atlas: Path) -> None:
    """Each of SHOTS, as a visitor sees it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for shot in SHOTS:
            page = browser.new_page(
                viewport={"width": shot.width, "height": shot.height}, color_scheme="dark" if shot.dark else "light"
            )
            page.goto(f"{atlas.as_uri()}/{shot.page}")
            if shot.above:
                page.eval_on_selector(shot.above, "element => element.scrollIntoView()")
            page.wait_for_load_state("networkidle")
            save(shot.name, page.screenshot())


def save(name: str, png: bytes) -> None:
    """As docs/pictures/NAME.webp."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((WIDEST, 10 * WIDEST))
    picture.save(PICTURES / f"{name}.webp", quality=QUALITY, method=6)
    print(f"{name}: {picture.size}, {(PICTURES / f'{name}.webp').stat().st_size} bytes")


if __name__ == "__main__":
    main()
