"""Feature maps of one layer that answer alike to every image: near-duplicates, found by correlation.

A row for each pair of maps whose strongest activations correlate (Pearson, over all images of the table `maxima`) at
least as much as asked, and for each map with those that it correlates with most, however little that is. Maps that
never change, dead ones among them, correlate with nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline import tables
from pipeline.analyses import maxima
from pipeline.analyses.maxima import matrix
from pipeline.derive import Context, Derivation
from pipeline.runs import RunError
from pipeline.storage import Location


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of duplicates."""

    layers: tuple[str, ...] = ()
    """Layers; default all layers of the table."""
    maxima: str = "maxima"
    """Table to read: maxima, or maxima-NAME."""
    correlation: float = 0.9
    """Smallest correlation of near-duplicates, from -1 to 1."""
    nearest: int = 3
    """So many of each map's most correlated ones are kept too, with false in the column `duplicate` where below."""

    def __post_init__(self) -> None:
        if self.nearest < 0:
            raise RunError(f"--nearest is {self.nearest}: give 0 or more")
        if not -1 <= self.correlation <= 1:
            raise RunError(f"--correlation is {self.correlation}: give a number from -1 to 1")


SCHEMA = tables.schema(
    "duplicates",
    row="two feature maps of a layer that answer alike, or of which one is among the other's most alike",
    file="layer",
    key=("layer", "feature_map", "other_map"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        tables.FEATURE_MAP,
        tables.column("other_map", pa.int32(), "The other channel of the pair, larger than feature_map."),
        tables.column("correlation", pa.float64(), "Pearson correlation of their strongest activations over images."),
        tables.column("duplicate", pa.bool_(), "Whether that is at least --correlation; else it is kept by --nearest."),
        tables.column("images", pa.int64(), "Images over which they were compared."),
    ],
)


def make(context: Context, layer: str) -> Iterator[pa.Table]:
    """The pairs of a layer, the most alike first, then by feature map."""
    location = context.run.slice(context.config.maxima, layer)
    data_id = tables.read(location, ["data_id"])["data_id"]
    correlation = _correlations(location)
    alike, nearest = correlation >= context.config.correlation, _nearest(correlation, context.config.nearest)
    one, other = np.nonzero(np.triu(alike | nearest | nearest.T, 1))
    order = np.lexsort((other, one, -correlation[one, other]))
    one, other = one[order], other[order]
    columns = {
        "model_id": [context.model.model_id] * len(one),
        "data_id": [data_id[0]] * len(one),
        "layer": [layer] * len(one),
        "feature_map": one,
        "other_map": other,
        "correlation": correlation[one, other],
        "duplicate": alike[one, other],
        "images": [len(data_id)] * len(one),
    }
    yield tables.conform(columns, SCHEMA)


def _correlations(location: Location) -> npt.NDArray[np.float64]:
    """[maps, maps]; NaN for maps that never change. Two passes over the file: the means, then the products."""
    pieces = [(x.sum(0), x.amin(0), x.amax(0), len(x)) for x in _values(location)]
    total, lowest, highest, count = zip(*pieces, strict=True)
    mean = torch.stack(total).sum(0) / sum(count)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for x in _values(location):
        products += (x - mean).T @ (x - mean)
    spread = products.diagonal().sqrt()
    spread[torch.stack(lowest).amin(0) == torch.stack(highest).amax(0)] = torch.nan
    found: npt.NDArray[np.float64] = (products / spread[:, None] / spread).clamp(-1, 1).numpy()
    return found


def _nearest(correlation: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]:
    """[maps, maps]: whether the column is one of the row's most correlated maps; of equal ones the first."""
    others = np.where(np.isnan(correlation) | np.eye(len(correlation), dtype=bool), -np.inf, correlation)
    order = np.argsort(-others, axis=1, kind="stable")[:, :count]
    found = np.zeros(others.shape, dtype=bool)
    np.put_along_axis(found, order, values=True, axis=1)
    return found & np.isfinite(others)


def _values(location: Location) -> Iterator[torch.Tensor]:
    """The maxima as float64 [images, maps], some images at a time."""
    for some in tables.stream(location, ["maxima"]):
        yield torch.from_numpy(matrix(some["maxima"]).astype(np.float64))


ANALYSIS = Derivation(
    table="duplicates",
    schema=SCHEMA,
    slices=maxima.slices,
    sources=maxima.sources,
    make=make,
    then="units.py --run {run}",
)
