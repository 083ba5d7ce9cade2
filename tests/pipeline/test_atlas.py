"""The atlas, built from synthetic tables in the real schemas, written by the real writers, with hostile strings."""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from PIL import Image

from pipeline import metrics, tables
from pipeline.analyses import deconv, occlusion, top9
from pipeline.atlas import Options, build, sprites
from pipeline.atlas.charts import chart
from pipeline.atlas.heatmaps import PALETTE, class_colours, colour_table, heat
from pipeline.atlas.projections import Box, around_grey, tile
from pipeline.atlas.records import Sources
from pipeline.projections import relative, semantics_columns, stored
from pipeline.runs import Run, RunError, file_stem
from pipeline.storage import Location
from zfnet.deconv import Semantics
from zfnet.images import Preprocessing

HOSTILE = '<script>alert("x")</script>\n\'&"</script><!-- \u202e\u05e9\u05dc\u05d5\u05dd 🦊 {{ 7*7 }} ../../etc'
CLASSES = ("cat", HOSTILE, "dog", 'a"onerror=alert(1) x="')
SIDE = 32
LAYERS = ("conv1", "features.10", 'Odd <b>&"layer#1?')
IDENTITY = {"model_id": "m0", "data_id": "d0"}


# --- a run, as the jobs would have written it --------------------------------------------------------------------


def make_run(folder: Path, *, values: str = "float32", without: tuple[str, ...] = ()) -> Run:
    """A run with every table but those named in `without`."""
    run = Run.at(str(folder / "run"))
    run.save_model(
        torch.nn.Linear(2, 2),
        architecture=HOSTILE,
        classes=CLASSES,
        preprocessing=Preprocessing(resize_px=SIDE, crop_px=SIDE),
        about={"seed": 7, "data": HOSTILE},
    )
    if "metrics" not in without:
        for epoch in (1, 2, 3):
            metrics.write(run, dict.fromkeys(metrics.METRICS.names, epoch / 4) | {"epoch": epoch, "skipped": 0})
    for layer in LAYERS:
        write_layer(run, layer, values, without)
    if "occlusion" not in without:
        write_occlusion(run)
    if "skipped" not in without:
        row = {name: [HOSTILE] for name in tables.SKIPPED.names}
        tables.write(tables.conform(row, tables.SKIPPED), run.location / "results" / "skipped" / "top9.parquet")
    return run


def entry(rows: int) -> dict[str, Any]:
    return {"rows": rows, "fingerprint": IDENTITY, "samples": 40, "skipped": {"bad_image": 1}, "seconds": 1.0}


def finish(run: Run, table: str, slice_: str, rows: Any) -> None:
    tables.write(rows, run.slice(table, slice_))
    run.finish(table, slice_, entry(rows.num_rows), run.location / "staging")


def write_layer(run: Run, layer: str, values: str, without: tuple[str, ...], maps: int = 4, side: int = 12) -> None:
    """Map 0 has nine images, map 1 three, map 2 is dead, map 3 has a projection that is zero."""
    counts = [9, 3, 0, 1][:maps]
    number = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(1, count + 1) for count in counts])
    rows = len(rank)
    box = {"top": rank - 5, "left": np.where(rank > 5, SIDE - 6, 4), "height": [side] * rows, "width": [side] * rows}
    shared = {
        **{name: [value] * rows for name, value in IDENTITY.items()},
        "layer": [layer] * rows,
        "feature_map": number,
        "rank": rank,
        "activation": 10.0 / rank,
        "key": [f"{HOSTILE}-{r}" for r in rank],
        "shard": ["val-000000.tar"] * rows,
        "label": [None if r == 2 else int(r) % 4 for r in rank],
        "label_name": [None if r == 2 else CLASSES[r % 4] for r in rank],
        "row": rank,
        "col": rank,
        **box,
    }
    statistics = {name: [1.0] * len(counts) for name in top9.FEATURE_MAPS.names if name[0] == "q"} | {
        **{name: [value] * len(counts) for name, value in IDENTITY.items()},
        "layer": [layer] * len(counts),
        "feature_map": np.arange(len(counts)),
        "images": [40] * len(counts),
        "mean": [0.5] * len(counts),
        "maximum": [10.0 if count else 0.0 for count in counts],
        "active_share": [count / 40 for count in counts],
        "active_cells_share": [0.1] * len(counts),
        "dead": [count == 0 for count in counts],
        "histogram": [[1, 2]] * len(counts),
        "histogram_edges": [[0.0, 1.0, 2.0]] * len(counts),
    }
    if "feature_maps" not in without:
        finish(run, "feature_maps", layer, tables.conform(statistics, top9.FEATURE_MAPS))
    if "top9" not in without:
        finish(run, "top9", layer, tables.conform(shared, top9.TOP9))
    if "deconv" not in without:
        finish(run, "deconv", layer, deconv_rows(shared, values))


