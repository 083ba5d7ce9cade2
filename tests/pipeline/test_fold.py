"""The fold: one tree, in one process and in Ray tasks, with the same bits and errors in our own words."""

import os
import shutil

import pytest

from pipeline import cluster, fold, sweep
from pipeline.analyses import top9
from pipeline.cluster import CannotSchedule, Workers
from pipeline.context import Options
from pipeline.fold import Parts, fold_tree, tree
from pipeline.runs import RunError
from pipeline.storage import Location, StorageError
from tests.pipeline.exact import assert_same

UNEQUAL = [20, 13, 9]  # at part size 4: 5, 4 and 3 parts


def merge(states):
    return f"({' '.join(states)})"


def named(part: Location) -> str | None:
    """The part's name as its state; of those in capitals no image could be read."""
    return None if part.name.isupper() else part.name


def parts(names: str, each=map) -> Parts:
    return Parts([Location.of(f"/parts/{name}") for name in names], each)


def test_the_tree_has_one_shape():
    assert tree(iter("abcdefghij"), merge, fan_in=3) == "(((a b c) (d e f) (g h i)) ((j)))"
    assert tree(iter("abc"), merge, fan_in=3) == "(a b c)"
    assert tree(iter("a"), merge, fan_in=3) == "a"


def test_a_fold_is_that_tree_over_groups_of_neighbours(monkeypatch):
    monkeypatch.setattr(fold, "FAN_IN", 3)
    assert fold_tree(parts("abcdefghij"), named, merge) == "(((a b c) (d e f) (g h i)) ((j)))"
    assert fold_tree(parts("ab"), named, merge) == "(a b)"


def test_parts_without_a_state_move_no_other_to_another_group(monkeypatch):
    monkeypatch.setattr(fold, "FAN_IN", 3)
    assert fold_tree(parts("abcDEFgHi"), named, merge) == "((a b c) (g i))"
    with pytest.raises(RunError, match="not one image could be read"):
        fold_tree(parts("ABCD"), named, merge)


def test_however_late_groups_come_their_order_stays(ray_cluster):
    found = cluster.in_tasks(lambda number: (number, os.getpid()), range(3 * cluster.TASKS_AT_ONCE))
    numbers, processes = zip(*found, strict=True)
    assert numbers == tuple(range(3 * cluster.TASKS_AT_ONCE))
    assert os.getpid() not in processes


def sweep_top9(run, data, num):
    options = Options(run=str(run), data=str(data), workers=Workers(num=num, cpus=1))
    assert sweep.run(top9.ANALYSIS, options, top9.Config(part_size=4, batch_size=2, k=3)) == 0


def test_a_fold_in_tasks_is_the_one_in_a_process_bit_for_bit(make_run, make_shards, ray_cluster, tmp_path, monkeypatch):
    """Both fold the same parts, which a call that ended before its fold left behind."""
    data, run, other = make_shards(val=UNEQUAL), make_run(), tmp_path / "other"
    with monkeypatch.context() as broken:
        broken.setattr(sweep, "_fold", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep_top9(run, data, num=0)
    shutil.copytree(run, other)
    groups: list[int] = []

    def counted(do, given, on=None):
        groups.append(len(given))
        return in_tasks(do, given, on)

    in_tasks = cluster.in_tasks
    monkeypatch.setattr(cluster, "in_tasks", counted)
    monkeypatch.setattr(fold, "FAN_IN", 5)
    sweep_top9(run, data, num=1)
    assert groups == [], "twelve parts are few"
    monkeypatch.setattr(sweep, "_MANY", 12)
    sweep_top9(other, data, num=1)
    assert groups == [3] * 6, "the states of all layers, and the maxima of each of five"
    assert_same(run, other, "top9", "feature_maps", "maxima")


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_an_error_in_a_task_is_in_our_own_words(ray_cluster):
    def refuse(name):
        raise StorageError(f"cannot read {name}")

    with pytest.raises(StorageError, match=r"^cannot read x$") as refused:
        list(cluster.in_tasks(refuse, ["x"]))
    assert type(refused.value) is StorageError


def test_a_task_that_kills_its_workers_ends_the_fold_with_what_to_do(ray_cluster):
    with pytest.raises(CannotSchedule, match="lost again and again .+ --workers.num 0"):
        list(cluster.in_tasks(lambda _: os._exit(1), ["x"]))


def test_parts_that_go_to_an_actor_together_are_the_same(make_run, make_shards, ray_cluster, tmp_path, monkeypatch):
    data, run, other = make_shards(val=UNEQUAL), make_run(), tmp_path / "other"
    shutil.copytree(run, other)
    sweep_top9(run, data, num=0)
    monkeypatch.setattr(cluster, "MOST_BLOCKS", 5)
    sweep_top9(other, data, num=1)
    assert_same(run, other, "top9", "feature_maps", "maxima")
