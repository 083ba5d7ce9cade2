"""Training: the stream's order, exact resume, and what is refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import checkpoints, sweep, train
from pipeline.analyses import evaluation
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.indexing import index_shards
from pipeline.loop import Trainer
from pipeline.mean import measure
from pipeline.runs import Run, RunError
from pipeline.shards import BadShards, Index
from pipeline.stream import Images, epoch_order, labelled, rank_batches
from tests.conftest import samples
from tests.tars import write_tar
from zfnet import images

SHARDS = np.repeat([0, 1, 2], [300, 7, 180])


def options(run, data, **more):
    return train.Options(
        **{
            "run": str(run),
            "data": str(data),
            "epochs": 3,
            "batch": 8,
            "workers": Workers(num=0),
            "decoders": 0,
            **more,
        }
    )


# ------------------------------------------------------------------------------------------------------ the order


def test_an_epoch_takes_every_sample_once_in_an_order_of_its_own():
    orders = [epoch_order(SHARDS, seed, epoch) for seed in (0, 1) for epoch in (1, 2, 3)]
    for order in orders:
        assert sorted(order) == list(range(len(SHARDS)))
    assert len({order.tobytes() for order in orders}) == len(orders)
    assert np.array_equal(orders[0], epoch_order(SHARDS, 0, 1))


def test_an_epoch_is_well_mixed():
    """Shards come one after another; a batch must not."""
    order = epoch_order(np.repeat(np.arange(10), 1000), 0, 1)
    for start in range(0, 8000, 128):
        assert len(set(order[start : start + 128] // 1000)) >= 5


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_a_global_batch_is_the_same_for_any_number_of_workers(world):
    def batches(rank, world):
        return list(
            rank_batches(SHARDS, seed=3, first_step=(len(SHARDS) // 32), epochs=4, batch=32, rank=rank, world=world)
        )

    whole = batches(0, 1)
    shares = [batches(rank, world) for rank in range(world)]
    assert len(whole) == 3 * (len(SHARDS) // 32)
    for step, batch in enumerate(whole):
        assert sorted(place for share in shares for place in share[step]) == sorted(batch)


def test_going_on_is_the_rest_of_never_having_stopped():
    def batches(first):
        return list(rank_batches(SHARDS, seed=0, first_step=first, epochs=3, batch=16, rank=0, world=1))

    whole = batches(0)
    for first in (1, len(SHARDS) // 16, 2 * (len(SHARDS) // 16) + 7, len(whole)):
        assert batches(first) == whole[first:]


def test_augmentation_depends_on_seed_epoch_and_key_alone(make_shards):
    index = Index.load(str(make_shards(train=[6])))
    rows, _ = labelled(index, "train", 3)
    preprocessing = images.Preprocessing(resize_px=72, crop_px=64)
    one, two = (Images(index, rows, preprocessing, seed) for seed in (0, 1))
    a, b = one.__getitems__([(1, 0), (1, 3)]), one.__getitems__([(1, 3)])
    assert torch.equal(a.pixels[1], b.pixels[0])
    assert (a.top[1], a.left[1]) == (b.top[0], b.left[0])
    assert not torch.equal(one.__getitems__([(2, 3)]).pixels, b.pixels)
    assert not torch.equal(two.__getitems__([(1, 3)]).pixels, b.pixels)


@pytest.mark.parametrize("world", [1, 2])
def test_the_mean_image_is_the_mean(make_shards, world):
    from unittest.mock import patch

    index = Index.load(str(make_shards(train=[70, 9])))
    rows = index.split("train")
    squares = [images.centre_crop(images.decode(s.image), 24, 24)[0].astype(np.int64) for s in index.read(rows)]
    exact = np.stack(squares).sum(0) / len(squares)
    if world == 1:
        found = measure(index, rows, 24, rank=0, world=1, decoders=0).mean
        assert np.array_equal(found.permute(1, 2, 0), exact.astype(np.float32))
        return
    sums = []
    with (
        patch("torch.distributed.all_reduce", lambda tensor: sums.append(tensor.clone())),
        patch("torch.distributed.get_backend", lambda: "gloo"),
    ):
        for rank in range(world):
            measure(index, rows, 24, rank=rank, world=world, decoders=0)
    total, count = sums[0] + sums[3], sums[2] + sums[5]
    assert np.array_equal(total.numpy() / int(count), exact)


# --------------------------------------------------------------------------------------------------- the training


def weights(run):
    return Run.at(str(run)).load_model()


def test_training_learns_and_leaves_what_it_says(make_shards, tmp_path, capsys):
    data, run = make_shards(train=[40, 9], val=[12]), tmp_path / "run"
    assert train.run(options(run, data)) == 0
    text = capsys.readouterr().out
    assert "epoch 3/3" in text
    metrics = pd.read_parquet(run / "metrics")
    assert metrics.epoch.tolist() == [1, 2, 3]
    assert metrics.train_samples.tolist() == [48] * 3
    assert metrics.validation_samples.tolist() == [12] * 3
    assert (metrics.validation_top5 == 1.0).all()  # of three classes
    model = weights(run)
    described = json.loads((run / "run.json").read_text())
    assert described["model_id"] == model.model_id
    assert described["training"]["train_samples"] == 49
    assert model.classes == ("red", "green", "blue")
    assert model.preprocessing.mean.shape == (3, 72, 72)
    assert train.run(options(run, data)) == 0
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(RunError, match="seed: 0 there, asked 5"):
        train.run(options(run, data, seed=5))


def test_the_last_epochs_validation_is_what_evaluate_finds(make_shards, tmp_path):
    data, run = make_shards(train=[40], val=[30]), tmp_path / "run"
    train.run(options(run, data, epochs=2, lr=0.002))
    last = pd.read_parquet(run / "metrics").iloc[-1]
    assert 0 < last.validation_top1 < 1  # or the order of the classes is not seen
    where = Options(run=str(run), data=str(data), workers=Workers(num=0))
    assert sweep.run(evaluation.ANALYSIS, where, evaluation.Config()) == 0
    found = pd.read_parquet(run / "results" / "predictions")
    assert len(found) == last.validation_samples
    assert found.label_rank.eq(1).mean() == pytest.approx(last.validation_top1, abs=1e-7)
    assert found.loss.mean() == pytest.approx(last.validation_loss, rel=1e-5)


@pytest.mark.parametrize("when", [2, 4, 6])  # of 3 steps an epoch: inside the first, inside the second, at its end
def test_a_training_that_was_stopped_ends_with_the_same_bits(make_shards, tmp_path, monkeypatch, when):
    data = make_shards(train=[24], val=[5])
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.run(options(whole, data))
    finish = Trainer._checkpoint

    def dies(self, *, inside):
        finish(self, inside=inside)
        if self.step == when:
            raise RunError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint", dies)
        with pytest.raises(RunError, match="the power went"):
            train.run(options(stopped, data, checkpoint_steps=2))
    assert not (stopped / "run.json").exists()
    with pytest.raises(RunError, match="holds another training"):
        train.run(options(stopped, data, lr=0.5))
    assert train.run(options(stopped, data)) == 0
    one, two = weights(whole), weights(stopped)
    assert one.model_id == two.model_id
    assert {path.name for path in (stopped / "checkpoints").glob("step-*")} == set()
    timed = ["images_per_second", "data_wait_share", "seconds"]
    first, second = (pd.read_parquet(run / "metrics").drop(columns=timed) for run in (whole, stopped))
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_a_checkpoint_without_its_manifest_does_not_exist(make_shards, tmp_path):
    data, run = make_shards(train=[16], val=[4]), tmp_path / "run"
    train.run(options(run, data))
    directory = Run.at(str(run))
    assert checkpoints.finished(directory) == [1, 2, 3]
    (run / "checkpoints" / "epoch-0003" / "manifest.json").unlink()
    assert max(checkpoints.finished(directory)) == 2
    (run / "checkpoints" / "epoch-0002" / "optimizer.pt").write_bytes(b"junk")
    with pytest.raises(RunError, match="epoch-0002 cannot be read"):
        checkpoints.read(directory, "epoch-0002")


def _checkpoint(epoch):
    return checkpoints.Checkpoint(
        step=10 * epoch, epoch=epoch, tensors={"w": torch.zeros(1)}, optimizer={}, history=[0.0] * epoch
    )


def test_a_checkpoint_that_is_dropped_while_one_looks_is_not_there(tmp_path, monkeypatch):
    run = Run.at(str(tmp_path))
    checkpoints.write(run, _checkpoint(1))
    whole = checkpoints._whole
    monkeypatch.setattr(checkpoints, "_whole", lambda run: [*whole(run), "step-00000015"])
    assert checkpoints.newest(run) == "epoch-0001"


def test_only_what_is_needed_of_old_checkpoints_is_kept(tmp_path):
    run = Run.at(str(tmp_path))
    for epoch in range(1, 13):
        checkpoints.write(run, _checkpoint(epoch))
    assert checkpoints.finished(run) == [1, 2, 5, 10, 11, 12]
    kept = sorted(path.parent.name for path in tmp_path.glob("checkpoints/*/optimizer.pt"))
    assert kept == ["epoch-0011", "epoch-0012"]


def test_what_cannot_be_used_is_skipped_by_reason(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    pictures = samples(20)
    pictures[2] = (pictures[2][0], {"jpg": pictures[2][1]["jpg"]})
    pictures[3] = (pictures[3][0], {**pictures[3][1], "cls": b"99"})
    pictures[4] = (pictures[4][0], {**pictures[4][1], "jpg": b"broken"})
    write_tar(data / "train-0.tar", pictures)
    write_tar(data / "val-0.tar", samples(4, seed=9))
    (data / "classes.txt").write_text("red\ngreen\nblue\n")
    index_shards([str(p) for p in data.glob("*.tar")], str(data), classes=None, accept_damaged=False)
    assert train.run(options(run, data, epochs=6, batch=6)) == 3
    skipped = pd.read_parquet(run / "results" / "skipped" / "train.parquet")
    assert dict(zip(skipped.key, skipped.reason, strict=True)) == {
        pictures[2][0]: "no_label",
        pictures[3][0]: "label_out_of_range",
        pictures[4][0]: "bad_image",
    }
    assert "3 of 24 samples skipped" in capsys.readouterr().out
    metrics = pd.read_parquet(run / "metrics")
    assert (metrics.skipped == 1).all()
    assert (metrics.train_samples + metrics.skipped).tolist() == [18] * 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"architecture": "zfnet_smal"}, "Did you mean 'zfnet_small'"),
        ({"batch": 1000}, "--batch is 1000, and the split 'train' holds 16 images"),
        ({"epochs": 0}, "epochs is 0"),
        ({"train_split": "test"}, "no split 'test'"),
    ],
)
def test_what_is_refused_before_anything_is_written(make_shards, tmp_path, more, message):
    data, run = make_shards(train=[16], val=[4]), tmp_path / "run"
    with pytest.raises((RunError, BadShards), match=message):
        train.run(options(run, data, **more))
    assert not run.exists()


def test_a_training_that_diverges_says_so(make_shards, tmp_path):
    data = make_shards(train=[24], val=[4])
    with pytest.raises(RunError, match=r"the loss is (nan|inf) in epoch \d: training has diverged; give a lower --lr"):
        train.run(options(tmp_path / "run", data, lr=1e9))
    assert not (tmp_path / "run" / "run.json").exists()


def test_labels_are_needed(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        write_tar(data / f"{split}-0.tar", [(key, {"jpg": members["jpg"]}) for key, members in samples(4)])
    (data / "classes.txt").write_text("a\nb\n")
    index_shards([str(p) for p in data.glob("*.tar")], str(data), classes=None, accept_damaged=False)
    with pytest.raises(RunError, match="no image with a usable label"):
        train.run(options(tmp_path / "run", data, batch=2))


def test_ray_train_gives_what_one_process_gives(make_shards, tmp_path, ray_cluster):
    """Dropout off would be needed for equal losses (issue of the networks); the data and the counts are the same."""
    data = make_shards(train=[40], val=[11])
    run = tmp_path / "run"
    workers = Workers(num=2, cpus=1)
    assert train.run(options(run, data, epochs=2, workers=workers, decoders=1)) == 0
    metrics = pd.read_parquet(run / "metrics")
    assert metrics.train_samples.tolist() == [40, 40]
    assert metrics.validation_samples.tolist() == [11, 11]
    alone = tmp_path / "alone"
    train.run(options(alone, data, epochs=2))
    one, two = weights(run), weights(alone)
    assert torch.equal(one.preprocessing.mean, two.preprocessing.mean)
    assert not (run / "unfinished").exists() or not list((run / "unfinished").iterdir())


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_training_goes_on(make_shards, tmp_path, ray_cluster):
    """SIGKILL of a training worker in the middle: Ray Train restarts the group, the loop the last checkpoint."""
    import os
    import signal
    import threading
    import time
    from pathlib import Path

    data, run = make_shards(train=[200], val=[10]), tmp_path / "run"
    killed = []

    def kill():
        while not (run / "checkpoints" / "epoch-0002" / "manifest.json").exists():
            time.sleep(0.05)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and b"RayTrainWorker" in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
                killed.append(int(entry.name))
                return

    thread = threading.Thread(target=kill)
    thread.start()
    assert train.run(options(run, data, epochs=8, workers=Workers(num=2, cpus=1))) == 0
    thread.join()
    assert killed
    assert pd.read_parquet(run / "metrics").epoch.tolist() == list(range(1, 9))
    shutil.rmtree(run)
