"""Correspondence: masks and distances by their definitions, the tables against loops, and known answers."""

import io
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline import sweep
from pipeline.analyses import correspondence
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.indexing import index_shards
from pipeline.runs import Run, RunError
from tests.conftest import CLASSES, jpeg, random_model
from tests.pipeline.exact import assert_same
from tests.tars import write_tar
from zfnet.correspondence import change_signs, random_places, sign_distances
from zfnet.images import Crop, Preprocessing

IN_PROCESS = Workers(num=0, cpus=2)
PARTS = ("right_eye", "left_eye", "nose")
WIDTH, HEIGHT = 96, 80  # of every image; resized to 86 x 72, of which the centre of 64 x 64 is seen
FACE = {"right_eye": [[33.5, 30.0]], "left_eye": [[61.0, 29.0]], "nose": [[48.0, 51.0]]}


def face(rng, **changes):
    """The members of a sample with landmarks that move about a little."""
    marks = {part: [(np.array(points[0]) + rng.integers(-3, 4, 2)).tolist()] for part, points in FACE.items()}
    described = {"landmarks": marks, "boxes": [{"xyxy": [18.0, 14.0, 78.0, 70.0]}], "frontal": True, **changes}
    return {"jpg": jpeg(rng, HEIGHT, WIDTH), "cls": b"0", "json": json.dumps(described).encode()}


def write(folder, members, shards=1):
    folder.mkdir()
    for number, some in enumerate(np.array_split(np.arange(len(members)), shards)):
        write_tar(folder / f"val-{number}.tar", [(f"k{i}", members[i]) for i in some])
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    index_shards([str(p) for p in sorted(folder.glob("*.tar"))], str(folder), classes=None, accept_damaged=False)
    return folder


@pytest.fixture
def faces(tmp_path):
    rng = np.random.default_rng(0)
    return write(tmp_path / "faces", [face(rng) for _ in range(5)], shards=2)


def run_correspondence(run, data, workers=IN_PROCESS, name=None, status=0, **config):
    options = Options(run=str(run), data=str(data), workers=workers, name=name)
    small = {"mask_px": 11, "random": 3, "part_size": 2, **config}
    assert sweep.run(correspondence.ANALYSIS, options, correspondence.Config(**small)) == status
    return read(run, name)


def read(run, name=None):
    tables = ("correspondence", "correspondence_pairs", "correspondence_images")
    return [pd.read_parquet(run / "results" / (table if name is None else f"{table}-{name}")) for table in tables]


# ------------------------------------------------------------------------------------------------- the mathematics


def test_a_crop_maps_boxes_there_and_back():
    crop = Crop(image_height=80, image_width=96, resized_height=72, resized_width=86, top=4, left=11, size_px=64)
    box = (3.5, 7.0, 20.0, 11.0)
    assert crop.from_original(*crop.to_original(*box)) == pytest.approx(box, rel=1e-12)
    assert crop.from_original(40, 48)[:2] == (32, 32)  # the middle stays in the middle


