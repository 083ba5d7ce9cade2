"""Checkpoints of training: weights for the epochs worth keeping, the optimizer's state for the last two.

runs/NAME/checkpoints/epoch-0001/weights.safetensors   weights and the preprocessing's tensors
runs/NAME/checkpoints/epoch-0001/optimizer.pt          state of the optimizer and the history of the errors
runs/NAME/checkpoints/epoch-0001/manifest.json         written last: without it the checkpoint does not exist
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save

from pipeline.runs import Run, RunError
from pipeline.shards import Skipped
from pipeline.storage import Location

EVOLUTION = (1, 2, 5, 10, 20, 30, 40, 64)
"""Epochs of the paper's figure 4, kept for the evolution analysis."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of training after an epoch."""

    epoch: int
    tensors: dict[str, torch.Tensor]
    """Weights, and the preprocessing's tensors under their own prefix."""
    optimizer: dict[str, Any]
    history: list[float]
    """Validation error of every epoch so far."""
    skipped: frozenset[Skipped] = frozenset()
    """What could not be read so far, by any worker."""


def _folder(run: Run, epoch: int) -> Location:
    return run.location / "checkpoints" / f"epoch-{epoch:04d}"


def finished(run: Run) -> list[int]:
    """Epochs whose checkpoints are whole, in order."""
    names = (run.location / "checkpoints").names()
    epochs = sorted(int(name.removeprefix("epoch-")) for name in names if name.startswith("epoch-"))
    return [epoch for epoch in epochs if (_folder(run, epoch) / "manifest.json").exists()]


def write(run: Run, checkpoint: Checkpoint) -> None:
    """Commit a checkpoint, then drop what is no longer needed of earlier ones."""
    folder = _folder(run, checkpoint.epoch)
    (folder / "weights.safetensors").write(save(checkpoint.tensors))
    buffer = io.BytesIO()
    torch.save(checkpoint.optimizer, buffer)
    (folder / "optimizer.pt").write(buffer.getvalue())
    skipped = sorted([s.shard, s.key, s.reason, s.detail] for s in checkpoint.skipped)
    manifest = {"epoch": checkpoint.epoch, "history": checkpoint.history, "skipped": skipped}
    (folder / "manifest.json").write(json.dumps(manifest).encode())
    for epoch in finished(run):
        if epoch < checkpoint.epoch - 1:
            _drop(run, epoch)


def _drop(run: Run, epoch: int) -> None:
    """Only the last two checkpoints can be gone on from; of the others the weights of figure 4's epochs stay."""
    folder = _folder(run, epoch)
    if epoch in EVOLUTION:
        (folder / "optimizer.pt").delete()
    else:
        (folder / "manifest.json").delete()
        folder.delete()


def read(run: Run, epoch: int) -> Checkpoint:
    """A whole checkpoint. Raises: RunError where it is damaged."""
    folder = _folder(run, epoch)
    try:
        manifest = json.loads((folder / "manifest.json").read())
        optimizer = torch.load(io.BytesIO((folder / "optimizer.pt").read()), weights_only=True, map_location="cpu")
        tensors = load((folder / "weights.safetensors").read())
        skipped = frozenset(Skipped(*entry) for entry in manifest["skipped"])
        return Checkpoint(epoch, tensors, optimizer, [float(error) for error in manifest["history"]], skipped)
    except Exception as error:  # torch.load and safetensors raise many kinds for damaged files
        raise RunError(
            f"the checkpoint {folder} cannot be read ({error}): delete it to go on from the one before, or train "
            "again into another --run"
        ) from None
