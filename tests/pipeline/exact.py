"""Comparing tables bit for bit, and the top-9 table by its definition."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.runs import Run
from pipeline.shards import Index
from pipeline.work import Cut
from zfnet import images


def files(run: Path, table: str) -> dict[str, pa.Table]:
    """Every file of a finished table."""
    return {path.name: pq.read_table(path) for path in sorted((run / "results" / table).iterdir())}


def bits(table: pa.Table) -> list[bytes]:
    """Every column as bytes: lengths, nulls and the bits of floats."""
    columns = []
    for column in table.columns:
        array = column.combine_chunks()
        while pa.types.is_list(array.type):
            columns.append(np.asarray(array.value_lengths().fill_null(-1)).tobytes())
            array = array.flatten()
        if pa.types.is_floating(array.type):
            columns.append(np.asarray(array.fill_null(0)).tobytes())
        else:
            columns.append(repr(array.to_pylist()).encode())
    return columns


def assert_same(one: Path, other: Path, *tables: str) -> None:
    """The same files with the same rows, bit for bit."""
    for table in tables:
        first, second = files(one, table), files(other, table)
        assert list(first) == list(second)
        assert first, f"{table} has no files"
        for name in first:
            assert first[name].schema.equals(second[name].schema, check_metadata=True)
            assert bits(first[name]) == bits(second[name]), (table, name)


def top9_by_definition(run: Path, data: Path, layers: dict[str, str], part_size: int, batch_size: int, k: int = 9):
    """Every activation of every image from torch's own forward, in the same batches; then sorted in Python.

    Args:
        layers: layer -> child of the network whose output is its activation.

    Returns: layer -> rows (feature_map, rank, activation, key, row, col).
    """
    model = Run.at(str(run)).load_model()
    index = Index.load(str(data))
    found: dict[str, list] = {layer: [] for layer in layers}
    outputs: dict[str, torch.Tensor] = {}
    hooks = [
        model.network.get_submodule(child).register_forward_hook(
            lambda module, args, output, layer=layer: outputs.update({layer: output.clone()})
        )
        for layer, child in layers.items()
    ]
    for part in Cut(index.split("val"), part_size):
        for start in range(0, part.num_rows, batch_size):
            samples = list(index.read(part.slice(start, batch_size)))
            size = model.preprocessing.resize_px, model.preprocessing.crop_px
            pixels = np.stack([images.centre_crop(images.decode(s.image), *size)[0] for s in samples])
            with torch.no_grad():
                model.network(model.preprocessing.normalise(torch.from_numpy(pixels)))
            for layer in layers:
                found[layer] += [(s.key, a.numpy()) for s, a in zip(samples, outputs[layer], strict=True)]
    for hook in hooks:
        hook.remove()
    return {layer: _best(entries, k) for layer, entries in found.items()}


def _best(entries, k):
    rows = []
    for feature_map in range(len(entries[0][1])):
        cells = []
        for key, activation in entries:
            plane = activation[feature_map]
            row, col = np.unravel_index(int(np.argmax(plane)), plane.shape)
            if plane[row, col] > 0:
                cells.append((-plane[row, col], key, int(row), int(col)))
        for rank, (negative, key, row, col) in enumerate(sorted(cells)[:k], start=1):
            rows.append((feature_map, rank, float(-negative), key, row, col))
    return rows
