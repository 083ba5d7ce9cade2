"""An object store that fails: what is read is right or an error, what is written is whole or not there.

Every fault happens on the way between pyarrow's client and a real S3 server (tests/pipeline/s3.py).
"""

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pipeline import patience, storage, tables
from pipeline.indexing import index_shards
from pipeline.shards import BadShards, Index
from pipeline.storage import Location, StorageError
from tests.conftest import ROOT, samples
from tests.pipeline.faults import Fault, Request
from tests.tars import write_tar

DATA = os.urandom(3 * 2**20)
LARGE = os.urandom(2**20) * 24
ALWAYS = 1000


@pytest.fixture
def impatient(monkeypatch):
    """What hangs is noticed soon, and what fails is tried again at once."""
    monkeypatch.setattr(storage, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(storage, "_CLIENT_ATTEMPTS", 1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    storage._client.cache_clear()


def at(name: str = "file.bin") -> Location:
    return Location.of(f"s3://bucket/folder/{name}")


def methods(requests: list[Request]) -> dict[str, int]:
    return dict(Counter(request.method for request in requests))


# ----------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("size", [0, 100, 9 * 2**20])
def test_a_small_object_is_one_put(s3, size):
    with s3.recorded() as made:
        at().write(DATA[:100] * (size // 100))
    assert methods(made) == {"PUT": 1}
    with s3.recorded() as made, at("built").whole_file() as file:
        file.write(bytes(size))
    assert methods(made) == {"PUT": 1}


def test_a_large_object_is_nothing_until_its_last_request(s3):
    seen = []
    s3.inject(*(Fault("slow", "PUT", part=f"partNumber={n}&", seconds=0.01) for n in (1, 2, 3)))
    before = s3.due

    def looks(request):
        if request.method in ("PUT", "POST") and not seen.append(request) and "uploads" not in request.path:
            assert not any(r.path == "/bucket/folder/file.bin" and r.method == "PUT" for r in seen)
        return before(request)

    s3.due = looks
    at().write(LARGE)
    assert [request.method for request in seen] == ["POST", "PUT", "PUT", "PUT", "POST"]
    assert at().read() == LARGE


def test_a_table_is_one_put(s3):
    with s3.recorded() as made:
        tables.write(pa.table({"x": list(range(1000))}), at("table.parquet"))
    assert methods(made) == {"PUT": 1}
    assert tables.read(at("table.parquet"))["x"].to_pylist() == list(range(1000))


def test_a_whole_object_is_read_in_few_requests(s3):
    at().write(LARGE)
    with s3.recorded() as made:
        assert at().read() == LARGE
    assert methods(made) == {"HEAD": 1, "GET": 2}


def test_memory_holds_no_more_than_what_is_on_its_way(s3, tmp_path, monkeypatch):
    """The upload of a large file waits for what it has sent."""
    flushed = []

    class Stream:
        def write(self, data):
            flushed.append(len(data))

        def flush(self):
            flushed.append("flush")

        def close(self):
            flushed.append("close")

    class Store:
        def open_output_stream(self, path):
            return Stream()

    with (tmp_path / "large").open("w+b") as file:
        file.truncate(160 * 2**20)
        Location(Store(), "bucket/large")._upload(file)
    assert flushed == [*[2**24] * 4, "flush", *[2**24] * 4, "flush", *[2**24] * 2, "close"]


# -------------------------------------------------------------------------------------------------------------- reads

READS = {
    "cut in the middle of the body": Fault("cut"),
    "cut twice": Fault("cut", times=2),
    "refused once": Fault("503"),
    "refused twice": Fault("503", times=2),
    "internal error on the size": Fault("500", "HEAD"),
    "slow": Fault("slow", times=2, seconds=0.5),
    "hanging once": Fault("hang"),
}


@pytest.mark.parametrize("fault", READS.values(), ids=READS)
def test_a_read_through_a_fault_is_right(s3, impatient, fault):
    at().write(DATA)
    s3.inject(fault)
    assert at().read() == DATA
    s3.inject(fault)
    assert at().read_range(1000, 2**20) == DATA[1000 : 1000 + 2**20]
    assert s3.injected


@pytest.mark.parametrize("kind", ["cut", "503"])
def test_a_read_that_keeps_failing_is_an_error_with_the_name(s3, impatient, kind):
    at().write(DATA)
    s3.inject(Fault(kind, times=ALWAYS))
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/folder/file.bin after 3 attempts: AWS Error"):
        at().read()


def test_a_read_that_hangs_for_ever_ends_with_an_error(s3, impatient, monkeypatch):
    monkeypatch.setenv("ZFNET_STORAGE_TIMEOUT", "0.5")
    at().write(DATA)
    s3.inject(Fault("hang", times=ALWAYS))
    with pytest.raises(StorageError, match=r"cannot read s3://.+file.bin: storage has not answered for 0.5 s"):
        at().read()


def test_a_table_is_read_through_faults(s3, impatient, monkeypatch):
    """Its many small reads are tried again by pyarrow's client alone."""
    monkeypatch.setattr(storage, "_CLIENT_ATTEMPTS", 3)
    table = pa.table({"x": list(range(100_000))})
    tables.write(table, at("table.parquet"))
    for kind in ("cut", "503"):
        s3.inject(Fault(kind))
        assert tables.read(at("table.parquet")).equals(table)
        assert s3.injected


def test_a_table_that_cannot_be_read_is_an_error_with_the_name(s3, impatient):
    tables.write(pa.table({"x": list(range(100_000))}), at("table.parquet"))
    s3.inject(Fault("503", times=ALWAYS, spared=1))
    with pytest.raises(StorageError, match="cannot read s3://bucket/folder/table.parquet.*: .*AWS Error"):
        tables.read(at("table.parquet"))


# ------------------------------------------------------------------------------------------------------------- writes

WRITES = {
    "refused once": Fault("503", "PUT"),
    "refused twice": Fault("500", "PUT", times=2),
    "lost half way": Fault("lost", "PUT"),
    "lost twice": Fault("lost", "PUT", times=2),
    "slow": Fault("slow", "PUT", seconds=0.5),
}


@pytest.mark.slow
def test_a_write_that_hangs_once_is_sent_again(s3, impatient):
    s3.inject(Fault("hang", "PUT"))
    at().write(DATA)
    assert s3.injected
    assert at().read() == DATA


@pytest.mark.parametrize("size", [len(DATA), len(LARGE)])
@pytest.mark.parametrize("fault", WRITES.values(), ids=WRITES)
def test_a_write_through_a_fault_is_whole(s3, impatient, fault, size):
    data = LARGE[:size]
    s3.inject(fault)
    at().write(data)
    assert s3.injected
    assert at().read() == data


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize(
    ("kind", "part"),
    [("503", ""), ("lost", ""), ("503", "partNumber=1&"), ("lost", "partNumber=2&"), ("503", "partNumber=3&")],
)
def test_a_write_that_keeps_failing_leaves_what_was_there(s3, impatient, kind, part, before):
    if before is not None:
        at().write(before)
    s3.inject(Fault(kind, "PUT", part=part, times=ALWAYS))
    with pytest.raises(
        StorageError, match=r"cannot write s3://bucket/folder/file.bin after 3 attempts: .+same command"
    ):
        at().write(LARGE if part else DATA)
    s3.inject()
    assert (at().read() if at().exists() else None) == before
    assert at().parent.names() == ([] if before is None else ["file.bin"])


def test_an_upload_whose_last_request_fails_is_not_there(s3, impatient):
    s3.inject(Fault("503", "POST", part="uploadId=", times=ALWAYS))
    with pytest.raises(StorageError, match="cannot write s3://"):
        at().write(LARGE)
    s3.inject()
    assert not at().exists()


def test_a_write_that_hangs_for_ever_ends_with_an_error_and_can_only_end_whole(s3, impatient, monkeypatch):
    monkeypatch.setenv("ZFNET_STORAGE_TIMEOUT", "0.5")
    s3.inject(Fault("hang", "PUT", times=ALWAYS))
    with pytest.raises(StorageError, match=r"cannot write s3://.+: storage has not answered for 0.5 s"):
        at().write(DATA)
    assert not at().exists()


def test_what_cannot_be_read_back_is_not_sent_in_part(s3, impatient, tmp_path):
    """The local file that an object is built in fails while it is sent: nothing appears, though the stream ends."""

    class Fails:
        def __init__(self):
            self.reads = 0

        def seek(self, place):
            self.reads = 0

        def read(self, length):
            self.reads += 1
            if self.reads == 2:
                raise OSError(5, "Input/output error")
            return LARGE[:length]

    with pytest.raises(StorageError, match="Input/output error"):
        at()._upload(Fails())
    assert not at().exists()


CHILD = """
import sys
from pipeline.storage import Location, StorageError

class Fails:
    def seek(self, place):
        pass

    def read(self, length):
        raise OSError(5, "Input/output error")

try:
    if sys.argv[1] == "unreadable":
        Location.of("s3://bucket/folder/file.bin")._upload(Fails())
    else:
        Location.of("s3://bucket/folder/file.bin").write(bytes(1000))
except StorageError as error:
    kept = error  # as a framework does that prints it later
    print(error)
"""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("unreadable", "Input/output error"),
        pytest.param("503", "cannot write", marks=pytest.mark.slow),  # a minute of attempts
        pytest.param("hang", "not answered for 1 s", marks=pytest.mark.slow),  # three, of pyarrow's attempts
    ],
)
def test_a_process_whose_upload_failed_ends(s3, kind, said):
    """pyarrow's stream, destroyed as the process ends, waits for threads that have ended."""
    if kind != "unreadable":
        s3.inject(Fault(kind, "PUT", times=ALWAYS))
    environment = {**os.environ, "ZFNET_STORAGE_TIMEOUT": "1" if kind == "hang" else ""}
    command = [sys.executable, "-c", CHILD, kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert said in done.stdout, done.stderr
    assert done.returncode == 0


def test_no_temporary_file_stays_on_the_disk_or_in_the_bucket(s3, impatient, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with at().whole_file() as file:
        file.write(DATA)
        assert list(tmp_path.iterdir()) == []
    s3.inject(Fault("503", "PUT", times=ALWAYS))
    with pytest.raises(StorageError), at("other").whole_file() as file:
        file.write(DATA)
    s3.inject()
    assert list(tmp_path.iterdir()) == []
    assert at().parent.names() == ["file.bin"]


def test_a_full_disk_for_temporary_files_is_named(s3, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    message = r"cannot write s3://.+ \(built in .+ first; \$TMPDIR\): No space left"
    with pytest.raises(StorageError, match=message), at().whole_file():
        pass


# ------------------------------------------------------------------------------------------------- where and who


def test_a_bucket_that_is_not_there_is_refused_with_what_to_do(s3, impatient):
    with pytest.raises(StorageError, match="cannot write s3://nowhere/x after 3 attempts: .+bucket does not exist"):
        Location.of("s3://nowhere/x").write(b"x")


def test_anonymous_access_signs_nothing(s3, monkeypatch):
    at().write(b"x")
    assert [request.signed for request in s3.requests] == [True]
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with s3.recorded() as made, suppress(OSError):
        at().write(b"x")
    assert made
    assert not any(request.signed for request in made)


def test_anonymous_access_to_google_is_the_same_variable_for_it(monkeypatch):
    monkeypatch.setenv("GS_NO_SIGN_REQUEST", "YES")
    location = Location.of("gs://bucket/run")
    options = location.filesystem.__reduce__()[1][0]
    assert options["anonymous"]
    assert options["retry_time_limit"].total_seconds() == patience.SECONDS
    assert str(location / "x") == "gs://bucket/run/x"


def test_credentials_in_a_url_are_refused_without_printing_them():
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as refused:
        Location.of("s3://key:secret@bucket/run")
    assert "secret@" not in str(refused.value)


def test_the_url_may_name_the_endpoint(s3, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = s3.endpoint.removeprefix("http://")
    location = Location.of(f"s3://bucket/run?scheme=http&endpoint_override={host}")
    (location / "file").write(b"x")
    assert Location.of(str(location / "file")).read() == b"x"


def test_a_location_goes_to_other_processes(s3):
    at().write(DATA)
    assert pickle.loads(pickle.dumps(at())).read() == DATA


# ------------------------------------------------------------------------------------------------------------- shards


def shards_on(s3, tmp_path, count: int = 12) -> tuple[str, Path]:
    """A shard in the bucket with its index, and the same on the disk."""
    local = tmp_path / "shards"
    local.mkdir()
    write_tar(local / "val-000000.tar", samples(count))
    index_shards([str(local)], str(local), classes=None, accept_damaged=False)
    at("val-000000.tar").write((local / "val-000000.tar").read_bytes())
    index_shards(["s3://bucket/folder"], "s3://bucket/folder", classes=None, accept_damaged=False)
    return "s3://bucket/folder", local


def read_all(folder: str) -> list:
    index = Index.load(folder)
    return list(index.read(index.split("val")))


def test_shards_in_a_bucket_have_the_same_index_and_the_same_samples(s3, tmp_path):
    url, local = shards_on(s3, tmp_path)
    one, other = Index.load(url), Index.load(str(local))
    assert one.samples.equals(other.samples)
    assert one.data_id("val") == other.data_id("val")
    assert read_all(url) == read_all(str(local))


def test_an_index_of_a_bucket_takes_each_shard_once(s3, tmp_path):
    url, _ = shards_on(s3, tmp_path)
    with s3.recorded() as made:
        index_shards([f"{url}/val-000000.tar"], f"{url}/index", classes=None, accept_damaged=False)
    assert sum(request.method == "GET" and "val-000000.tar" in request.path for request in made) == 1


def test_a_folder_without_shards_is_refused(s3, tmp_path):
    for folder in ("s3://bucket/nothing", str(tmp_path)):
        with pytest.raises(BadShards, match=f"given no shards in {folder}: name the tar files"):
            index_shards([folder], str(tmp_path), classes=None, accept_damaged=False)


@pytest.mark.parametrize("fault", READS.values(), ids=READS)
def test_samples_are_read_through_faults(s3, tmp_path, impatient, fault):
    url, local = shards_on(s3, tmp_path)
    s3.inject(Fault(fault.kind, fault.method, "val-000000.tar", fault.times, 0, fault.seconds))
    assert read_all(url) == read_all(str(local))
    assert s3.injected


def test_storage_that_keeps_failing_is_never_a_skipped_sample(s3, tmp_path, impatient):
    url, _ = shards_on(s3, tmp_path)
    s3.inject(Fault("cut", part="val-000000.tar", times=ALWAYS))
    with pytest.raises(StorageError, match="cannot read s3://bucket/folder/val-000000.tar after 3 attempts"):
        read_all(url)


# ----------------------------------------------------------------------------------------------- a disk that hangs


def test_a_disk_that_does_not_answer_is_an_error_after_a_time(tmp_path, monkeypatch):
    """A named pipe that nobody writes to: opening it for reading never returns, as on a dead network disk."""
    monkeypatch.setenv("ZFNET_STORAGE_TIMEOUT", "0.2")
    os.mkfifo(tmp_path / "val-000000.tar")
    location = Location.of(str(tmp_path / "val-000000.tar"))
    for read in (location.read, lambda: location.read_range(0, 10), lambda: location.open().__enter__()):
        with pytest.raises(StorageError, match=r"cannot read .+val-000000.tar: storage has not answered for 0.2 s"):
            read()
    assert Location.of(str(tmp_path)).names() == ["val-000000.tar"]
    (tmp_path / "other").write_bytes(b"others can be read")
    assert Location.of(str(tmp_path / "other")).read() == b"others can be read"


def test_slow_is_not_hung_while_there_is_progress(monkeypatch):
    monkeypatch.setenv("ZFNET_STORAGE_TIMEOUT", "0.3")
    wait = threading.Event().wait

    def slow():
        for _ in range(8):
            wait(0.1)
            patience.progress()
        return "read"

    assert patience.answered(slow) == "read"
    with pytest.raises(patience.Hung, match="no answer for 0.3 s"):
        patience.answered(lambda: wait(2))


def test_waiting_threads_end_with_the_thread_that_asked():
    def count() -> int:
        return sum(thread.name == "storage" for thread in threading.enumerate())

    patience.answered(lambda: None)
    before = count()
    askers = [threading.Thread(target=lambda: patience.answered(lambda: None)) for _ in range(20)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    deadline = threading.Event()
    for _ in range(100):
        if count() <= before:
            break
        deadline.wait(0.02)
    assert count() <= before


def test_a_forked_process_reads_too(tmp_path):
    """What DataLoader's processes are: the parent's waiting thread is not in them."""
    (tmp_path / "file").write_bytes(b"here")
    location = Location.of(str(tmp_path / "file"))
    assert location.read() == b"here"
    child = os.fork()
    if child == 0:
        os._exit(0 if location.read() == b"here" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_pyarrow_does_is_still_what_was_measured(s3):
    """The reasons for the ways above; where one of these fails after an upgrade, they can be thought over."""
    plain, _ = pafs.FileSystem.from_uri("s3://bucket/x")
    with s3.recorded() as made, plain.open_output_stream("bucket/x") as stream:
        stream.write(b"x")
    assert methods(made) == {"POST": 2, "PUT": 1}
    at().write(DATA)
    with s3.recorded() as made, plain.open_input_stream("bucket/folder/file.bin") as stream:
        stream.read()
    assert methods(made)["GET"] > 10