def test_distances_are_counts_of_unlike_signs(monkeypatch):
    monkeypatch.setattr("zfnet.correspondence._UNITS_AT_A_TIME", 100)
    signs = torch.randint(-1, 2, (6, 333), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    differing, changed = sign_distances(signs)
    for i, j in itertools.product(range(6), repeat=2):
        one, other = signs[i].tolist(), signs[j].tolist()
        assert differing[i, j] == sum(a != b for a, b in zip(one, other, strict=True))
        assert changed[i, j] == sum(a != 0 or b != 0 for a, b in zip(one, other, strict=True))


def test_signs_are_three_valued_and_rounding_has_none():
    clean = torch.tensor([4.0, 1.0, 0.0, 2.0, 2.0])
    masked = torch.tensor([[3.0, 2.0, 0.0, 2.0 + 1e-6, 2.0 - 1e-3]])
    assert change_signs(clean, masked).tolist() == [[1, -1, 0, -1, 1]]
    assert change_signs(clean, masked, least=1e-6).tolist() == [[1, -1, 0, 0, 1]]


def test_random_places_are_every_free_place_and_no_other():
    """All places of a small image, drawn until none is left, are those that a loop over pixels calls free."""
    parts, side, mask_px, box = [(2, 3), (9, 8)], 16, 3, (1.0, 2.0, 9.0, 11.0)
    for boxes in (None, [box], [box, (12.0, 0.0, 4.0, 4.0)]):
        expected = [
            (top, left)
            for top, left in itertools.product(range(side - mask_px + 1), repeat=2)
            if not any(abs(top - t) < mask_px and abs(left - le) < mask_px for t, le in parts)
            and (
                boxes is None
                or any(t <= top + mask_px / 2 <= t + h and le <= left + mask_px / 2 <= le + w for t, le, h, w in boxes)
            )
        ]
        found = random_places(parts, mask_px, side, len(expected), np.random.default_rng(0), boxes)
        assert sorted(found) == expected
        with pytest.raises(ValueError, match=f"room for {len(expected)} of {len(expected) + 1} random masks of 3 px"):
            random_places(parts, mask_px, side, len(expected) + 1, np.random.default_rng(0), boxes)


# ------------------------------------------------------------------------------------------------------ the tables


def signs_by_definition(run, images, module):
    """(image, mask) -> sign(x - x~) of one image at a time, pixels replaced before the mean is subtracted."""
    model = Run.at(str(run)).load_model()
    seen = []
    model.network.get_submodule(module).register_forward_hook(lambda _module, _inputs, y: seen.append(y[0].flatten()))
    signs = {}
    for row in images.itertuples():
        pixels = np.asarray(Image.open(io.BytesIO(row.image_png)))
        masks = list(zip(row.parts, row.mask_tops, row.mask_lefts, strict=True))
        for number, (part, top, left) in enumerate([("clean", 0, 0), *masks]):
            copy = pixels.copy()
            if part != "clean":
                copy[top : top + row.mask_px, left : left + row.mask_px] = 124
            with torch.no_grad():
                model.network(model.preprocessing.normalise(torch.from_numpy(copy)[None]))
            if number == 0:
                clean = seen[-1]
            else:
                change = (clean - seen[-1]).numpy()
                signs[row.key, number - 1] = np.where(abs(change) <= 1e-6 * float(clean.max()), 0, np.sign(change))
    return signs


def test_the_tables_are_the_definition(make_run, faces):
    run = make_run()
    summary, pairs, images = run_correspondence(run, faces)
    assert images.parts.map(list).tolist() == [[*PARTS, "random", "random", "random"]] * 5
    assert list(summary.layer) == ["conv5"] * 4 + ["fc7"] * 4
    assert list(summary.part) == [*PARTS, "random"] * 2
    for layer, module in (("conv5", "relu5"), ("fc7", "relu7")):
        signs = signs_by_definition(run, images, module)
        units = len(next(iter(signs.values())))
        for row in pairs[pairs.layer == layer].itertuples():
            number = len(PARTS) + row.repeat if row.part == "random" else PARTS.index(row.part)
            one, other = signs[row.key, number], signs[row.other_key, number]
            assert row.units == units
            assert abs(row.differing - (one != other).sum()) <= units * 2e-3  # forwards of other sizes round otherwise
            assert abs(row.changed - ((one != 0) | (other != 0)).sum()) <= units * 2e-3
            assert row.share == row.differing / units


def test_the_summary_is_of_the_pairs(make_run, faces):
    summary, pairs, images = run_correspondence(make_run(), faces)
    keys = list(images.key)
    assert keys == [f"k{i}" for i in range(5)]
    for row in summary.itertuples():
        own = pairs[(pairs.layer == row.layer) & (pairs.part == row.part)]
        repeats = 3 if row.part == "random" else 1
        assert list(zip(own.repeat, own.key, own.other_key, strict=True)) == [
            (repeat, *pair) for repeat in range(repeats) for pair in itertools.combinations(keys, 2)
        ]
        assert (row.images, row.pairs, row.mask_px, row.fill) == (5, 10 * repeats, 11, "124")
        assert row.mean == pytest.approx(own.share.mean())
        assert row.std_pairs == pytest.approx(own.share.std())
        of_images = [own[(own.key == key) | (own.other_key == key)].share.mean() for key in keys]
        assert row.std_images == pytest.approx(np.std(of_images, ddof=1))
        assert row.mean_units == pytest.approx(own.differing.mean())
        assert row.delta == pytest.approx(2 * own.differing.sum() / repeats)  # i != j: each pair both ways
        assert row.mean_of_changed == pytest.approx((own.differing / own.changed).mean())
        assert 0 < row.changed < 1


def test_masks_lie_on_their_parts_and_random_ones_in_the_box(make_run, faces):
    _, _, images = run_correspondence(make_run(), faces)
    rng = np.random.default_rng(0)
    for row in images.itertuples():
        marks = json.loads(face(rng)["json"])["landmarks"]
        places = list(zip(row.mask_tops, row.mask_lefts, strict=True))
        for part, (top, left) in zip(PARTS, places, strict=False):
            x, y = marks[part][0]
            assert abs(top + 5.5 - (y * 72 / 80 - 4)) <= 0.5  # resized by 72 / 80, cropped by 4 and 11
            assert abs(left + 5.5 - (x * 86 / 96 - 11)) <= 0.5
        for top, left in places[3:]:
            assert all(abs(top - t) >= 11 or abs(left - le) >= 11 for t, le in places[:3])
            assert 14 * 0.9 - 4 <= top + 5.5 <= 70 * 0.9 - 4
            assert 18 * 86 / 96 - 11 <= left + 5.5 <= 78 * 86 / 96 - 11


def test_boxes_that_cannot_be_used_are_left_out(make_run, faces, tmp_path):
    rng = np.random.default_rng(0)
    good = {"xyxy": [18.0, 14.0, 78.0, 70.0]}
    faulty = [{"xyxy": [0, 0, 0, 80]}, {"label": "face"}, good, {"xyxy": [float("nan"), 0, 9, 9]}, 3]
    data = write(tmp_path / "faulty", [face(rng, boxes=faulty) for _ in range(5)])
    found = run_correspondence(make_run("one"), data)[2]
    alone = run_correspondence(make_run("other"), faces)[2]
    for column in ("mask_tops", "mask_lefts"):
        assert found[column].map(list).tolist() == alone[column].map(list).tolist()


def test_neither_workers_nor_parts_matter(make_run, faces, ray_cluster):
    run, other = make_run(), make_run("other")
    run_correspondence(run, faces)
    run_correspondence(other, faces, workers=Workers(num=2, cpus=1), part_size=1)
    assert_same(run, other, "correspondence", "correspondence_pairs", "correspondence_images")


# --------------------------------------------------------------------------------------------------- known answers


def test_identical_images_correspond_wholly(make_run, tmp_path):
    same = face(np.random.default_rng(3))
    summary, pairs, _ = run_correspondence(make_run(), write(tmp_path / "same", [same] * 3))
    named = summary.part != "random"
    assert (pairs[pairs.part != "random"].differing == 0).all()
    assert (summary[named][["mean", "std_pairs", "std_images", "delta", "mean_of_changed"]] == 0).all(axis=None)
    assert (summary.changed > 0).all()
    assert (summary[~named]["mean"] > 0).all()  # random parts differ from image to image


def test_a_mask_that_shows_what_is_there_changes_nothing(make_run, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT), (124, 124, 124)).save(buffer, format="PNG")
    blank = {"png": buffer.getvalue(), "json": face(np.random.default_rng(3))["json"]}
    summary, pairs, _ = run_correspondence(make_run(), write(tmp_path / "grey", [blank] * 3))
    assert (summary[["mean", "changed", "delta"]] == 0).all(axis=None)
    assert summary.mean_of_changed.isna().all()
    assert (pairs.changed == 0).all()


