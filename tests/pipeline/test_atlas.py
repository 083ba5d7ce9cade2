"""The atlas, built from synthetic tables in the real schemas, written by the real writers, with hostile strings."""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from PIL import Image

from docs.generate import tables as declared
from pipeline import box_loop, metrics, tables
from pipeline.analyses import (
    ablation,
    detection,
    localization,
    scratch,
    transfer,
)
from pipeline.atlas import Options, boxes, build, sprites, table_charts
from pipeline.atlas.charts import bars, chart, histogram
from pipeline.atlas.images import _hidden
from pipeline.atlas.records import Sources
from pipeline.drawing.heatmaps import PALETTE, Frame, class_colours, colour_table, heat
from pipeline.drawing.tiles import Box, around_grey, tile
from pipeline.fills import Hider
from pipeline.papers.beside import beside
from pipeline.projections import png, relative
from pipeline.runs import Run, RunError, file_stem
from pipeline.storage import Location
from tests.jobs.parse import would_take
from tests.pipeline.synthetic import (
    HOSTILE,
    LAYERS,
    SIDE,
    filled,
    finish,
    make_run,
    picture_rows,
    write_boxes,
    write_class_maps,
    write_layer,
    write_whole,
)

SCHEMAS = {name: table.schema for name, table in declared.found().items()}

# --- reading pages ------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What a browser would find in a page."""

    path: Path
    links: list[str]
    identities: list[str]
    scripts: list[dict[str, str | None]]
    script_text: str
    attributes: set[str]
    text: str
    headings: list[int]
    images_without_alt: int
    cells_without_scope: int


class Reader(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page(path, [], [], [], "", set(), "", [], 0, 0)
        self.inside: list[str] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known, page = dict(attrs), self.page
        self.inside.append(tag)
        page.links += [known[name] or "" for name in ("href", "src") if name in known]
        page.attributes |= set(known)
        page.identities += [known["id"] or ""] if "id" in known else []
        page.scripts += [known] if tag == "script" else []
        page.headings += [int(tag[1])] if tag in {"h1", "h2", "h3", "h4"} else []
        page.images_without_alt += tag == "img" and "alt" not in known
        page.cells_without_scope += tag == "th" and "scope" not in known

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "script" and data.strip():
            self.page.script_text += data
        self.page.text += data.replace("\xa0", " ")

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass


def read_site(index: Path) -> dict[Path, Page]:
    return {path: Reader(path).page for path in sorted(index.parent.rglob("*.html"))}


def built(run: Run, options: Options | None = None) -> Path:
    index = build(run, options or Options()).local
    assert index is not None
    return index


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(make_run(tmp_path_factory.mktemp("atlas") / "a run's <i>folder</i>"))


# --- pages --------------------------------------------------------------------------------------------------------


def test_every_link_resolves_and_none_leaves_the_run(site: Path) -> None:
    pages = read_site(site)
    written = {path.relative_to(site.parent).as_posix() for path in pages}
    stems = [file_stem(layer) for layer in LAYERS]
    assert {"index.html", "run.html", "maps.html", "images.html", "images/occlusion-1.html"} <= written
    assert {f"layers/{stem}.html" for stem in stems} <= written
    assert {f"maps/{stem}/{number}.html" for stem in stems for number in range(4)} <= written
    assert {f"tables/{name}.html" for name in ("metrics", "top9", "unheard_of", "pictures-groups")} <= written
    for page in pages.values():
        for link in page.links:
            if link == "data:,":  # no icon, and no request for one
                continue
            parts = urlsplit(link)
            assert (parts.scheme, parts.netloc) == ("", ""), link
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            assert target.exists(), f"{page.path}: {link}"
            assert site.parents[1] in target.parents
            if parts.fragment:
                assert parts.fragment in pages[target].identities, f"{page.path}: {link}"


def test_a_page_loads_less_than_a_megabyte_at_first_and_its_pictures_when_they_are_seen(tmp_path: Path) -> None:
    maps = 64
    index = built(make_run(tmp_path, without=("others",), maps=maps))
    assert loaded_at_first(index) < 1e6
    layer = index.parent / "layers" / "conv1.html"
    alone = loaded_at_first(index.parent / "tables" / "metrics.html")
    assert (loaded_at_first(layer) - alone) * 384 / maps < 1e6 - alone  # of ZFNet's widest layer
    for page in (index, layer, index.parent / "images.html"):
        pictures = re.findall(r"<img [^>]*>", page.read_text())
        assert pictures
        assert all('loading="lazy"' in picture for picture in pictures), page


def loaded_at_first(page: Path) -> int:
    """Bytes of a page, its style and script, and of those pictures that do not wait until they are seen."""
    source = page.read_text()
    tags = re.findall(r"<(?:img|image|script|link)\b[^>]*>", source)
    eager = [tag for tag in tags if 'loading="lazy"' not in tag and "data:," not in tag and 'rel="icon"' not in tag]
    named = {unquote(html.unescape(name)) for tag in eager for name in re.findall(r'(?:href|src)="([^"]+)"', tag)}
    assert len(named) >= 2  # style and script
    return len(source.encode()) + sum((page.parent / name).stat().st_size for name in named)


def test_no_string_of_the_tables_becomes_markup_or_script(site: Path) -> None:
    seen = 0
    for page in read_site(site).values():
        assert len(page.scripts) == 1
        assert page.scripts[0]["src"] == "../" * (len(page.path.relative_to(site.parent).parts) - 1) + "static/atlas.js"
        assert page.script_text == ""
        assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
        assert "<script>alert" not in page.path.read_text()
        assert "62773913" not in page.text  # the product: no template of ours renders a string of the tables
        seen += HOSTILE in page.text
    assert seen >= 25


def test_pages_are_well_formed_for_readers_of_all_kinds(site: Path) -> None:
    for page in read_site(site).values():
        assert page.headings[0] == 1
        assert page.headings.count(1) == 1
        assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False)), page.path
        assert page.images_without_alt == page.cells_without_scope == 0
        assert len(page.identities) == len(set(page.identities)), page.path


