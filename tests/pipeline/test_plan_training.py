"""--plan of a training says what it costs and writes nothing; what can be told beforehand is told exactly."""

import re

import pytest

from pipeline import plan_training, train
from pipeline.analyses import ablation
from pipeline.cluster import Workers
from pipeline.loop import Trainer
from pipeline.plan_training import Worker
from pipeline.progress import say_suggestion
from pipeline.runs import Run, RunError
from pipeline.train_boxes import Detector, Localizer, run_detector, run_localizer
from tests.pipeline.boxed import save_network, scenes

GIVEN = {"epochs": 3, "batch": 8, "workers": Workers(num=0), "decoders": 0}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(plan_training, "REHEARSAL_SECONDS", 0.0)


def training(run, data, **more):
    return train.Options(**{"run": str(run), "data": str(data), "colour": "paper", **GIVEN, **more})


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def told(text, name):
    return re.search(rf"{name} +(.*)", text)[1]


def test_a_plan_tells_the_cost_and_writes_nothing(make_shards, tmp_path, capsys):
    data, run = make_shards(train=[20, 13], val=[9]), tmp_path / "run"
    before = everything(data)
    assert train.run(training(run, data, plan=True)) == 0
    assert not run.exists()
    assert everything(data) == before  # nor are the images' statistics measured
    text = capsys.readouterr().out
    assert told(text, "steps") == "12 of 12 to do, 3 epochs of 4, 96 images"
    assert told(text, "forwards") == "123, 96 of them with a backward pass"
    assert told(text, "probe") == "2 steps of 8 images; nothing was written"
    assert float(told(text, "hours").split()[0]) > 0
    say_suggestion()
    assert "evaluate" not in capsys.readouterr().out
    assert train.run(training(run, data)) == 0
    written = sum(path.stat().st_size for path in run.rglob("*") if path.suffix in {".safetensors", ".pt"})
    assert float(told(text, "storage").split()[0]) * 1e9 == pytest.approx(written, rel=0.15)
    capsys.readouterr()
    assert train.run(training(run, data, plan=True)) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_rehearsal_leaves_the_training_as_it_would_have_been(make_shards, tmp_path):
    data = make_shards(train=[16], val=[8])
    assert train.run(training(tmp_path / "rehearsed", data, epochs=1, plan=True)) == 0
    for name in ("rehearsed", "straight"):
        assert train.run(training(tmp_path / name, data, epochs=1)) == 0
    one, other = (Run.at(str(tmp_path / name)).describe()["model_id"] for name in ("rehearsed", "straight"))
    assert one == other


def stopped_in_the_second_epoch(trainer):
    if trainer.epoch == 2:
        raise KeyboardInterrupt
    return {"validation_samples": 8, "validation_loss": 1.0, "validation_top1": 0.5, "validation_top5": 1.0}


def test_a_plan_is_about_what_is_left_and_refuses_another_training(make_shards, tmp_path, capsys, monkeypatch):
    data, run = make_shards(train=[16], val=[8]), tmp_path / "run"

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", stopped_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            train.run(training(run, data))
    before = everything(run)
    capsys.readouterr()
    assert train.run(training(run, data, plan=True)) == 0
    assert told(capsys.readouterr().out, "steps") == "4 of 6 to do, 3 epochs of 2, 32 images"
    with pytest.raises(RunError, match="holds another training"):
        train.run(training(run, data, plan=True, seed=1))
    assert everything(run) == before


@pytest.mark.parametrize(("kind", "job"), [(Localizer, run_localizer), (Detector, run_detector)])
def test_trainings_on_boxes_have_plans_too(tmp_path, capsys, kind, job):
    source, data = save_network(tmp_path / "classifier"), scenes(tmp_path / "scenes")
    before = everything(tmp_path)
    options = kind(run=str(tmp_path / "run"), source=str(source), data=str(data), scales=(1, 3), plan=True, **GIVEN)
    assert job(options) == 0
    assert everything(tmp_path) == before
    assert re.fullmatch(r"9 of 9 to do, 3 epochs of 3, 72 images", told(capsys.readouterr().out, "steps"))


def test_an_ablation_forecasts_each_of_its_trainings(make_shards, tmp_path, capsys):
    data, run = make_shards(train=[16], val=[8]), tmp_path / "run"
    names = ("zfnet_small", "alexnet_small_no7")
    assert ablation.run(ablation.Options(run=str(run), data=str(data), variants=names, plan=True, **GIVEN)) == 0
    assert not run.exists()
    text = capsys.readouterr().out
    assert all(f"ablation: {name}: forecast for {name}\n  steps     6 of 6" in text for name in names)


def test_a_worker_is_what_was_asked_for():
    assert Worker.of(Workers(num=0), None) == Worker("cpu", Worker.of(Workers(), None).cpus, 0, 1)
    asked = Worker.of(Workers(num=4, cpus=6, gpus=0), None)
    assert (asked.device, asked.cpus, asked.decoders, asked.threads) == ("cpu", 6, 6, 3)
    assert Worker.of(Workers(num=4, cpus=6, gpus=0), 2).decoders == 2