def test_only_cells_that_see_the_mask_change(make_run, faces):
    """A cell of conv1 sees 7 x 7 pixels in steps of 2: of 29 x 29, those that overlap 11 pixels, 8 or 9 a side."""
    _, pairs, _ = run_correspondence(make_run(), faces, layers=("conv1",))
    maps = random_model().conv1.out_channels
    assert (pairs.units % maps == 0).all()
    assert (pairs.changed <= maps * 2 * 9 * 9).all()


# -------------------------------------------------------------------------------------------------- which images


def test_images_that_cannot_be_compared_are_passed_over(make_run, tmp_path):
    rng = np.random.default_rng(0)
    marks = json.loads(face(rng)["json"])["landmarks"]
    members = [
        face(rng, frontal=False),
        face(rng),
        {"jpg": jpeg(rng, HEIGHT, WIDTH)},
        face(rng, landmarks={**marks, "nose": []}),
        face(rng, landmarks={**marks, "nose": marks["nose"] * 2}),
        face(rng, landmarks={**marks, "nose": [[2.0, 40.0]]}),
        face(rng, landmarks={**marks, "nose": [[float("nan"), 40.0]]}),
        face(rng, landmarks="none"),
        face(rng, boxes=[]),
        {**face(rng), "json": b"{"},
        face(rng),
        face(rng),
        face(rng),
    ]
    run, data = make_run(), write(tmp_path / "mixed", members)
    chosen = run_correspondence(run, data, where="frontal", first=3)[2]
    assert list(chosen.key) == ["k1", "k10", "k11"]
    anywhere = run_correspondence(run, data, random_in="image", name="anywhere")[2]
    assert list(anywhere.key) == ["k0", "k1", "k8", "k10", "k11"]
    by_key = run_correspondence(run, data, keys=("k11", "k0"), name="keys")[2]
    assert list(by_key.key) == ["k0", "k11"]
    for key, words in {
        "k2": "right_eye 0 times",
        "k4": "nose 2 times",
        "k5": "the mask of nose leaves",
        "k6": "NaN",
        "k7": "'str' object",
        "k8": "room for 0 of 3",
        "k9": "Expecting property name",
    }.items():
        with pytest.raises(RunError, match=f"Not so: '{key}': .*{words}"):
            run_correspondence(run, data, keys=("k0", key), name="refused")
    with pytest.raises(RunError, match="0 of 13 can be compared"):
        run_correspondence(run, data, where="frontal", mask_px=60, random=0, name="refused")


