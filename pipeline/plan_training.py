"""What a training will cost, from a few of its steps that are taken in this process and thrown away."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline import checkpoints
from pipeline.actor import torch_settings_kept
from pipeline.cluster import Workers
from pipeline.loop import Plan, Rehearsal, Trainer
from pipeline.plan import machines, tell
from pipeline.runs import Run

REHEARSAL_SECONDS = 10.0


@dataclass(frozen=True)
class Worker:
    """One of the workers that the training will have, if it has this machine's hardware."""

    device: str
    cpus: int
    decoders: int
    threads: int

    @classmethod
    def of(cls, workers: Workers, decoders: int | None) -> Worker:
        """As the options of a training ask for it."""
        gpu = torch.cuda.is_available() and workers.gpus != 0 and workers.num != 0
        cpus = workers.cpus or os.cpu_count() or 1
        if workers.num == 0:
            return cls("cpu", cpus, decoders or 0, torch.get_num_threads())
        return cls("cuda" if gpu else "cpu", cpus, cpus if decoders is None else decoders, max(1, cpus // 2))


def forecast(
    plan: Plan, trainer: type[Trainer], workers: Workers, decoders: int | None, keep: tuple[int, ...], label: str
) -> int:
    """Say what is left to do: steps, forwards, hours and gigabytes. Nothing is written. Returns the exit status 0.

    Args:
        plan: what is to be trained.
        trainer: what each worker runs.
        workers: what the training asks of the cluster.
        decoders: processes of each worker that decode images, where that was said.
        keep: epochs whose weights are kept.
        label: what the forecast begins with.
    """
    count = workers.num or 1
    epochs, steps = plan.recipe.epochs, plan.train_samples // plan.recipe.batch
    newest = checkpoints.newest(Run.at(plan.run))
    left = epochs * steps - (0 if newest is None else checkpoints.step_of(Run.at(plan.run), newest))
    worker = Worker.of(workers, decoders)
    share = max(1, plan.recipe.batch // count)
    seen = _rehearse(replace(plan, recipe=replace(plan.recipe, batch=share)), trainer, worker)
    images = left * plan.recipe.batch
    validated = (plan.samples - plan.train_samples) * -(-left // steps)
    hours = (left * seen.step_seconds + validated * seen.validation_seconds / count) / 3600
    kept = len({*(epoch for epoch in keep if epoch <= epochs), epochs - 1, epochs})
    size = (kept + 1) * seen.weights_bytes + 2 * seen.optimizer_bytes
    where = machines(count, worker.cpus, gpu=worker.device == "cuda")
    lines = [
        f"steps     {left:,} of {epochs * steps:,} to do, {epochs} epochs of {steps:,}, {images:,} images",
        f"forwards  {images + validated:,}, {images:,} of them with a backward pass",
        f"hours     {hours:.3g} on {where}, without start-up and the mean image's pass",
        f"storage   {size / 1e9:.3g} GB of checkpoints and the model",
        f"probe     {seen.steps} steps of {share} images; nothing was written",
    ]
    tell(label, plan.architecture, lines)
    return 0


def _rehearse(plan: Plan, trainer: type[Trainer], worker: Worker) -> Rehearsal:
    """Some steps, whose batch is the worker's share of one."""
    place: dict[str, Any] = {"rank": 0, "world": 1, "checkpoint_steps": 1, "keep_epochs": ()}
    with torch_settings_kept():
        torch.set_num_threads(worker.threads)
        alone = trainer(plan, device=worker.device, decoders=worker.decoders, **place)
        return alone.rehearse(REHEARSAL_SECONDS)
