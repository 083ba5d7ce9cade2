"""The index and the one reader: every sample is read or accounted for, whatever happens to the tar."""

import contextlib
import json
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import shards
from pipeline.indexing import index_shards, split_of
from pipeline.shards import BadShards, Index, Sample, Skipped
from pipeline.sources import commands
from pipeline.storage import StorageError
from tests.conftest import samples
from tests.tars import add, offsets, write_tar

COUNT = 10


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "val-000000.tar", samples(COUNT))


def make_index(path, **options):
    return index_shards(
        [str(path)], str(path.parent / "index"), **{"classes": None, "accept_damaged": False, **options}
    )


def read_all(index, split="val"):
    return list(index.read(index.split(split)))


def outcomes(index):
    return ["ok" if isinstance(found, Sample) else found.reason for found in read_all(index)]


def test_what_is_written_is_read(shard):
    make_index(shard)
    index = Index.load(str(shard.parent / "index"))
    found = read_all(index)
    assert [(s.key, s.members) for s in found] == samples(COUNT)
    assert [s.label for s in found] == [int(members["cls"]) for _, members in samples(COUNT)]
    assert found[0].image == samples(COUNT)[0][1]["jpg"]
    assert index.splits == {"val": COUNT}


def test_the_index_has_the_fields_of_wids(shard):
    make_index(shard)
    index = json.loads((shard.parent / "index" / "index.json").read_text())
    assert index["wids_version"] == 1
    assert index["shardlist"] == [{"url": shard.name, "nsamples": COUNT, "filesize": shard.stat().st_size}]


def test_shards_may_be_named_in_any_order(tmp_path):
    paths = [write_tar(tmp_path / f"val-{i:06d}.tar", samples(3, seed=i)) for i in range(5)]
    tables = []
    for seed in range(3):
        random.Random(seed).shuffle(paths)
        tables.append(
            index_shards([str(p) for p in paths], str(tmp_path / str(seed)), classes=None, accept_damaged=False)
        )
    assert all(table.samples.equals(tables[0].samples) for table in tables)
    assert len({table.data_id("val") for table in tables}) == 1


@pytest.mark.parametrize(("file", "split"), [("val-000001.tar", "val"), ("a-b-3.tar", "a-b"), ("plain.tar", "plain")])
def test_the_split_is_the_name_up_to_the_last_dash(file, split):
    assert split_of(file) == split


# --------------------------------------------------------------------------------------------- truncation, damage


def cut(path, at):
    path.write_bytes(path.read_bytes()[:at])


def damage_header(path, member):
    header = offsets(path)[member][0]
    data = bytearray(path.read_bytes())
    data[header + 100 : header + 160] = b"\xff" * 60
    path.write_bytes(bytes(data))


