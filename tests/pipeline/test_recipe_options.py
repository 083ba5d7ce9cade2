"""Recipes as trained: statistics against NumPy, colour shifts, equality over workers, and the options that change no
default."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import cluster, mean, train
from pipeline.cluster import Workers
from pipeline.runs import Run, RunError
from pipeline.shards import Index
from pipeline.stream import Images, epoch_order, labelled
from tests.pipeline.test_train import options, weights
from zfnet import images, models
from zfnet.recipe import PRESETS, Recipe, initialise, renormalise_filters, set_dropout


def squares(index: Index, side: int) -> np.ndarray:
    """Centre squares of all training images, float64."""
    found = index.read(index.split("train"))
    return np.stack([images.centre_crop(images.decode(s.image), side, side)[0] for s in found]).astype(np.float64)


def test_mean_and_covariance_are_numpys(make_shards):
    index = Index.load(str(make_shards(train=[70, 9])))
    found = mean.measure(index, index.split("train"), 24, rank=0, world=1, decoders=0)
    pixels = squares(index, 24)
    np.testing.assert_allclose(found.covariance, np.cov(pixels.reshape(-1, 3).T, bias=True), rtol=1e-10)
    np.testing.assert_allclose(found.mean, pixels.mean(0).transpose(2, 0, 1), rtol=1e-6)


def test_statistics_lie_with_the_data_and_are_used_again(make_shards, tmp_path, monkeypatch):
    data = make_shards(train=[16], val=[4])
    train.run(options(tmp_path / "one", data, epochs=1))
    (stored,) = (data / "statistics").iterdir()
    monkeypatch.setattr(mean, "measure", lambda *_, **__: pytest.fail("measured again"))
    train.run(options(tmp_path / "two", data, epochs=1))
    assert weights(tmp_path / "one").model_id == weights(tmp_path / "two").model_id
    stored.write_bytes(b"junk")
    with pytest.raises(RunError, match="statistics/train-.* is damaged"):
        train.run(options(tmp_path / "three", data, epochs=1))


def test_statistics_lie_with_the_run_where_the_data_is_not_ours(make_shards, tmp_path):
    data, run = make_shards(train=[16], val=[4]), tmp_path / "run"
    (data / "statistics").write_text("a file where the folder would be")
    train.run(options(run, data, epochs=1))
    assert len(list((run / "checkpoints").glob("train-*.safetensors"))) == 1


def test_colours_shift_by_key_and_leave_the_crops_alone(make_shards):
    index = Index.load(str(make_shards(train=[6])))
    rows, _ = labelled(index, "train", 3)
    preprocessing = images.Preprocessing(resize_px=72, crop_px=64)
    axes = np.diag([3.0, 2.0, 1.0])
    plain, shifted = (Images(index, rows, preprocessing, 0, None, colours) for colours in (None, axes))
    places = [(1, row) for row in range(6)]
    a, b = plain.__getitems__(places), shifted.__getitems__(places)
    assert a.colour is None
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(shifted.__getitems__([(1, 4)]).colour[0], b.colour[4])
    assert len(b.colour.unique()) == 18
    assert shifted.__getitems__([(0, 4)]).colour is None  # validation


def test_presets_reach_the_training(make_shards, tmp_path):
    data, run = make_shards(train=[16], val=[4]), tmp_path / "run"
    train.run(options(run, data, preset="alexnet", epochs=1))
    told = Run.at(str(run)).describe()["training"]["recipe"]
    expected = {"epochs": 1, "batch": 8, "colour": "paper", "renormalise": None, "weight_decay": 5e-4, "init": "paper"}
    assert {name: told[name] for name in expected} == expected
    bias = weights(run).network.fc6.bias
    assert (bias - 1).abs().max() < 0.1
    assert PRESETS["zfnet"] == Recipe()


MODERN = {
    "bf16": {"precision": "bf16"},
    "channels_last": {"channels_last": True},
    "accumulate": {"accumulate": 3},
    "compile": {"compile": True},
    "cosine": {"schedule": "cosine"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from pipeline.indexing import index_shards
    from tests.conftest import samples
    from tests.tars import write_tar

    folder = tmp_path_factory.mktemp("data")
    write_tar(folder / "train-0.tar", samples(24))
    write_tar(folder / "val-0.tar", samples(4, seed=9))
    index_shards([str(p) for p in folder.glob("*.tar")], str(folder), classes=None, accept_damaged=False)
    return folder


@pytest.mark.parametrize(
    "option", [pytest.param(name, marks=[pytest.mark.slow] if name == "compile" else []) for name in MODERN]
)
def test_modern_options_train_nearly_the_same(option, data, tmp_path):
    """Each option changes rounding, the schedule or nothing: never what is learned from."""
    plain = {"epochs": 1, "dropout": 0.0, "schedule": "plateau"}
    train.run(options(tmp_path / "plain", data, **plain))
    train.run(options(tmp_path / option, data, **plain | MODERN[option]))
    one, two = (weights(tmp_path / name).network.state_dict() for name in ("plain", option))
    start = weights(tmp_path / "plain").network
    initialise(start, "he")
    moved = start.state_dict()
    for name in one:
        step = (one[name] - moved[name]).norm()
        off = (one[name] - two[name]).norm()
        # bf16: in a plain torch loop too, one step's gradient of conv1 is off by 0.24 of its norm.
        limit = {"bf16": 0.5, "cosine": 1.0}.get(option, 1e-3)
        assert off <= limit * step + 1e-7, name
    if option in ("bf16", "cosine"):
        assert any(not torch.equal(one[name], two[name]) for name in one)


def test_the_default_path_is_a_plain_torch_loop(data, tmp_path):
    """Two epochs of three steps, float32, no dropout: the bits of a tutorial's loop over the same batches."""
    train.run(options(tmp_path / "run", data, epochs=2, schedule="plateau", dropout=0.0))
    trained = weights(tmp_path / "run")
    index = Index.load(str(data))
    rows, _ = labelled(index, "train", 3)
    network = models.build("zfnet_small", classes=3)
    initialise(network, "he", seed=0)
    set_dropout(network, 0.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    mean = torch.from_numpy(squares(index, 72).mean(0)).permute(2, 0, 1).float()
    dataset = Images(index, rows, trained.preprocessing, seed=0)
    for epoch in (1, 2):
        order = epoch_order(np.zeros(24), 0, epoch).reshape(3, 8)
        for batch in order:
            examples = dataset.__getitems__([(epoch, int(row)) for row in batch])
            crops = [mean[:, t : t + 64, le : le + 64] for t, le in zip(examples.top, examples.left, strict=True)]
            x = examples.pixels.permute(0, 3, 1, 2).float() - torch.stack(crops)
            loss = torch.nn.functional.cross_entropy(network(x), examples.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            renormalise_filters(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(trained.network.state_dict()[name], tensor), name


def test_tensorboard_gets_each_column(data, tmp_path):
    train.run(options(tmp_path / "run", data, epochs=1, tensorboard=True))
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"validation_top1" in events.read_bytes()
    there = "s3://bucket/run?region=us-east-1"  # a region: nothing is looked up
    with pytest.raises(RunError, match="--tensorboard writes to a local disk"):
        train._refuse_places(options(there, data, tensorboard=True), Run.at(there))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"checkpoint_steps": 0}, "--checkpoint-steps is 0"),
        ({"failures": -1}, "--failures is -1: give 0, for none, or more"),
        ({"min_workers": 2, "workers": Workers(num=1)}, "--min-workers is 2 and --workers.num 1"),
        ({"min_workers": 1}, "--workers.num as the largest"),
    ],
)
def test_refused_places(data, tmp_path, more, message):
    with pytest.raises(RunError, match=message):
        train.run(options(tmp_path / "run", data, **more))
    assert not (tmp_path / "run").exists()