def read(site: Path, page: str) -> Page:
    return Reader(site.parent / page).page


def test_layer_page_has_an_item_for_every_map_and_says_what_is_dead(site: Path) -> None:
    page = read(site, "layers/conv1.html")
    assert {f"map-{number}" for number in range(4)} <= set(page.identities)
    assert "4 feature maps, 1 of them dead" in page.text
    assert "sum, where pooling windows share a switch" in page.text
    assert "active in 22.5 % of images" in page.text
    assert "no label" in page.text
    source = page.path.read_text()
    assert source.count('data-state="dead"') == 1
    assert 'data-share="22.5"' in source


def test_map_page_holds_what_the_tables_know_of_the_map(site: Path) -> None:
    text = read(site, "maps/conv1/0.html").text
    for words in (
        "Largest activation 10, active in 22.5 % of 40 images",
        "Classes of the 9 strongest images",
        "q0.5",
        "Map 1 correlation 0.970",
        "In other tables",
        "unheard_of",
        "What these pictures can and cannot tell",
        "activation: the cell starts with its own activation",
        "in the original rows 1–2, columns 1–2",
    ):
        assert words in text, words
    assert "Dead: no image of 40 activates it" in read(site, "maps/conv1/2.html").text


def test_the_box_is_drawn_where_the_cell_sees_on_the_whole_picture(site: Path) -> None:
    source = (site.parent / "maps" / "conv1" / "0.html").read_text()
    # Rank 1 sees rows -4 to 8 and columns 4 to 16 of an input of 32, which is drawn 96 pixels wide.
    assert 'class="field-line" x="12.00" y="0.00" width="36.00" height="24.00"' in source
    # Rank 6 sees rows 1 to 13 and columns 26 to 38; its picture is the sixth of the sheet, 98 pixels apart.
    assert 'class="field-line" x="568.00" y="3.00" width="18.00" height="36.00"' in source
    sheet = np.asarray(Image.open(site.parent / "assets" / "conv1" / "map-0000-whole.webp")).astype(int)
    assert sheet.shape[:2] == (96, 9 * 98 - 2)
    assert abs(sheet[10, 5 * 98 + 10, :3] - [0, 0, 200]).max() < 20


def test_the_evolution_strip_shows_the_epochs_that_a_map_lives_in(site: Path) -> None:
    page = read(site, "maps/features.10/0.html")
    assert "epoch 1 1 epoch 5 5, another image" in " ".join(page.text.split())  # with the activations
    source = page.path.read_text()
    assert 'aria-label="Projection at epoch 1" data-contrast="0.2"' in source
    assert 'aria-label="Projection at epoch 5" data-contrast="1"' in source
    sheet = np.asarray(
        Image.open(site.parent / "assets" / "features.10" / "map-0000-epochs.webp").convert("RGBA")
    ).astype(int)
    assert sheet.shape[:2] == (2 * 96 + 2, 2 * 96 + 2)
    for left in (0, 98):  # each epoch's own scale: +1 above, -1 below; the patch under it
        assert (sheet[10:40, left + 10 : left + 80, :3] > 240).all()
        assert (sheet[60:90, left + 10 : left + 80, :3] < 15).all()
        assert abs(sheet[110:180, left + 10 : left + 80, :3] - [200, 0, 0]).max() < 12
    assert "Evolution" in read(site, "maps/features.10/1.html").text
    assert "Evolution" not in read(site, "maps/features.10/3.html").text


