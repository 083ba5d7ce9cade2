"""Result tables: the shared columns, and how a table is conformed, written and read. Pure Arrow.

Each analysis declares its schema once, from these columns where they are shared, so that all tables join. Column
types are plain: strings, numbers, flat lists with shape columns, PNG bytes. They read the same in pandas, Polars
and DuckDB, without this package.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from pipeline.storage import Location, StorageError

if TYPE_CHECKING:
    import pandas as pd

ROW_GROUP_BYTES = 64 * 2**20
"""A row group of a finished table holds at most this many bytes of values."""

_STREAMED_ROWS = 4096


class SchemaError(ValueError):
    """A table does not fit its schema: a fault of the analysis, never of the data."""


def column(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    """A documented column, never null: one sentence with its unit."""
    return pa.field(name, kind, nullable=False, metadata={"doc": doc})


def or_null(name: str, kind: pa.DataType, doc: str) -> pa.Field:
    """A documented column whose values may be null."""
    return column(name, kind, doc).with_nullable(True)


def schema(table: str, *, row: str, file: str, key: tuple[str, ...], columns: list[pa.Field]) -> pa.Schema:
    """The columns of a table, and in the schema's metadata what docs/tables.md says of it; every file carries both.

    Args:
        table: name of the table.
        row: what a row is.
        file: what has a file of its own: a layer, an epoch; empty where there is one file.
        key: the columns that name a row within a run.
        columns: made with `column` or `or_null`, or the shared ones below.
    """
    about = {"table": table, "row": row, "file": file, "key": ", ".join(key)}
    return pa.schema(columns, metadata=about)


MODEL_ID = column("model_id", pa.string(), "Identity of the network: hash of weights, architecture, preprocessing.")
DATA_ID = column("data_id", pa.string(), "Identity of the images: hash of the shards of the split.")
LAYER = column("layer", pa.string(), "Layer, named by its convolution or linear module.")
FEATURE_MAP = column("feature_map", pa.int32(), "Channel of the layer, from 0.")
RANK = column("rank", pa.int32(), "Place among the images of this feature map, from 1.")
ACTIVATION = column("activation", pa.float32(), "Activation of the cell, after ReLU where one follows.")
KEY = column("key", pa.string(), "Name of the sample, unique in its split.")
SHARD = column("shard", pa.string(), "File name of the shard that holds the sample.")
LABEL = or_null("label", pa.int32(), "Class of the sample; null where it has none.")
LABEL_NAME = or_null("label_name", pa.string(), "Name of the class; null where unknown.")
ROW = column("row", pa.int32(), "Row of the cell in its feature map, from 0.")
COL = column("col", pa.int32(), "Column of the cell in its feature map, from 0.")
TOP = column("top", pa.int32(), "First row of the receptive field in input pixels; may leave the image.")
LEFT = column("left", pa.int32(), "First column of the receptive field in input pixels; may leave the image.")
HEIGHT = column("height", pa.int32(), "Height of the receptive field in input pixels.")
WIDTH = column("width", pa.int32(), "Width of the receptive field in input pixels.")

CELL = [LAYER, FEATURE_MAP, RANK, ACTIVATION, KEY, SHARD, LABEL, LABEL_NAME, ROW, COL, TOP, LEFT, HEIGHT, WIDTH]
"""One of a feature map's strongest cells: what top9 and deconv share."""

SKIPPED = schema(
    "skipped",
    row="a sample that could not be read, and why",
    file="piece of work",
    key=("table", "shard", "key"),
    columns=[
        column("table", pa.string(), "Table for which the sample was read."),
        SHARD,
        KEY,
        column("reason", pa.string(), "Short code: bad_image, too_large, truncated, ..."),
        column("detail", pa.string(), "What was found, in words."),
    ],
)

ACCOUNT = schema(
    "account",
    row="a part: how often it was started and how long it took",
    file="piece of work",
    key=("table", "work", "part"),
    columns=[
        column("table", pa.string(), "Table that the part is of."),
        column("work", pa.string(), "The work that the part belongs to: hash of slices, configuration and samples."),
        column("part", pa.int32(), "Number of the part, from 0."),
        column("samples", pa.int32(), "Samples of the part."),
        column("skipped", pa.int32(), "Samples of the part that could not be read."),
        column("attempts", pa.int32(), "How often the part was started."),
        column("seconds", pa.float64(), "Seconds from its first read to its commit."),
    ],
)


