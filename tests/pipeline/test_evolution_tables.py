"""The tables of evolution: against their definition on a small network; known answers; new epochs; workers; resume."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cosine

from pipeline import checkpoints, sweep, train
from pipeline.analyses import deconv, evolution, evolution_cells
from pipeline.checkpoints import Checkpoint
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.runs import Run, RunError
from tests.conftest import load_index, random_model
from tests.pipeline.exact import assert_same
from zfnet import images

LAYERS = ("conv1", "conv2", "conv5")
TABLES = ("evolution_cells", "evolution", "evolution_convergence")
SMALL = {"layers": LAYERS, "sweep_part_size": 5, "part_size": 4, "batch_size": 3}


def trained(folder, models):
    """A training under way: its claim and the checkpoints of these epochs; no model yet."""
    run = Run.at(str(folder))
    checkpoints.claim_of(run).write(json.dumps({"architecture": "zfnet_small"}).encode())
    for epoch, model in models.items():
        checkpoint(run, epoch, model, keep=tuple(models))
    return folder


def checkpoint(run, epoch, model, keep):
    tensors = {**model.state_dict(), checkpoints.MEAN: torch.full((3, 1, 1), 120.0)}
    checkpoints.write(run, Checkpoint(step=epoch, epoch=epoch, tensors=tensors, optimizer={}, history=[]), keep)


def evolved(run, data, num=0, **config):
    options = Options(run=str(run), data=str(data), split="train", workers=Workers(num=num, cpus=2))
    assert evolution.run(options, evolution.Config(**{**SMALL, **config})) == 0
    return [table(run, name) for name in TABLES]


def table(run, name):
    return pd.concat(pd.read_parquet(path) for path in sorted((run / "results" / name).iterdir()))


@pytest.fixture
def data(make_shards):
    return make_shards(train=[9, 5])


def inputs(data):
    """Keys and input pixels of the training images."""
    index = load_index(data)
    found = [(s.key, images.centre_crop(images.decode(s.image), 72, 64)[0]) for s in index.read(index.split("train"))]
    return [key for key, _ in found], torch.from_numpy(np.stack([pixels for _, pixels in found]))


def by_definition(model, x):
    """Activations [images, maps, rows, cols] of each layer by torch's own forward, and the same with gradients."""
    kept = {}
    hooks = [
        model.get_submodule(layer.replace("conv", "relu")).register_forward_hook(
            lambda module, args, output, layer=layer: kept.update({layer: output})
        )
        for layer in LAYERS
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return kept


def projected(model, layer, number, row, col, x):
    """Sec. 2.1 by autograd: rectify the signal on its way down, leave normalisation out; seeded with the activation."""
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ReLU) and name != layer.replace("conv", "relu"):
            hooks.append(module.register_full_backward_hook(lambda m, gi, go: (go[0].clamp(min=0),)))
        elif type(module).__name__ == "LocalResponseNorm":
            hooks.append(module.register_full_backward_hook(lambda m, gi, go: (go[0],)))
    x = x.clone().requires_grad_()
    cell = by_definition(model, x)[layer][0, number, row, col]
    (gradient,) = torch.autograd.grad(cell, x)
    for hook in hooks:
        hook.remove()
    return (cell.detach() * gradient[0]).permute(1, 2, 0).numpy()