def place(path, member):
    """(header, data, end of data, end of padding) of a member."""
    header, data, size = offsets(path)[member]
    return header, data, data + size, data + -(-size // 512) * 512


# Members 0, 1 are the jpg and cls of sample 0, and so on: member 8 is the jpg of sample 4.
DAMAGES = {
    "inside a member": lambda p: cut(p, place(p, 8)[1] + 10),
    "inside the padding": lambda p: cut(p, place(p, 8)[2] + 1),
    "at a member's border": lambda p: cut(p, place(p, 8)[0]),
    "inside a header": lambda p: cut(p, place(p, 8)[0] + 200),
    "a corrupt header": lambda p: damage_header(p, 8),
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(random.Random(0).randbytes(5000)),
}


@pytest.mark.parametrize("kind", [*DAMAGES, "only the end-of-archive missing"])
def test_damaged_shards_are_refused_by_name(shard, kind):
    if kind in DAMAGES:
        DAMAGES[kind](shard)
    else:
        cut(shard, place(shard, 2 * COUNT - 1)[3])
    with pytest.raises(
        BadShards, match=r"(?s)damaged shards, nothing was written:\n  val-000000.tar: .+--accept-damaged"
    ):
        make_index(shard)
    assert not (shard.parent / "index").exists()


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_damage_after_the_index_was_made_skips_just_what_is_lost(shard, kind):
    make_index(shard)
    DAMAGES[kind](shard)
    found = outcomes(Index.load(str(shard.parent / "index")))
    assert len(found) == COUNT
    if kind in ("empty", "garbage"):
        assert "ok" not in found
    elif kind == "a corrupt header":
        assert found == ["ok"] * 4 + ["corrupt_tar"] + ["ok"] * 5
    else:
        assert found == ["ok"] * 4 + ["truncated"] * 6


@settings(max_examples=200)
@given(st.data())
def test_the_fast_reader_of_headers_is_tarfile_or_leaves_it_to_it(data):
    """Of a sample as tars hold it, with some bytes changed: none, or those of any header or member."""
    name = st.text("aé/.x", min_size=1, max_size=120)
    members = data.draw(st.lists(st.tuples(name, st.binary(max_size=600)), min_size=1, max_size=3))
    dialect = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    sample = bytearray()
    for text, content in members:
        member = tarfile.TarInfo(text)
        member.size = len(content)
        with contextlib.suppress(ValueError):  # ustar has no way to write some long names
            sample += member.tobuf(dialect) + content + bytes(-len(content) % 512)
    for place in data.draw(st.lists(st.integers(0, max(0, len(sample) - 1)), max_size=2)) if sample else ():
        sample[place] = data.draw(st.integers(0, 255))
    fast = shards._plain_files(bytes(sample))
    if fast:
        assert fast == shards._files(bytes(sample))


def test_plain_headers_are_read_fast(shard):
    for sample in Index.load(str(make_index(shard).folder), str(shard.parent / "index")).samples.to_pylist():
        bytes_ = shard.read_bytes()[sample["offset"] :][: sample["bytes"]]
        assert shards._plain_files(bytes_) == shards._files(bytes_)


def test_accepting_damage_indexes_what_comes_before_it(shard):
    DAMAGES["inside a member"](shard)
    index = make_index(shard, accept_damaged=True)
    assert index.splits == {"val": 4}
    assert "byte" in index.shards["val"][0]["damage"]
    assert outcomes(index) == ["ok"] * 4


def test_only_the_end_mark_missing_loses_nothing_once_indexed(shard):
    make_index(shard)
    cut(shard, place(shard, 2 * COUNT - 1)[3])
    assert outcomes(Index.load(str(shard.parent / "index"))) == ["ok"] * COUNT


def test_a_shard_that_is_gone_is_storages_fault(shard):
    make_index(shard)
    shard.unlink()
    with pytest.raises(StorageError, match="bring it back"):
        read_all(Index.load(str(shard.parent / "index")))


def test_storage_that_fails_once_is_read_again_from_the_start(shard, monkeypatch):
    from pipeline.storage import Location

    index = make_index(shard)
    before = read_all(index)
    opened = Location._open
    calls = []

    def fails_first(self):
        calls.append(self)
        if len(calls) == 1:
            raise OSError("AWS Error NETWORK_CONNECTION")
        return opened(self)

    monkeypatch.setattr(Location, "_open", fails_first)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert read_all(index) == before


def test_storage_that_keeps_failing_is_never_a_skipped_sample(shard, monkeypatch):
    from pipeline.storage import Location

    index = make_index(shard)

    def fails(self):
        raise OSError("AWS Error ACCESS_DENIED")

    monkeypatch.setattr(Location, "_open", fails)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StorageError, match=r"val-000000.tar after 3 attempts: AWS Error"):
        read_all(index)


# --------------------------------------------------------------------------------------------------- odd samples


def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def test_labels_are_optional_and_images_are_not(tmp_path):
    path = tar_of(
        tmp_path / "val-0.tar",
        ("a.JPG", b"1"),
        ("b.jpeg", b"2"),
        ("b.cls", b" 7\n"),
        ("c.png", b"3"),
        ("c.cls", b"x"),
        ("d.cls", b"1"),
        ("dir/e.f.webp", b"5"),
        ("readme", b"no suffix"),
    )
    index = make_index(path)
    found = read_all(index)
    assert [f.key for f in found] == ["a", "b", "c", "d", "dir/e"]
    assert [f.label for f in found[:3]] == [None, 7, None]
    assert isinstance(found[3], Skipped)
    assert found[3].reason == "no_image"
    assert isinstance(found[4], Skipped)  # its suffix is f.webp: no image