def conform(rows: dict[str, Any] | pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows as a table of exactly this schema, columns in its order.

    Raises: SchemaError where a column is missing, unknown, of another type, or null though it may not be.
    """
    given = list(rows) if isinstance(rows, dict) else rows.column_names
    if set(given) != set(schema.names):
        missing, unknown = sorted(set(schema.names) - set(given)), sorted(set(given) - set(schema.names))
        raise SchemaError(f"columns missing: {missing}, unknown: {unknown}; expected {schema.names}")
    try:
        columns = [_cast(rows[field.name], field) for field in schema]
        table = pa.Table.from_arrays(columns, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise SchemaError(f"a column does not have the type of its schema: {error}") from error
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise SchemaError(f"column {field.name!r} holds a null, and its schema allows none")
    return table


def _cast(values: Any, field: pa.Field) -> Any:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.cast(field.type)
    return pa.array(values, type=field.type)


def box_columns(box: tuple[Any, ...], count: int) -> dict[str, Any]:
    """The columns of receptive fields (top, left, height, width), numbers or arrays, for this many rows."""
    return {
        field.name: np.broadcast_to(np.asarray(side), count)
        for field, side in zip([TOP, LEFT, HEIGHT, WIDTH], box, strict=True)
    }


def flat_lists(arrays: list[Any], kind: pa.DataType) -> pa.Array:
    """A column of flat lists from arrays of any shape, row-major, without a detour over Python floats."""
    lengths = [array.size for array in arrays]
    offsets = pa.array([0, *_cumulative(lengths)], type=pa.int32())
    values = pa.concat_arrays([pa.array(array.reshape(-1), type=kind) for array in arrays] or [pa.array([], type=kind)])
    return pa.ListArray.from_arrays(offsets, values)


def _cumulative(lengths: list[int]) -> Iterator[int]:
    total = 0
    for length in lengths:
        total += length
        yield total


def write(
    table: pa.Table,
    location: Location,
    staging: Location | None = None,
    row_group_bytes: int = ROW_GROUP_BYTES,
    compression: str = "zstd",
) -> None:
    """One Parquet file, whole or not at all."""
    write_stream(iter([table]), table.schema, location, staging, row_group_bytes, compression)


def _storage(schema: pa.Schema, compression: str) -> dict[str, Any]:
    """How Parquet stores the columns. Only texts have a dictionary: numbers seldom repeat. They compress better by the
    differences of integers and by the bytes of floats, all first ones side by side."""
    kinds = dict(_leaf(field.name, field.type) for field in schema)
    integers = {name: "DELTA_BINARY_PACKED" for name, kind in kinds.items() if kind in (pa.int32(), pa.int64())}
    floats = {name: "BYTE_STREAM_SPLIT" for name, kind in kinds.items() if kind in (pa.float32(), pa.float64())}
    return {
        "compression": compression,
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)],
        "column_encoding": integers | floats,
        "write_page_checksum": True,
    }


def _leaf(name: str, kind: pa.DataType) -> tuple[str, pa.DataType]:
    """Parquet's name of a column's values, and their type."""
    return _leaf(f"{name}.list.element", kind.value_type) if pa.types.is_list(kind) else (name, kind)


def stored_bytes(table: pa.Table) -> int:
    """What the table takes as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **_storage(table.schema, "zstd"))
    return int(sink.getvalue().size)