def test_every_row_by_its_definition(tmp_path, data):
    models = {1: random_model(seed=1), 2: random_model(seed=2), 5: random_model(seed=3)}
    with torch.no_grad():  # a map that is dead at first
        models[1].conv2.weight[3], models[1].conv2.bias[3] = 0, -1
    run = trained(tmp_path / "run", models)
    cells, found, _ = evolved(run, data)
    assert sorted(found.epoch.unique()) == [1, 2, 5]
    keys, pixels = inputs(data)
    x = pixels.permute(0, 3, 1, 2).float() - 120
    checked, before = 0, {}
    for epoch, model in models.items():
        model_id = checkpoints.load_model(Run.at(str(run)), epoch).model_id
        with torch.no_grad():
            activations = by_definition(model, x)
        rows = found[found.epoch == epoch].set_index(["layer", "feature_map"])
        assert set(rows.model_id) == {model_id}
        now = {}
        for layer in LAYERS:
            for number, maps in enumerate(activations[layer].permute(1, 0, 2, 3)):
                if not maps.max() > 0:
                    assert (layer, number) not in rows.index
                    continue
                image = int(maps.flatten(1).max(1).values.argmax())
                row, col = divmod(int(maps[image].argmax()), maps.shape[2])
                mine = rows.loc[(layer, number)]
                assert (mine.key, mine.row, mine.col, mine["rank"]) == (keys[image], row, col, 1)
                assert mine.activation == pytest.approx(float(maps.max()), rel=1e-5)
                now[layer, number] = keys[image]
                previous = sorted(models)[sorted(models).index(epoch) - 1]
                assert pd.isna(mine.previous_epoch) if epoch == 1 else mine.previous_epoch == previous
                if epoch == 1:
                    assert mine.image_changed is None
                else:
                    assert mine.image_changed == (before.get((layer, number)) != keys[image])
                if number % 13 == 0:
                    full = projected(model, layer, number, row, col, x[image : image + 1])
                    box = np.s_[max(0, mine.top) : mine.top + mine.height, max(0, mine.left) : mine.left + mine.width]
                    stored = mine.projection.reshape(mine.projection_height, mine.projection_width, 3)
                    assert np.abs(stored - full[box]).max() <= 1e-5 * np.abs(full).max()
                    checked += 1
        before = now
    assert checked >= 3 * 12
    assert ("conv2", 3) not in set(zip(*found[found.epoch == 1][["layer", "feature_map"]].values.T, strict=True))
    assert bool(found.set_index(["epoch", "layer", "feature_map"]).loc[(2, "conv2", 3)].image_changed)
    shared = ["epoch", "layer", "feature_map", "key", "row", "col", "activation", "model_id"]
    assert cells[shared].values.tolist() == found[shared].values.tolist()


def in_its_field(row):
    """A projection as the paper's figure shows it: the whole receptive field, zero outside the image."""
    field = np.zeros((row.height, row.width, 3))
    for y in range(row.projection_height):
        for x in range(row.projection_width):
            place = (y * row.projection_width + x) * 3
            field[y + max(0, -row.top), x + max(0, -row.left)] = row.projection[place : place + 3]
    return field.ravel()


def test_convergence_by_its_definition(tmp_path, data):
    models = {1: random_model(seed=1), 2: random_model(seed=2), 5: random_model(seed=3)}
    with torch.no_grad():
        models[1].conv2.weight[3], models[1].conv2.bias[3] = 0, -1
    run = trained(tmp_path / "run", models)
    _, found, compared = evolved(run, data)
    assert set(compared.reference_epoch) == {5}
    assert len(compared) == 3 * (32 + 64 + 64)
    cells = found.set_index(["epoch", "layer", "feature_map"])
    for row in compared[compared.feature_map % 9 == 3].itertuples():
        weights = [
            models[epoch].get_submodule(row.layer).weight[row.feature_map].detach().flatten()
            for epoch in (row.epoch, 5)
        ]
        if row.epoch == 1 and row.layer == "conv2" and row.feature_map == 3:
            assert pd.isna(row.filter_cosine)
        else:
            assert row.filter_cosine == pytest.approx(1 - cosine(*(w.double() for w in weights)), abs=1e-12)
        pair = [(epoch, row.layer, row.feature_map) for epoch in (row.epoch, 5)]
        if not all(name in cells.index for name in pair):
            assert pd.isna(row.projection_cosine)
            assert row.same_image is None
            continue
        one, other = (cells.loc[name] for name in pair)
        assert row.projection_cosine == pytest.approx(1 - cosine(in_its_field(one), in_its_field(other)), abs=1e-6)
        assert row.same_image == (one.key == other.key)


