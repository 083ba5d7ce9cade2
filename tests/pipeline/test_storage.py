"""Storage: a file is there whole or not at all, on a disk and on an object store alike."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipeline.storage import READ_ATTEMPTS, Location, StorageError, retrying
from tests.conftest import ROOT

DATA = bytes(range(256)) * 1000


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    """A folder of each kind of storage."""
    if request.param == "local":
        return Location.of(str(tmp_path / "folder"))
    request.getfixturevalue("s3")
    return Location.of("s3://bucket/folder")


def names(folder: Location) -> list[str]:
    """Every name, temporary ones too."""
    selector = pafs.FileSelector(folder.path, allow_not_found=True)
    return sorted(info.base_name for info in folder.filesystem.get_file_info(selector))


# -------------------------------------------------------------------------------------------- on every kind of storage


def test_what_is_written_is_read(folder):
    file = folder / "deeper" / "file.bin"
    assert not file.exists()
    file.write(DATA)
    assert file.exists()
    assert file.read() == DATA
    assert file.size() == len(DATA)
    with file.open() as stream:
        assert stream.read_at(5, 300) == DATA[300:305]
    assert (file.name, file.parent, folder.names()) == ("file.bin", folder / "deeper", ["deeper"])


def test_a_file_is_not_there_before_it_is_whole(folder):
    file = folder / "file.bin"
    with file.whole_file() as stream:
        stream.write(DATA)
        stream.flush()
        assert not file.exists()
        assert folder.names() == []
    assert file.read() == DATA
    assert names(folder) == ["file.bin"]


def fail_inside(file: Location, error: BaseException) -> None:
    with file.whole_file() as stream:
        stream.write(DATA)
        raise error


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_exception_inside_leaves_nothing(folder, error):
    file = folder / "file.bin"
    with pytest.raises(StorageError if error is OSError else error):
        fail_inside(file, error("the power went"))
    assert not file.exists()
    assert names(folder) == []


def test_an_exception_inside_leaves_the_file_that_was_there(folder):
    file = folder / "file.bin"
    file.write(b"before")
    with pytest.raises(ValueError, match="the power went"):
        fail_inside(file, ValueError("the power went"))
    assert file.read() == b"before"
    assert names(folder) == ["file.bin"]


def test_writing_again_replaces_the_file(folder):
    file = folder / "file.bin"
    file.write(b"before")
    file.write(DATA)
    assert file.read() == DATA
    file.write(b"")
    assert (file.read(), file.size()) == (b"", 0)


def test_two_writers_of_one_file_leave_one_whole_file(folder):
    file = folder / "file.bin"
    with file.whole_file() as one, file.whole_file() as two:
        one.write(b"1" * 100)
        two.write(b"2" * 100)
    assert file.read() in (b"1" * 100, b"2" * 100)
    assert names(folder) == ["file.bin"]


def test_temporary_files_may_lie_elsewhere(folder):
    with (folder / "results" / "file.bin").whole_file(staging=folder / "staging") as stream:
        stream.write(DATA)
        assert (folder / "results").names() == names(folder / "results") == []
    assert names(folder / "results") == ["file.bin"]
    assert names(folder / "staging") == []


def test_names_are_sorted_and_hide_temporary_ones(folder):
    for name in ("b", "a", ".tmp-left-behind", "c.tmp-x", ".hidden"):
        (folder / name).write(b"")
    assert folder.names() == [".hidden", "a", "b", "c.tmp-x"]
    assert (folder / "not there").names() == []


def test_files_and_folders_are_deleted_and_what_is_not_there_is_no_error(folder):
    (folder / "deep" / "er" / "file").write(b"1")
    (folder / "file").write(b"1")
    (folder / "file").delete()
    (folder / "deep").delete()
    (folder / "never").delete()
    assert not (folder / "file").exists()
    assert not (folder / "deep" / "er" / "file").exists()


def test_a_missing_file_is_named_at_once(folder, monkeypatch):
    def sleeps(seconds):
        raise AssertionError("a missing file is not tried again")

    monkeypatch.setattr("time.sleep", sleeps)
    with pytest.raises(FileNotFoundError, match="there is no file .+folder/file.bin"):
        (folder / "file.bin").read()
    with pytest.raises(FileNotFoundError, match="there is no file .+folder/file.bin"):
        (folder / "file.bin").size()


# ------------------------------------------------------------------------------------------------------------- a disk


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_kill_inside_leaves_no_half_of_a_file(tmp_path, before):
    file = Location.of(str(tmp_path / "file.bin"))
    if before is not None:
        file.write(before)
    script = (
        "import os, sys\nfrom pipeline.storage import Location\n"
        "with Location.of(sys.argv[1]).whole_file() as file:\n"
        "    file.write(bytes(100_000))\n    file.flush()\n    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file.bin")], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (file.read() if file.exists() else None) == before
    assert Location.of(str(tmp_path)).names() == (["file.bin"] if before else [])


def test_a_name_below_a_file_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match=r"cannot write in .+file/run: .+choose a folder that can be written"):
        (Location.of(str(tmp_path / "file")) / "run" / "run.json").write(b"x")
    assert not (Location.of(str(tmp_path / "file")) / "run").exists()


@pytest.mark.parametrize(
    "place",
    [
        "/proc/zfnet/run.json",
        "/proc/zfnet.json",
    ],
)
def test_a_place_that_cannot_be_written_is_refused_with_what_to_do(place):
    with pytest.raises(StorageError, match=r"cannot write .+: .+choose"):
        Location.of(place).write(b"x")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE of a child, since a limit once lowered stays."""
    script = (
        "import resource, sys\nfrom pipeline.storage import Location\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nLocation.of(sys.argv[1]).write(bytes(100_000))"
    )
    path = tmp_path / "file.bin"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, check=False, timeout=60, capture_output=True, text=True
    )
    assert f"StorageError: cannot write {path}: File too large; free space or choose another place" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- what is meant


