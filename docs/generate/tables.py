"""Write docs/tables.md from the schemas that the code declares: `python docs/generate/tables.py`.

Every schema made by `pipeline.tables.schema` at the top of a module is found; there is no list to keep.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pipeline  # noqa: E402
from pipeline import makers  # noqa: E402

PAGE = ROOT / "docs" / "tables.md"

INTRODUCTION = """\
# Tables

*Written by `make docs` from the schemas in the code; a test holds it to them.*

A table is a folder of Parquet files, `RUN/results/TABLE` (or `TABLE-NAME` after `--name NAME`), and anything that reads
Parquet reads it. Column types are plain: strings, numbers, flat lists with shape columns, PNG bytes.

```python
import pandas as pd, polars as pl, duckdb

pd.read_parquet("runs/demo/results/top9")
pl.read_parquet("runs/demo/results/top9")
duckdb.sql("SELECT * FROM 'runs/demo/results/top9/*.parquet'")
```

With this package, `pipeline.tables` adds types and arrays:

```python
from pipeline import tables

top9 = tables.load("runs/demo", "top9")  # integers that may be null stay integers; top9.attrs: meanings
deconv = tables.load("runs/demo", "deconv", filters=[("layer", "=", "conv5"), ("rank", "=", 1)])
tables.image(deconv.iloc[0])  # uint8 [height, width, RGB]: the patch
tables.image(deconv.iloc[0], "projection")  # float32 [height, width, RGB]: the projection
tables.grid(tables.load("runs/demo", "occlusion").iloc[0], "class_map")  # [grid_rows, grid_cols]
```

A file is finished when `RUN/results/manifests/TABLE/` names it; `load` reads finished files alone. `metrics` lies in
`RUN/metrics`, and `samples` beside the shards. A column means the same in every table that has it, so tables join by
the columns of equal name; each table below says on which. All tables of a run share `model_id`, which is left out of
the keys. [The cookbook](cookbook.md) asks questions of them.
"""


@dataclass(frozen=True)
class Table:
    """A table as its schema declares it."""

    schema: pa.Schema

    def about(self, what: str) -> str:
        """Its row, file or key, as `pipeline.tables.schema` was given it."""
        return str(self.schema.metadata[what.encode()].decode())

    @property
    def key(self) -> list[str]:
        """The columns that name a row."""
        return self.about("key").split(", ")


def found() -> dict[str, Table]:
    """Every table that a module declares, by name; the schema with most columns where they depend on options."""
    tables: dict[str, Table] = {}
    for info in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        module = importlib.import_module(info.name)
        for schema in vars(module).values():
            if not isinstance(schema, pa.Schema) or b"table" not in (schema.metadata or {}):
                continue
            name = schema.metadata[b"table"].decode()
            declared = re.search(rf'schema\(\s*"{name}"', inspect.getsource(module))
            if declared and (name not in tables or len(schema) > len(tables[name].schema)):
                tables[name] = Table(schema)
    return dict(sorted(tables.items()))


def page() -> str:
    """The whole page."""
    tables = found()
    lines = [INTRODUCTION, "| table | a row is | a file for each | made by |", "|---|---|---|---|"]
    for name, table in tables.items():
        lines.append(
            f"| [`{name}`](#{name}) | {table.about('row')} | {table.about('file') or 'one file'} | {_job(name)} |"
        )
    for name, table in tables.items():
        lines += ["", *_section(name, table, tables)]
    return "\n".join(lines) + "\n"


def _job(table: str) -> str:
    return "every job" if table in APART else f"`jobs/{makers.job(table)}.py`"


def _section(name: str, table: Table, tables: dict[str, Table]) -> list[str]:
    lines = [f"## {name}", "", f"A row is {table.about('row')}. Key: {_code(table.key)}.", ""]
    if joins := _joins(name, table, tables):
        lines += [f"Joins {'; '.join(joins)}.", ""]
    lines += ["| column | type | meaning |", "|---|---|---|"]
    for field in table.schema:
        meaning = field.metadata[b"doc"].decode().replace("|", r"\|")
        lines.append(f"| `{field.name}` | `{_kind(field.type)}`{', null' if field.nullable else ''} | {meaning} |")
    return lines


def _kind(kind: pa.DataType) -> str:
    """As NumPy calls it."""
    if pa.types.is_list(kind):
        return f"list of {_kind(kind.value_type)}"
    return {"float": "float32", "halffloat": "float16", "double": "float64"}.get(str(kind), str(kind))


def _joins(name: str, table: Table, tables: dict[str, Table]) -> list[str]:
    """The tables of which a row of this one finds one row, by their key; grouped by the columns."""
    by: dict[str, list[str]] = {}
    for other, its in tables.items():
        if other != name and other not in APART and set(its.key) <= set(table.schema.names):
            by.setdefault(_code(its.key), []).append(f"[`{other}`](#{other})")
    return [f"{', '.join(others)} by {columns}" for columns, others in by.items()]


APART = ("skipped", "account")
"""Tables of the work itself, which join with nothing."""


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page())
