"""The training loop of one worker: plain PyTorch, with or without a process group around it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.classification import MulticlassAccuracy

from pipeline import checkpoints, metrics, tables
from pipeline.checkpoints import Checkpoint
from pipeline.mean import mean_image
from pipeline.runs import Run
from pipeline.shards import Index, Skipped
from pipeline.stream import Examples, Images, labelled, loader, rank_batches
from zfnet import models, recipe
from zfnet.images import Preprocessing
from zfnet.recipe import Recipe

VALIDATION_BATCH = 256
_MEAN = "preprocessing.mean"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained on what; everything but the places decides the result."""

    run: str
    data: str
    index: str | None
    architecture: str
    recipe: Recipe
    seed: int
    train_split: str
    validation_split: str
    train_data_id: str
    validation_data_id: str
    train_samples: int
    """Images to train on."""
    samples: int
    """Samples of both splits, those that cannot be used included."""


class Trainer:
    """One worker's part of a training."""

    def __init__(self, plan: Plan, *, rank: int, world: int, device: str, decoders: int) -> None:
        self.plan, self.rank, self.world, self.decoders = plan, rank, world, decoders
        self.device = torch.device(device)
        self.run_directory = Run.at(plan.run)
        self.images_index = Index.load(plan.data, plan.index)
        self.classes = self.images_index.classes
        self.train_rows, unusable = labelled(self.images_index, plan.train_split, len(self.classes))
        self.validation_rows, more = labelled(self.images_index, plan.validation_split, len(self.classes))
        self.skipped = {*unusable, *more}
        self.history: list[float] = []
        self.epoch = 0

    def run(self) -> None:
        """Train all epochs that are left, then write the model. Rank 0 writes; the others only compute."""
        self._prepare()
        batches = self._training_batches()
        while self.epoch < self.plan.recipe.epochs:
            self.epoch += 1
            row = self._epoch(batches)
            self.history.append(1 - row["validation_top1"])
            self.skipped = self._all_skipped()
            if self.rank == 0:
                metrics.write(self.run_directory, row)
                self._checkpoint()
        self._finish()

    def _prepare(self) -> None:
        """Network, preprocessing and optimizer, fresh or from the newest checkpoint."""
        self.network = models.build(self.plan.architecture, classes=len(self.classes))
        epoch = self._newest_checkpoint()
        found = checkpoints.read(self.run_directory, epoch) if epoch else None
        recipe.initialise(self.network, self.plan.recipe.init, self.plan.seed)
        resize_px = self.network.resize_px
        if found is None:
            mean = mean_image(
                self.images_index,
                self.train_rows,
                resize_px,
                rank=self.rank,
                world=self.world,
                decoders=self.decoders,
            )
            if self.plan.recipe.smallest_crop is not None:  # a mean for each pixel has no place in a scaled crop
                mean = mean.mean((1, 2), keepdim=True)
        else:
            mean = found.tensors.pop(_MEAN)
            self.network.load_state_dict(found.tensors)
            self.epoch, self.history = found.epoch, found.history
            self.skipped |= found.skipped
        self.preprocessing = Preprocessing(resize_px=resize_px, crop_px=self.network.input_px, mean=mean)
        self.network.to(self.device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=self.plan.recipe.lr,
            momentum=self.plan.recipe.momentum,
            weight_decay=self.plan.recipe.weight_decay,
        )
        if found is not None:
            self.optimizer.load_state_dict(found.optimizer)
        self.parallel: nn.Module = self.network if self.world == 1 else DistributedDataParallel(self.network)

    def _newest_checkpoint(self) -> int:
        """The last epoch with a whole checkpoint, or 0: rank 0 looks, so that all begin at the same one."""
        choice = [max(checkpoints.finished(self.run_directory), default=0)]
        if self.world > 1:
            dist.broadcast_object_list(choice)
        return choice[0]

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return int(self.train_rows.num_rows) // self.plan.recipe.batch

    def _training_batches(self) -> Iterator[Examples]:
        """This rank's share of every global batch that is left, decoded ahead across the borders of epochs."""
        shards = self.train_rows["shard"].combine_chunks().dictionary_encode().indices.to_numpy()
        places = rank_batches(
            shards,
            seed=self.plan.seed,
            first_epoch=self.epoch + 1,
            epochs=self.plan.recipe.epochs,
            batch=self.plan.recipe.batch,
            rank=self.rank,
            world=self.world,
        )
        smallest = self.plan.recipe.smallest_crop
        dataset = Images(self.images_index, self.train_rows, self.preprocessing, self.plan.seed, smallest)
        return iter(loader(dataset, places, self.decoders))

    @cached_property
    def _validation_loader(self) -> Any:
        mine = range(self.rank, self.validation_rows.num_rows, self.world)
        batches = [
            [(0, row) for row in mine[start : start + VALIDATION_BATCH]]
            for start in range(0, len(mine), VALIDATION_BATCH)
        ]
        dataset = Images(self.images_index, self.validation_rows, self.preprocessing, self.plan.seed)
        return loader(dataset, batches, min(self.decoders, 1))

    def _epoch(self, batches: Iterator[Examples]) -> dict[str, Any]:
        """Train one epoch and validate; returns its row of metrics, the same on every rank."""
        started = time.monotonic()
        # Dropout is drawn from (seed, epoch, rank), so an epoch that is done again is the same.
        torch.manual_seed(int(np.random.SeedSequence([self.plan.seed, self.epoch, self.rank]).generate_state(1)[0]))
        trained = self._train(batches)
        seconds = time.monotonic() - started
        validated = self._validate()
        return {
            "epoch": self.epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **trained,
            **validated,
            "images_per_second": trained["train_samples"] / seconds,
            "data_wait_share": self.waited / seconds,
            "seconds": time.monotonic() - started,
        }

    def _train(self, batches: Iterator[Examples]) -> dict[str, Any]:
        self.parallel.train()
        self.waited = 0.0
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # images, loss, right, skipped
        for step in range(self.steps):
            begun = time.monotonic()
            examples = next(batches)
            self.waited += time.monotonic() - begun
            self.skipped.update(examples.skipped)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            sums += self._step(examples)
        images_, loss, right, skipped = self._sum(sums).tolist()
        return {
            "train_samples": int(images_),
            "train_loss": loss / max(images_, 1),
            "train_top1": right / max(images_, 1),
            "skipped": int(skipped),
        }

    def _learning_rate(self, step: int) -> float:
        done = (self.epoch - 1) * self.steps + step
        return recipe.learning_rate(self.plan.recipe, done, self.steps, self.history)

    def _step(self, examples: Examples) -> Tensor:
        """One step of SGD on the mean loss of the global batch, whatever was skipped of it."""
        x, labels = self._input(examples), examples.label.to(self.device)
        logits = self.parallel(x)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        images_ = self._sum(torch.tensor([float(len(labels))], dtype=torch.float64, device=self.device))
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel averages over ranks; the mean over images needs the sum.
        (loss * self.world / images_.clamp_min(1).to(loss.dtype).squeeze()).backward()
        self.optimizer.step()
        if self.plan.recipe.renormalise is not None:
            recipe.renormalise_filters(self.network, self.plan.recipe.renormalise)
        right = (logits.detach().argmax(1) == labels).sum()
        counts = torch.tensor([len(labels), len(examples.skipped)], dtype=torch.float64, device=self.device)
        return torch.stack([counts[0], loss.detach().double(), right.double(), counts[1]])

    def _input(self, examples: Examples) -> Tensor:
        return self.preprocessing.normalise(examples.pixels.to(self.device), examples.top, examples.left)

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Top-1, top-5 and loss over the whole split, centre crop: sums and counts over all ranks."""
        self.network.eval()
        number = len(self.classes)
        top = {
            k: MulticlassAccuracy(num_classes=number, top_k=min(k, number), average="micro").to(self.device)
            for k in (1, 5)
        }
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for examples in self._validation_loader:
            self.skipped.update(examples.skipped)
            if not len(examples.label):
                continue
            logits, labels = self.network(self._input(examples)), examples.label.to(self.device)
            sums[0] += len(labels)
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
            for accuracy in top.values():
                accuracy.update(logits, labels)
        images_, loss = self._sum(sums).tolist()
        return {
            "validation_samples": int(images_),
            "validation_loss": loss / max(images_, 1),
            "validation_top1": float(top[1].compute()),
            "validation_top5": float(top[5].compute()),
        }

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def _checkpoint(self) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        tensors[_MEAN] = self.preprocessing.mean
        checkpoints.write(
            self.run_directory,
            Checkpoint(self.epoch, tensors, self.optimizer.state_dict(), self.history, frozenset(self.skipped)),
        )

    def _finish(self) -> None:
        """Write what could not be read, then the model; run.json is last."""
        if self.rank:
            return
        skipped = sorted(self.skipped, key=lambda s: (s.shard, s.key, s.reason))
        self._write_skipped(skipped)
        self.run_directory.save_model(
            self.network.eval(),
            architecture=self.plan.architecture,
            classes=self.classes,
            preprocessing=self.preprocessing,
            about={"training": describe(self.plan), "skipped": len(skipped), "history": self.history},
        )

    def _all_skipped(self) -> set[Skipped]:
        gathered: list[Any] = [self.skipped] * self.world
        if self.world > 1:
            dist.all_gather_object(gathered, self.skipped)
        return set().union(*gathered)

    def _write_skipped(self, skipped: list[Skipped]) -> None:
        columns = {name: [getattr(s, name) for s in skipped] for name in ("shard", "key", "reason", "detail")}
        table = tables.conform({"table": ["train"] * len(skipped), **columns}, tables.SKIPPED)
        tables.write(table, self.run_directory.location / "results" / "skipped" / "train.parquet")


def describe(plan: Plan) -> dict[str, Any]:
    """What decides a training's result, ready for JSON."""
    return {name: value for name, value in asdict(plan).items() if name not in ("run", "data", "index")}
