"""The node's cache of shards: always the bytes that the index describes, whole, and never more than it may hold."""

import fcntl
import hashlib
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import cache
from pipeline.cache import ShardCache
from pipeline.indexing import index_shards
from pipeline.shards import Index
from pipeline.storage import Location, StorageError
from tests.conftest import samples
from tests.pipeline.faults import Fault
from tests.tars import write_tar

SIZE = 100_000


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """What was used just now may go too."""
    monkeypatch.setattr(cache, "RECENT_SECONDS", -1.0)


def shard(number: int, size: int = SIZE) -> tuple[Location, int, str]:
    """A shard in the bucket, as `ShardCache.open` takes it."""
    data = bytes([number]) * size
    location = Location.of(f"s3://bucket/val-{number:06d}.tar")
    if not location.exists():
        location.write(data)
    return location, size, hashlib.sha256(data).hexdigest()


def is_right(copies: ShardCache, number: int, size: int = SIZE) -> bool:
    with copies.open(*shard(number, size)) as file:
        return file.read() == bytes([number]) * size


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir() if path.name != "lock")


def fetches(requests) -> int:
    return sum(request.method == "GET" and "val-" in request.path for request in requests)


def test_a_shard_is_fetched_once(s3, tmp_path):
    copies = ShardCache(tmp_path / "cache", 10 * SIZE)
    shard(1)
    with s3.recorded() as made:
        assert is_right(copies, 1)
        assert is_right(copies, 1)
    assert fetches(made) == 1
    assert files(tmp_path / "cache") == [".tar"]


def test_the_copies_used_longest_ago_go_first(s3, tmp_path):
    copies = ShardCache(tmp_path / "cache", int(3.5 * SIZE))
    for number in (1, 2, 3):
        assert is_right(copies, number)
        os.utime(tmp_path / "cache" / f"{shard(number)[2]}.tar", (number, number))
    assert is_right(copies, 1)  # used again
    assert is_right(copies, 4)
    kept = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
    assert kept == {shard(number)[2] for number in (1, 3, 4)}
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= copies.limit


def test_a_cache_that_is_too_small_for_the_job_is_not_filled_again_and_again(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "RECENT_SECONDS", 60.0)
    copies = ShardCache(tmp_path / "cache", int(2.5 * SIZE))
    for number in (1, 2, 3):
        shard(number)
    with s3.recorded() as made:
        found = [copies.open(*shard(number)) is not None for _ in range(5) for number in (1, 2, 3)]
    assert found == [True, True, False] * 5
    assert fetches(made) == 2


def test_a_shard_larger_than_the_cache_is_not_kept(s3, tmp_path):
    copies = ShardCache(tmp_path / "cache", SIZE - 1)
    assert copies.open(*shard(1)) is None
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("size", [SIZE, SIZE + 1])
def test_what_changed_since_it_was_indexed_is_not_kept(s3, tmp_path, size):
    location, expected, sha256 = shard(1)
    location.write(bytes(size))
    copies = ShardCache(tmp_path / "cache", 10 * SIZE)
    assert copies.open(location, expected, sha256) is None
    assert files(tmp_path / "cache") == []


def test_a_copy_that_somebody_cut_is_fetched_again(s3, tmp_path):
    copies = ShardCache(tmp_path / "cache", 10 * SIZE)
    assert is_right(copies, 1)
    os.truncate(next((tmp_path / "cache").glob("*.tar")), 10)
    assert is_right(copies, 1)


def test_what_a_killed_process_left_is_taken_over_or_cleared(s3, tmp_path):
    copies = ShardCache(tmp_path / "cache", int(1.5 * SIZE))
    copies.folder.mkdir()
    for number in (1, 2):
        (copies.folder / f"{shard(number)[2]}.part").write_bytes(bytes(SIZE))
    assert is_right(copies, 1)
    assert files(copies.folder) == [".tar"]


def test_what_is_being_fetched_is_not_cleared(s3, tmp_path):
    copies = ShardCache(tmp_path / "cache", int(1.5 * SIZE))
    copies.folder.mkdir()
    part = copies.folder / f"{shard(2)[2]}.part"
    with part.open("wb") as other:
        other.write(bytes(SIZE))
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert copies.open(*shard(1)) is None  # no room
        assert part.exists()


def test_a_copy_that_goes_while_it_is_read_stays_readable(s3, tmp_path):
    copies = ShardCache(tmp_path / "cache", int(1.5 * SIZE))
    with copies.open(*shard(1)) as first:
        assert is_right(copies, 2)
        assert files(copies.folder) == [".tar"]
        assert first.read() == bytes([1]) * SIZE