def test_a_broken_image_is_skipped(make_run, tmp_path):
    rng = np.random.default_rng(0)
    members = [face(rng), {**face(rng), "jpg": b"broken"}, face(rng), face(rng)]
    run, data = make_run(), write(tmp_path / "broken", members)
    summary, pairs, images = run_correspondence(run, data, status=3)
    assert list(images.key) == ["k0", "k2", "k3"]
    assert set(summary.images) == {3}
    assert len(pairs) == 2 * (3 + 3) * 3
    assert pd.read_parquet(run / "results" / "skipped").key.tolist() == ["k1"]


def test_another_seed_moves_the_random_parts_alone(make_run, faces):
    run = make_run()
    one, other = (run_correspondence(run, faces, seed=seed, name=f"seed{seed}")[2] for seed in (0, 1))
    for row, moved in zip(one.itertuples(), other.itertuples(), strict=True):
        assert list(row.mask_tops[:3]) == list(moved.mask_tops[:3])
        assert list(row.mask_tops[3:]) != list(moved.mask_tops[3:])


def test_a_network_without_classes_can_be_asked(tmp_path, faces):
    run = tmp_path / "headless"
    from tests.pipeline.test_invariance import headless

    Run.at(str(run)).save_model(
        headless(),
        architecture="tests.pipeline.test_invariance:headless",
        classes=(),
        preprocessing=Preprocessing(resize_px=36, crop_px=32),
        about={},
    )
    summary, _, images = run_correspondence(run, faces, mask_px=5, random=0)
    assert set(summary.layer) == {"2", "4"}
    assert set(images.mask_px) == {5}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"first": 1}, "--first is 1: give at least 2"),
        ({"random": -1}, "--random is -1"),
        ({"mask_px": 0}, "--mask-px is 0"),
        ({"least": float("nan")}, "--least is nan"),
        ({"parts": ("nose", "nose")}, "--parts is 'nose nose': give landmarks, each once"),
        ({"parts": ("random",)}, "none called 'random'"),
        ({"fill": "edge"}, "--fill is edge: give a grey from 0 to 255, a colour as R,G,B, mean or blur"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(RunError) as caught:
        correspondence.Config(**config)
    assert words in str(caught.value)