def test_projections_of_several_tables_stand_side_by_side_with_their_semantics(tmp_path: Path) -> None:
    run = make_run(tmp_path, without=("occlusion", "others"))
    rows = tables.read(run.slice("deconv", "conv1"))
    guided = pa.array(["guided"] * len(rows), rows.schema.field("relu").type)
    rows = rows.set_column(rows.schema.get_field_index("relu"), rows.schema.field("relu"), guided)
    finish(run, "deconv-guided", "conv1", rows)
    index = built(run)
    text = read(index, "maps/conv1/0.html").text.split("Projected in other ways")[1].split("Activity")[0]
    first, second = text.split("deconv-guided")
    assert "deconvnet: the signal itself is rectified" in first
    assert "guided: the signal is rectified, and kept only where" in second
    source = (index.parent / "maps" / "conv1" / "0.html").read_text()
    for name in ("map-0000.webp", "map-0000-deconv-guided.webp"):
        assert f'class="sprite" src="../../assets/conv1/{name}"' in source
    assert "Projected in other ways" not in read(index, f"maps/{file_stem(LAYERS[1])}/0.html").text


def test_contrasts_are_shares_of_the_maps_largest_value(tmp_path: Path) -> None:
    source = Sources(run=make_run(tmp_path, without=("others", "occlusion")))
    layer = source.layer("conv1")
    assert layer.maps[0].contrasts == [1.0] * 9
    assert layer.maps[3].contrasts == [0.0]  # its projection is zero


def test_the_overview_leads_to_all_and_the_run_page_gives_numbers_and_pandas_lines(site: Path) -> None:
    assert "validation top-1 75.0 %, top-5 75.0 %" in read(site, "index.html").text
    text = read(site, "run.html").text
    for table in ("metrics", "results/top9", "results/deconv", "results/occlusion", "results/skipped"):
        assert f"/run/{table}" in text
    assert "1 sample could not be read" in text
    assert "this run, val, centre crop, 40 images, average of 2 networks25.012.5" in text  # in the paper's table 2
    assert "1 convnet as per figure 338.416.5" in text
    assert "Table 6: PASCAL 2012 classification: not measured yet" in text


def test_errors_of_boxes_stand_beside_overfeats_and_transfer_beside_tables_4_and_5(tmp_path: Path) -> None:
    run = make_run(tmp_path, without=("occlusion", "others"))
    points = {"images_per_class": [15], "accuracy": [0.5], "spread": [0.02]}
    outcomes = {"outcome": ["right", "missed", "poor_overlap", "right", None], "key": list("abcde")}
    for name, schema, rows in (
        ("localization_images", localization.IMAGES, filled(localization.IMAGES, 5, **outcomes)),
        ("detection_classes", detection.CLASSES, filled(detection.CLASSES, 3, average_precision=[0.5, 0.75, None])),
        ("transfer-mine", transfer.SCHEMA, filled(transfer.SCHEMA, 1, classifier=["svm"], layer=["fc7"], **points)),
        ("scratch", scratch.SCHEMA, filled(scratch.SCHEMA, 1, architecture=["zfnet"], **points)),
    ):
        finish(run, name, "images", tables.conform(rows, schema))
    page = read(built(run), "run.html")
    text = page.text
    lines = " ".join(text.split())
    assert "this run, svm (fc7) (transfer-mine)50.0 +- 2.0 this run, not pretrained (zfnet)50.0 +- 2.0" in lines
    assert "Caltech-101, not pretrained22.8 +- 1.546.5 +- 1.7" in lines
    assert "Caltech-256, not pretrained9.0 +- 1.422.5 +- 0.731.2 +- 0.538.8 +- 1.4" in lines
    shown = [line for one in beside(run) if one.measured for grid in one.grids for line in grid.lines]
    assert all("".join([line.name, *line.cells]) in text for line in shown)
    assert "this run, 4 images50.0" in text
    assert "this run, 2 classes62.5" in text
    assert "OverFeat, one regressor, 4 scales30.0" in text


@pytest.mark.parametrize("without", [(), ("occlusion", "others", "deconv"), ("occlusion", "others", "boxes")])
def test_every_command_on_the_pages_is_one_that_its_job_takes(tmp_path: Path, without: tuple[str, ...]) -> None:
    index = built(make_run(tmp_path, without=without))
    commands = {
        html.unescape(command)
        for page in index.parent.rglob("*.html")
        for command in re.findall(r"python jobs/[^<]*", page.read_text())
    }
    assert {shlex.split(command)[1] for command in commands} >= {"jobs/localize.py", "jobs/detect.py", "jobs/atlas.py"}
    for command in commands:
        would_take(command)


