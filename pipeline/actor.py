"""Ray Data's actor of every sweep: reads and decodes a part, runs the network, commits the part's rows."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import platform
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch

from pipeline import tables
from pipeline.analysis import Analysis
from pipeline.cluster import Resources
from pipeline.context import Options, open_context
from pipeline.errors import FORESEEN, SweepFailed
from pipeline.runs import RunError, require_visible, versions
from pipeline.shards import Skipped
from pipeline.storage import Location
from pipeline.waiting import Spent, Waiting
from pipeline.work import Work, begin_start, reasons
from zfnet.activations import NotFinite

WORKER_DIED = "worker_died"
"""The reason in `skipped` of the images of a part that was given up."""

_DECODED_AHEAD = 256
"""Images of a part that are decoded before a CPU runs the network on the first of them, if each is seen once."""

Pictures = tuple[list[Any], list[Skipped]]
"""Of a batch: what was decoded and what was skipped."""

Done = tuple[int, Any, list[Skipped]]
"""Of a batch: how many images were read, what became of them, and what was skipped."""


class GivenUp(Exception):
    """The part killed its worker again and again."""


class PartActor:
    """Ray Data's actor: loads the model once, then does whole parts.

    Several parts may be called for at once, each in a thread of its own: their batches share the actor's threads in the
    order of the calls, so that these go on with the next part while the last batches of one are waited for, reduced
    and committed. A part that was begun before, and did not end, may have killed its worker: it is done again with
    nothing beside it, so that what it does is not taken for the fault of others.
    """

    def __init__(
        self,
        module: str,
        options: Options,
        config: Any,
        slices: list[str],
        resources: Resources,
        session: str,
        token: str | None,
    ) -> None:
        self.session, self.options = session, options
        self.threads = resources.cpus
        self.device = options.device or ("cuda" if resources.gpus else "cpu")
        self.error = ""
        self.pool = ThreadPoolExecutor(self.threads)
        self.using_gpu = threading.Lock()
        self.turns = Turns()
        self.waiting = Waiting(self.threads if self.device == "cpu" else 1)
        starting = None
        try:
            _deterministic()
            if token is not None:
                require_visible(token)
                most = (resources.num or 1) * (options.attempts + 1)
                starting = begin_start(Location.of(token).parent, session, most)
            _require_device(self.device, resources)
            self.analysis: Analysis = importlib.import_module(module).ANALYSIS
            context = open_context(options, config, self.analysis.table, self.device, self.analysis.model)
            self.work = Work.of(context, self.analysis, slices)
            self._ready()
            self.state = self.analysis.setup(context, slices)
        except Exception as error:  # an actor that cannot start would be restarted for ever
            self.error = explain(error)
        finally:
            if starting is not None:
                starting.delete()

    def _ready(self) -> None:
        self.work.require_environment(self.device)

    def __call__(self, batch: dict[str, Any]) -> Any:
        """One part in, one row out; errors are returned, because Ray would retry them for ever."""
        number = int(batch["part"][0])
        samples, report, given_up = 0, "{}", False
        error = self.error or str(batch.get("error", [""])[0])
        if not error:
            try:
                with self.waiting.part() as spent:
                    report = json.dumps(self._do(number, batch, spent))
                samples = self.work.parts[number].num_rows
            except GivenUp as problem:
                error, given_up = str(problem), True
            except Exception as problem:
                error = explain(problem)
        row = {"part": number, "samples": samples, "error": error, "given_up": given_up, "report": report}
        return {name: [value] for name, value in row.items()}

    def close(self) -> None:
        """Begin nothing more: parts that are under way end with an error, which nobody reads."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _do(self, number: int, batch: dict[str, Any], spent: Spent) -> dict[str, Any]:
        """Compute and commit a part, or give it up. Returns what is reported of it."""
        suspect = self.work.was_begun(number)
        started = time.time()
        with self.turns.take(alone=suspect):
            if suspect and self.work.part(number).exists():
                return self._report([], started, spent, suspect)  # its worker died after the commit
            if why := str(batch.get("given_up", [""])[0]) or self._why_not(number, suspect):
                return self._report(self._give_up(number, why), started, spent, suspect)
            started = time.time()
            table, skipped = self.compute(number, _decoded(batch), spent)
            self.work.commit(number, table, skipped, self.device, time.time() - started)
            return self._report(skipped, started, spent, suspect)

    def _why_not(self, number: int, suspect: bool) -> str | None:
        """Why a part is given up; None where it is not, and then an attempt at it is counted."""
        if suspect and (why := self.work.why_given_up(number)):
            return why
        # A part begins when a thread is free for it: a worker's death while it waits is none of its attempts.
        attempt = self.pool.submit(self.work.begin_attempt, number, self.session, suspect).result()
        if attempt > self.options.attempts:
            return f"its worker died {attempt - 1} times while it did nothing else"
        return None

    def _give_up(self, number: int, why: str) -> list[Skipped]:
        """Commit the part with all its images skipped, if that is the user's choice. Raises: GivenUp if it is not."""
        self.work.give_up(number, why)
        if self.options.given_up == "retry":
            raise GivenUp(why)
        rows = self.work.parts[number].select(["shard", "key"]).to_pylist()
        skipped = [Skipped(row["shard"], row["key"], WORKER_DIED, why) for row in rows]
        table = tables.conform(self.analysis.reduce_part(self.work.context, []), self.work.part_schema)
        self.work.commit(number, table, skipped, self.device, 0.0)
        return skipped

    def _report(self, skipped: list[Skipped], started: float, spent: Spent, again: bool) -> dict[str, Any]:
        """What docs/cluster.md says of a part's log line."""
        return {
            "skipped": reasons(skipped),
            "seconds": round(time.time() - started, 3),
            **spent.report(),
            "again": again,
            "node": platform.node(),
            "device": self.device,
        }

    def compute(
        self, number: int, decoded: list[Pictures] | None = None, spent: Spent | None = None
    ) -> tuple[pa.Table, list[Skipped]]:
        """The rows of a part, and what was skipped of it. Nothing is written.

        Args:
            decoded: its batches, where a decoder made them.
            spent: counts on what the time goes.
        """
        rows = self.work.parts[number]
        results, skipped, read = self._results(rows, decoded, spent or Spent())
        if read + len(skipped) != rows.num_rows:
            raise SweepFailed(f"{rows.num_rows} samples in, {read} read and {len(skipped)} skipped: a fault of ours")
        return tables.conform(self.analysis.reduce_part(self.work.context, results), self.work.part_schema), skipped

    def batches(self, rows: pa.Table) -> list[pa.Table]:
        """A part's samples as they go through the network together."""
        size = self.work.context.config.batch_size
        return [rows.slice(start, size) for start in range(0, rows.num_rows, size)]

    def decode(self, rows: pa.Table) -> Pictures:
        """The pictures of a batch, and what was skipped of it."""
        return self.analysis.decode(self.work.context, self.state, rows)

    def _results(
        self, rows: pa.Table, decoded: list[Pictures] | None, spent: Spent
    ) -> tuple[list[Any], list[Skipped], int]:
        """The analysis's result of every batch, in order, what was skipped, and how many images were read."""
        batches = self.batches(rows)
        skipped: list[Skipped] = []
        results: list[Any] = []
        read = 0
        done = self._on_cpu if self.device == "cpu" else self._on_gpu
        for images, result, not_read in done(batches, decoded or [], spent):
            skipped += not_read
            read += images
            if images:
                results.append(result)
        return results, skipped, read

    def _on_cpu(self, batches: list[pa.Table], decoded: Sequence[Pictures], spent: Spent) -> Iterator[Done]:
        """Each thread takes whole batches with one torch thread, so neither decoding nor the network ever waits, and
        the number of threads cannot change a sum. Many batches are decoded before the network runs on any of them:
        between two images of a kind of work, its code and the weights stay in the core's cache."""

        def batch_and_map(pictures: Pictures) -> Done:
            with spent.on("waited"):
                images, batch, skipped = self._batch(pictures)
            with spent.on("network"):
                return images, self._map(batch) if images else None, skipped

        for start in range(0, len(batches), self._ahead):
            together = slice(start, start + self._ahead)
            yield from self.pool.map(batch_and_map, decoded[together] or self._decode_all(batches[together], spent))

    @cached_property
    def _ahead(self) -> int:
        """Batches that are decoded before the network runs on any of them. Few where an image has many views: they take
        memory, and the network takes so long that the caches do not matter."""
        images = _DECODED_AHEAD // self.analysis.forwards(self.work.context)
        batches: int = images // self.work.context.config.batch_size
        return max(self.threads, batches)

    def _decode_all(self, batches: list[pa.Table], spent: Spent) -> Iterator[Pictures]:
        """The pictures of each batch. A thread reads and decodes several batches at once, each time a half of its share
        of them: one that is done early takes more."""

        def decode(group: list[pa.Table]) -> list[Pictures]:
            with spent.on("waited"):
                pictures, skipped = self.decode(pa.concat_tables(group))
            found: list[Pictures] = [([], []) for _ in group]
            batch_of = {key: found[i] for i, rows in enumerate(group) for key in rows["key"].to_pylist()}
            for picture in pictures:
                batch_of[picture.sample.key][0].append(picture)
            for sample in skipped:
                batch_of[sample.key][1].append(sample)
            return found

        size = -(-len(batches) // (2 * self.threads))
        groups = [batches[start : start + size] for start in range(0, len(batches), size)]
        return itertools.chain.from_iterable(self.pool.map(decode, groups))

    def _on_gpu(self, batches: list[pa.Table], decoded: Sequence[Pictures], spent: Spent) -> Iterator[Done]:
        """Threads decode ahead of the network."""
        if decoded:
            ahead = self.pool.map(self._batch, decoded)
        else:
            ahead = self.pool.map(lambda rows: self._batch(self.decode(rows)), batches)
        for _ in batches:
            with spent.on("waited"):
                images, batch, skipped = next(ahead)
            with self.using_gpu, spent.on("network"):  # its memory is for one batch at a time
                result = self._map(batch) if images else None
            yield images, result, skipped

    def _batch(self, found: Pictures) -> Done:
        """What the network runs on."""
        pictures, skipped = found
        batch = self.analysis.batch(self.work.context, self.state, pictures) if pictures else None
        return len(pictures), batch, skipped

    def _map(self, batch: Any) -> Any:
        try:
            with torch.inference_mode():
                return self.analysis.map_batch(self.work.context, self.state, batch)
        except NotFinite as error:
            key = batch.pictures[error.index].sample.key
            raise SweepFailed(
                f"sample {key!r}: {error}. The network's weights or its input are broken; results would be too"
            ) from None


class Turns:
    """Parts side by side, or one with nothing beside it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.under_way = self.waiting = 0
        self.alone = False

    @contextmanager
    def take(self, alone: bool) -> Iterator[None]:
        """Wait for a turn, and hold it while the block runs; who wants to be alone comes first."""
        with self.changed:
            self.waiting += alone
            self.changed.wait_for(lambda: not (self.under_way if alone else self.alone or self.waiting))
            self.waiting -= alone
            self.under_way += 1
            self.alone = alone
        try:
            yield
        finally:
            with self.changed:
                self.under_way -= 1
                self.alone = False
                self.changed.notify_all()


def _deterministic() -> None:
    """The same bits for any number of workers and threads, on the same device and versions."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.set_num_threads(1)
    # The same as use_deterministic_algorithms, which imports torch's compiler: 150 MB and a second.
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _require_device(device: str, resources: Resources) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        given = f"Ray gave it {resources.gpus:g} GPUs" if resources.gpus else "--device is cuda"
        raise RunError(
            f"a worker on node {platform.node()} has no CUDA: {given}, and torch sees none; install the driver and a "
            "torch for it there, or give --device cpu"
        )


def _decoded(batch: dict[str, Any]) -> list[Pictures] | None:
    """A part's pictures, where a decoder made them."""
    if "decoded" not in batch:
        return None
    made_with, decoded = pickle.loads(batch["decoded"][0])
    if made_with != versions():
        raise RunError(
            f"it was decoded with {made_with}, and this worker has {versions()}: install the same on all nodes"
        )
    found: list[Pictures] = decoded
    return found


def explain(error: Exception) -> str:
    """What went wrong, in words where the project foresaw it, else with the stack: then it is a fault of ours."""
    if isinstance(error, FORESEEN):
        return str(error)
    return "".join(traceback.format_exception(error))


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """An actor in this process leaves torch as it found it."""
    threads = torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    matmul = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(deterministic)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = cudnn
        torch.backends.cuda.matmul.allow_tf32 = matmul