@pytest.mark.parametrize("kind", ["cut", "503"])
def test_a_fetch_that_fails_once_is_made_again_from_the_start(s3, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shard(1)
    s3.inject(Fault(kind))
    assert is_right(ShardCache(tmp_path / "cache", 10 * SIZE), 1)
    assert s3.injected


def test_a_disk_full_of_other_things_is_a_cache_without_room(s3, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    copies = ShardCache(tmp_path / "cache", 10 * SIZE)
    assert copies.open(*shard(1)) is None
    assert files(copies.folder) == []


def test_a_folder_that_cannot_be_written_is_refused(s3, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write .+/file/cache: Not a directory; give a folder .+ZFNET_CACHE"):
        ShardCache(tmp_path / "file" / "cache", SIZE).open(*shard(1))


@pytest.mark.parametrize(("folder", "size"), [("relative", "1"), ("/tmp/x", "many"), ("/tmp/x", "0"), ("/tmp/x", "-1")])
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, folder, size):
    monkeypatch.setenv("ZFNET_CACHE", folder)
    monkeypatch.setenv("ZFNET_CACHE_GB", size)
    with pytest.raises(StorageError, match="give an absolute path on a disk of the node, and a number"):
        cache.of_this_node()


def test_without_the_environment_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("ZFNET_CACHE", raising=False)
    assert cache.of_this_node() is None


# ------------------------------------------------------------------------------------------------ several processes


def reads_all(folder: str, numbers: list[int], rounds: int, wrong) -> None:
    cache.RECENT_SECONDS = -1.0
    copies = ShardCache(Path(folder), int(3.5 * SIZE))
    for turn in range(rounds):
        for number in numbers:
            try:
                if not is_right(copies, number):
                    wrong.value += 1
                if sum(path.stat().st_size for path in Path(folder).glob("*.tar")) > copies.limit:
                    wrong.value += 1
            except FileNotFoundError:  # of the sum: a copy went meanwhile
                continue
            except AttributeError:  # None: no room beside what the others fetch just now
                time.sleep(0.001 * turn)


@pytest.mark.slow
def test_processes_that_fetch_and_clear_at_once_never_see_half_a_shard(s3, tmp_path):
    """Three processes, six shards, room for three of them."""
    for number in range(6):
        shard(number)
    context = multiprocessing.get_context("spawn")
    wrong = context.Value("i", 0)
    orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]]
    readers = [context.Process(target=reads_all, args=(str(tmp_path / "cache"), order, 5, wrong)) for order in orders]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert wrong.value == 0
    assert set(files(tmp_path / "cache")) <= {".tar"}


def test_readers_that_want_one_shard_at_once_fetch_it_once(s3, tmp_path):
    shard(1)
    with s3.recorded() as made, ThreadPoolExecutor(8) as readers:
        found = readers.map(lambda _: is_right(ShardCache(tmp_path / "cache", 10 * SIZE), 1), range(16))
        assert list(found) == [True] * 16
    assert fetches(made) == 1


# ------------------------------------------------------------------------------------------------------ of a job


def test_samples_come_from_the_cache_and_are_the_same(s3, tmp_path, monkeypatch):
    local = tmp_path / "shards"
    local.mkdir()
    write_tar(local / "val-000000.tar", samples(12))
    index_shards([str(local)], str(local), classes=None, accept_damaged=False)
    Location.of("s3://bucket/data/val-000000.tar").write((local / "val-000000.tar").read_bytes())
    index_shards(["s3://bucket/data"], "s3://bucket/data", classes=None, accept_damaged=False)

    def read(folder: str) -> list:
        index = Index.load(folder)
        rows = index.split("val")
        return [sample for start in range(0, 12, 5) for sample in index.read(rows.slice(start, 5))]

    expected = read(str(local))
    monkeypatch.setenv("ZFNET_CACHE", str(tmp_path / "cache"))
    with s3.recorded() as made:
        assert read("s3://bucket/data") == expected
        assert read("s3://bucket/data") == expected
    assert fetches(made) == 1
    assert read(str(local)) == expected
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1  # what lies on a disk is not copied
    Location.of("s3://bucket/data/val-000000.tar").delete()
    assert read("s3://bucket/data") == expected
    monkeypatch.delenv("ZFNET_CACHE")
    with pytest.raises(StorageError, match="bring it back"):
        read("s3://bucket/data")
