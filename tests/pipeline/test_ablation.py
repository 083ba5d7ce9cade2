"""The ablation: ordinary trainings side by side, a table from their own metrics, and one that fails costs no other."""

import json

import pandas as pd
import pytest
import torch

from pipeline import cluster, train
from pipeline.analyses import ablation
from pipeline.cluster import Resources, Workers
from pipeline.errors import SweepFailed
from pipeline.loop import Trainer
from pipeline.runs import Run, RunError
from pipeline.sources.rendered import Rendered
from pipeline.sources.writer import write_shards
from tests.conftest import SHARED
from zfnet import models

NAMES = ("alexnet_small", "alexnet_small_nocolour", "zfnet_small_no3467")
GIVEN = {"epochs": 2, "batch": 8, "decoders": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation") / "shards"
    write_shards(Rendered(train=24, val=8), str(folder))
    return folder


def options(run, data, **more):
    given = {"variants": NAMES, "workers": Workers(num=0), **GIVEN, **more}
    return ablation.Options(run=str(run), data=str(data), **given)


def table(run):
    return pd.read_parquet(run / "results" / "ablation").set_index("variant")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert ablation.run(options(run, data)) == 0
    return run


def test_each_row_is_what_its_run_says(undisturbed):
    rows = table(undisturbed)
    assert sorted(rows.index) == sorted(NAMES)
    for name, row in rows.iterrows():
        metrics = pd.read_parquet(undisturbed / name / "metrics")
        described = json.loads((undisturbed / name / "run.json").read_text())
        network = models.build(row.architecture, classes=12)
        assert described["architecture"] == row.architecture == name.removesuffix("_nocolour")
        assert row.parameters == sum(p.numel() for p in network.parameters())
        assert row.model_id == Run.at(str(undisturbed / name)).load_model().model_id
        assert row.epochs == 2
        last = metrics.iloc[-1]
        errors = [1 - last.train_top1, 1 - last.validation_top1, 1 - last.validation_top5]
        assert [row.train_top1_error, row.top1_error, row.top5_error] == errors
        assert row.seconds == pytest.approx(metrics.seconds.sum())
        assert pd.isna(row.epochs_to_25) == (1 - metrics.train_top1.max() > 0.25)
        assert row.filter(like="paper_").drop(["paper_top1_cost", "paper_says"]).isna().all()  # not ImageNet
    assert rows.compared_with["alexnet_small_nocolour"] == "alexnet_small"
    assert rows.paper_top1_cost["alexnet_small_nocolour"] == 0.01
    assert rows.paper_says["alexnet_small_nocolour"] == "more than 1 %"


def test_a_variant_is_an_ordinary_training(undisturbed, data, tmp_path):
    alone = train.Options(
        run=str(tmp_path / "run"), data=str(data), architecture="zfnet_small_no3467", workers=Workers(num=0), **GIVEN
    )
    train.run(alone)
    model_id = Run.at(str(tmp_path / "run")).load_model().model_id
    assert table(undisturbed).model_id["zfnet_small_no3467"] == model_id


def test_only_the_colours_differ_where_only_they_should(undisturbed):
    recipes = [json.loads((undisturbed / n / "run.json").read_text())["training"]["recipe"] for n in NAMES]
    assert [recipe.pop("colour") for recipe in recipes] == ["paper", "none", "none"]
    assert recipes[0] == recipes[1]


def test_what_is_finished_is_not_made_again(undisturbed, data, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "connected", lambda address: pytest.fail("Ray was asked for"))
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert ablation.run(options(undisturbed, data, workers=Workers(num=1))) == 0
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()} == before
    said = capsys.readouterr().out
    assert said.count("finished already") == 3
    assert "paper's top1 cost" in said
    with pytest.raises(SweepFailed, match=r"3 of 3 variants failed.*\n.*seed: 0 there, asked 4"):
        ablation.run(options(undisturbed, data, seed=4))


