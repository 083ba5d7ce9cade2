"""The main job once, on the embedded data set: images -> shards -> training -> sweeps -> atlas."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pandas as pd

from pipeline import atlas, cluster, derive, metrics, sweep, train
from pipeline.analyses import deconv, duplicates, evaluation, groups, occlusion, pictures, top9
from pipeline.context import Options as SweepOptions
from pipeline.probes import linear_baselines
from pipeline.progress import say, suggest
from pipeline.runs import Run
from pipeline.sources.default import DEFAULT, shards_or_default
from pipeline.storage import Location


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the demo takes."""

    run: str = "runs/demo"
    """Run directory."""
    data: str = DEFAULT
    """Folder of the shards; the default is drawn if it is missing."""
    epochs: int | None = None
    """Passes over the training images; default the network's recipe."""


def run(options: Options) -> int:
    """Everything; what the run holds already is not made again. Returns the worst exit status."""
    started = time.time()
    index = shards_or_default(options.data, None)
    sweeps = SweepOptions(run=options.run, data=options.data)
    tables = derive.Options(run=options.run)
    with cluster.connected(None):
        status = max(
            train.run(train.Options(run=options.run, data=options.data, epochs=options.epochs)),
            sweep.run(top9.ANALYSIS, sweeps, top9.Config()),
            sweep.run(deconv.ANALYSIS, sweeps, deconv.Config()),
            sweep.run(occlusion.ANALYSIS, sweeps, occlusion.Config(first=12)),
            sweep.run(evaluation.ANALYSIS, sweeps, evaluation.Config()),
            derive.run(duplicates.ANALYSIS, tables, duplicates.Config()),
            derive.run(groups.ANALYSIS, tables, groups.Config()),
            sweep.run(pictures.ANALYSIS, sweeps, pictures.Config()),
            sweep.run(pictures.ANALYSIS, replace(sweeps, name="groups"), pictures.Config(of="groups")),
        )
    page = atlas.build(Run.at(options.run), atlas.Options())
    _say_accuracy(options, linear_baselines(index, "zfnet_small"))
    say(f"\ndemo: {time.time() - started:.0f} s. Open {page}, or read the tables:")
    say(f'  pd.read_parquet("{Location.of(options.run)}/results/top9")')
    suggest("shards.py imagefolder photos --out shards/photos")
    return status


def _say_accuracy(options: Options, baselines: dict[str, float]) -> None:
    """The trained network's validation accuracy beside what needs no learned features."""
    last = metrics.read(Run.at(options.run)).to_pylist()[-1]
    rows = {f"logistic regression, {name}": accuracy for name, accuracy in baselines.items()}
    rows["zfnet_small, trained"] = last["validation_top1"]
    say("\n" + pd.Series(rows, name="validation top-1").map("{:.1%}".format).to_string())
