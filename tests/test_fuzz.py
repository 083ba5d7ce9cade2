"""Broken and hostile files: shards, indexes, checkpoints, descriptions. Never a crash without a message, never a file
outside of the folder that was given, never an unpickling.

`make fuzz` runs 10,000 cases instead of 500; ZFNET_FUZZ_CASES and ZFNET_FUZZ_SEED choose others, and a failure prints
the case that hypothesis shrank it to.
"""

import functools
import gc
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import chdir, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import checkpoints, metrics, status, sweep, tables, train
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import FORESEEN
from pipeline.indexing import index_shards
from pipeline.runs import Run
from pipeline.shards import Index, Sample, Skipped
from tests.conftest import ROOT, samples
from tests.tars import write_tar
from zfnet import images

CASES = int(os.environ.get("ZFNET_FUZZ_CASES", "500"))
SEED = int(os.environ.get("ZFNET_FUZZ_SEED", "0"))
BLOCK = tarfile.BLOCKSIZE

NAMES = [
    b"a.jpg", b"../a.jpg", b"../../../../tmp/escaped.jpg", b"/tmp/escaped.jpg", b"a/../../b.jpg", b"./a.jpg", b".jpg",
    b"jpg", b"a", b"", b".", b"..", b"a/", b"k" * 10_000 + b".jpg", b"\xff\xfe\x80.jpg", b"a\nb\r.jpg", b"a\0b.jpg",
    b"A.JPG", "\U0001f98a\u202e\u05e9.jpg".encode(), b"<script>alert(1)</script>.jpg", b"a.b.c.jpg",
    b"a.cls", b"a.json",
]  # fmt: skip
KINDS = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
         tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, b"\xff"]  # fmt: skip
PAX = [{"path": "../../escaped.jpg"}, {"size": "99999999999"}, {"size": "-1"}, {"size": "x"}, {"mtime": "nan"},
       {"GNU.sparse.size": "1e9"}, {"GNU.sparse.map": "0,9,9"}, {"linkpath": "/etc/passwd"},
       {"k": "v" * 70_000}]  # fmt: skip
VALUES = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("nan"),
    "",
    "../../x",
    "x" * 10_000,
    "\ud83d",
    [],
    [[]],
    {},
    {"a": None},
]

MOST_MEMORY_MB = 1024


@pytest.fixture(scope="module", autouse=True)
def memory():
    """However large a header says that its member is, memory stays in bounds over all cases of this file."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < MOST_MEMORY_MB


def resident(name):
    """A line of this process's status, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


cases = functools.partial(settings, database=None, print_blob=True, suppress_health_check=list(HealthCheck))


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = jpeg()


# ------------------------------------------------------------------------------------------------------ strategies


