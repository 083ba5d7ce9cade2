"""What a sweep will cost, from one part that is computed in this process and thrown away."""

from __future__ import annotations

import os
import time

import torch

from pipeline import tables
from pipeline.actor import PartActor, torch_settings_kept
from pipeline.analysis import Analysis
from pipeline.cluster import Resources
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.progress import say
from pipeline.work import Work


def forecast(analysis: Analysis, options: Options, work: Work) -> int:
    """Say what is left to do: forwards, hours, gigabytes and parts. Nothing is written. Returns the exit status 0.

    Raises: SweepFailed where the part cannot be computed.
    """
    todo = work.unfinished_parts()
    left = sum(work.parts[number].num_rows for number in todo)
    lines = [f"parts     {len(todo)} of {len(work.parts)} to do, {left} images"]
    if todo:
        number = max(todo, key=lambda part: work.parts[part].num_rows)
        gpu = options.device == "cuda" or (
            options.device is None and torch.cuda.is_available() and options.workers.gpus != 0
        )
        resources = Resources(1, options.workers.cpus or os.cpu_count() or 1, float(gpu))
        seconds, size = _probe(analysis, options, work, number, resources)
        share = left / work.parts[number].num_rows
        workers = options.workers.num or 1
        where = machines(workers, resources.cpus, gpu)
        lines += [
            f"forwards  {left * analysis.forwards(work.context):,}",
            f"hours     {seconds * share / workers / 3600:.3g} on {where}, without start-up and fold",
            f"storage   {size * share / 1e9:.3g} GB of parts while it works, and about as much for the tables at most",
            f"probe     part {number}, {work.parts[number].num_rows} images in {seconds:.1f} s; nothing was written",
        ]
    tell(work.context.table, ", ".join(work.slices), lines)
    return 0


def machines(count: int, cpus: int, gpu: bool) -> str:
    """What a forecast's hours are of."""
    return f"{count} x {cpus} CPUs{' and a GPU' if gpu else ''} like this machine's"


def tell(label: str, of: str, lines: list[str]) -> None:
    """Say a forecast."""
    say("\n".join([f"{label}: forecast for {of}", *(f"  {line}" for line in lines)]))


def _probe(analysis: Analysis, options: Options, work: Work, number: int, resources: Resources) -> tuple[float, int]:
    """Seconds that a part takes, and its bytes on storage."""
    with torch_settings_kept():
        actor = PartActor(analysis.module, options, work.context.config, work.slices, resources, session="", token=None)
        if actor.error:
            raise SweepFailed(f"{work.context.table}: {actor.error}")
        started = time.perf_counter()
        table, _ = actor.compute(number)
        return time.perf_counter() - started, tables.stored_bytes(table)