def test_a_training_on_windows_has_its_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path, without=("metrics", "occlusion", "others"))
    for epoch in (1, 2):
        row = {name: [0.25] for name in box_loop.METRICS.names} | {"epoch": [epoch]}
        tables.write(tables.conform(row, box_loop.METRICS), run.location / "metrics" / f"epoch-000{epoch}.parquet")
    index = built(run)
    text = read(index, "run.html").text
    assert "training windows, last 75.0 %" in text  # of which a quarter is right
    assert "Validation windows right" in text
    assert "trained for 2 epochs, 25.0 % of the validation windows right" in " ".join(Reader(index).page.text.split())


def test_a_table_page_has_documented_columns_ranges_and_rows(site: Path) -> None:
    text = read(site, "tables/top9.html").text
    assert "Place among the images of this feature map, from 1." in text
    assert "activationfloatActivation of the cell, after ReLU where one follows.1.111110" in text
    assert "pd.read_parquet(" in text
    unknown = read(site, "tables/unheard_of.html").text
    assert "1.5, 1.5, 1.5, 1.5, 1.5, 1.5, … (9 in all)" in unknown
    assert HOSTILE in unknown
    assert list((site.parent / "assets" / "tables").glob("pictures-*-picture_jpeg.webp"))
    grid = Image.open(site.parent / "assets" / "tables" / "occlusion-0-probability_map.webp")
    assert grid.size == (125, 125)  # 5 x 5 positions, each of 25 pixels


def test_the_confusion_matrix_shades_shares_of_rows(site: Path) -> None:
    page = read(site, "tables/confusion.html")
    source = page.path.read_text()
    assert 'class="shade-5">9<' in source
    assert 'class="shade-1">1<' in source
    assert "cat" in page.text.split("Most often confused")[1]


def test_an_image_page_draws_the_boxes_that_tables_have_and_the_best_classes(site: Path) -> None:
    page = read(site, "images/occlusion-1.html")
    source = page.path.read_text()
    assert 'class="box box-1" x="6.0" y="4.0" width="12.0" height="10.0"' in source
    assert "box-1" not in (site.parent / "images" / "occlusion-2.html").read_text()
    before, after = page.text.split("Image as it is")[1].split("With the square at its worst")[:2]
    assert "90.0 %" in before
    assert "cat60.0 %" in after
    assert 'data-probability="0.1000 0.1333' in source
    assert "object_occlusion" in page.text.split("In other tables")[1]


def test_boxes_of_one_analysis_are_drawn_together_in_the_images_own_pixels(tmp_path: Path) -> None:
    run = make_run(tmp_path, without=("occlusion",))
    write_boxes(run, ["whole", "plain"])
    text = read(built(run), "tables/detection.html").text
    assert "There are no pictures of these images yet" in text
    assert "--of detection --whole --name detection" in text
    write_whole(run, ["whole", "plain"], 80, 160)
    finish(run, "pictures-elsewhere", "images", picture_rows("images", ["whole"]), data_id="other images")
    for page in ("detection", "detection_objects", "detection_windows"):
        source = (built(run).parent / "tables" / f"{page}.html").read_text()
        assert source.count('viewBox="0.0 0.0 160.0 80.0"') == 2
        assert source.count('class="box box-1" x="30.0" y="10.0" width="40.0" height="20.0"') == 2  # the objects
        assert source.count('class="box box-2" x="30.0" y="10.0" width="40.0" height="20.0"') == 1  # what is right
        assert source.count('class="box box-5" x="40.0" y="20.0" width="4.0" height="4.0"') == 1  # a confused class
        assert '<g class="kind-5" opacity="0.50">' in source  # a quarter of the other's score
        assert source.count('class="box box-8" x="16.0" y="8.0" width="64.0" height="64.0"') == 1  # a window
        assert source.count('class="box box-9" x="30.0" y="10.0" width="40.0" height="20.0"') == 1  # and its own box
        assert 'data-fate="missed"' in source
        assert HOSTILE in read(run_index(run), f"tables/{page}.html").text


def run_index(run: Run) -> Path:
    assert run.location.local is not None
    return run.location.local / "atlas" / "index.html"


