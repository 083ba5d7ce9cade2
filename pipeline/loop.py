"""The training loop of one worker: plain PyTorch, with or without a process group around it."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from pipeline import checkpoints, metrics, tables
from pipeline.checkpoints import MEAN, Checkpoint
from pipeline.mean import Statistics, statistics
from pipeline.runs import Run, RunError
from pipeline.shards import Index, Skipped
from pipeline.stream import Examples, Images, labelled, loader, rank_batches
from zfnet import models, recipe
from zfnet.images import Preprocessing
from zfnet.recipe import Recipe

VALIDATION_BATCH = 256
PROGRESS_SECONDS = 10.0
_DTYPES = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}
"""Of weights and gradients, by the recipe's precision; bf16 is autocast on top."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained on what; everything but the places decides the result."""

    PLACES: ClassVar[tuple[str, ...]] = ("run", "data", "index")
    """Fields that decide nothing."""

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


@dataclass(frozen=True)
class Rehearsal:
    """What some steps of a training took."""

    steps: int
    """That were taken."""
    step_seconds: float
    validation_seconds: float
    """Of an image."""
    weights_bytes: int
    optimizer_bytes: int


class Trainer:
    """One worker's part of a training."""

    METRICS = metrics.METRICS
    """Columns of its metrics."""
    TRAINED = ("train_samples", "train_top1")
    """Those that count what was trained on, and say which share of it was right."""

    def __init__(
        self,
        plan: Plan,
        *,
        rank: int,
        world: int,
        device: str,
        decoders: int,
        checkpoint_steps: int,
        keep_epochs: tuple[int, ...],
    ) -> None:
        self.plan, self.rank, self.world, self.decoders = plan, rank, world, decoders
        self.recipe, self.checkpoint_steps, self.keep_epochs = plan.recipe, checkpoint_steps, keep_epochs
        self.device, self.dtype = torch.device(device), _DTYPES[plan.recipe.precision]
        self.run_directory = Run.at(plan.run)
        self.images_index = Index.load(plan.data, plan.index)
        self.classes = self.images_index.classes
        self.train_rows, unusable = labelled(self.images_index, plan.train_split, len(self.classes))
        self.validation_rows, more = labelled(self.images_index, plan.validation_split, len(self.classes))
        self.skipped = {*unusable, *more}
        self.history: list[float] = []
        self.step = 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # images, loss, right, skipped
        self.earlier_seconds = 0.0
        self.rehearsing = False

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return int(self.train_rows.num_rows) // self.recipe.batch

    @property
    def epoch(self) -> int:
        """Whole epochs so far."""
        return self.step // self.steps

    def run(self) -> None:
        """Train all steps that are left, then write the model. Rank 0 writes; the others only compute."""
        self._prepare()
        batches = self._training_batches()
        while self.epoch < self.recipe.epochs:
            row = self._epoch(batches)
            self.history.append(self._error(row))
            if self.rank == 0:
                metrics.write(self.run_directory, row, self.METRICS)
            self._checkpoint(inside=False)
        self._finish()

    def rehearse(self, seconds: float) -> Rehearsal:
        """Take steps from the first weights on for so long, validate some images, and write nothing.

        The first half of the steps is not clocked: by then the decoders run, and what they had ready is used up.
        """
        self.rehearsing = True
        self._prepare()
        self.parallel.train()
        batches = self._training_batches()
        ends = [time.perf_counter()]
        while len(ends) <= self.recipe.epochs * self.steps and (len(ends) < 3 or ends[-1] - ends[0] < seconds):
            self._step(next(batches)).tolist()  # waits for the device
            ends.append(time.perf_counter())
        half = (len(ends) - 1) // 2
        self.validation_rows = self.validation_rows.slice(0, VALIDATION_BATCH)
        self._validate()  # the decoders start
        begun = time.perf_counter()
        self._validate()
        buffer = io.BytesIO()
        torch.save(self.optimizer.state_dict(), buffer)
        return Rehearsal(
            steps=len(ends) - 1,
            step_seconds=(ends[-1] - ends[half]) / (len(ends) - 1 - half),
            validation_seconds=(time.perf_counter() - begun) / self.validation_rows.num_rows,
            weights_bytes=sum(tensor.nbytes for tensor in self.network.state_dict().values()),
            optimizer_bytes=buffer.tell(),
        )

    def _error(self, row: dict[str, Any]) -> float:
        """What the learning rate's schedule goes by, of an epoch's metrics."""
        return 1 - float(row["validation_top1"])

    def _first_network(self) -> models.Classifier:
        """The network before the first step. Parameters that want no gradient are not trained."""
        network = models.build(self.plan.architecture, classes=len(self.classes))
        recipe.initialise(network, self.recipe.init, self.plan.seed, self.recipe.ones)
        return network

    def _module(self) -> nn.Module:
        """What is run on images in training."""
        return self.network

    def _prepare(self) -> None:
        """Network, preprocessing and optimizer, fresh or from the newest checkpoint."""
        self.network = self._first_network()
        name = None if self.rehearsing else self._newest_checkpoint()
        found = checkpoints.read(self.run_directory, name) if name else None
        if self.recipe.dropout is not None:
            recipe.set_dropout(self.network, self.recipe.dropout)
        self.network.to(self.dtype)
        self._prepare_images(found)
        if found is not None:
            self.network.load_state_dict(found.tensors)
            self.step, self.history, self.earlier_seconds = found.step, found.history, found.seconds
            self.skipped |= found.skipped
            if self.rank == 0 and found.sums is not None:  # the sum over all ranks is theirs
                self.sums += torch.tensor(found.sums, dtype=torch.float64, device=self.device)
        self.network.to(self.device)
        if self.recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.optimizer = self._optimizer([each for each in self.network.parameters() if each.requires_grad])
        if found is not None:
            self.optimizer.load_state_dict(found.optimizer)
        if self.recipe.compile:
            self.network.compile()
        module = self._module()
        self.parallel: nn.Module = module if self.world == 1 else DistributedDataParallel(module)

    def _prepare_images(self, found: Checkpoint | None) -> None:
        """Preprocessing with the mean image, and the axes of the colours' shifts."""
        resize_px = self.network.resize_px
        mean = None if found is None else found.tensors.pop(MEAN)
        self.colours = None
        if mean is None or self.recipe.colour != "none":
            measured = self._statistics(resize_px)
            if mean is None:
                mean = measured.mean
                if self.recipe.smallest_crop is not None:  # a mean for each pixel has no place in a scaled crop
                    mean = mean.mean((1, 2), keepdim=True)
            if self.recipe.colour != "none":
                self.colours = recipe.colour_axes(measured.covariance, self.recipe.colour).numpy()
        self.preprocessing = Preprocessing(resize_px=resize_px, crop_px=self.network.input_px, mean=mean)

    def _statistics(self, resize_px: int) -> Statistics:
        """Of the training images: one pass over them, but for a rehearsal."""
        if self.rehearsing:
            return Statistics(torch.zeros(3, resize_px, resize_px), torch.eye(3, dtype=torch.float64))
        return statistics(
            self.images_index,
            self.plan.train_split,
            self.train_rows,
            resize_px,
            run=self.run_directory.location,
            rank=self.rank,
            world=self.world,
            decoders=self.decoders,
        )

    def _optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        how = self.recipe
        return torch.optim.SGD(trained, lr=how.lr, momentum=how.momentum, weight_decay=how.weight_decay)

    def _newest_checkpoint(self) -> str | None:
        """The whole checkpoint that is furthest: rank 0 looks, so that all begin at the same one."""
        choice = [checkpoints.newest(self.run_directory) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(choice)
        return choice[0]

    def _training_batches(self) -> Iterator[Examples]:
        """This rank's share of every global batch that is left, decoded ahead across the borders of epochs."""
        shards = self.train_rows["shard"].combine_chunks().dictionary_encode().indices.to_numpy()
        places = rank_batches(
            shards,
            seed=self.plan.seed,
            first_step=self.step,
            epochs=self.recipe.epochs,
            batch=self.recipe.batch,
            rank=self.rank,
            world=self.world,
        )
        return iter(loader(self._training_images(), places, self.decoders))

    def _training_images(self) -> Dataset[Any]:
        """The training samples by place."""
        return Images(
            self.images_index,
            self.train_rows,
            self.preprocessing,
            self.plan.seed,
            self.recipe.smallest_crop,
            self.colours,
        )

    def _validation_images(self) -> Dataset[Any]:
        """The validation samples by place."""
        return Images(self.images_index, self.validation_rows, self.preprocessing, self.plan.seed)

    @cached_property
    def _validation_loader(self) -> Any:
        mine = range(self.rank, self.validation_rows.num_rows, self.world)
        batches = [
            [(0, row) for row in mine[start : start + VALIDATION_BATCH]]
            for start in range(0, len(mine), VALIDATION_BATCH)
        ]
        return loader(self._validation_images(), batches, min(self.decoders, 1))

    def _epoch(self, batches: Iterator[Examples]) -> dict[str, Any]:
        """Train to the end of the epoch and validate; returns its row of metrics, the same on every rank."""
        begun = self.step
        started = time.monotonic()
        trained = self._train(batches)
        seconds = time.monotonic() - started
        validated = self._validate()
        return {
            "epoch": self.epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **trained,
            **validated,
            "workers": self.world,
            "images_per_second": (self.step - begun) * self.recipe.batch / seconds,
            "data_wait_share": self.waited / seconds,
            "seconds": self.earlier_seconds + time.monotonic() - started,
        }

    def _train(self, batches: Iterator[Examples]) -> dict[str, Any]:
        self.parallel.train()
        self.waited = 0.0
        self.started = time.monotonic()
        progress = metrics.Pace(self.run_directory, PROGRESS_SECONDS)
        end = (self.epoch + 1) * self.steps
        while self.step < end:
            begun = time.monotonic()
            examples = next(batches)
            self.waited += time.monotonic() - begun
            self.skipped.update(examples.skipped)
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate(self.recipe, self.step, self.steps, self.history)
            self._seed()
            self.sums += self._step(examples)
            self.step += 1
            if self.rank == 0:
                total = self.recipe.epochs * self.steps
                progress.advance(self.step, total, self.steps, self.recipe.batch, self.waited)
            if self.step < end and self.step % self.checkpoint_steps == 0:
                self._checkpoint(inside=True)
        examples_, loss, right, skipped = self._sum(self.sums.clone()).tolist()
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} in epoch {self.epoch}: training has diverged; give a lower --lr than "
                f"{self.recipe.lr:g}, and another --run"
            )
        counted, share_right = self.TRAINED
        return {
            counted: int(examples_),
            "train_loss": loss / max(examples_, 1),
            share_right: right / max(examples_, 1),
            "skipped": int(skipped),
        }

    def _seed(self) -> None:
        """Dropout is drawn from (seed, step, rank), so a step that is done again is the same."""
        torch.manual_seed(int(np.random.SeedSequence([self.plan.seed, self.step, self.rank]).generate_state(1)[0]))

    def _step(self, examples: Examples) -> Tensor:
        """One step of SGD on the mean loss of the global batch, whatever was skipped of it.

        Returns: this rank's images, summed loss, right ones and skipped ones.
        """
        x, labels = self._input(examples), examples.label.to(self.device)
        images_ = torch.tensor([float(len(labels))], dtype=torch.float64, device=self.device)
        # Waited for after the forward pass: waiting here would keep every rank back for the slowest decoder.
        counting = dist.all_reduce(images_, async_op=True) if self.world > 1 else None
        self.optimizer.zero_grad(set_to_none=True)
        loss, right = torch.zeros(2, dtype=torch.float64, device=self.device)
        slices = list(zip(x.chunk(self.recipe.accumulate), labels.chunk(self.recipe.accumulate), strict=True))
        for number, (part, answers) in enumerate(slices, 1):
            with self._gradients_together(last=number == len(slices)):
                logits = self._forward(self.parallel, part)
                part_loss = F.cross_entropy(logits, answers, reduction="sum")
                if counting is not None:
                    counting.wait()
                # DistributedDataParallel averages over ranks; the mean over images needs the sum.
                share = self.world / images_.clamp_min(1).to(self.dtype).squeeze()
                (part_loss * share).backward()
            loss = loss + part_loss.detach().double()
            right = right + (logits.detach().argmax(1) == answers).sum()
        self.optimizer.step()
        if self.recipe.renormalise is not None:
            recipe.renormalise_filters(self.network, self.recipe.renormalise)
        counts = torch.tensor([len(labels), len(examples.skipped)], dtype=torch.float64, device=self.device)
        return torch.stack([counts[0], loss, right, counts[1]])

    def _gradients_together(self, last: bool) -> AbstractContextManager[None]:
        """Gradients of the slices of a step are exchanged with the last."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def _forward(self, network: nn.Module, x: Tensor) -> Tensor:
        """Logits, in the precision of the weights."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits: Tensor = network(x)
        return logits.to(self.dtype)

    def _input(self, examples: Examples) -> Tensor:
        x = self.preprocessing.normalise(examples.pixels.to(self.device), examples.top, examples.left)
        if examples.colour is not None:
            shift = examples.colour.to(self.device)[:, :, None, None]
            x = (x + shift) * recipe.colour_scale(self.recipe.colour)
        x = x.to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else x

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
            logits, labels = self._forward(self.network, self._input(examples)), examples.label.to(self.device)
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

    def _checkpoint(self, *, inside: bool) -> None:
        """Commit where training stands, inside an epoch or at its end. All ranks call it, rank 0 writes."""
        self.skipped = self._all_skipped()
        sums = self._sum(self.sums.clone()).tolist()
        if not inside:
            self.sums.zero_()
            self.earlier_seconds = 0.0
        if self.rank:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        tensors[MEAN] = self.preprocessing.mean
        checkpoint = Checkpoint(
            step=self.step,
            epoch=self.epoch,
            tensors=tensors,
            optimizer=self.optimizer.state_dict(),
            history=self.history,
            sums=sums if inside else None,
            seconds=self.earlier_seconds + time.monotonic() - self.started if inside else 0.0,
            skipped=frozenset(self.skipped),
        )
        checkpoints.write(self.run_directory, checkpoint, self.keep_epochs)

    def _finish(self) -> None:
        """Write what could not be read, then the model; run.json is last."""
        if self.rank:
            return
        skipped = sorted(self.skipped, key=lambda s: (s.shard, s.key, s.reason))
        self._write_skipped(skipped)
        self.run_directory.save_model(
            self.network.float().eval(),
            architecture=self.plan.architecture,
            classes=self.classes,
            preprocessing=self.preprocessing,
            about={"training": describe(self.plan), "skipped": len(skipped), "history": self.history},
            staging=self.run_directory.training,
        )

    def _all_skipped(self) -> set[Skipped]:
        gathered: list[Any] = [self.skipped] * self.world
        if self.world > 1:
            dist.all_gather_object(gathered, self.skipped)
        return set().union(*gathered)

    def _write_skipped(self, skipped: list[Skipped]) -> None:
        columns = {name: [getattr(s, name) for s in skipped] for name in ("shard", "key", "reason", "detail")}
        table = tables.conform({"table": ["train"] * len(skipped), **columns}, tables.SKIPPED)
        location = self.run_directory.location / "results" / "skipped" / "train.parquet"
        tables.write(table, location, self.run_directory.training)


def describe(plan: Plan) -> dict[str, Any]:
    """What decides a training's result, ready for JSON."""
    return {name: value for name, value in asdict(plan).items() if name not in plan.PLACES}
