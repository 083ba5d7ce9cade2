"""Ray Data's actor of every sweep: reads and decodes a part, runs the network, commits the part's rows."""

from __future__ import annotations

import importlib
import os
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch

from pipeline import tables
from pipeline.analysis import Analysis
from pipeline.cluster import Resources
from pipeline.context import Options, open_context
from pipeline.errors import FORESEEN, SweepFailed
from pipeline.runs import require_visible
from pipeline.shards import Skipped
from pipeline.storage import Location
from pipeline.work import Work, begin_start
from zfnet.activations import NotFinite

WORKER_DIED = "worker_died"
"""The reason in `skipped` of the images of a part that was given up."""


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
        self.device = "cuda" if resources.gpus else "cpu"
        self.error = ""
        self.pool = ThreadPoolExecutor(self.threads)
        self.using_gpu = threading.Lock()
        self.turns = Turns()
        starting = None
        try:
            _deterministic()
            if token is not None:
                require_visible(token)
                most = (resources.num or 1) * (options.attempts + 1)
                starting = begin_start(Location.of(token).parent, session, most)
            self.analysis: Analysis = importlib.import_module(module).ANALYSIS
            context = open_context(options, config, self.analysis.table, self.device)
            self.work = Work.of(context, self.analysis, slices)
            self.work.require_environment(self.device)
            self.state = self.analysis.setup(context, slices)
        except Exception as error:  # an actor that cannot start would be restarted for ever
            self.error = _explain(error)
        finally:
            if starting is not None:
                starting.delete()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """One part in, one row out; errors are returned, because Ray would retry them for ever."""
        number = int(batch["part"][0])
        samples, error, given_up = 0, self.error, False
        if not error:
            try:
                self._do(number)
                samples = self.work.parts[number].num_rows
            except GivenUp as problem:
                error, given_up = str(problem), True
            except Exception as problem:
                error = _explain(problem)
        return {"part": [number], "samples": [samples], "error": [error], "given_up": [given_up]}

    def close(self) -> None:
        """Begin nothing more: parts that are under way end with an error, which nobody reads."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _do(self, number: int) -> None:
        suspect = self.work.was_begun(number)
        with self.turns.take(alone=suspect):
            if suspect and self.work.part(number).exists():
                return  # its worker died after the commit
            if suspect and (why := self.work.why_given_up(number)):
                self._give_up(number, why)
                return
            # A part begins when a thread is free for it: a worker's death while it waits is none of its attempts.
            attempt = self.pool.submit(self.work.begin_attempt, number, self.session, suspect).result()
            if attempt > self.options.attempts:
                self._give_up(number, f"its worker died {attempt - 1} times while it did nothing else")
                return
            started = time.time()
            table, skipped = self.compute(number)
            self.work.commit(number, table, skipped, self.device, time.time() - started)

    def _give_up(self, number: int, why: str) -> None:
        """Commit the part with all its images skipped, if that is the user's choice. Raises: GivenUp if it is not."""
        self.work.give_up(number, why)
        if self.options.given_up == "retry":
            raise GivenUp(why)
        rows = self.work.parts[number].select(["shard", "key"]).to_pylist()
        skipped = [Skipped(row["shard"], row["key"], WORKER_DIED, why) for row in rows]
        table = tables.conform(self.analysis.reduce_part(self.work.context, []), self.work.part_schema)
        self.work.commit(number, table, skipped, self.device, 0.0)

    def compute(self, number: int) -> tuple[pa.Table, list[Skipped]]:
        """The rows of a part, and what was skipped of it. Nothing is written."""
        rows = self.work.parts[number]
        results, skipped, read = self._results(rows)
        if read + len(skipped) != rows.num_rows:
            raise SweepFailed(f"{rows.num_rows} samples in, {read} read and {len(skipped)} skipped: a fault of ours")
        return tables.conform(self.analysis.reduce_part(self.work.context, results), self.work.part_schema), skipped

    def _results(self, rows: pa.Table) -> tuple[list[Any], list[Skipped], int]:
        """The analysis's result of every batch, in order, what was skipped, and how many images were read.

        On a CPU each thread takes whole batches with one torch thread, so neither decoding nor the network ever
        waits, and the number of threads cannot change a sum. On a GPU threads decode ahead of it.
        """
        size = self.work.context.config.batch_size
        batches = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
        skipped: list[Skipped] = []
        results: list[Any] = []
        read = 0
        on_cpu = self.device == "cpu"
        for images, result, not_read in self.pool.map(self._prepare_and_map if on_cpu else self._prepare, batches):
            skipped += not_read
            read += images
            if images:
                results.append(result if on_cpu else self._map_alone(result))
        return results, skipped, read

    def _prepare_and_map(self, rows: pa.Table) -> tuple[int, Any, list[Skipped]]:
        images, batch, skipped = self._prepare(rows)
        return images, None if batch is None else self._map(batch), skipped

    def _prepare(self, rows: pa.Table) -> tuple[int, Any, list[Skipped]]:
        batch, skipped = self.analysis.prepare(self.work.context, self.state, rows)
        return 0 if batch is None else len(batch.pictures), batch, skipped

    def _map_alone(self, batch: Any) -> Any:
        with self.using_gpu:  # its memory is for one batch at a time
            return self._map(batch)

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
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _explain(error: Exception) -> str:
    """What went wrong, in words where the project foresaw it, else with the stack: then it is a fault of ours."""
    if isinstance(error, FORESEEN):
        return str(error)
    return "".join(traceback.format_exception(error))


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """An actor in this process leaves torch as it found it."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    matmul = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = cudnn
        torch.backends.cuda.matmul.allow_tf32 = matmul
