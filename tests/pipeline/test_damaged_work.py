"""Files of work under way that were damaged, or are none of ours: an error that names them, or the same tables."""

import json
import random
import shutil

import pytest

from pipeline import status, sweep
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import RunError
from pipeline.storage import Location, StorageError
from pipeline.work import _of_parts
from tests.pipeline.exact import assert_same

TABLES = ("top9", "feature_maps", "maxima")
FLIPS = 60


def run_top9(run, data):
    options = Options(run=str(run), data=str(data), workers=Workers(num=0, cpus=1))
    return sweep.run(top9.ANALYSIS, options, top9.Config(part_size=4, batch_size=2))


@pytest.fixture
def begun(make_run, make_shards, tmp_path):
    """A run whose parts are all committed and not folded yet; its data; and what it becomes."""
    data, run = make_shards(val=[12, 9]), make_run()

    def dies(*given):
        raise RunError("the power went")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_fold", dies)
        with pytest.raises(RunError, match="the power went"):
            run_top9(run, data)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    run_top9(whole, data)
    return run, data, whole


@pytest.fixture
def again(begun, tmp_path):
    """A copy of the work, its folder, and a call that finishes it."""
    run, data, whole = begun
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (work,) = (copy / "unfinished" / "top9").iterdir()
    return copy, work, lambda: run_top9(copy, data), whole


def test_a_flipped_bit_never_changes_a_table(begun, tmp_path):
    run, data, whole = begun
    chance, refused = random.Random(8), 0
    for number in range(FLIPS):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        part = chance.choice(sorted(copy.glob("unfinished/top9/*/parts/*")))
        damaged = bytearray(part.read_bytes())
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        part.write_bytes(damaged)
        said = ""
        try:
            assert run_top9(copy, data) == 0
            assert_same(copy, whole, *TABLES)
        except (StorageError, RunError) as error:
            said = str(error)
        assert not said or part.name in said
        refused += bool(said)
        shutil.rmtree(copy)
    assert refused > FLIPS / 2


def js(value):
    return json.dumps(value).encode()


DAMAGE = {
    "a part cut short": ("parts/part-000001.parquet", lambda data: data[: len(data) // 2]),
    "an empty part": ("parts/part-000001.parquet", lambda data: b""),
    "an empty account": ("account/part-000001.json", lambda data: b""),
    "an account that is a list": ("account/part-000001.json", lambda data: js([])),
    "an empty description": ("work.json", lambda data: b""),
    "a description of nothing": ("work.json", lambda data: js({})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_what_to_do(again, damage):
    _, work, finish, _ = again
    name, damaged = DAMAGE[damage]
    (work / name).write_bytes(damaged((work / name).read_bytes()))
    with pytest.raises((StorageError, RunError), match=f"{name}.+(bring it back|delete)"):
        finish()


def test_an_account_that_is_gone_is_named(again):
    _, work, finish, _ = again
    (work / "account" / "part-000002.json").unlink()
    with pytest.raises(RunError, match=r"part-000002\.json is not there"):
        finish()


@pytest.mark.parametrize("folder", ["", "parts", "attempts", "given_up", "account", ".."])
def test_what_file_managers_leave_is_left_alone(again, folder):
    run, work, finish, whole = again
    (work / folder).mkdir(exist_ok=True)
    for name in (".DS_Store", "part-0 (1).parquet"):
        (work / folder / name).write_bytes(b"x")
    status.read(str(run))
    assert finish() == 0
    assert_same(run, whole, *TABLES)


@pytest.mark.parametrize("left", [b"", b"[]", js({"process": None}), js({"process": "x", "machine": []})])
def test_a_lease_that_is_none_is_replaced(again, left):
    run, work, finish, whole = again
    (work / "lease.json").write_bytes(left)
    (work.parent / "lease.json").write_bytes(left)
    assert finish() == 0
    assert_same(run, whole, *TABLES)


def test_parts_beyond_the_millionth_have_their_number(again):
    _, work, _, _ = again
    (work / "given_up").mkdir()
    (work / "given_up" / "part-1234567.json").write_text('"why"')
    assert list(_of_parts(Location.of(work / "given_up"))) == [1234567]
