"""docs/tables.md is what the schemas say, and no table is missing from it."""

import importlib
import pkgutil

import pipeline.analyses
from docs.generate import tables as page
from pipeline.analysis import Analysis


def test_the_page_is_current():
    assert page.PAGE.read_text() == page.page(), "docs/tables.md is out of date: run `make docs` and commit it"


def test_every_table_of_every_analysis_is_declared():
    declared = page.found()
    for info in pkgutil.iter_modules(pipeline.analyses.__path__, "pipeline.analyses."):
        analysis = getattr(importlib.import_module(info.name), "ANALYSIS", None)
        if analysis is not None:
            written = analysis.tables if isinstance(analysis, Analysis) else (analysis.table,)
            missing = set(written) - set(declared)
            assert not missing, f"{info.name}: declare {missing} with pipeline.tables.schema at the top of the module"


def test_every_column_has_a_meaning_and_every_key_is_of_columns():
    for name, table in page.found().items():
        assert set(table.key) <= set(table.schema.names), name
        for field in table.schema:
            assert field.metadata[b"doc"].decode().endswith("."), f"{name}.{field.name}"


def test_a_column_of_one_name_has_one_type_in_all_tables():
    kinds: dict[str, dict[str, str]] = {}
    for name, table in page.found().items():
        for field in table.schema:
            if name not in page.APART and (field.name in table.key or field.name.endswith("_id")):
                kinds.setdefault(field.name, {})[name] = str(field.type)
    assert {name: found for name, found in kinds.items() if len(set(found.values())) > 1} == {}