def write_stream(
    tables: Iterator[pa.Table],
    schema: pa.Schema,
    location: Location,
    staging: Location | None = None,
    row_group_bytes: int = ROW_GROUP_BYTES,
    compression: str = "zstd",
) -> int:
    """One Parquet file from tables that come one after another; memory holds one at a time.

    Returns: the number of rows. The same tables give the same bytes.
    """
    rows = 0
    with (
        location.whole_file(staging) as file,
        pq.ParquetWriter(file, schema, **_storage(schema, compression)) as writer,
    ):
        for table in tables:
            table = table.cast(schema)
            rows += table.num_rows
            if table.num_rows:
                per_row = max(1, table.nbytes // table.num_rows)
                writer.write_table(table, row_group_size=max(1, row_group_bytes // per_row))
    return rows


def read(location: Location, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
    """A Parquet file, or all files of a folder in the order of their names. Raises: FileNotFoundError, StorageError."""
    if not location.exists():
        raise FileNotFoundError(f"there is no table {location}")
    with sound(location):
        if location.name.endswith(".parquet") and filters is None:  # without the set-up of a data set: half the time
            with location.open() as file:
                return opened(file).read(columns)
        return pq.read_table(
            location.path,
            columns=columns,
            filters=filters,
            filesystem=location.filesystem,
            page_checksum_verification=True,
        )


def opened(file: Any) -> pq.ParquetFile:
    """A Parquet file whose pages must be as they were written: a flipped bit is an error, not another number."""
    return pq.ParquetFile(file, page_checksum_verification=True)


@contextmanager
def sound(location: Location) -> Iterator[None]:
    """What Parquet finds wrong with a file in the block is said with its name. Raises: StorageError."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(
            f"{location} cannot be read as a table ({str(error).strip()}): bring it back, or delete it and give the "
            "command that makes it again"
        ) from None


def read_equal(location: Location, columns: list[str], name: str, value: str) -> pa.Table:
    """The rows of a Parquet file whose column `name` has this value: only row groups that may hold it are read.

    The same as `read` with a filter, several times faster for small files.
    """
    with sound(location), location.open() as file:
        parquet = opened(file)
        place = parquet.schema_arrow.get_field_index(name)
        ranges = [parquet.metadata.row_group(i).column(place).statistics for i in range(parquet.num_row_groups)]
        groups = [i for i, held in enumerate(ranges) if held is None or held.min <= value <= held.max]
        rows = parquet.read_row_groups(groups, [name, *columns])
    return rows.filter(pc.equal(rows[name], value)).select(columns)


def stream(location: Location, columns: list[str], rows: int | None = None) -> Iterator[pa.Table]:
    """The rows of a Parquet file in order, some thousands or `rows` at a time.

    Raises: FileNotFoundError, StorageError.
    """
    with sound(location), location.open() as file:
        for batch in opened(file).iter_batches(rows or _STREAMED_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def load(run: str | Location, table: str, columns: list[str] | None = None, filters: Any = None) -> pd.DataFrame:
    """A finished table of a run as a DataFrame: `load("runs/demo", "top9", filters=[("rank", "=", 1)])`.

    The same rows as pd.read_parquet gives, and more kindly: integers that may be null stay integers (pandas' Int32),
    slices that are not finished are left out, and `frame.attrs` says what each column means.

    Args:
        run: run directory: a local path, s3:// or gs://.
        table: its name, with that of --name: top9, top9-mine, metrics, skipped.
        columns: those to read; default all.
        filters: as pyarrow.parquet.read_table takes them.

    Raises: FileNotFoundError naming the tables that there are.
    """
    place = Location.of(run)
    files = _finished(place, table)
    if not files:
        others = [name for name in ("metrics", *(place / "results").names()) if _finished(place, name)]
        raise FileNotFoundError(
            f"there is no finished table {table!r} in {place}, which has {', '.join(others) or 'none'}: run the job "
            "that makes it (docs/tables.md names it)"
        )
    found = pa.concat_tables([read(file, columns, filters) for file in files], promote_options="default")
    frame: pd.DataFrame = found.to_pandas(integer_object_nulls=True)
    for field in found.schema:
        if field.nullable and field.type in _NULLABLE:
            frame[field.name] = frame[field.name].astype(_NULLABLE[field.type])
    frame.attrs = {field.name: field.metadata[b"doc"].decode() for field in found.schema}
    return frame


_NULLABLE = {pa.int32(): "Int32", pa.int64(): "Int64", pa.bool_(): "boolean"}
"""What pandas has for columns that may be null."""


def _finished(run: Location, table: str) -> list[Location]:
    """The files of a table whose manifests are written; all, of tables that have no manifests."""
    folder = run / "metrics" if table == "metrics" else run / "results" / table
    names = [name for name in sorted(folder.names()) if name.endswith(".parquet")]
    if table not in _WITHOUT_MANIFEST:
        made = set((run / "results" / "manifests" / table).names())
        names = [name for name in names if name.replace(".parquet", ".json") in made]
    return [folder / name for name in names]


_WITHOUT_MANIFEST = ("metrics", "skipped", "account")


def image(row: Mapping[str, Any] | pd.Series, column: str | None = None) -> npt.NDArray[Any]:
    """The picture in a row, ready to be shown: [height, width, RGB].

    Args:
        row: of pandas (`frame.iloc[0]`), or a dictionary, as Polars and DuckDB give it.
        column: one that ends in _png or _jpeg (uint8), or `projection` (float32, the projection's own values, however
            they are stored); default the row's only picture.

    Raises: KeyError where the row has no such column, or several pictures and none is named.
    """
    if column is None:
        pictures = [str(name) for name in row.keys() if str(name).endswith(("_png", "_jpeg"))]  # noqa: SIM118 (a Series)
        if len(pictures) != 1:
            raise KeyError(f"the row has {', '.join(pictures) or 'no picture'}: name one column")
        (column,) = pictures
    if column != "projection":
        return np.asarray(_decoded(row[column]))
    stored, scale = row["projection"], np.float32(row["projection_scale"])
    if isinstance(stored, bytes):
        values = (np.asarray(_decoded(stored), dtype=np.float32) - np.float32(128)) / np.float32(127)
    else:
        values = np.asarray(stored, dtype=np.float32).reshape(row["projection_height"], row["projection_width"], 3)
    largest = np.abs(values).max(initial=0)  # 1 where they are shares of the scale, the scale itself where not
    return values * (scale / largest) if largest else values


def _decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def grid(row: Mapping[str, Any] | pd.Series, column: str = "probability_map") -> npt.NDArray[Any]:
    """One of an image's maps over the occluder's positions: [grid_rows, grid_cols].

    Args:
        row: of the table occlusion, as `image` takes it.
        column: activation_map, probability_map or class_map.

    Raises: KeyError where the row has no such column.
    """
    return np.asarray(row[column]).reshape(row["grid_rows"], row["grid_cols"])
