"""OverFeat's views end to end: the paper's steps image by image and scale by scale; ensembles, what is refused."""

import io
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline import sweep
from pipeline.analyses import evaluation
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import Run, RunError
from pipeline.shards import Index
from tests.pipeline.exact import assert_same
from tests.pipeline.overfeat import SIZES, overfeat_run, photos
from zfnet.dense import SCALES, Sliding


def table(run, name="predictions"):
    return pd.read_parquet(run / "results" / name)


@pytest.fixture
def data(tmp_path):
    return photos(tmp_path / "data")


def evaluate(run, data, *, others=(), num=0, name=None, **config):
    options = Options(run=str(run), data=str(data), name=name, workers=Workers(num=num, cpus=1))
    config = {"views": "overfeat", "part_size": 4, "batch_size": 3, **config}
    return sweep.run(evaluation.ANALYSIS, options, evaluation.Config(**config, others=tuple(map(str, others))))


def probabilities_of(run, image, scales, stride, of):
    """The paper's steps for one image: each scale and flip, each class's maximum over the windows, their mean."""
    from torchvision.transforms import v2

    model = Run.at(str(run)).load_model()
    sliding = Sliding(model.network)
    step, least = sliding.step_px["coarse"], sliding.window_px + (sliding.cells - 1) * sliding.step_px["fine"]
    vectors = []
    for scale in scales:
        shorter, longest = (least + step * steps for steps in SCALES[scale - 1])
        resized = v2.Resize(shorter)(image)
        longer = max(side for side in range(shorter, longest + 1, step) if side <= max(resized.size))
        size = (longer, shorter) if image.height > image.width else (shorter, longer)
        pixels = v2.functional.pil_to_tensor(v2.CenterCrop(size)(resized)).float()
        x = (pixels - model.preprocessing.mean.mean((1, 2), keepdim=True)) / model.preprocessing.std
        for view in (x, v2.functional.hflip(x)):
            with torch.no_grad():
                maps = sliding.scores(sliding.pooled(view[None], stride))[0].double()
            if of == "probabilities":
                vectors.append(maps.softmax(0).amax((1, 2)))
            else:
                vectors.append(maps.amax((1, 2)).softmax(0))
    return torch.stack(vectors).mean(0)


def assert_is(run, runs, data, scales, stride="fine", of="probabilities", name="predictions"):
    index = Index.load(str(data))
    rows = table(run, name)
    assert len(rows) == len(SIZES)
    for sample, row in zip(index.read(index.split("val")), rows.itertuples(), strict=True):
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        p = torch.stack([probabilities_of(one, image, scales, stride, of) for one in runs]).mean(0)
        p = (p / p.sum()).tolist()
        order = sorted(range(len(p)), key=lambda c: -p[c])
        assert (row.key, row.predicted_class, row.label_rank) == (sample.key, order[0], order.index(sample.label) + 1)
        assert row.loss == pytest.approx(-np.log(p[sample.label]), rel=1e-4, abs=1e-5)
        assert row.top5_probabilities == pytest.approx([p[c] for c in order], rel=1e-4, abs=1e-6)
        assert (row.scales.tolist(), row.stride, row.maximum_of) == (list(scales), stride, of)


@pytest.mark.parametrize("name", ["overfeat_fast_small", "overfeat_accurate_small"])
@pytest.mark.parametrize(
    ("scales", "stride", "of"),
    [((1, 2, 3), "fine", "probabilities"), ((2,), "coarse", "probabilities"), ((1, 4), "fine", "scores")],
)
def test_predictions_are_the_papers_steps_for_each_image_by_itself(tmp_path, data, name, scales, stride, of):
    run = overfeat_run(tmp_path / "run", name)
    assert evaluate(run, data, scales=scales, stride=stride, maximum_of=of) == 0
    assert_is(run, [run], data, scales, stride, of)
    assert set(table(run).views) == {"overfeat"}


def test_all_six_scales_are_the_default_and_their_order_does_not_matter(tmp_path, data, capsys):
    run = overfeat_run(tmp_path / "run")
    evaluate(run, data)
    assert_is(run, [run], data, range(1, 7))
    assert evaluate(run, data, scales=(6, 4, 2, 1, 3, 5)) == 0
    said = capsys.readouterr().out
    assert "finished already" in said
    assert "views overfeat (fine, scales 1 2 3 4 5 6): top-1 error" in said
    with pytest.raises(RunError, match="stride: finished with 'fine', asked 'coarse'.+--name"):
        evaluate(run, data, stride="coarse")


def test_networks_of_other_geometry_are_averaged_and_workers_change_no_bit(tmp_path, data, ray_cluster):
    run, other = overfeat_run(tmp_path / "run"), overfeat_run(tmp_path / "other", "overfeat_accurate_small", 1)
    third = overfeat_run(tmp_path / "third", seed=2)
    again = shutil.copytree(run, tmp_path / "again")
    assert evaluate(run, data, others=[other, third], scales=(1, 2)) == 0
    assert_is(run, [run, other, third], data, (1, 2))
    assert evaluate(again, data, others=[third, other], scales=(1, 2), num=2) == 0
    assert_same(run, again, "predictions", "confusion", "class_errors", "evaluation")


def test_the_ten_crops_of_the_same_network_are_beside_it(tmp_path, data):
    run = overfeat_run(tmp_path / "run")
    evaluate(run, data, views="ten", name="ten")
    rows = table(run, "predictions-ten")
    assert set(rows.views) == {"ten"}
    assert rows.scales.map(len).eq(0).all()
    assert rows.stride.isna().all()
    assert rows.maximum_of.isna().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scales": (1, 7)}, "--scales has 7: give some of 1 to 6"),
        ({"scales": (2, 2)}, "--scales is 2 2: give each scale once"),
        ({"views": "ten", "scales": (1,)}, "go with --views overfeat; --views is ten"),
        ({"views": "centre", "stride": "coarse"}, "go with --views overfeat; --views is centre"),
        ({"views": "centre", "maximum_of": "scores"}, "go with --views overfeat"),
    ],
)
def test_options_that_do_not_go_together_are_refused(config, message):
    with pytest.raises(RunError, match=message):
        evaluation.Config(**{"views": "overfeat", **config})


def test_networks_that_do_not_slide_are_refused(tmp_path, data, make_run):
    zfnet, run = make_run("zfnet"), overfeat_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"zfnet: zfnet_small takes images of one size.+give an OverFeat network"):
        evaluate(zfnet, data)
    with pytest.raises(RunError, match=r"zfnet: zfnet_small takes images of one size"):
        evaluate(run, data, others=[zfnet])
