"""Invariance: altered images against numpy and scipy, the table against one forward at a time, and known answers."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from pipeline import sweep
from pipeline.analyses import invariance
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.indexing import index_shards
from pipeline.runs import Run, RunError
from pipeline.shards import Index
from tests.conftest import CLASSES
from tests.pipeline.exact import assert_same
from tests.tars import write_tar
from zfnet.graph import UnknownLayer
from zfnet.images import Preprocessing, centre_crop, decode
from zfnet.invariance import altered

IN_PROCESS = Workers(num=0, cpus=2)
FEW = {"translations_px": (-7.0, 0.0, 2.5), "scales": (1.0, 1.7), "rotations_deg": (0.0, 40.0, 270.0)}
ARRAY_MODES = {"edge": "nearest", "reflect": "reflect", "wrap": "grid-wrap"}  # what scipy calls them


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (21, 26, 3), dtype=np.uint8)


def run_invariance(run, data, workers=IN_PROCESS, name=None, **config):
    options = Options(run=str(run), data=str(data), workers=workers, name=name)
    assert sweep.run(invariance.ANALYSIS, options, invariance.Config(**config)) == 0
    return pd.read_parquet(run / "results" / ("invariance" if name is None else f"invariance-{name}"))


# ------------------------------------------------------------------------------------------------------ the images


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("fill", [(1, 2, 3), "edge", "reflect", "wrap"])
def test_identity_whole_pixels_and_quarter_turns_are_exact(pixels, interpolation, fill):
    square = pixels[:, :21]
    for transform, amount in (("vertical", 0), ("horizontal", 0), ("scale", 1), ("rotation", 0), ("rotation", 360)):
        assert np.array_equal(altered(pixels, transform, amount, interpolation, fill), pixels)
    for turns in (1, 2, 3):
        turned = altered(square, "rotation", 90 * turns, interpolation, fill)
        assert np.array_equal(turned, np.rot90(square, turns))
    for axis, transform in enumerate(("vertical", "horizontal")):
        for amount in (-20, -3, 5):
            moved = altered(pixels, transform, amount, interpolation, fill)
            expected = np.roll(pixels, amount, axis)
            if fill != "wrap":
                kept = [slice(None)] * 2
                kept[axis] = slice(amount, None) if amount > 0 else slice(None, amount)
                beyond = [slice(None)] * 2
                beyond[axis] = slice(0, amount) if amount > 0 else slice(amount, None)
                assert np.array_equal(moved[tuple(kept)], expected[tuple(kept)])
                if not isinstance(fill, str):
                    assert (moved[tuple(beyond)] == fill).all()
            else:
                assert np.array_equal(moved, expected)


@pytest.mark.parametrize("fill", [(200, 200, 200), "edge", "reflect", "wrap"])
@pytest.mark.parametrize(
    ("transform", "amount"),
    [("vertical", 3.3), ("horizontal", -12.75), ("scale", 1.45), ("scale", 0.6), ("rotation", 33), ("rotation", -140)],
)
def test_other_amounts_are_scipys(pixels, transform, amount, fill):
    """The definition in rows and columns of cells: output = matrix @ (cell - centre) + centre - shift."""
    turn = np.deg2rad(amount)
    matrix = {
        "rotation": np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]),
        "scale": np.eye(2) / amount,
    }.get(transform, np.eye(2))
    shift = np.array([amount * (transform == "vertical"), amount * (transform == "horizontal")])
    centre = (np.array(pixels.shape[:2]) - 1) / 2
    mode = {"mode": ARRAY_MODES[fill]} if isinstance(fill, str) else {"mode": "grid-constant", "cval": fill[0]}
    found = altered(pixels, transform, amount, "bilinear", fill)
    for channel in range(3):
        plane = pixels[..., channel].astype(float)
        reference = ndimage.affine_transform(plane, matrix, centre - matrix @ centre - shift, order=1, **mode)
        assert np.abs(found[..., channel] - reference).max() <= 0.51  # rounded to whole grey levels


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_is_one_forward_at_a_time(make_run, make_shards):
    run, data = make_run(), make_shards(val=[4])
    frame = run_invariance(run, data, first=3, part_size=2, **FEW)
    amounts = 2 * 3 + 2 + 3
    assert len(frame) == 3 * amounts * 2
    assert frame.layer.tolist() == ["conv1", "fc7"] * 3 * amounts
    by_definition(run, data, frame, {"conv1": "relu1", "fc7": "relu7"})


def by_definition(run, data, frame, modules):
    model = Run.at(str(run)).load_model()
    seen = {}
    for layer, name in modules.items():
        model.network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, y, layer=layer: seen.update({layer: y[0].double().numpy().copy().ravel()})
        )

    def forward(pixels):
        with torch.no_grad():
            scores = model.network(model.preprocessing.normalise(torch.from_numpy(pixels.copy())[None]))[0].double()
        return dict(seen), (scores.exp() / scores.exp().sum()).numpy()

    index = Index.load(str(data))
    clean = {}
    for sample in index.read(index.split("val")):
        pixels, _ = centre_crop(decode(sample.image), model.preprocessing.resize_px, model.preprocessing.crop_px)
        clean[sample.key] = (pixels, sample.label, *forward(pixels))
    for row in frame.itertuples():
        pixels, label, features, probabilities = clean[row.key]
        moved, moved_probabilities = forward(altered(pixels, row.transform, row.amount))
        distance = np.sqrt(((moved[row.layer] - features[row.layer]) ** 2).sum())
        length = np.sqrt((features[row.layer] ** 2).sum())
        assert abs(row.distance - distance) <= 1e-5 * length
        assert abs(row.relative_distance - distance / length) <= 1e-5
        assert (row.label, row.target_class, row.label_name) == (label, label, CLASSES[label])
        assert abs(row.probability - moved_probabilities[label]) <= 1e-5
        assert abs(row.clean_probability - probabilities[label]) <= 1e-5


def test_identity_is_exactly_0_and_the_clean_probability(make_run, make_shards):
    frame = run_invariance(make_run(), make_shards(val=[3]), copies=2, **FEW)
    is_identity = frame.amount == np.where(frame["transform"] == "scale", 1, 0)
    assert is_identity.sum() == 3 * 4 * 2
    assert (frame.distance[is_identity] == 0).all()
    assert (frame.relative_distance[is_identity] == 0).all()
    assert (frame.probability[is_identity] == frame.clean_probability[is_identity]).all()
    assert (frame.distance[~is_identity] > 0).all()


def test_default_amounts_are_the_papers_in_proportion(make_run, make_shards):
    frame = run_invariance(make_run(), make_shards(val=[1]), first=1, layers=("conv1",))
    amounts = frame.groupby("transform").amount.agg(list)
    assert amounts["vertical"] == amounts["horizontal"] == [-17, -14, -11, -9, -6, -3, 0, 3, 6, 9, 11, 14, 17]
    assert amounts["scale"] == [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8]
    assert amounts["rotation"] == list(range(0, 360, 10))


def test_neither_workers_nor_parts_matter(make_run, make_shards, ray_cluster):
    run, data = make_run(), make_shards(val=[3, 2])
    run_invariance(run, data, **FEW)
    other = make_run("other")
    run_invariance(other, data, workers=Workers(num=2, cpus=1), part_size=1, **FEW)
    assert_same(run, other, "invariance")


def test_copies_at_a_time_matter_by_rounding_alone(make_run, make_shards):
    run, data = make_run(), make_shards(val=[2])
    one = run_invariance(run, data, **FEW)
    other = run_invariance(run, data, copies=3, name="three", **FEW)
    assert np.abs(one.relative_distance - other.relative_distance).max() <= 1e-5


# --------------------------------------------------------------------------------------------------- known answers


def circular(classes=0):
    """Invariant to shifts, by multiples of 4 pixels, of images that go on at the other side: whole numbers only."""
    steps = [
        nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(5, 7, 4, stride=4),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
    ]
    network = nn.Sequential(*steps, *([nn.Flatten(), nn.Linear(7, classes)] if classes else []))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
    return network


def headless():
    return circular()


def save(tmp_path, function, classes):
    run = tmp_path / function.__name__
    Run.at(str(run)).save_model(
        function(len(classes)) if classes else function(),
        architecture=f"tests.pipeline.test_invariance:{function.__name__}",
        classes=classes,
        preprocessing=Preprocessing(resize_px=36, crop_px=32),
        about={},
    )
    return run


def test_a_network_that_cannot_see_shifts_is_invariant_to_them(tmp_path, make_shards):
    run, data = save(tmp_path, circular, CLASSES), make_shards(val=[3])
    amounts = (-8.0, -3.0, 4.0, 12.0, 13.0)
    moves = {"transforms": ("vertical", "horizontal"), "translations_px": amounts, "layers": ("0", "4")}
    frame = run_invariance(run, data, fill="wrap", **moves)
    by = frame.groupby(["layer", "amount"]).distance
    assert (by.min()["0"] > 0).all()  # the first layer moves with the image
    assert (by.max()["4"][[-8, 4, 12]] == 0).all()
    assert (by.max()["4"][[-3, 13]] > 0).all()
    kept = frame[frame.amount % 4 == 0]
    assert (kept.probability == kept.clean_probability).all()
    filled = run_invariance(run, data, name="grey", **moves)
    assert (filled[(filled.layer == "4") & (filled.amount == 4)].distance > 0).any()  # grey comes in at the border


def test_a_network_without_classes_has_distances_alone(tmp_path, make_shards):
    frame = run_invariance(save(tmp_path, headless, ()), make_shards(val=[2]), **FEW)
    assert set(frame.layer) == {"0", "4"}
    assert frame[["target_class", "probability", "clean_probability"]].isna().all(axis=None)
    assert frame.relative_distance.notna().all()


def test_images_without_a_label_of_the_network_have_the_clean_class(make_run, make_shards):
    run = make_run(classes=("other", "names", "than", "these"))
    frame = run_invariance(run, make_shards(val=[3]), transforms=("scale",), scales=(1.0, 1.3))
    assert (frame.clean_probability >= 1 / 4).all()  # of four, the most probable


def test_a_feature_vector_of_length_0_has_no_relative_distance(make_run, make_shards):
    run = make_run()
    model = Run.at(str(run)).load_model()
    model.network.conv1.weight.data.zero_()
    model.network.conv1.bias.data.fill_(-1)
    dark = Run.at(str(run.parent / "dark"))
    dark.save_model(
        model.network,
        architecture="zfnet_small",
        classes=CLASSES,
        preprocessing=model.preprocessing,
        about={},
    )
    frame = run_invariance(run.parent / "dark", make_shards(val=[2]), layers=("conv1", "fc7"), **FEW)
    assert frame[frame.layer == "conv1"].relative_distance.isna().all()
    assert (frame[frame.layer == "conv1"].distance == 0).all()
    assert frame[frame.layer == "fc7"].relative_distance.notna().all()


# -------------------------------------------------------------------------------------------------- what can go wrong


def test_a_broken_image_is_skipped_and_the_rest_is_there(make_run, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), (9, 80, 200)).save(buffer, format="PNG")
    data = tmp_path / "data"
    data.mkdir()
    members = [(f"k{i}", {"png": buffer.getvalue() if i != 1 else b"broken", "cls": b"0"}) for i in range(3)]
    write_tar(data / "val-0.tar", members)
    (data / "classes.txt").write_text("\n".join(CLASSES))
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run = make_run()
    options = Options(run=str(run), data=str(data), workers=IN_PROCESS)
    assert sweep.run(invariance.ANALYSIS, options, invariance.Config(**FEW)) == 3
    frame = pd.read_parquet(run / "results" / "invariance")
    assert list(frame.key.unique()) == ["k0", "k2"]
    assert pd.read_parquet(run / "results" / "skipped").reason.tolist() == ["bad_image"]


def test_a_network_with_nan_fails_naming_the_image(make_run, make_shards):
    run = make_run()
    model = Run.at(str(run)).load_model()
    model.network.fc7.bias.data[3] = torch.nan
    Run.at(str(run)).save_model(
        model.network, architecture="zfnet_small", classes=CLASSES, preprocessing=model.preprocessing, about={}
    )
    with pytest.raises(SweepFailed, match=r"sample 's0-0000': feature map 3 .* NaN"):
        run_invariance(run, make_shards(val=[2]), **FEW)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fill": "mean"}, "--fill is mean: give a grey from 0 to 255, a colour as R,G,B, edge, reflect or wrap"),
        ({"scales": (1.0, 0.01)}, "--scales is 1.0 0.01: give ratios of at least 0.1"),
        ({"scales": (float("nan"),)}, "--scales is nan"),
        ({"rotations_deg": (float("inf"),)}, "--rotations-deg is inf: give degrees"),
        ({"translations_px": (1.0, 1.0)}, "--translations-px is 1.0 1.0: give each once"),
        ({"copies": 0}, "--copies is 0: give at least 1"),
        ({"keys": ("a",), "label": "b"}, "--keys and --label were both given"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(RunError) as caught:
        invariance.Config(**config)
    assert words in str(caught.value)


def test_refusals_that_need_the_run(make_run, make_shards):
    run, data = make_run(), make_shards(val=[2])
    with pytest.raises(RunError, match="the input has 64 px, so give amounts between -64 and 64"):
        run_invariance(run, data, translations_px=(64.0,))
    with pytest.raises(RunError, match="there is no key 'none'"):
        run_invariance(run, data, keys=("none",))
    with pytest.raises(UnknownLayer, match="Did you mean 'conv1'"):
        run_invariance(run, data, layers=("konv1",))
