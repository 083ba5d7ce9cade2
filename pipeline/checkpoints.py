"""Checkpoints of training: weights for the epochs worth keeping, the optimizer's state for those to go on from.

runs/NAME/checkpoints/epoch-0001/weights.safetensors   weights and the preprocessing's tensors
runs/NAME/checkpoints/epoch-0001/optimizer.pt          state of the optimizer
runs/NAME/checkpoints/epoch-0001/manifest.json         where training stands; written last: without it there is none
runs/NAME/checkpoints/step-00001500/                   the same inside an epoch; gone once a later one is whole
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pipeline.runs import Model, Run, RunError, clear, identity
from pipeline.shards import Skipped
from pipeline.storage import Location, StorageError
from zfnet import models
from zfnet.images import Preprocessing

EVOLUTION = (1, 2, 5, 10, 20, 30, 40, 64)
"""Epochs of the paper's figure 4, kept for the evolution analysis."""

MEAN = "preprocessing.mean"
"""The mean image's name among a checkpoint's tensors."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of training after a step. Nothing in it depends on the number of workers."""

    step: int
    """Steps taken so far, over all epochs: with the batch and the seed it says which sample is next."""
    epoch: int
    """Whole epochs so far."""
    tensors: dict[str, torch.Tensor]
    """Weights, and the preprocessing's tensors under their own prefix."""
    optimizer: dict[str, Any]
    history: list[float]
    """Validation error of every whole epoch so far."""
    sums: list[float] | None = None
    """Inside an epoch, over all workers: its images, loss, right, skipped so far. None at its end."""
    seconds: float = 0.0
    """Of training in the unfinished epoch."""
    skipped: frozenset[Skipped] = frozenset()
    """What could not be read so far, by any worker."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return epoch_name(self.epoch) if self.sums is None else f"step-{self.step:08d}"


def epoch_name(epoch: int) -> str:
    """Name of the folder of the checkpoint at an epoch's end."""
    return f"epoch-{epoch:04d}"


def claim_of(run: Run) -> Location:
    """The file that says what a run directory is training."""
    return run.location / "checkpoints" / "training.json"


def finished(run: Run) -> list[int]:
    """Epochs whose checkpoints are whole, in order."""
    return sorted(int(name.removeprefix("epoch-")) for name in _whole(run) if name.startswith("epoch-"))


def newest(run: Run) -> str | None:
    """Name of the whole checkpoint that is furthest, or None."""
    steps = {}
    for name in _whole(run):
        with suppress(FileNotFoundError):  # workers of a call that was killed are alive some seconds more, and drop it
            steps[name] = step_of(run, name)
    return max(steps, key=lambda name: steps[name], default=None)


def _whole(run: Run) -> list[str]:
    folder = run.location / "checkpoints"
    names = [name for name in folder.names() if name.startswith(("epoch-", "step-"))]
    return [name for name in names if (folder / name / "manifest.json").exists()]


def step_of(run: Run, name: str) -> int:
    """Steps taken at a whole checkpoint. Raises: RunError where its manifest is damaged."""
    return int(_manifest(run.location / "checkpoints" / name)["step"])


def _manifest(folder: Location) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "manifest.json").read())
        return {"step": int(found["step"]), **found}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from None


def write(run: Run, checkpoint: Checkpoint, keep: Collection[int] = EVOLUTION) -> None:
    """Commit a checkpoint, then drop what is no longer needed of earlier ones.

    Only the last two epochs can be gone on from; of the others the weights of those in `keep` stay.

    Another process may be at work on the same training (pipeline/lease.py): if it is further, it may have dropped this
    one while it was written, and nothing is lost.
    """
    try:
        _commit(run, checkpoint)
    except StorageError:
        further = newest(run)
        if further is None or step_of(run, further) <= checkpoint.step:
            raise
        return
    for epoch in finished(run):
        if epoch < checkpoint.epoch - 1:
            folder = run.location / "checkpoints" / epoch_name(epoch)
            if epoch in keep:
                clear(folder / "optimizer.pt")
            else:
                _delete(folder)
    for name in (run.location / "checkpoints").names():
        # Only earlier ones: of a process that is further this one drops nothing.
        if name.startswith("step-") and name != checkpoint.name and int(name[5:]) <= checkpoint.step:
            _delete(run.location / "checkpoints" / name)


def _commit(run: Run, checkpoint: Checkpoint) -> None:
    folder = run.location / "checkpoints" / checkpoint.name
    (folder / "weights.safetensors").write(save(checkpoint.tensors), run.training)
    buffer = io.BytesIO()
    torch.save(checkpoint.optimizer, buffer)
    (folder / "optimizer.pt").write(buffer.getvalue(), run.training)
    skipped = sorted([s.shard, s.key, s.reason, s.detail] for s in checkpoint.skipped)
    state = {name: getattr(checkpoint, name) for name in ("step", "epoch", "history", "sums", "seconds")}
    (folder / "manifest.json").write(json.dumps({**state, "skipped": skipped}).encode(), run.training)


def _delete(folder: Location) -> None:
    clear(folder / "manifest.json")
    clear(folder)


def read(run: Run, name: str) -> Checkpoint:
    """A whole checkpoint. Raises: RunError where it is damaged."""
    folder = run.location / "checkpoints" / name
    manifest = _manifest(folder)
    try:
        optimizer = torch.load(io.BytesIO((folder / "optimizer.pt").read()), weights_only=True, map_location="cpu")
        return Checkpoint(
            step=manifest["step"],
            epoch=int(manifest["epoch"]),
            tensors=load((folder / "weights.safetensors").read()),
            optimizer=optimizer,
            history=[float(error) for error in manifest["history"]],
            sums=manifest["sums"] and [float(value) for value in manifest["sums"]],
            seconds=float(manifest["seconds"]),
            skipped=frozenset(Skipped(*entry) for entry in manifest["skipped"]),
        )
    except Exception as error:  # torch.load and safetensors raise many kinds for damaged files
        raise _damaged(folder, error) from None


def load_model(run: Run, epoch: int) -> Model:
    """The network as it was at an epoch's end, in eval mode, on the CPU; training may still be under way.

    Its classes are numbers. After the last epoch it has the identity of the run's own model.

    Raises: RunError where there is no such checkpoint, or it is damaged.
    """
    folder = run.location / "checkpoints" / epoch_name(epoch)
    try:
        architecture = str(json.loads(claim_of(run).read())["architecture"])
        tensors = load((folder / "weights.safetensors").read())
        mean = tensors.pop(MEAN)
        with torch.device("meta"):
            outputs = models.classes_of(models.build(architecture), tensors)
        network = models.build(architecture, outputs or models.CLASSES).eval()
        models.load_tensors(network, tensors)
        preprocessing = Preprocessing(resize_px=network.resize_px, crop_px=network.input_px, mean=mean)
    except FileNotFoundError as error:
        raise RunError(f"there is no checkpoint of epoch {epoch} in {run.location}: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, error) from None
    model_id = identity(architecture, preprocessing, network.state_dict())
    return Model(network, architecture, tuple(map(str, range(outputs or 0))), preprocessing, model_id)


def _damaged(folder: Location, error: Exception) -> RunError:
    return RunError(
        f"the checkpoint {folder} cannot be read ({error}): delete it to go on from the one before, or train "
        "again into another --run"
    )
