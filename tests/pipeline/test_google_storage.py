"""`gs://`, on a real server of Google's protocol: the same code, and what it does differently.

All jobs on it: tests/jobs/test_every_job_in_a_bucket.py.
"""

import os
import pickle
from dataclasses import replace

import pyarrow as pa
import pytest

from pipeline import patience, storage, tables
from pipeline.indexing import index_shards
from pipeline.shards import Index
from pipeline.storage import Location, StorageError
from tests.conftest import samples
from tests.pipeline.faults import Fault
from tests.tars import write_tar

DATA = os.urandom(3 * 2**20)
LARGE = os.urandom(2**20) * 24
FOLDER = "gs://bucket/folder"


def at(name: str = "file.bin") -> Location:
    return Location.of(f"{FOLDER}/{name}")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(patience, "SECONDS", 3.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    storage._client.cache_clear()


@pytest.mark.parametrize("data", [b"", b"x", DATA, LARGE], ids=["empty", "small", "3 MB", "24 MB"])
def test_what_is_written_is_read(gs, data):
    at().write(data)
    assert at().read() == data
    assert at().size() == len(data)
    for start in (0, 1000, max(0, len(data) - 1)):
        assert at().read_range(start, 100) == data[start : start + 100]


def test_a_file_built_in_pieces_is_whole(gs):
    with at().whole_file() as file:
        for start in range(0, len(LARGE), 2**20):
            file.write(LARGE[start : start + 2**20])
        assert not at().exists()
    assert at().read() == LARGE


def test_a_write_replaces_what_was_there(gs):
    at().write(b"before")
    at().write(b"after")
    assert at().read() == b"after"


def test_folders_are_listed_and_deleted(gs):
    for name in ("a/deep/er", "a/f", "c", ".tmp-x"):
        at(name).write(b"x")
    folder = Location.of(FOLDER)
    assert folder.names() == ["a", "c"]
    assert (folder / "a").names() == ["deep", "f"]
    assert (folder / "a" / "f").exists()
    assert str(folder / "a") == f"{FOLDER}/a"
    assert folder.times()["c"] > 1.7e9
    (folder / "a").delete()
    assert folder.names() == ["c"]
    folder.delete()
    assert folder.names() == []
    folder.delete()


def test_what_is_not_there_is_named(gs):
    assert not at().exists()
    for action in (at().read, at().size, lambda: at().read_range(0, 1)):
        with pytest.raises(FileNotFoundError, match=f"there is no file {FOLDER}/file.bin"):
            action()


def test_tables_go_there_and_back(gs):
    table = pa.table({"x": list(range(1000))})
    tables.write(table, at("table.parquet"))
    assert tables.read(at("table.parquet")).equals(table)


def test_a_location_goes_to_other_processes(gs):
    at().write(DATA)
    there = pickle.loads(pickle.dumps(at()))
    assert there.read() == DATA
    assert str(there) == str(at())


def test_the_url_may_name_the_endpoint(gs, monkeypatch):
    at().write(b"x")
    monkeypatch.delenv("CLOUD_STORAGE_EMULATOR_ENDPOINT")
    scheme, _, host = gs.endpoint.partition("://")
    location = Location.of(f"gs://bucket/folder?scheme={scheme}&endpoint_override={host}") / "file.bin"
    assert location.read() == b"x"
    assert Location.of(str(location)).read() == b"x"


FAULTS = {
    "cut in the middle of the body": Fault("cut"),
    "refused once": Fault("503"),
    "slow": Fault("slow", seconds=0.5),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_read_through_a_fault_is_right(gs, fault):
    at().write(DATA)
    for spared in range(3):  # the size, the opening, the body
        gs.inject(replace(fault, spared=spared))
        assert at().read() == DATA
        assert gs.inject()


@pytest.mark.parametrize("kind", ["503", "lost"])
@pytest.mark.parametrize("data", [DATA[:100], LARGE], ids=["small", "24 MB"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_write_through_a_fault_is_whole(gs, method, kind, data):
    gs.inject(Fault(kind, method))
    at().write(data)
    assert gs.inject()
    assert at().read() == data


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_write_that_keeps_failing_leaves_what_was_there(gs, impatient, method):
    at().write(b"before")
    gs.inject(Fault("503", method, times=1000))
    with pytest.raises(StorageError, match=f"cannot write {FOLDER}/file.bin"):
        at().write(LARGE)
    gs.inject()
    assert at().read() == b"before"


def test_shards_have_the_same_index_and_the_same_samples(gs, tmp_path):
    write_tar(tmp_path / "val-000000.tar", samples(6))
    at("val-000000.tar").write((tmp_path / "val-000000.tar").read_bytes())
    read = []
    for folder in (str(tmp_path), FOLDER):
        index_shards([folder], folder, classes=None, accept_damaged=False)
        index = Index.load(folder)
        read.append((index.data_id("val"), index.samples, list(index.read(index.split("val")))))
    assert read[0] == read[1]