def test_a_member_twice_keeps_the_first(tmp_path):
    path = tar_of(tmp_path / "val-0.tar", ("a.jpg", b"1"), ("a.jpg", b"2"))
    assert [s.image for s in read_all(make_index(path))] == [b"1"]


@pytest.mark.parametrize("shards", [[["a", "b", "a"]], [["a", "b"], ["c", "a"]]])
def test_a_key_twice_in_a_split_is_refused(tmp_path, shards):
    paths = [
        tar_of(tmp_path / f"val-{i}.tar", *((f"{key}.jpg", b"1") for key in keys)) for i, keys in enumerate(shards)
    ]
    with pytest.raises(BadShards, match="key 'a' occurs 2 times"):
        index_shards([str(p) for p in paths], str(tmp_path / "index"), classes=None, accept_damaged=False)
    assert not (tmp_path / "index").exists()


def test_hostile_names_stay_keys(tmp_path):
    names = ["../../etc/passwd", "/absolute", "a" * 5000, "<b>&\"'", "new\nline", "emoji 😀 עברית"]
    path = tar_of(tmp_path / "val-0.tar", *((f"{name}.jpg", b"1") for name in names))
    assert [s.key for s in read_all(make_index(path))] == [name for name in names if "." not in name.rpartition("/")[2]]


# ------------------------------------------------------------------------------------------------- what is refused


def test_no_shards(tmp_path):
    with pytest.raises(BadShards, match="given no shards"):
        index_shards([], str(tmp_path), classes=None, accept_damaged=False)


def test_shards_without_a_sample(tmp_path):
    path = tar_of(tmp_path / "val-0.tar")
    with pytest.raises(BadShards, match="without any sample"):
        make_index(path)


def test_a_missing_index_names_the_command(tmp_path):
    with pytest.raises(BadShards, match=r"jobs/shards.py index"):
        Index.load(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"splits": {"val": {}}}', '{"splits": 3, "classes": []}'])
def test_a_damaged_index_is_named(shard, text):
    make_index(shard)
    (shard.parent / "index" / "index.json").write_text(text)
    with pytest.raises(BadShards, match="make"):
        Index.load(str(shard.parent / "index"))


def test_an_index_that_contradicts_its_samples(shard):
    make_index(shard)
    path = shard.parent / "index" / "index.json"
    path.write_text(path.read_text().replace(f'"samples": {COUNT}', '"samples": 11'))
    with pytest.raises(BadShards, match="lists 11 samples and samples.parquet 10"):
        Index.load(str(path.parent))


def test_an_unknown_split_names_those_there_are(shard):
    with pytest.raises(BadShards, match="no split 'test' in .+: it has val"):
        make_index(shard).split("test")


def test_key_order_is_the_order_of_code_points(tmp_path):
    keys = ["b", "a", "Z", "é", "😀", "ﬁ", "10", "9"]
    path = tar_of(tmp_path / "val-0.tar", *((f"{key}.jpg", b"1") for key in keys))
    rows = make_index(path).split("val")
    assert rows.sort_by("number")["key"].to_pylist() == sorted(keys)


# ----------------------------------------------------------------------------------------------------------- check


def test_shards_that_were_changed_or_are_gone_are_named(make_shards, capsys):
    data = make_shards(train=[3, 2], val=[2])
    given = commands.Check(data=str(data))
    assert commands.run(given) == 0
    assert "shards: 3 are as they were indexed" in capsys.readouterr().out
    changed = bytearray((data / "train-000001.tar").read_bytes())
    changed[700] ^= 1
    (data / "train-000001.tar").write_bytes(changed)
    (data / "val-000000.tar").unlink()
    with pytest.raises(
        BadShards, match=r"2 of 3 shards .+train-000001.tar was changed \(\d+ .+; val-000000.tar is gone"
    ):
        commands.run(given)
