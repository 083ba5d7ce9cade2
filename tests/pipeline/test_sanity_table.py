"""The table sanity: against a network randomised by hand and projected by gradients; what holds at each stage."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from pipeline import sweep
from pipeline.analyses import sanity, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import Run, RunError
from pipeline.work import Cut
from tests.conftest import load_index
from tests.pipeline.exact import assert_same
from zfnet import images
from zfnet.sanity import randomised

LAYERS = ("conv1", "conv2", "conv5")
BELOW = {"conv1": ["conv1"], "conv2": ["conv2", "conv1"], "conv5": ["conv5", "conv4", "conv3", "conv2", "conv1"]}


def swept(run, data, **config):
    options = Options(run=str(run), data=str(data), workers=Workers(num=0, cpus=2))
    assert sweep.run(top9.ANALYSIS, options, top9.Config(layers=LAYERS)) == 0


def checked(run, data, num=0, **config):
    options = Options(run=str(run), data=str(data), workers=Workers(num=num, cpus=2))
    assert sweep.run(sanity.ANALYSIS, options, sanity.Config(**{"ranks": 2, **config})) == 0
    return pd.concat(pd.read_parquet(path) for path in sorted((run / "results" / "sanity").iterdir()))


@pytest.fixture
def run_and_data(make_run, make_shards):
    run, data = make_run(), make_shards(val=[9, 5])
    swept(run, data)
    return run, data


def pixels_of(data):
    index = load_index(data)
    samples = [sample for part in Cut(index.split("val"), 64) for sample in index.read(part)]
    return {sample.key: images.centre_crop(images.decode(sample.image), 72, 64)[0] for sample in samples}


def projected(network, layer, row, x):
    """Sec. 2.1 by autograd: ReLUs rectify the signal on its way down, normalisation is left out; one image."""
    handles = []
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU):
            handles.append(module.register_full_backward_hook(lambda m, gi, go: (go[0].clamp(min=0),)))
        elif type(module).__name__ == "LocalResponseNorm":
            handles.append(module.register_full_backward_hook(lambda m, gi, go: (go[0],)))
    kept = []
    conv = network.get_submodule(layer)
    handles.append(conv.register_forward_hook(lambda m, i, o: kept.append(o)))
    x = x.clone().requires_grad_()
    network(x)
    (gradient,) = torch.autograd.grad(kept[0][0, row.feature_map, row.row, row.col], x)
    for handle in handles:
        handle.remove()
    return gradient[0].permute(1, 2, 0).numpy()


def test_every_correlation_against_gradients_of_a_network_randomised_by_hand(run_and_data):
    run, data = run_and_data
    found = checked(run, data, seed=3)
    model = Run.at(str(run)).load_model()
    pixels = pixels_of(data)
    some = found[(found.feature_map % 13 == 0) & (found.stage > 0)]
    assert len(some) > 30
    for row in some.itertuples():
        assert row.randomised == BELOW[row.layer][row.stage - 1]
        x = model.preprocessing.normalise(torch.from_numpy(pixels[row.key])[None])
        random = randomised(model.network, BELOW[row.layer][: row.stage], 3)
        inside = np.s_[max(0, row.top) : row.top + row.height, max(0, row.left) : row.left + row.width]
        one, other = (projected(n, row.layer, row, x)[inside].ravel() for n in (model.network, random))
        for name, a, b in (("absolute", abs(one), abs(other)), ("signed", one, other)):
            expected = spearmanr(a, b).statistic if np.ptp(b) else None
            actual = getattr(row, f"spearman_{name}")
            assert pd.isna(actual) if expected is None else actual == pytest.approx(expected, abs=2e-3)


def test_stages_and_rows(run_and_data):
    run, data = run_and_data
    found = checked(run, data)
    top = pd.read_parquet(run / "results" / "top9")
    for layer in LAYERS:
        mine = found[found.layer == layer]
        assert sorted(mine.stage.unique()) == list(range(1 + len(BELOW[layer])))
        cells = top[(top.layer == layer) & (top["rank"] <= 2)]
        for _, stage in mine.groupby("stage"):
            cell = ["feature_map", "rank", "key", "row", "col", "activation"]
            assert stage[cell].values.tolist() == cells.sort_values(["feature_map", "rank"])[cell].values.tolist()
    first = found[found.stage == 0]
    assert (first[["spearman_absolute", "spearman_signed"]].dropna() > 1 - 1e-12).all().all()
    assert first.randomised.isna().all()
    assert found[found.stage > 0][["again", "relative_error"]].isna().all().all()


def test_a_patch_gives_back_its_activation_at_the_border_too(run_and_data):
    run, data = run_and_data
    first = checked(run, data)
    first = first[first.stage == 0]
    assert (first.relative_error <= 1e-5).all()
    assert first.inside.any()
    assert not first.inside.all()
    model, pixels = Run.at(str(run)).load_model(), pixels_of(data)
    relu = {"conv1": "relu1", "conv2": "relu2", "conv5": "relu5"}
    wrong = 0
    for row in first[first.feature_map == 0].itertuples():
        for shrunk in (0, 1):  # a patch that lacks the field's rim gives back something else: the check can fail
            image = np.full((64, 64, 3), 124, np.uint8)
            top, left = max(0, row.top + shrunk), max(0, row.left + shrunk)
            box = np.s_[top : row.top + row.height - shrunk, left : row.left + row.width - shrunk]
            image[box] = pixels[row.key][box]
            kept = []
            handle = model.network.get_submodule(relu[row.layer]).register_forward_hook(
                lambda m, i, o, kept=kept: kept.append(o.clone())
            )
            with torch.no_grad():
                model.network(model.preprocessing.normalise(torch.from_numpy(image)[None]))
            handle.remove()
            again = float(kept[0][0, row.feature_map, row.row, row.col])
            if shrunk:
                wrong += abs(again - row.activation) > 1e-3 * row.activation
            else:
                assert again == pytest.approx(row.again, rel=1e-5)
    assert wrong


def test_workers_and_parts_do_not_matter(run_and_data, make_run, ray_cluster):
    run, data = run_and_data
    other = make_run("other")
    swept(other, data)
    checked(run, data, part_size=4, batch_size=3)
    checked(other, data, num=2, part_size=4, batch_size=3)
    assert_same(run, other, "sanity")


def test_what_was_found_is_said(run_and_data):
    run, data = run_and_data
    found = checked(run, data)
    said = "\n".join(sanity.report(Run.at(str(run)), None))
    own = found[(found.layer == "conv5") & (found.stage == 1)]
    assert f"its own layer random {own.spearman_absolute.mean():.2f} and {own.spearman_signed.mean():.2f}" in said
    assert said.count("patches give back") == 3


@pytest.mark.parametrize(("config", "words"), [({"grey": 256}, "--grey is 256"), ({"ranks": 0}, "--ranks is 0")])
def test_refusals(config, words):
    with pytest.raises(RunError) as caught:
        sanity.Config(**config)
    assert words in str(caught.value)


def test_without_top9(make_run, make_shards):
    with pytest.raises(RunError, match=r"run jobs/top9\.py first"):
        checked(make_run(), make_shards(val=[2]))
