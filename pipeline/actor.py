"""Ray Data's actor of every sweep: reads and decodes a part, runs the network, commits the part's rows."""

from __future__ import annotations

import importlib
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import tables
from pipeline.analysis import Analysis
from pipeline.cluster import Resources
from pipeline.context import Batch, Options, open_context, read_pictures
from pipeline.errors import FORESEEN, SweepFailed
from pipeline.runs import require_visible
from pipeline.shards import Skipped
from pipeline.work import Work
from zfnet.activations import NotFinite


class PartActor:
    """Ray Data's actor: loads the model once, then does whole parts."""

    def __init__(
        self,
        module: str,
        options: Options,
        config: Any,
        slices: list[str],
        resources: Resources,
        session: str,
        token: str,
    ) -> None:
        self.session, self.limit = session, options.attempts
        self.threads = resources.cpus
        self.error = ""
        device = "cuda" if resources.gpus else "cpu"
        try:
            _deterministic()
            require_visible(token)
            self.analysis: Analysis = importlib.import_module(module).ANALYSIS
            context = open_context(options, config, self.analysis.table, device)
            decides = context.decides(self.analysis.selects)
            self.work = Work.of(context, self.analysis, slices, self.analysis.plan(context).samples, decides)
            self.work.require_environment(device)
            self.state = self.analysis.setup(context, slices)
        except Exception as error:  # an actor that cannot start would be restarted for ever
            self.error = _explain(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """One part in, one account row out; errors are returned, because Ray would retry them for ever."""
        number = int(batch["part"][0])
        account: dict[str, Any] = {"part": number, "samples": 0, "error": self.error, "fatal": bool(self.error)}
        if not self.error:
            try:
                account["samples"] = self._do(number)
            except Exception as error:
                account.update(error=_explain(error), fatal=True)
        return {name: [value] for name, value in account.items()}

    def _do(self, number: int) -> int:
        attempt = self.work.begin_attempt(number, self.session)
        if attempt > self.limit:
            raise SweepFailed(f"its worker died {self.limit} times in a row (out of memory?): give up")
        started = time.time()
        rows = self.work.parts[number]
        results, skipped = self._results(rows)
        table = tables.conform(self.analysis.reduce_part(self.work.context, results), self.work.part_schema)
        account = {
            "samples": rows.num_rows,
            "skipped": len(skipped),
            "seconds": time.time() - started,
            "finished": time.time(),
        }
        self.work.commit(number, table, skipped, account)
        return int(rows.num_rows)

    def _results(self, rows: pa.Table) -> tuple[list[Any], list[Skipped]]:
        """The analysis's result of every batch, in order.

        On a CPU each thread takes whole batches with one torch thread, so neither decoding nor the network ever
        waits, and the number of threads cannot change a sum. On a GPU threads decode ahead of it.
        """
        size = self.work.context.config.batch_size
        batches = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
        skipped: list[Skipped] = []
        results: list[Any] = []
        on_cpu = self.work.context.device == "cpu"
        with ThreadPoolExecutor(self.threads) as pool:
            work = self._prepare_and_map if on_cpu else self._prepare
            for result, not_read in pool.map(work, batches):
                skipped += not_read
                if result is not None:
                    results.append(result if on_cpu else self._map(result))
        return results, skipped

    def _prepare_and_map(self, rows: pa.Table) -> tuple[Any, list[Skipped]]:
        batch, skipped = self._prepare(rows)
        return (None if batch is None else self._map(batch)), skipped

    def _prepare(self, rows: pa.Table) -> tuple[Batch | None, list[Skipped]]:
        pictures, skipped = read_pictures(self.work.context, rows)
        if not pictures:
            return None, skipped
        context = self.work.context
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(context.device)
        return Batch(pictures, context.model.preprocessing.normalise(pixels)), skipped

    def _map(self, batch: Batch) -> Any:
        try:
            with torch.inference_mode():
                return self.analysis.map_batch(self.work.context, self.state, batch)
        except NotFinite as error:
            key = batch.pictures[error.index].sample.key
            raise SweepFailed(
                f"sample {key!r}: {error}. The network's weights or its input are broken; results would be too"
            ) from None


def _deterministic() -> None:
    """DESIGN section 4: the same bits for any number of workers and threads."""
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
