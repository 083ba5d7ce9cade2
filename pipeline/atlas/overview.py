"""The first page: what the run is, how training went, and the way to everything else."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from urllib.parse import quote

from pipeline import metrics
from pipeline.atlas import records
from pipeline.atlas.charts import Chart, chart
from pipeline.atlas.images import Picture
from pipeline.atlas.layers import Face
from pipeline.atlas.records import ResultTable, Sources
from pipeline.atlas.site import Site
from pipeline.storage import Location

SKIPPED_SHOWN = 200
CLASSES_SHOWN = 60
ABOUT = {
    "metrics": "Loss and accuracy of every epoch of training.",
    "feature_maps": "Statistics of every feature map: mean, maximum, quantiles, share of active images, dead or not.",
    "top9": "The strongest images of every feature map, with the cell and its receptive field.",
    "deconv": "Projection and patch of every top-9 cell.",
    "occlusion": "The three occlusion maps of every chosen image, with its clean prediction.",
    "skipped": "Samples that could not be read, and why.",
    "account": "Parts, attempts and seconds of every job.",
}
_SHOWN_APART = ("architecture", "classes", "model_id", "versions", "preprocessing")


def write(site: Site, sources: Sources, facts: dict[str, Any], faces: list[Face], pictures: list[Picture]) -> Location:
    """Write index.html, which is what makes a new atlas visible: after everything that it links to."""
    run = sources.run
    epochs = metrics.read(run).sort_by("epoch").to_pydict()
    skipped = records.skipped(run)
    found = records.result_tables(run, facts["model_id"])
    site.write_page(
        "index.html",
        "index.html.j2",
        run_name=run.location.name,
        run_path=str(run.location),
        facts=facts,
        sources=sources,
        classes=facts["classes"][:CLASSES_SHOWN],
        more={name: _as_text(value) for name, value in facts.items() if name not in _SHOWN_APART},
        data_ids=_data_ids(sources),
        epochs=epochs,
        charts=_charts(epochs),
        faces=faces,
        pictures=pictures,
        reasons=Counter((row["table"], row["reason"]) for row in skipped).most_common(),
        skipped=skipped[:SKIPPED_SHOWN],
        skipped_total=len(skipped),
        result_tables=[(table, _about(table), _pandas_line(run.location, table)) for table in found],
        file_url=lambda path: quote(f"../{path}"),
        deconv_missing=[face.layer.name for face in faces if face.layer.semantics is None and face.layer.alive],
    )
    return site.location / "index.html"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data_ids(sources: Sources) -> list[str]:
    """The images that the shown tables were made of, by their identity."""
    slices = [
        s for table in (sources.top9, sources.deconv, sources.occlusion) for s in sources.run.manifest(table).values()
    ]
    return sorted({entry["fingerprint"]["data_id"] for entry in slices if "data_id" in entry.get("fingerprint", {})})


def _charts(epochs: dict[str, list[Any]]) -> list[Chart]:
    loss = {"training": epochs["train_loss"], "validation": epochs["validation_loss"]}
    accuracy = {
        "validation top-5": epochs["validation_top5"],
        "validation top-1": epochs["validation_top1"],
        "training top-1": epochs["train_top1"],
    }
    found = (
        chart("Loss (mean cross-entropy)", epochs["epoch"], loss),
        chart("Accuracy", epochs["epoch"], accuracy, percent=True),
    )
    return [drawn for drawn in found if drawn]


def _about(table: ResultTable) -> str:
    return ABOUT.get(table.name) or ABOUT.get(table.name.split("-")[0], "A table of this run.")


def _pandas_line(run: Location, table: ResultTable) -> str:
    return f"pd.read_parquet({f'{run}/{table.path}'!r})"