@pytest.mark.parametrize("error", [RunError("the power went"), ZeroDivisionError("a fault of ours")])
def test_a_variant_that_fails_is_named_costs_no_other_and_goes_on(undisturbed, data, tmp_path, monkeypatch, error):
    run = tmp_path / "run"
    checkpoint = Trainer._checkpoint

    def dies(self, *, inside):
        checkpoint(self, inside=inside)
        if self.plan.architecture == "alexnet_small" and self.plan.recipe.colour == "paper" and self.step == 2:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_checkpoint", dies)
        with pytest.raises(SweepFailed, match="1 of 3 variants failed") as caught:
            ablation.run(options(run, data, checkpoint_steps=2))
    assert f"alexnet_small: {'Traceback' if isinstance(error, ZeroDivisionError) else error}" in str(caught.value)
    assert sorted(table(run).index) == sorted(NAMES[1:])
    assert ablation.run(options(run, data)) == 0
    assert table(run).model_id.to_dict() == table(undisturbed).model_id.to_dict()
    assert not (run / "unfinished").exists() or not list((run / "unfinished").iterdir())


@pytest.mark.slow
def test_as_many_at_once_as_fit_on_the_cluster(undisturbed, data, tmp_path, ray_cluster, capsys):
    run = tmp_path / "run"
    given = {"workers": Workers(num=1, cpus=1), "decoders": 1}
    assert ablation.run(options(run, data, variants=NAMES[1:], **given)) == 0
    assert "2 variants to train, 2 at a time" in capsys.readouterr().out
    begun = [(run / name / "checkpoints" / "training.json").stat().st_mtime for name in NAMES[1:]]
    ended = [(run / name / "run.json").stat().st_mtime for name in NAMES[1:]]
    assert max(begun) < min(ended)
    assert table(run).model_id.to_dict() == table(undisturbed).model_id[list(NAMES[1:])].to_dict()


@pytest.mark.parametrize(
    ("nodes", "workers", "together"),
    [
        ([{"CPU": 4.0}], Workers(num=1), 1),
        ([{"CPU": 4.0}], Workers(num=1, cpus=1), 4),
        ([{"CPU": 4.0}], Workers(num=2, cpus=1), 2),
        ([{"CPU": 8.0, "GPU": 4.0}] * 2, Workers(num=1), 8),
        ([{"CPU": 8.0, "GPU": 4.0}] * 2, Workers(num=4), 2),
        ([{"CPU": 0.0}, {"CPU": 8.0, "GPU": 4.0}], Workers(num=1, gpus=2), 2),
    ],
)
def test_how_many_fit(monkeypatch, nodes, workers, together):
    monkeypatch.setattr(cluster, "nodes", lambda: nodes)
    resources = cluster.resolve(workers)
    assert isinstance(resources, Resources)
    assert cluster.groups_at_once(resources) == together


# ---------------------------------------------------------------------------------------------------- which variants


@pytest.mark.parametrize(("word", "scale"), [("small", "_small"), ("full", "")])
def test_all_rows_of_both_papers_by_one_word(word, scale):
    found = ablation.chosen((word,))
    alexnet = ("", "no34", "no7", "no67", "no3467", "fc2048", "fc8192")
    claims = ("nonorm", "pool2", "nocolour", "half", "tanh", "no1", "no2", "no3", "no4", "no5")
    zfnet = ("", "fc2048", "fc8192", "wide", "wide_fc8192")
    expected = [f"alexnet{scale}_{s}".rstrip("_") for s in (*alexnet, *claims)]
    expected += [f"zfnet{scale}_{s}".rstrip("_") for s in zfnet]
    assert [variant.name for variant in found] == expected
    for variant in found:
        with torch.device("meta"):
            models.build(variant.architecture, classes=3)
        is_base = variant.name in (f"alexnet{scale}", f"zfnet{scale}")
        assert variant.compared_with == (None if is_base else variant.name.split("_")[0] + scale)
        assert variant.full == (word == "full")