def test_equal_checkpoints_have_converged(tmp_path, data, capsys):
    model = random_model()
    _, found, compared = evolved(trained(tmp_path / "run", dict.fromkeys((1, 2, 5), model)), data)
    assert found.image_changed.value_counts(dropna=False).to_dict() == {None: len(found) / 3, False: len(found) * 2 / 3}
    assert compared.filter_cosine.to_numpy() == pytest.approx(1)
    assert compared.projection_cosine.dropna().to_numpy() == pytest.approx(1)
    assert compared.same_image.dropna().all()
    said = capsys.readouterr().out
    assert "filters, cosine to epoch 5" in said
    assert "another one than at the epoch before" in said


def test_a_new_epoch_costs_one_sweep_and_the_others_are_kept(tmp_path, data, monkeypatch):
    models = {epoch: random_model(seed=epoch) for epoch in (1, 2, 5, 10)}
    whole = trained(tmp_path / "whole", models)
    evolved(whole, data)
    run = trained(tmp_path / "run", {epoch: models[epoch] for epoch in (1, 2)})
    evolved(run, data)
    kept = {path: path.read_bytes() for path in run.rglob("results/*/*.parquet")}
    networks = []
    at_epoch = evolution_cells.at_epoch
    monkeypatch.setattr(evolution_cells, "at_epoch", lambda c, slice_: networks.append(slice_) or at_epoch(c, slice_))
    for epoch in (5, 10):
        checkpoint(Run.at(str(run)), epoch, models[epoch], keep=tuple(models))
        evolved(run, data)
    assert networks == ["epoch-0005", "epoch-0010"]
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert_same(whole, run, "evolution_cells", "evolution")
    compared = table(run, "evolution_convergence")
    assert compared.groupby("reference_epoch").epoch.unique().map(list).to_dict() == {
        2: [1, 2],
        5: [1, 2, 5],
        10: [1, 2, 5, 10],
    }
    last = compared[compared.reference_epoch == 10].reset_index(drop=True)
    pd.testing.assert_frame_equal(last, table(whole, "evolution_convergence").reset_index(drop=True), check_exact=True)


def test_an_epoch_between_two_leaves_them_as_they_are(tmp_path, data):
    run = trained(tmp_path / "run", {epoch: random_model(seed=epoch) for epoch in (1, 3, 5)})
    evolved(run, data, epochs=(1, 5))
    evolved(run, data, epochs=(3,))
    _, found, compared = evolved(run, data, epochs=(1, 3, 5))
    previous = found.groupby("epoch").previous_epoch.first()
    assert previous[[3, 5]].tolist() == [1, 1]
    assert sorted(compared[compared.reference_epoch == 5].epoch.unique()) == [1, 3, 5]


def test_an_epoch_whose_checkpoint_is_gone_stays_in_the_table(tmp_path, data):
    run = trained(tmp_path / "run", {1: random_model(seed=1), 2: random_model(seed=2)})
    evolved(run, data)
    for epoch in (3, 4):  # training goes on, and keeps the first epoch and the last two
        checkpoint(Run.at(str(run)), epoch, random_model(seed=epoch), keep=(1,))
    _, found, compared = evolved(run, data, epochs=(1, 4))
    assert sorted(found.epoch.unique()) == [1, 2, 4]
    assert found[found.epoch == 4].previous_epoch.unique().tolist() == [2]
    assert sorted(compared[compared.reference_epoch == 4].epoch.unique()) == [1, 4]


def test_workers_do_not_matter(tmp_path, data, ray_cluster, monkeypatch):
    models = {epoch: random_model(seed=epoch) for epoch in (1, 2)}
    run, other = (trained(tmp_path / name, models) for name in ("run", "other"))
    evolved(run, data)
    monkeypatch.setattr(sweep, "_MANY", 1)  # its fold goes to tasks, too
    evolved(other, data, num=2)
    assert_same(run, other, *TABLES)


