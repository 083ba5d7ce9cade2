"""What the driver holds does not grow with the number of parts."""

import itertools
import subprocess
import sys
import tracemalloc

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster import in_threads
from pipeline.work import Cut


def samples_of(shards: list[str], chunks: int = 1) -> pa.Table:
    """A sample for each name of a shard, in tables of so many chunks."""
    table = pa.table({"shard": shards, "key": [f"{number:06d}" for number in range(len(shards))]})
    size = -(-len(shards) // chunks)
    return pa.concat_tables([table.slice(start, size) for start in range(0, len(shards), size)])


def parts_by_definition(samples: pa.Table, part_size: int) -> list[list[dict[str, str]]]:
    """Neighbours of one shard, so many at a time."""
    parts = []
    for _, shard in itertools.groupby(samples.to_pylist(), key=lambda row: row["shard"]):
        rows = list(shard)
        parts += [rows[start : start + part_size] for start in range(0, len(rows), part_size)]
    return parts


@given(
    runs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 12)), min_size=1, max_size=8),
    part_size=st.integers(1, 15),
    chunks=st.integers(1, 5),
)
def test_parts_are_cut_as_they_are_defined(runs, part_size, chunks):
    samples = samples_of([shard for shard, count in runs for _ in range(count)], chunks)
    parts, expected = Cut(samples, part_size), parts_by_definition(samples, part_size)
    assert len(parts) == len(expected)
    assert [part.to_pylist() for part in parts] == expected
    assert parts[len(expected) - 1].to_pylist() == parts[-1].to_pylist() == expected[-1]


def test_a_cut_holds_nothing_for_each_part_but_its_border():
    parts = 20_000
    samples = samples_of(["shard"] * parts)
    tracemalloc.start()
    try:
        cut = Cut(samples, part_size=1)
        assert sum(part.num_rows for part in cut) == parts
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 8 * parts + 500_000  # a table for each would be 60 MB


def test_of_many_answers_few_are_held_and_their_order_stays():
    asked: list[int] = []

    def numbers():
        for number in range(500):
            asked.append(number)
            yield number

    answers = in_threads(lambda number: number**2, numbers(), at_once=3)
    assert next(answers) == 0
    assert len(asked) < 20
    assert list(answers) == [number**2 for number in range(1, 500)]


def test_a_driver_that_gives_all_parts_to_others_does_not_import_torchs_compiler():
    """150 MB, and a second, of which a job without torch.compile uses nothing."""
    program = (
        "import sys, torch\n"
        "from pipeline.actor import _deterministic, torch_settings_kept\n"
        "with torch_settings_kept():\n"
        "    _deterministic()\n"
        "    assert torch.are_deterministic_algorithms_enabled()\n"
        "    assert not torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "assert not torch.are_deterministic_algorithms_enabled()\n"
        "assert 'torch._inductor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
