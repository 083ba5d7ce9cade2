"""--plan says what a sweep costs and writes nothing; and what can be told beforehand is told exactly."""

import re
import shutil

import pytest

from pipeline import sweep
from pipeline.analyses import deconv, occlusion, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.runs import Run

ANALYSES = {
    "top9": (top9.ANALYSIS, top9.Config(part_size=8, batch_size=3)),
    "deconv": (deconv.ANALYSIS, deconv.Config(part_size=8, batch_size=3)),
    "occlusion": (occlusion.ANALYSIS, occlusion.Config(first=3, occluder_px=("24",), stride_px=20, part_size=2)),
}


def run_job(job, run, data, **options):
    analysis, config = ANALYSES[job]
    return sweep.run(analysis, Options(run=str(run), data=str(data), workers=Workers(num=0, cpus=2), **options), config)


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("job", "parts", "images", "forwards"), [("top9", 5, 33, 33), ("deconv", 5, None, None), ("occlusion", 2, 3, 30)]
)
def test_a_plan_tells_the_cost_and_writes_nothing(make_run, make_shards, capsys, job, parts, images, forwards):
    data, run = make_shards(val=[20, 13]), make_run()
    if job == "deconv":
        run_job("top9", run, data)
    before = everything(run)
    capsys.readouterr()
    assert run_job(job, run, data, plan=True) == 0
    assert everything(run) == before
    text = capsys.readouterr().out
    found = re.search(r"parts +(\d+) of (\d+) to do, (\d+) images\n +forwards +([\d,]+)", text)
    assert int(found[1]) == int(found[2]) == parts
    assert images is None or int(found[3]) == images
    assert forwards is None or int(found[4]) == forwards
    assert float(re.search(r"hours +(\S+)", text)[1]) > 0
    assert float(re.search(r"storage +(\S+) GB", text)[1]) > 0


def test_the_storage_of_a_plan_is_that_of_the_parts(make_run, make_shards, capsys, monkeypatch):
    data, run = make_shards(val=[24]), make_run()
    run_job("top9", run, data, plan=True)
    forecast = float(re.search(r"storage +(\S+) GB", capsys.readouterr().out)[1]) * 1e9
    monkeypatch.setattr(sweep, "clear_finished", lambda context, analysis: None)
    run_job("top9", run, data)
    written = sum(path.stat().st_size for path in (run / "unfinished").rglob("part-*.parquet"))
    assert forecast == pytest.approx(written, rel=0.15)


def test_a_plan_is_about_what_is_left(make_run, make_shards, capsys):
    data, run = make_shards(val=[20, 13]), make_run()
    run_job("top9", run, data)
    kept = everything(run)
    assert run_job("top9", run, data, plan=True) == 0
    assert "finished already" in capsys.readouterr().out
    assert everything(run) == kept
    for table in ("top9", "manifests/top9"):
        shutil.rmtree(run / "results" / table)
    assert run_job("top9", run, data, plan=True) == 0
    assert "5 of 5 to do" in capsys.readouterr().out


def test_a_plan_of_what_cannot_be_computed_fails(make_run, make_shards):
    data, run = make_shards(val=[4]), make_run()
    model = Run.at(str(run)).load_model()
    model.network.conv2.bias.data[0] = float("nan")
    Run.at(str(run)).save_model(
        model.network, architecture="zfnet_small", classes=model.classes, preprocessing=model.preprocessing, about={}
    )
    with pytest.raises(SweepFailed, match="is NaN or infinite"):
        run_job("top9", run, data, plan=True)


def test_scaled_decoding_names_its_images_otherwise(make_run, make_shards, capsys):
    """Pixels differ, so tables of one decoding are refused for another."""
    data, run = make_shards(val=[6]), make_run()
    run_job("top9", run, data, decode="scaled")
    manifest = Run.at(str(run)).manifest("top9")["conv1"]["fingerprint"]
    assert manifest["decode"] == "scaled"
    assert manifest["data_id"].endswith("-scaled")
    with pytest.raises(ValueError, match="was made of"):
        run_job("deconv", run, data)
    assert run_job("deconv", run, data, decode="scaled") == 0