def test_any_other_network_by_its_name():
    (other,) = ablation.chosen(("zfnet_small_no34",))
    assert (other.compared_with, other.row.table, other.architecture) == ("zfnet_small", "other", "zfnet_small_no34")
    assert ablation.paper(other, ())["paper_top1_cost"] is None
    with pytest.raises(RunError, match=r"none called 'zfnet_smal_no7'. Did you mean 'zfnet_small_no7'"):
        ablation.chosen(("zfnet_smal_no7",))


# ------------------------------------------------------------------------------------------------------------- papers

IMAGENET = models.torchvision_classes("torchvision:alexnet")

TAB3 = {  # PAPERS 1.11: training top-1, validation top-1 and top-5
    "alexnet": (35.1, 40.5, 18.1), "alexnet_no34": (41.8, 45.4, 22.1), "alexnet_no7": (27.4, 40.0, 18.4),
    "alexnet_no67": (27.4, 44.8, 22.4), "alexnet_no3467": (71.1, 71.3, 50.1), "alexnet_fc2048": (40.3, 41.7, 18.8),
    "alexnet_fc8192": (26.8, 40.0, 18.1), "zfnet": (33.1, 38.4, 16.5), "zfnet_fc2048": (38.2, 40.2, 17.6),
    "zfnet_fc8192": (22.0, 38.8, 17.0), "zfnet_wide": (18.8, 37.5, 16.0), "zfnet_wide_fc8192": (10.0, 38.3, 16.9),
}  # fmt: skip


def test_the_papers_numbers_beside_ours_on_imagenet_alone():
    for variant in ablation.chosen(("full",)):
        found = ablation.paper(variant, IMAGENET)
        errors = [found[f"paper_{name}"] for name in ("train_top1_error", "top1_error", "top5_error")]
        if variant.name in TAB3:
            assert errors == pytest.approx([percent / 100 for percent in TAB3[variant.name]])
        else:
            assert errors == [None] * 3
        assert ablation.paper(variant, ("cat", "dog"))["paper_top1_error"] is None
    for variant in ablation.chosen(("small",)):
        assert ablation.paper(variant, IMAGENET)["paper_top1_error"] is None


def test_what_a_change_costs_in_the_papers():
    costs = {v.name: ablation.paper(v, ()) for v in ablation.chosen(("small",))}
    assert costs["alexnet_small_no34"]["paper_top1_cost"] == pytest.approx(0.049)
    assert costs["zfnet_small_wide"]["paper_top5_cost"] == pytest.approx(-0.005)
    assert costs["alexnet_small_nonorm"]["paper_top5_cost"] == pytest.approx(0.012)
    assert costs["alexnet_small"]["paper_top1_cost"] is None
    assert "six times" in costs["alexnet_small_tanh"]["paper_says"]


def test_imagenet_is_known_by_its_classes():
    assert ablation.is_imagenet(IMAGENET)
    assert ablation.is_imagenet(tuple(f"{name.replace(' ', '_')}, Latin name" for name in IMAGENET))
    wnids = ("n01440764", *(f"n0{number}" for number in range(2_000_000, 2_000_998)), "n15075141")
    assert ablation.is_imagenet(wnids)
    assert not ablation.is_imagenet(wnids[::-1])
    assert not ablation.is_imagenet(IMAGENET[::-1])
    assert not ablation.is_imagenet(IMAGENET[:999])
    assert not ablation.is_imagenet(tuple(f"class {number}" for number in range(1000)))


def test_the_names_of_the_real_classes_are_known():
    path = SHARED / "data" / "imagenet-samples" / "classes.txt"
    if not path.is_file():
        pytest.skip("real images imagenet-samples are not beside the project (../shared/data)")
    assert ablation.is_imagenet(tuple(path.read_text().splitlines()))