def test_a_job_that_broke_off_goes_on_with_the_same_bits(tmp_path, data, monkeypatch):
    models = {epoch: random_model(seed=epoch) for epoch in (1, 2)}
    run, other = (trained(tmp_path / name, models) for name in ("run", "other"))
    evolved(run, data)
    calls = []
    map_batch = deconv.map_batch

    def dies(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise RunError("the power went")
        return map_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(deconv, "map_batch", dies)
        with pytest.raises(SweepFailed, match="the power went"):
            evolved(other, data)
    assert not (other / "results" / "evolution").exists()
    swept = {path: path.stat().st_mtime_ns for path in (other / "results" / "evolution_cells").iterdir()}
    evolved(other, data)
    assert swept == {path: path.stat().st_mtime_ns for path in (other / "results" / "evolution_cells").iterdir()}
    assert_same(run, other, *TABLES)
    assert [path.name for path in (other / "unfinished").glob("*")] == ["train"]  # the training is still under way


def test_the_last_epoch_is_the_runs_own_network_and_training_keeps_what_it_is_told(make_shards, tmp_path):
    data, run = make_shards(train=[16], val=[4]), tmp_path / "run"
    given = {"run": str(run), "data": str(data), "batch": 8, "workers": Workers(num=0), "decoders": 0}
    train.run(train.Options(**given, epochs=6, keep_epochs=(2, 3)))
    assert checkpoints.finished(Run.at(str(run))) == [2, 3, 5, 6]
    _, found, _ = evolved(run, data, epochs=(2, 6), layers=("conv1",))
    assert set(found[found.epoch == 6].model_id) == {Run.at(str(run)).load_model().model_id}
    assert found.model_id.nunique() == 2


@pytest.mark.parametrize(
    ("models", "config", "words"),
    [
        ({}, {}, "no checkpoint of epoch any in .*, which has none: .*jobs/train.py"),
        ({3: None}, {}, "no checkpoint of epoch any in .*, which has 3: name some of these with --epochs"),
        ({1: None}, {"epochs": (1, 7)}, "no checkpoint of epoch 7 in .*, which has 1"),
        ({1: None}, {"layers": ("conv9",)}, "no layer 'conv9'"),
    ],
)
def test_what_is_refused_before_anything_is_written(tmp_path, data, models, config, words):
    run = trained(tmp_path / "run", dict.fromkeys(models, random_model()))
    with pytest.raises(ValueError, match=words):
        evolved(run, data, **config)
    assert not (run / "results").exists()


def test_a_damaged_checkpoint_is_named(tmp_path, data):
    run = trained(tmp_path / "run", {1: random_model(), 2: random_model()})
    (run / "checkpoints" / "epoch-0002" / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(RunError, match="epoch-0002 cannot be read"):
        evolved(run, data)


def test_projections_that_take_too_much_are_the_users_choice(tmp_path, data, monkeypatch):
    run = trained(tmp_path / "run", {1: random_model()})
    monkeypatch.setattr(deconv, "ASK_ABOVE_BYTES", 10**5)
    with pytest.raises(RunError, match="--values float32, float16"):
        evolved(run, data)
    _, found, compared = evolved(run, data, values="png")
    assert isinstance(found.projection.iloc[0], bytes)
    assert compared.projection_cosine.dropna().to_numpy() == pytest.approx(1)


def test_a_forecast_writes_nothing(tmp_path, data, capsys):
    run = trained(tmp_path / "run", {1: random_model(), 2: random_model(seed=2)})
    options = Options(run=str(run), data=str(data), split="train", workers=Workers(num=0, cpus=1), plan=True)
    before = sorted(run.rglob("*"))
    assert evolution.run(options, evolution.Config(**SMALL)) == 0
    assert "evolution_cells: forecast for epoch-0001, epoch-0002" in capsys.readouterr().out
    assert sorted(run.rglob("*")) == before
    evolved(run, data)
    shutil.rmtree(run / "results" / "evolution")
    shutil.rmtree(run / "results" / "manifests" / "evolution")
    capsys.readouterr()
    assert evolution.run(options, evolution.Config(**SMALL)) == 0
    assert "evolution: forecast for epoch-0001, epoch-0002" in capsys.readouterr().out
