"""Parts through Ray Data: each once, and nothing of it left behind when who asked stops asking."""

import threading
from contextlib import closing

from pipeline import cluster
from pipeline.cluster import Resources, Stage


def mapped(parts):
    class Squares:  # workers cannot import this file: a local class goes to them whole
        def __call__(self, batch):
            return {"part": batch["part"], "square": batch["part"] ** 2}

    return cluster.map_parts(list(range(parts)), Stage(Squares, {}, Resources(1, 1, 0.0)))


def test_each_part_comes_once(ray_cluster):
    with closing(mapped(30)) as rows:
        found = sorted((row["part"], row["square"]) for row in rows)
    assert found == [(part, part**2) for part in range(30)]


def test_after_an_error_no_thread_is_left_that_asks_ray_for_more(ray_cluster):
    """One that did after Ray's end ended the process, before the error was told."""
    before = set(threading.enumerate())
    with closing(mapped(30)) as rows:
        next(rows)
        assert set(threading.enumerate()) > before  # Ray Data's own, while it works
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()