def test_boxes_on_an_image_page_are_in_pixels_of_the_input(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_boxes(run, ["plain"])
    write_whole(run, ["plain"], 64, 128)
    source = (built(run).parent / "images" / "occlusion-2.html").read_text()
    # The input of 32 pixels is the middle of 64 x 128: half of it, from column 32. Row 10 is 5, column 30 is -1.
    assert 'class="box box-1" x="-1.0" y="5.0" width="20.0" height="10.0"' in source
    other = make_run(tmp_path / "other")
    write_boxes(other, ["plain"], data_id="other images")  # which have the same keys
    finish(other, "pictures-detection", "images", picture_rows("images", ["plain"]), data_id="other images")
    page = read(built(other), "images/occlusion-2.html")
    assert "box-1" not in page.path.read_text()
    assert "detection_objects" not in page.text


def test_class_maps_lie_on_the_image_about_the_centres_of_their_windows(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_class_maps(run)
    index = built(run)
    for name in ("tables/dense_maps.html", "images/occlusion-2.html"):
        source = (index.parent / name).read_text()
        # Windows of 30 px, 10 down and 15 across from each other: the first cell's middle is at 15, 15.
        assert source.count('x="7.50" y="10.00" width="45.00" height="20.00"') == 2
        assert "at most 100.0" in read(index, name).text
    assert "class-maps" not in (index.parent / "images" / "occlusion-1.html").read_text()
    cells = np.asarray(Image.open(index.parent / "assets" / "class-maps" / "dense_maps-0-scale1-rank9.png"))
    assert (cells[0] == colour_table()[[0, 128, 255]]).all()


@pytest.mark.parametrize("known", boxes.BOXES, ids=lambda known: f"{known.table}-{known.name}")
def test_boxes_ask_for_columns_that_the_table_has(known: boxes.BoxesOf) -> None:
    asked = {*known.sides, *known.caption, *filter(None, (known.fate, known.strength)), *(known.apart or ("key",))[:1]}
    assert asked <= set(SCHEMAS[known.table].names)


@pytest.mark.parametrize(
    ("without", "job"), [(("top9", "feature_maps", "deconv"), "top9"), (("deconv",), "deconv"), (("occlusion",),) * 2]
)
def test_a_missing_table_is_named_with_its_command(tmp_path: Path, without: tuple[str, ...], job: Any) -> None:
    job = job if isinstance(job, str) else job[0]
    index = built(make_run(tmp_path, without=(*without, "others")))
    run_path = index.parents[1]
    assert f"python jobs/{job}.py --run {run_path}" in Reader(index).page.text
    pages = read_site(index)
    for page in pages.values():
        for link in page.links:
            path = urlsplit(link).path
            assert not path or link == "data:," or (page.path.parent / unquote(path)).exists(), link
    if job == "deconv":
        text = pages[index.parent / "layers" / "conv1.html"].text
        assert "There are no projections of this layer yet" in text
        assert "Map 0" in text
        text = pages[index.parent / "maps" / "conv1" / "0.html"].text
        assert "jobs/pictures.py --run" in text
        assert "--of groups --name groups" in text
        assert "its evolution over the epochs" in text.lower()


def test_two_runs_are_put_side_by_side(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", without=("others",))
    other.location.local.rename(tmp_path / "other")  # type: ignore[union-attr]
    metrics.write(run, dict.fromkeys(metrics.METRICS.names, 1.0) | {"epoch": 4, "skipped": 0})
    described = json.loads((tmp_path / "other" / "run.json").read_text())
    (tmp_path / "other" / "run.json").write_text(json.dumps({**described, "seed": 8}))
    text = read(built(run, Options(against=str(tmp_path / "other"))), "comparison.html").text
    assert "run and other" in text
    assert "seed78" in text
    assert "run: validation top-1" in text
    assert "other: validation top-1" in text
    assert "feature_maps" in text
    with pytest.raises(RunError, match="no trained model"):
        build(run, Options(against=str(tmp_path / "nothing")))
    built(run)
    assert not (tmp_path / "a" / "run" / "atlas" / "comparison.html").exists()


def test_an_empty_run_has_a_page_and_one_without_a_model_is_refused(tmp_path: Path) -> None:
    everything = ("metrics", "top9", "feature_maps", "deconv", "occlusion", "skipped", "others")
    index = built(make_run(tmp_path, without=everything))
    assert "no training metrics" in read(index, "run.html").text
    with pytest.raises(RunError, match="no trained model"):
        build(Run.at(str(tmp_path / "nothing")), Options())


def test_a_folder_of_tables_without_a_network_has_its_pages(tmp_path: Path) -> None:
    run = Run.at(str(tmp_path / "ablation"))
    columns = filled(ablation.SCHEMA, 2, variant=["as it is", HOSTILE], top1_error=[0.25, 0.5])
    finish(run, "ablation", "zfnet_small", tables.conform(columns, ablation.SCHEMA))
    index = built(run)
    assert "Tables of several networks" in Reader(index).page.text
    assert "made of another network" not in Reader(index).page.text
    text = read(index, "run.html").text
    assert "without a network of its own" in text
    assert "this run, as it is: " in text  # beside the paper's table 3
    assert "zfnet: layers 6, 7: 2048 units38.240.217.6" in text
    text = read(index, "tables/ablation.html").text
    assert "25.0 %" in text
    assert HOSTILE in text


def test_a_table_that_vanished_is_refused_with_its_name(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.results("deconv") / "conv1.parquet").delete()
    with pytest.raises(RunError, match=r"manifest of deconv lists conv1.*bring it back"):
        build(run, Options())


def test_building_again_gives_the_same_bytes_and_drops_what_is_stale(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    index = built(run)
    before = digests(index.parent)
    stale = index.parent / "assets" / "conv9" / "map-0000.webp"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    (index.parent / "assets" / "conv1" / "map-0777.webp").write_bytes(b"old")
    (index.parent / "notes.txt").write_text("the user's own")
    built(run)
    assert (index.parent / "notes.txt").exists()
    (index.parent / "notes.txt").unlink()
    assert digests(index.parent) == before
    assert not stale.parent.exists()


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layers_are_ordered_by_receptive_field_not_by_when_they_were_made(tmp_path: Path) -> None:
    run = make_run(tmp_path, without=("occlusion", "others"))
    write_layer(run, "zeroth", "float32", ("others",), side=8)
    assert Sources(run=run).layers() == ["zeroth", *LAYERS]


def test_options_are_checked_when_they_are_given() -> None:
    with pytest.raises(RunError, match="--tile-px is 4: give 16 to 512"):
        Options(tile_px=4)
    with pytest.raises(RunError, match="--images is -1"):
        Options(images=-1)


def test_file_names_are_safe_stable_and_distinct() -> None:
    assert file_stem("conv1") == "conv1"
    assert file_stem("features.0") == "features.0"
    names = ["Conv1", "conv1", "a/b", "a-b", "../x", "x", "", ".", "..", "é" * 300, HOSTILE, "a b", "con "]
    stems = [file_stem(name) for name in names]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and stem[0] not in ".-" for stem in stems)
    assert max(map(len, stems)) < 100


# --- pixels -------------------------------------------------------------------------------------------------------


def sprite_tile(path: Path, place: int, *, patch: bool, tile_px: int = 96) -> np.ndarray:
    """One tile [side, side, RGBA] of a sprite file, found by the documented layout alone."""
    sheet = np.asarray(Image.open(path).convert("RGBA")).astype(int)
    width, height = sprites.size(tile_px)
    assert sheet.shape == (height, width, 4)
    row, col = divmod(place, 3)
    top, left = row * (tile_px + 2), col * (tile_px + 2) + patch * (3 * tile_px + 2 * 2 + 14)
    return sheet[top : top + tile_px, left : left + tile_px]


@pytest.mark.parametrize("values", ["float32", "float16", "png"])
def test_sprites_show_sign_zero_and_place_however_values_are_stored(tmp_path: Path, values: str) -> None:
    folder = built(make_run(tmp_path, values=values, without=("occlusion", "others"))).parent / "assets" / "conv1"
    # Rank 1 lies at top -4, left 4: of the 12-pixel box (8 tile pixels each) the first 4 rows are outside the image.
    first = sprite_tile(folder / "map-0000.webp", 0, patch=False)
    assert (first[32:, :, 3] == 255).all()
    assert (first[:32, :, 3] < 255).all()
    assert (first[36:60, 8:88, :3] > 240).all()
    assert (first[68:92, 8:88, :3] < 15).all()
    # Rank 6 lies at top 1, left 26: the last 6 of 12 columns are outside.
    sixth = sprite_tile(folder / "map-0000.webp", 5, patch=True)
    assert (sixth[:, :48, 3] == 255).all()
    assert (sixth[:, 48:, 3] < 255).all()
    assert abs(sixth[8:88, 8:40, :3] - [200, 0, 0]).max() < 12
    zero = sprite_tile(folder / "map-0003.webp", 0, patch=False)
    assert abs(zero[36:92, 4:92, :3] - 128).max() <= 2
    assert (sprite_tile(folder / "map-0001.webp", 3, patch=False)[..., 3] == 0).all()
    assert not (folder / "map-0002.webp").exists()


def test_a_tile_keeps_its_aspect_and_is_exact() -> None:
    assert around_grey(np.float32([0, 1, -1, 0.5])).tolist() == [128, 255, 0, 191]
    wide = tile(np.full((2, 8, 3), 9, dtype=np.uint8), Box(0, 0, 2, 8), 32)
    assert (wide[12:20, :, 3] == 255).all()
    assert (wide[12:20, :, :3] == 9).all()
    assert (wide[:12, :, 3] < 255).all()
    assert (wide[20:, :, 3] < 255).all()


def test_a_field_larger_than_the_image_is_shown_on_the_image() -> None:
    assert Box(-4, 20, 12, 12).within(64) == Box(-4, 20, 12, 12)
    box = Box(-10, 15, 83, 83).within(64)
    assert box == Box(0, -15, 64, 64)
    drawn = tile(np.full((64, 49, 3), 9, dtype=np.uint8), box, 64)
    assert (drawn[:, 15:, :3] == 9).all()
    assert (drawn[:, :15, 3] < 255).all()


def test_each_tile_is_scaled_by_itself() -> None:
    row = {"projection": np.float32([1e6, 0, -5e5]), "projection_height": 1, "projection_width": 1}
    assert relative(row).tolist() == [[[1, 0, -0.5]]]
    assert relative({**row, "projection": np.zeros(3, np.float32)}).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("group_bytes", [1, 4000, 10**9])
def test_a_map_that_row_groups_share_is_drawn_once_and_whole(tmp_path: Path, group_bytes: int) -> None:
    run = make_run(tmp_path, without=("occlusion", "others"))
    location = run.results("deconv") / "conv1.parquet"
    tables.write(tables.read(location), location, row_group_bytes=group_bytes)
    found = list(sprites.sprites(location, 96, SIDE))
    assert [sprite.feature_map for sprite in found] == [0, 1, 3]
    sheet = np.asarray(Image.open(io.BytesIO(found[0].data)))
    assert (sheet[-10:, 200:280, 3] == 255).any()  # the ninth tile is there


def test_heat_map_values_go_from_dark_to_light_over_the_bar() -> None:
    found = heat(np.float32([[0, 1], [2, 4]]))
    table = colour_table()
    assert found.ticks == (0, 1, 2, 3, 4)
    assert (found.pixels[0, 0] == table[0]).all()
    assert (found.pixels[1, 0] == table[128]).all()
    assert (found.pixels[1, 1] == table[255]).all()
    assert heat(np.full((2, 2), 0.5, dtype=np.float32)).ticks == (0.5,)


def test_class_map_gives_the_target_its_colour_and_gathers_what_is_rare() -> None:
    pixels, legend = class_colours(np.arange(16, dtype=np.int32).reshape(4, 4), target=3)
    assert (legend[0].number, legend[0].colour) == (3, PALETTE[0])
    assert (legend[-1].number, legend[-1].positions, legend[-1].classes) == (None, 6, 6)
    assert pixels[0, 3].tolist() == [0x00, 0x72, 0xB2]
    absent = class_colours(np.zeros((2, 2), dtype=np.int32), target=3)[1]
    assert absent[0].colour != PALETTE[0]


def test_occlusion_page_draws_cells_around_the_squares_centres(site: Path) -> None:
    text = (site.parent / "images" / "occlusion-1.html").read_text()
    # Square 8, stride 6: cell (0, 0) is centred at 4, so it begins at 1; five cells of 6 px span 30.
    assert 'x="1.0" y="1.0" width="30" height="30"' in text
    assert 'x="3" y="0" width="12" height="10"' in text  # the projection, cut at the top
    grid = np.asarray(Image.open(site.parent / "assets" / "occlusion" / "1-probability.png"))
    assert grid.shape == (5, 5, 3)
    assert (grid[0, 0] == colour_table()[0]).all()
    assert (grid[4, 4] == colour_table()[255]).all()
    page = Reader(site.parent / "images" / "occlusion-1.html").page
    assert "is least probable: 10.0 %" in page.text
    assert 'href="../assets/occlusion/1-hidden.png"' in text
    expected = np.full((SIDE, SIDE, 3), 60)
    expected[:8, :8] = 124  # where it is least probable, in the fill of the table
    assert (np.asarray(Image.open(site.parent / "assets" / "occlusion" / "1-hidden.png")) == expected).all()
    assert "class 99" in Reader(site.parent / "images" / "occlusion-2.html").page.text


@pytest.mark.parametrize(("fill", "shown"), [("9,8,7", (9, 8, 7)), ("mean", (128, 128, 128)), ("blur", (60, 60, 60))])
def test_the_square_shows_what_the_table_says_and_grey_for_the_mean_of_a_network_that_is_gone(
    tmp_path: Path, fill: str, shown: tuple[int, ...]
) -> None:
    image = png(np.full((SIDE, SIDE, 3), 60, np.uint8))
    row = {"image_png": image, "fill": fill, "occluder_px": 8, "occluder_width_px": 6}
    drawn = _hidden(Hider(Run.at(str(tmp_path))), row, Frame(5, 5, 8, 6, 6), (1, 2))
    expected = np.full((SIDE, SIDE, 3), 60)
    expected[6:14, 12:18] = shown
    assert (drawn == expected).all()


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    drawn = chart("Loss", {"a": [(1, 2.0), (2, float("nan")), (3, 1.0)], "b": [(1, float("inf"))]})
    assert drawn is not None
    assert len(drawn.lines[0].points) == 2
    assert drawn.lines[1].last is None
    assert chart("Loss", {"a": []}) is None
    single = chart("Loss", {"a": [(4, 2.0)]})
    assert single is not None
    assert [tick.text for tick in single.across] == ["4"]
    below = chart("Correlation", {"a": [(0, 1.0), (1, -0.5)]}, axis="stage")
    assert below is not None
    assert [tick.text for tick in below.up] == ["-0.5", "0", "0.5", "1"]
    (high, low) = below.lines[0].points
    assert (high[1], low[1]) == (below.up[-1].at, below.up[0].at)


def test_a_chart_of_many_points_or_curves_is_thinned_and_keeps_the_ends() -> None:
    drawn = chart("p", {str(n): [(x, x / 2000) for x in range(2000)] for n in range(20)})
    assert drawn is not None
    assert (len(drawn.lines), drawn.left_out) == (16, 4)
    assert all(len(line.points) <= 401 for line in drawn.lines)
    assert drawn.lines[0].points[0][0] == drawn.left
    assert drawn.lines[0].points[-1][0] == drawn.right


def test_bars_have_one_scale_and_say_what_is_left_out() -> None:
    drawn = bars("b", ("x", "y"), [("one", (0.5, 0.25)), ("two", (None, float("nan"))), ("three", (1, -1))], most=2)
    assert drawn is not None
    assert [[bar.length for bar in row] for _, row in drawn.rows] == [[50, 25], [0, 0]]
    assert drawn.left_out == 1
    assert bars("b", ("x",), [("one", (None,))]) is None


def test_a_histogram_is_as_tall_as_its_counts_on_a_logarithmic_axis() -> None:
    drawn = histogram([1, 0, 4], [1, 10, 100, 1000], {0.05: 0.0, 0.5: 100.0})
    assert drawn is not None
    third = (drawn.width - 16) / 3
    assert drawn.path == f"M8.0 110V85.0H{8 + third:.1f}V110ZM{8 + 2 * third:.1f} 110V10.0H{8 + 3 * third:.1f}V110Z"
    assert [(mark.text, round(mark.at, 1)) for mark in drawn.marks] == [("50%", round(8 + 2 * third, 1))]
    assert [tick.text for tick in drawn.ticks] == ["1", "10", "100", "1e+03"]
    assert histogram([], [], {}) is None


def test_charts_of_tables_are_means_by_group(tmp_path: Path) -> None:
    rows = {"layer": ["a", "a", "b"], "stage": [0, 0, 0], "y": [1.0, 3.0, None]}
    frame = pd.DataFrame(rows)
    (drawn,) = table_charts.Curves(title="t", x="stage", y="y", by=("layer",)).draw(frame)
    assert [(line.name, line.last) for line in drawn.lines] == [("a", 2.0), ("b", None)]
    (table,) = table_charts.Means(title="t", by="layer", values=("y",)).draw(frame)
    assert [(name, bar.value) for name, (bar,) in table.rows] == [("a", 2.0), ("b", None)]
    (shares,) = table_charts.Shares(title="t", value="stage", by="layer").draw(frame.assign(stage=["x", "y", "x"]))
    assert [(name, [bar.value for bar in bars]) for name, bars in shares.rows] == [
        ("all", [2 / 3, 1 / 3]),
        ("a", [0.5, 0.5]),
        ("b", [1, 0]),
    ]
    (ranked,) = table_charts.Means(title="t", by="layer", values=("stage",), ranked=True, mean=True).draw(
        frame.assign(stage=[1, 1, 3])
    )
    assert [(name, bar.value) for name, (bar,) in ranked.rows] == [("mean", 2), ("b", 3), ("a", 1)]
    (spread,) = table_charts.Spread(title="t", value="y", by="layer").draw(frame)
    assert spread.lines[0].last == 0.5  # of the two rows of a, one lies in the last tenth


@pytest.mark.parametrize("table", sorted(table_charts.CHARTS))
def test_the_charts_ask_for_columns_that_the_table_has(table: str) -> None:
    asked = {column for chart in table_charts.CHARTS[table] for column in chart.columns}
    assert asked <= set(SCHEMAS[table].names)


# --- storage ------------------------------------------------------------------------------------------------------


def test_an_atlas_on_an_object_store_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    local = contents(built(run).parent)
    shutil.rmtree(tmp_path / "run" / "atlas")
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.put(str(tmp_path / "run"), f"{tmp_path}/run", recursive=True)
    store = pafs.PyFileSystem(pafs.FSSpecHandler(memory))
    try:
        build(Run(Location(store, f"{tmp_path}/run")), Options())
        memory.get(f"{tmp_path}/run/atlas", str(tmp_path / "copy"), recursive=True)
    finally:
        memory.rm(str(tmp_path), recursive=True)
    there = contents(tmp_path / "copy")
    assert there.keys() == local.keys()
    for name, data in there.items():
        assert data.replace(b"py::fsspec+memory://", b"") == local[name], name  # pages name the run's place


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