def test_failures_are_ray_trains(data, tmp_path, monkeypatch):
    """The option reaches what Ray Train is built with, which is all that is looked at."""
    built = []

    def trainer(*_, run_config, **__):
        built.append(run_config.failure_config.max_failures)
        raise RunError("seen")

    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext())
    monkeypatch.setattr(cluster, "resolve", lambda workers: cluster.Resources(num=1, cpus=1, gpus=0))
    for number, given in enumerate(({}, {"failures": 0}, {"failures": 100})):
        with pytest.raises(RunError, match="seen"):
            train.run(options(tmp_path / f"{number}", data, workers=Workers(num=1), **given))
    assert built == [3, 0, 100]


def test_two_workers_of_64_are_one_of_128(make_shards, tmp_path, ray_cluster):
    """float64, dropout off: twenty steps of a global batch of 128 by Ray Train on one worker and on two."""
    data = make_shards(train=[100, 28], val=[6])
    shared = {"epochs": 20, "batch": 128, "precision": "float64", "dropout": 0.0, "decoders": 0}
    for world in (1, 2):
        assert train.run(options(tmp_path / f"{world}", data, **shared, workers=Workers(num=world, cpus=1))) == 0
    one, two = (pd.read_parquet(tmp_path / f"{world}" / "metrics") for world in (1, 2))
    assert (one.train_samples == 128).all()  # an epoch is a step: its loss is that step's
    assert one.train_loss.nunique() == 20
    np.testing.assert_allclose(one.train_loss, two.train_loss, rtol=0, atol=1e-9)
    np.testing.assert_allclose(one.validation_loss, two.validation_loss, rtol=0, atol=1e-9)