@st.composite
def damaged(draw, data):
    """The bytes, some flipped, cut, or their blocks dropped, doubled or exchanged."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(["flip", "cut", "drop", "double", "exchange", "zero"]))
        place = draw(st.integers(0, max(0, len(data) - 1)))
        block = place // BLOCK * BLOCK
        if how == "flip" and data:
            data[place] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del data[place:]
        elif how == "drop":
            del data[block : block + BLOCK]
        elif how == "double":
            data[block:block] = data[block : block + BLOCK]
        elif how == "exchange":
            other = draw(st.integers(0, max(0, len(data) - 1))) // BLOCK * BLOCK
            one, two = data[block : block + BLOCK], data[other : other + BLOCK]
            data[block : block + len(two)], data[other : other + len(one)] = two, one
        else:
            data[block : block + BLOCK] = bytes(len(data[block : block + BLOCK]))
    return bytes(data)


@st.composite
def hostile_tars(draw):
    """Members of odd names and kinds, sizes that headers only claim, and pax headers that contradict them."""
    parts = []
    for _ in range(draw(st.integers(1, 5))):
        name = draw(st.one_of(st.sampled_from(NAMES), st.binary(max_size=300)))
        body = draw(st.sampled_from([JPEG, b"", b"3", b"-1", b"9" * 400, b"{", b'{"boxes": 3}', b"\x80\x04."]))
        member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
        member.size = len(body)
        member.type = draw(st.sampled_from([tarfile.REGTYPE] * 9 + KINDS))
        member.linkname = draw(st.sampled_from(["", "/etc/passwd", "../../x", "a.jpg"]))
        member.pax_headers = draw(st.sampled_from([{}] * 5 + PAX))
        how = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
        try:
            header = member.tobuf(how, "utf-8", "surrogateescape")
        except ValueError:  # a name that this format cannot hold
            continue
        if draw(st.integers(0, 9)) == 0:  # a claim of gigabytes, in base 256
            claimed = draw(st.sampled_from([2**31, 2**33, 2**62])).to_bytes(11, "big")
            header = header[:-BLOCK] + _resized(header[-BLOCK:], b"\x80" + claimed)
        parts.append(header + body + bytes(-len(body) % BLOCK))
    ending = draw(st.sampled_from([bytes(2 * BLOCK), bytes(BLOCK), b"", b"\x01" * BLOCK]))
    return b"".join(parts) + ending


def _resized(header, size):
    header = header[:124] + size + header[136:]
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + f"{total:06o}\0 ".encode() + header[156:]


@st.composite
def altered_json(draw, data):
    """The same document with something in it exchanged or missing."""
    document = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        place = document
        while isinstance(place, dict | list) and place:
            names = sorted(place) if isinstance(place, dict) else range(len(place))
            name = draw(st.sampled_from(list(names)))
            if not isinstance(place[name], dict | list) or not place[name] or draw(st.booleans()):
                if draw(st.booleans()):
                    place[name] = draw(st.sampled_from(VALUES))
                else:
                    del place[name]
                break
            place = place[name]
    return json.dumps(document).encode()


# ---------------------------------------------------------------------------------------------------------- watching


@contextmanager
def no_unpickling():
    """Fails where anything is unpickled."""

    def never(*args, **kwargs):
        raise AssertionError("something was unpickled")

    kept = pickle.loads, pickle.load, pickle.Unpickler
    pickle.loads = pickle.load = pickle.Unpickler = never
    try:
        yield
    finally:
        pickle.loads, pickle.load, pickle.Unpickler = kept


@contextmanager
def foreseen():
    """Only errors with a message for users come out of the block, and they say something."""
    try:
        with no_unpickling():
            yield
    except FORESEEN as error:
        text = str(error)
        assert len(text) > 20, text
        assert "Traceback" not in text


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------------------ shards


@functools.cache
def sound_tar():
    with tempfile.TemporaryDirectory() as folder:
        write_tar(
            Path(folder) / "a.tar", [(key, {**members, "jpg": JPEG, "json": b"{}"}) for key, members in samples(4)]
        )
        return (Path(folder) / "a.tar").read_bytes()


def shard_is_safe(data, accept_damaged):
    """Whatever its bytes: indexed, read and decoded, or refused with a message; all that is listed is accounted for."""
    with tempfile.TemporaryDirectory() as name, chdir(name):  # as deep as the names with .. lead up
        folder = Path(name) / "one" / "two" / "three"
        (folder / "in").mkdir(parents=True)
        (folder / "in" / "val-0.tar").write_bytes(data)
        with foreseen():
            index_shards([str(folder / "in")], str(folder / "out"), classes=None, accept_damaged=accept_damaged)
            index = Index.load(str(folder / "out"))
            rows = index.split("val")
            read = list(index.read(rows))
            assert [(found.shard, found.key) for found in read] == list(
                zip(rows["shard"].to_pylist(), rows["key"].to_pylist(), strict=True)
            )
            for found in read:
                assert isinstance(found, Sample | Skipped)
                if isinstance(found, Sample):
                    with suppress(images.BadImage):
                        assert images.input_pixels(found.image, 16, 12)[0].shape == (12, 12, 3)
        assert not Path("/tmp/escaped.jpg").exists()
        assert listing(Path(name)) - {"one", "one/two", "one/two/three"} <= {
            f"one/two/three/{path}" for path in WRITTEN
        }


WRITTEN = {
    "in",
    "in/val-0.tar",
    "out",
    "out/index.json",
    "out/samples.parquet",
    "out/classes.txt",
}


@seed(SEED)
@cases(max_examples=CASES * 3 // 10)
@given(st.data(), st.booleans())
def test_damaged_shards(data, accept_damaged):
    shard_is_safe(data.draw(damaged(sound_tar())), accept_damaged)


@seed(SEED)
@cases(max_examples=CASES * 3 // 10)
@given(hostile_tars(), st.booleans())
def test_hostile_shards(data, accept_damaged):
    shard_is_safe(data, accept_damaged)


@pytest.mark.slow
def test_members_of_gigabytes_take_no_memory(tmp_path):
    """A real member of 3 GB (a sparse file): neither indexing nor reading holds it."""
    path = tmp_path / "val-0.tar"
    write_tar(path, [(key, members) for key, members in samples(2)])
    sound = path.read_bytes().rstrip(b"\0")
    sound += bytes(-len(sound) % BLOCK)
    member = tarfile.TarInfo("large.jpg")
    member.size = 3 * 2**30
    with path.open("wb") as file:
        file.write(sound + member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(len(sound) + BLOCK + member.size + 2 * BLOCK)
    script = (
        "import resource; from pipeline.indexing import index_shards; from pipeline.shards import Index\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"index_shards([{str(path)!r}], {str(tmp_path / 'out')!r}, classes=None, accept_damaged=False)\n"
        f"index = Index.load({str(tmp_path / 'out')!r})\n"
        "found = list(index.read(index.split('val')))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print([getattr(one, 'reason', 'read') for one in found], after - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['read', 'read', 'too_large']"), done.stdout
    assert int(done.stdout.split()[-1]) < 300_000, "kilobytes more than before"


# ------------------------------------------------------------------------------------- indexes, runs and checkpoints


@functools.cache
def sound_run():
    """A folder with shards, and a run that was trained and swept, with a second training under way."""
    folder = Path(tempfile.mkdtemp(prefix="zfnet-fuzz-"))
    data = folder / "shards"
    data.mkdir()
    write_tar(data / "train-0.tar", samples(16))
    write_tar(data / "val-0.tar", samples(5, seed=1))
    (data / "classes.txt").write_text("red\ngreen\nblue\n")
    index_shards([str(data)], str(data), classes=None, accept_damaged=False)
    run = folder / "run"
    small = {"epochs": 2, "batch": 8, "decoders": 0, "workers": Workers(num=0)}
    assert train.run(train.Options(run=str(run), data=str(data), **small)) == 0
    options = Options(run=str(run), data=str(data), workers=Workers(num=0))
    assert sweep.run(top9.ANALYSIS, options, top9.Config(layers=("conv5",))) == 0
    (folder / "begun").mkdir()
    shutil.copytree(run / "checkpoints", folder / "begun" / "checkpoints")
    shutil.copytree(run / "metrics", folder / "begun" / "metrics")
    (folder / "begun" / "checkpoints" / "pace.json").write_text('{"step": 3, "steps": 2, "seconds_left": 1.0}')
    return folder


def use(folder):
    """All that reads a run, each by itself: the first that is refused does not hide the others."""
    data, run, begun = folder / "shards", Run.at(str(folder / "run")), Run.at(str(folder / "begun"))
    looked_at = [
        lambda: [list(Index.load(str(data)).read(Index.load(str(data)).split(split))) for split in ("train", "val")],
        lambda: Index.load(str(data)).data_id("val"),
        run.load_model,
        lambda: [run.manifest(table) for table in ("top9", "feature_maps")],
        lambda: status.run(str(run.location), as_json=True),
        lambda: status.run(str(begun.location), as_json=False),
        lambda: [checkpoints.read(begun, name) for name in [checkpoints.newest(begun)] if name],
        lambda: checkpoints.load_model(begun, 2),
        lambda: metrics.read(begun),
        lambda: metrics.pace(begun),
        lambda: tables.load(str(run.location), "top9"),
    ]
    for look in looked_at:
        with foreseen():
            look()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@seed(SEED)
@cases(max_examples=CASES * 4 // 10)
@given(st.data())
def test_damaged_indexes_runs_and_checkpoints(data):
    sound = sound_run()
    chosen = data.draw(st.sampled_from([str(path.relative_to(sound)) for path in files_of(sound)]))
    kept = (sound / chosen).read_bytes()
    before = listing(sound)
    change = damaged(kept) if not chosen.endswith(".json") or data.draw(st.booleans()) else altered_json(kept)
    (sound / chosen).write_bytes(data.draw(change))
    try:
        use(sound)
    finally:
        (sound / chosen).write_bytes(kept)
    assert listing(sound) == before


def test_the_sound_run_is_read_without_complaint():
    """Else the fuzzer would find nothing because everything is refused."""
    folder = sound_run()
    with no_unpickling():
        assert Run.at(str(folder / "run")).load_model().classes == ("red", "green", "blue")
        assert checkpoints.read(Run.at(str(folder / "begun")), "epoch-0002").epoch == 2
        assert len(tables.load(str(folder / "run"), "top9"))
        index = Index.load(str(folder / "shards"))
        assert all(isinstance(found, Sample) for found in index.read(index.split("train")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4_000_000