def deconv_rows(shared: dict[str, Any], values: str) -> Any:
    """Projections: +1 in the upper half and -1 in the lower; of map 3 zero. Patches: red."""
    projections, patches = [], []
    for index, number in enumerate(shared["feature_map"]):
        top, left, height, width = (int(shared[name][index]) for name in ("top", "left", "height", "width"))
        shape = (min(top + height, SIDE) - max(top, 0), min(left + width, SIDE) - max(left, 0), 3)
        pixels = np.zeros(shape, dtype=np.float32)
        if number != 3:
            pixels[: shape[0] // 2], pixels[shape[0] // 2 :] = 4.0, -4.0
        projections.append(pixels)
        patches.append(deconv.png(np.broadcast_to(np.uint8([200, 0, 0]), shape).copy()))
    rows = len(projections)
    columns = {
        **shared,
        **stored(projections, values),
        "patch_png": patches,
        **{f"box_{name}": [1.0] * rows for name in ("top", "left", "height", "width")},
        **semantics_columns(Semantics(), rows),
    }
    return tables.conform(columns, deconv.schema(deconv.Config(values=values)))  # type: ignore[arg-type]


def write_occlusion(run: Run) -> None:
    """Two images: one of a class with a hostile name, one without a label."""
    grid, stride, square = 5, 6, 8
    probability = np.linspace(0.1, 0.9, grid * grid, dtype=np.float32)
    same = {
        **IDENTITY,
        "shard": "val-000000.tar",
        "target_class": 1,
        "clean_class": 1,
        "clean_class_name": CLASSES[1],
        "clean_class_probability": 0.9,
        "clean_probability": 0.9,
        "grid_rows": grid,
        "grid_cols": grid,
        "occluder_px": square,
        "occluder_width_px": square,
        "stride_px": stride,
        "fill": "124",
        "exact": True,
        "dense_from": "pool5",
        "layer": "conv1",
        "feature_map": 0,
        "activation_map": np.arange(grid * grid, dtype=np.float32),
        "probability_map": probability,
        "class_map": np.arange(grid * grid, dtype=np.int32) % 4,
        "image_png": deconv.png(np.full((SIDE, SIDE, 3), 60, dtype=np.uint8)),
        "activation": 5.0,
        **{"row": 1, "col": 2, "top": -2, "left": 3, "height": 12, "width": 12},
        **{name: value[0] for name, value in semantics_columns(Semantics(), 1).items()},
    }
    rows = [{**same, "key": HOSTILE, "label": 1, "label_name": CLASSES[1]}]
    rows.append({**same, "key": "plain", "label": None, "label_name": None, "class_map": np.full(25, 99)})
    projected = stored([np.ones((10, 12, 3), dtype=np.float32)] * 2, "float32")
    columns = {name: [row[name] for row in rows] for name in rows[0]} | projected
    finish(run, "occlusion", "images", tables.conform(columns, occlusion.OCCLUSION))


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
    assert {path.relative_to(site.parent).as_posix() for path in pages} == {
        "index.html",
        "layers/conv1.html",
        "layers/features.10.html",
        f"layers/{file_stem(LAYERS[2])}.html",
        "images/occlusion-1.html",
        "images/occlusion-2.html",
    }
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


def test_no_string_of_the_tables_becomes_markup_or_script(site: Path) -> None:
    for page in read_site(site).values():
        assert len(page.scripts) == 1
        assert page.scripts[0]["src"] == ("" if page.path == site else "../") + "static/atlas.js"
        assert page.script_text == ""
        assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
        assert "<script>alert" not in page.path.read_text()
        assert "49" not in page.text or "{{ 7*7 }}" in page.text
        assert HOSTILE in page.text or page.path.name == "occlusion-2.html"


def test_pages_are_well_formed_for_readers_of_all_kinds(site: Path) -> None:
    for page in read_site(site).values():
        assert page.headings[0] == 1
        assert page.headings.count(1) == 1
        assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
        assert page.images_without_alt == page.cells_without_scope == 0
        assert len(page.identities) == len(set(page.identities))


def test_layer_page_has_an_anchor_for_every_map_and_lists_the_dead(site: Path) -> None:
    page = Reader(site.parent / "layers" / "conv1.html").page
    assert {f"map-{number}" for number in range(4)} <= set(page.identities)
    assert "4 feature maps, 1 of them dead" in page.text
    assert "unpooling" in page.text.lower()
    assert "sum, where pooling windows share a switch" in page.text
    assert "active in 22.5 % of images" in page.text
    assert "no label" in page.text


def test_overview_gives_numbers_and_pandas_lines(site: Path) -> None:
    text = Reader(site).page.text
    assert "validation top-1 75.0 %, top-5 75.0 %" in text
    for table in ("metrics", "results/top9", "results/deconv", "results/occlusion", "results/skipped"):
        assert f"/run/{table}" in text
    assert "1 sample could not be read" in text


@pytest.mark.parametrize(
    ("without", "job"), [(("top9", "feature_maps", "deconv"), "top9"), (("deconv",), "deconv"), (("occlusion",),) * 2]
)
def test_a_missing_table_is_named_with_its_command(tmp_path: Path, without: tuple[str, ...], job: Any) -> None:
    job = job if isinstance(job, str) else job[0]
    index = built(make_run(tmp_path, without=without))
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


def test_an_empty_run_has_a_page_and_one_without_a_model_is_refused(tmp_path: Path) -> None:
    everything = ("metrics", "top9", "feature_maps", "deconv", "occlusion", "skipped")
    text = Reader(built(make_run(tmp_path, without=everything))).page.text
    assert "no training metrics" in text
    with pytest.raises(RunError, match="no trained model"):
        build(Run.at(str(tmp_path / "nothing")), Options())


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
    run = make_run(tmp_path, without=("occlusion",))
    write_layer(run, "zeroth", "float32", (), side=8)
    assert Sources(run=run, top9="top9", deconv="deconv", occlusion="occlusion").layers() == [
        "zeroth",
        *LAYERS,
    ]


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
    folder = built(make_run(tmp_path, values=values, without=("occlusion",))).parent / "assets" / "conv1"
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
    run = make_run(tmp_path, without=("occlusion",))
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
    assert "class 99" in Reader(site.parent / "images" / "occlusion-2.html").page.text


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    drawn = chart("Loss", [1, 2, 3], {"a": [2.0, float("nan"), 1.0], "b": [float("inf")] * 3})
    assert drawn is not None
    assert len(drawn.lines[0].points) == 2
    assert drawn.lines[1].last is None
    assert chart("Loss", [], {"a": []}) is None
    single = chart("Loss", [4], {"a": [2.0]})
    assert single is not None
    assert [tick.text for tick in single.across] == ["4"]


# --- storage ------------------------------------------------------------------------------------------------------


def test_an_atlas_on_an_object_store_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    local = digests(built(run).parent)
    shutil.rmtree(tmp_path / "run" / "atlas")
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.put(str(tmp_path / "run"), f"{tmp_path}/run", recursive=True)
    store = pafs.PyFileSystem(pafs.FSSpecHandler(memory))
    try:
        build(Run(Location(store, f"{tmp_path}/run")), Options())
        memory.get(f"{tmp_path}/run/atlas", str(tmp_path / "copy"), recursive=True)
    finally:
        memory.rm(str(tmp_path), recursive=True)
    there = digests(tmp_path / "copy")
    assert there.keys() == local.keys()
    assert {name for name in local if there[name] != local[name]} <= {"index.html"}  # it names the run's place