def test_a_relative_path_is_taken_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location.of("runs/demo").local == tmp_path / "runs" / "demo"
    assert Location.of(Path("runs")) == Location.of(str(tmp_path / "runs"))


def test_a_relative_path_is_taken_from_zfnet_home_where_it_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("ZFNET_HOME", str(tmp_path))
    assert Location.of("runs/demo").local == tmp_path / "runs" / "demo"
    assert Location.of("/absolute").local == Path("/absolute")


def test_zfnet_home_may_be_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("ZFNET_HOME", f"file://{tmp_path}")
    assert Location.of("runs/demo").local == tmp_path / "runs" / "demo"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Location.of("~/runs").local == tmp_path / "runs"


def test_a_relative_path_in_rays_copy_of_the_folder_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(
        StorageError, match=r"'runs/demo' is relative.+throw-away copy.+absolute path.+s3://.+ZFNET_HOME"
    ):
        Location.of("runs/demo")
    assert Location.of(str(tmp_path)).local == tmp_path
    monkeypatch.setenv("ZFNET_HOME", str(tmp_path))
    assert Location.of("runs/demo").local == tmp_path / "runs" / "demo"


def test_a_url_of_a_local_file_is_a_local_path(tmp_path):
    assert Location.of(f"file://{tmp_path}/x").local == tmp_path / "x"
    assert str(Location.of(f"file://{tmp_path}/x/")) == f"{tmp_path}/x"


@pytest.mark.parametrize("url", ["nosuch://bucket/run", "memory://x", "https://host/run", "://"])
def test_an_unknown_scheme_is_refused_with_those_there_are(url):
    with pytest.raises(StorageError, match=r"cannot use '.+give a local path, s3:// or gs://"):
        Location.of(url)


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_path_is_not_the_current_folder(empty):
    with pytest.raises(StorageError, match=rf"the path '{empty}' is empty: give a local path, s3:// or gs://; \."):
        Location.of(empty)


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3:///folder", "s3://?region=eu-west-1", "gs://", "gcs:///x"])
def test_a_url_without_a_bucket_is_refused(url):
    scheme = url.partition(":")[0]
    with pytest.raises(StorageError, match=rf"cannot use '.+ names no bucket, as {scheme}://bucket/folder"):
        Location.of(url)


def test_a_location_names_itself_as_it_was_given(tmp_path):
    assert str(Location.of(str(tmp_path)) / "a") == f"{tmp_path}/a"
    s3 = pafs.S3FileSystem(anonymous=True, region="us-east-1")
    assert str(Location(s3, "bucket/run") / "run.json") == "s3://bucket/run/run.json"
    assert Location(s3, "bucket/run").local is None


# ------------------------------------------------------------------------------------------------------------ retrying


def failing(times: int, error: Exception):
    calls = []

    def action():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return action, calls


def test_storage_that_fails_is_tried_again_and_each_time_later(monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    action, _ = failing(READ_ATTEMPTS - 1, OSError("AWS Error NETWORK_CONNECTION"))
    assert retrying(Location.of("/x"), action) == READ_ATTEMPTS
    assert len(waits) == READ_ATTEMPTS - 1
    assert waits == sorted(waits)
    assert waits[0] > 0


def test_storage_that_keeps_failing_is_reported_with_the_name_and_the_cause(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    action, calls = failing(99, OSError("AWS Error ACCESS_DENIED"))
    with pytest.raises(StorageError, match=r"cannot read /a/b after 3 attempts: AWS Error ACCESS_DENIED"):
        retrying(Location.of("/a/b"), action)
    assert len(calls) == READ_ATTEMPTS


@pytest.mark.parametrize("error", [FileNotFoundError("x"), ValueError("x")])
def test_what_will_not_change_is_not_tried_again(error):
    action, calls = failing(99, error)
    with pytest.raises(type(error)):
        retrying(Location.of("/x"), action)
    assert len(calls) == 1


def test_a_folder_is_not_read_as_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match=str(tmp_path)):
        Location.of(str(tmp_path)).read()
    assert os.listdir(tmp_path) == []  # noqa: PTH208
