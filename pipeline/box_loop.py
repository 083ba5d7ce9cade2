"""The training loop of one worker for what looks at windows: a regressor of boxes, or a detector with a background.

Order, resume and account are those of classification (pipeline/loop.py). Here a sample gives a view of a random scale
and place, and every window of it that shows an object, or may show the background, is an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipeline import tables
from pipeline.checkpoints import Checkpoint
from pipeline.loop import Plan, Trainer
from pipeline.objects import objects_of
from pipeline.runs import Run
from pipeline.shards import Index, Sample, Skipped
from pipeline.stream import Place, generator
from zfnet import images, models
from zfnet.dense import Sliding, Stride, in_context, slide
from zfnet.localization import (
    Ints,
    into_frame,
    lower_view,
    nearest_object,
    nearest_window,
    out_of_frame,
    training_view,
    window_edges,
    window_labels,
)
from zfnet.merging import Edges
from zfnet.models.heads import EDGES, HeadedNetwork, initialise_heads

BACKGROUND = "background"
"""Name of the class that a detector has beside those of its classifier."""
Mining = Literal["random", "offending", "both"]
Learns = Literal["regressor", "all"]
IGNORED = -1
"""Label of a window that is no example."""
_MEAN = "preprocessing.mean"

METRICS = pa.schema(
    [
        tables.column("epoch", pa.int32(), "Epoch, from 1."),
        tables.column("learning_rate", pa.float64(), "Learning rate at the end of the epoch."),
        tables.column("train_windows", pa.int64(), "Windows that the epoch trained on."),
        tables.column("train_loss", pa.float64(), "Mean loss over them: squared distance of edges, or cross-entropy."),
        tables.column("train_right", pa.float64(), "Share of them with a box of IoU 0.5 or more, or the right class."),
        tables.column("validation_windows", pa.int64(), "Windows of the validation images' views."),
        tables.column("validation_loss", pa.float64(), "Mean loss over them."),
        tables.column("validation_right", pa.float64(), "Share of them with a box of IoU 0.5 or more, or the class."),
        tables.column("skipped", pa.int64(), "Training samples and boxes of the epoch that could not be used."),
        tables.column("workers", pa.int32(), "Training workers at the end of the epoch."),
        tables.column("images_per_second", pa.float64(), "Training images a second, all workers together."),
        tables.column("data_wait_share", pa.float64(), "Share of the training time spent waiting for images."),
        tables.column("seconds", pa.float64(), "Seconds of the epoch, validation included."),
    ]
)


@dataclass(frozen=True, kw_only=True)
class BoxPlan(Plan):
    """What is trained on what, beginning with which model."""

    PLACES: ClassVar[tuple[str, ...]] = (*Plan.PLACES, "source")

    source: str
    """Run of that model."""
    source_model_id: str
    scales: tuple[int, ...]
    """Of which a view is drawn, 1 to 6."""
    stride: Stride
    """Of the windows."""
    stretch: float
    """How much higher and wider than its scale's an image may be."""


@dataclass(frozen=True, kw_only=True)
class LocalizerPlan(BoxPlan):
    """A regressor of boxes on frozen features."""

    in_view: float
    """Least share of a box that a window must see to be trained on it."""
    filled: float
    """Least share of the window that the box must cover."""
    learns: Learns
    """The regressor on frozen features, or all of the network, the classes of its windows too."""


@dataclass(frozen=True, kw_only=True)
class DetectorPlan(BoxPlan):
    """A classifier of windows with a background class."""

    negatives: int
    """Windows of the background that are taken of each view."""
    mining: Mining
    """Which ones."""


@dataclass(frozen=True, eq=False)
class Windows:
    """A batch as it leaves the decoders; W windows of each view."""

    pixels: Tensor
    """uint8 [N, side, side, 3], RGB."""
    label: Tensor
    """int64 [N, W]: class, or IGNORED."""
    edges: Tensor
    """float32 [N, W, 4]: the object's, in units of the window; zeros where there is none."""
    lower: Tensor
    """uint8 as `pixels`: the view of the next lower scale about the same middle; [N, 0, 0, 3] without context."""
    nearest: Tensor
    """int64 [N, W]: the window of the lower view that lies nearest; -1: there is no lower scale."""
    skipped: list[Skipped]


@dataclass(frozen=True, eq=False)
class Views(Dataset[Any]):
    """Samples by place, as views with their windows' labels. Epoch 0 stands for the views of validation."""

    index: Index
    rows: pa.Table
    classes: tuple[str, ...]
    """Of the network, to which a box's label is put."""
    seed: int
    sides_px: tuple[int, ...]
    side_px: int
    windows: Edges
    about: float
    """Share of the views that are drawn about an object."""
    stretch: float
    label: Callable[[Edges, Edges, Ints], tuple[Ints, Ints]]
    """Windows, boxes, their labels -> label of each window, and which box it is of, or -1."""
    context: bool
    require_boxes: bool
    """Whether an image without any is of no use."""

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __getitems__(self, places: list[Place]) -> Windows:
        """A batch; what cannot be used is in its `skipped`."""
        found = self.index.read(self.rows.take(pa.array([row for _, row in places], type=pa.int64())))
        taken: list[tuple[Any, ...]] = []
        skipped: list[Skipped] = []
        for (epoch, _), sample in zip(places, found, strict=True):
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            try:
                taken.append(self._view(sample, epoch, skipped))
            except images.BadImage as error:
                skipped.append(Skipped(sample.shard, sample.key, error.reason, error.detail))
        side, lower, count = self.side_px, self.side_px if self.context else 0, len(self.windows)
        shapes: list[tuple[int, ...]] = [(side, side, 3), (count,), (count, EDGES), (lower, lower, 3), (count,)]
        kinds = [np.uint8, np.int64, np.float32, np.uint8, np.int64]
        columns = [
            torch.from_numpy(
                np.stack([item[i] for item in taken]).astype(kind) if taken else np.empty((0, *shape), kind)
            )
            for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
        ]
        pixels, label, edges, lower_pixels, nearest = columns
        return Windows(pixels, label, edges, lower_pixels, nearest, skipped)

    def _view(self, sample: Sample, epoch: int, skipped: list[Skipped]) -> tuple[Any, ...]:
        image, objects = images.decode(sample.image), objects_of(sample, self.classes)
        if self.require_boxes and not len(objects):
            why = ", ".join(reason for _, reason in objects.refused) or "there is none"
            raise images.BadImage("no_box", f"it has no box that can be used: {why}")
        for entry, reason in objects.refused:
            skipped.append(Skipped(sample.shard, sample.key, f"box_{reason}", str(entry)))
        rng = generator(self.seed, epoch, sample.key)
        view = training_view(image, objects.boxes, self.sides_px, self.side_px, self.about, self.stretch, rng)
        label, nearest = self.label(self.windows, view.boxes, objects.labels)
        edges = np.zeros((len(self.windows), EDGES))
        edges[nearest >= 0] = into_frame(view.boxes[nearest[nearest >= 0]], self.windows[nearest >= 0])
        lower, beside = np.empty((0, 0, 3), np.uint8), np.full(len(self.windows), -1)
        place = self.sides_px.index(view.smallest_px)
        if self.context:
            lower = np.zeros((self.side_px, self.side_px, 3), np.uint8)
        if self.context and place:
            lower, there = lower_view(image, view, self.sides_px[place - 1])
            beside = nearest_window(out_of_frame(self.windows / self.side_px, there), self.windows)
        return view.pixels, label, edges, lower, beside


class BoxTrainer(Trainer):
    """One worker's part of training on windows; the subclasses say what is trained, and how."""

    METRICS = METRICS
    TRAINED = ("train_windows", "train_right")
    plan: Any
    network: Any

    def __init__(self, plan: BoxPlan, **place: Any) -> None:
        super().__init__(plan, **place)
        self.source = Run.at(plan.source).load_model()
        self.skipped = set()
        self.train_rows = self.images_index.split(plan.train_split)
        self.validation_rows = self.images_index.split(plan.validation_split)

    def _prepare_images(self, found: Checkpoint | None) -> None:
        """The source's preprocessing, a mean for each channel."""
        self.preprocessing = self.source.preprocessing.of_any_size()
        if found is not None:
            found.tensors.pop(_MEAN)
        sliding = Sliding(self.network)
        self.sides_px = tuple(sliding.sides_px(scale)[0] for scale in self.plan.scales)
        self.side_px = self.sides_px[0]
        steps = (self.side_px - sliding.sides_px(1)[0]) // sliding.step_px["coarse"] + 1
        count = steps * (sliding.cells if self.plan.stride == "fine" else 1)
        self.windows = window_edges(sliding, self.plan.stride, count, count)

    def _views(self, rows: pa.Table) -> Views:
        return Views(
            self.images_index,
            rows,
            self.classes,
            self.plan.seed,
            self.sides_px,
            self.side_px,
            self.windows,
            self.about,
            self.plan.stretch,
            self._label,
            getattr(self.network, "context", None) is not None,
            self.require_boxes,
        )

    require_boxes: ClassVar[bool]
    about: ClassVar[float]

    def _training_images(self) -> Views:
        return self._views(self.train_rows)

    def _validation_images(self) -> Views:
        return self._views(self.validation_rows)

    @property
    def _label(self) -> Callable[[Edges, Edges, Ints], tuple[Ints, Ints]]:
        """How windows are labelled, as something that can be sent to the decoders."""
        raise NotImplementedError

    def _losses(self, outputs: Tensor, batch: Windows) -> tuple[Tensor, Tensor]:
        """Loss of each window that counts, and whether each is right. Outputs are [N, W, C]."""
        raise NotImplementedError

    def _outputs(self, batch: Windows) -> Tensor:
        """[N, W, C]"""
        x = self.preprocessing.normalise(batch.pixels.to(self.device)).to(self.dtype)
        lower = batch.lower.to(self.device)
        lower = self.preprocessing.normalise(lower).to(self.dtype) if lower.numel() else lower.to(self.dtype)
        found: Tensor = self.parallel(x, lower, batch.nearest.to(self.device))
        return found.flatten(2).transpose(1, 2)

    def _step(self, examples: Any) -> Tensor:
        """A step of SGD on the mean loss of the windows of the global batch.

        Returns: this rank's windows, summed loss, right ones, and what was skipped.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses, right = self._losses(self._outputs(examples), examples)
        windows = torch.tensor([float(len(losses))], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(windows)
        # DistributedDataParallel averages over ranks; the mean over windows needs the sum.
        (losses.sum() * (self.world / windows.clamp_min(1).to(self.dtype).squeeze())).backward()
        self.optimizer.step()
        sums = [len(losses), float(losses.detach().double().sum()), float(right.sum()), len(examples.skipped)]
        return torch.tensor(sums, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Loss and right windows over the views of the whole split: sums and counts over all ranks."""
        self.parallel.eval()
        self._seed()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for examples in self._validation_loader:
            self.skipped.update(examples.skipped)
            if len(examples.label):
                losses, right = self._losses(self._outputs(examples), examples)
                sums += torch.tensor(
                    [len(losses), float(losses.double().sum()), float(right.sum())], device=self.device
                )
        windows, loss, hits = self._sum(sums).tolist()
        return {
            "validation_windows": int(windows),
            "validation_loss": loss / max(windows, 1),
            "validation_right": hits / max(windows, 1),
        }

    def _error(self, row: dict[str, Any]) -> float:
        return float(row["validation_loss"])


@dataclass(frozen=True)
class LabelBoxes:
    """The nearest object of each window, where enough of it is in view."""

    in_view: float
    filled: float

    def __call__(self, windows: Edges, boxes: Edges, labels: Ints) -> tuple[Ints, Ints]:
        """Label and box of each window."""
        nearest = nearest_object(windows, boxes, self.in_view, self.filled)
        return np.append(labels, IGNORED)[nearest], nearest


EDGES_WEIGHT = 25.0
"""Of a box's squared distance beside the cross-entropy of its class, where both are learned."""


class LocalizerTrainer(BoxTrainer):
    """The regressor is trained, and all else stays as the source has it (OverFeat 4.2), or is trained with it."""

    plan: LocalizerPlan
    network: HeadedNetwork
    require_boxes = True
    about = 1.0

    def _first_network(self) -> Any:
        self.classes = self.source.classes
        network = models.build(self.plan.architecture, len(self.classes))
        assert isinstance(network, HeadedNetwork)
        assert network.regressor is not None
        initialise_heads(network, self.plan.seed)
        network.load_state_dict(self.source.network.state_dict(), strict=False)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(self.plan.learns == "all" or name.startswith("regressor."))
        return network

    def _optimizer(self, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam: frozen features have whatever size their training gave them, and SGD's step grows with its square."""
        return torch.optim.Adam(trained, lr=self.recipe.lr, weight_decay=self.recipe.weight_decay)

    def _module(self) -> nn.Module:
        return RegressedWindows(self.network, self.plan.stride, scored=self.plan.learns == "all")

    @property
    def _label(self) -> LabelBoxes:
        return LabelBoxes(self.plan.in_view, self.plan.filled)

    def _losses(self, outputs: Tensor, batch: Windows) -> tuple[Tensor, Tensor]:
        """The squared distance of the four edges and, where it is learned, the class's cross-entropy.

        A window has a right box at an overlap of one half.
        """
        label, edges = batch.label.to(self.device), batch.edges.to(self.device, outputs.dtype)
        counts = label >= 0
        outputs, label, edges = outputs[counts], label[counts], edges[counts]
        classes = len(self.classes) if self.plan.learns == "all" else 0
        boxes = outputs[:, classes:].unflatten(1, (-1, EDGES))
        of = label if boxes.shape[1] > 1 else torch.zeros_like(label)
        said = boxes[torch.arange(len(of), device=of.device), of]
        losses = (said - edges).square().sum(1)
        if classes:
            losses = EDGES_WEIGHT * losses + F.cross_entropy(outputs[:, :classes], label, reduction="none")
        return losses, _iou(said.detach(), edges) >= 0.5


def _iou(one: Tensor, other: Tensor) -> Tensor:
    """[N] of boxes [N, 4] in pairs."""
    overlap = (torch.minimum(one, other)[:, 2:] - torch.maximum(one, other)[:, :2]).clamp_min(0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp_min(0).prod(1) for boxes in (one, other)]
    return overlap / (areas[0] + areas[1] - overlap).clamp_min(1e-12)


class RegressedWindows(nn.Module):
    """Images -> the class scores of every window, where they are learned, and what the regressor says of it."""

    def __init__(self, network: HeadedNetwork, stride: Stride, scored: bool) -> None:
        super().__init__()
        assert network.regressor is not None
        self.network, self.regressor, self.stride, self.scored = network, network.regressor, stride, scored
        self._sliding = Sliding(network)

    def forward(self, x: Tensor, lower: Tensor, nearest: Tensor) -> Tensor:
        """[N, outputs, rows, cols]"""
        pooled = self._sliding.pooled(x, self.stride)
        found = slide(self.regressor, pooled)
        return torch.cat([self._sliding.scores(pooled), found], 1) if self.scored else found


@dataclass(frozen=True)
class LabelWindows:
    """Class or background."""

    background: int

    def __call__(self, windows: Edges, boxes: Edges, labels: Ints) -> tuple[Ints, Ints]:
        """Label of each window; no boxes are asked for."""
        return window_labels(windows, boxes, labels, self.background), np.full(len(windows), -1, np.int64)


class DetectorTrainer(BoxTrainer):
    """The whole classifier is trained on, spatially, with a background class (OverFeat 5)."""

    plan: DetectorPlan
    require_boxes = False
    about = 0.5

    def _first_network(self) -> Any:
        self.classes = (*self.source.classes, BACKGROUND)
        network = models.build(self.plan.architecture, len(self.classes))
        if isinstance(network, HeadedNetwork):
            initialise_heads(network, self.plan.seed)
        own = network.state_dict()
        for name, tensor in self.source.network.state_dict().items():
            own[name][: len(tensor)] = tensor  # the background's row is the last of the classifier's
            if len(own[name]) > len(tensor):
                own[name][len(tensor) :] = 0
        return network

    def _module(self) -> nn.Module:
        return ScoredWindows(self.network, self.plan.stride)

    @property
    def _label(self) -> LabelWindows:
        return LabelWindows(len(self.classes) - 1)

    def _losses(self, outputs: Tensor, batch: Windows) -> tuple[Tensor, Tensor]:
        """Cross-entropy of all windows that show an object, and of a few of each view that show none."""
        label = batch.label.to(self.device)
        counts = (label >= 0) & (label != len(self.classes) - 1) | self._mined(outputs.detach(), label)
        said, wanted = outputs[counts], label[counts]
        return F.cross_entropy(said, wanted, reduction="none"), said.detach().argmax(1) == wanted

    def _mined(self, outputs: Tensor, label: Tensor) -> Tensor:
        """[N, W]: the windows of the background that are taken: drawn, or those that look most like an object."""
        background = len(self.classes) - 1
        candidates = label == background
        offence = 1 - outputs.double().softmax(2)[:, :, background]
        drawn = torch.rand(label.shape, dtype=torch.float64).to(self.device)
        half = self.plan.negatives // 2
        wanted = {
            "random": [(drawn, self.plan.negatives)],
            "offending": [(offence, self.plan.negatives)],
            "both": [(offence, self.plan.negatives - half), (drawn, half)],
        }[self.plan.mining]
        taken = torch.zeros_like(candidates)
        for key, count in wanted:
            key = torch.where(candidates & ~taken, key, -1.0)
            _, order = key.sort(dim=1, descending=True, stable=True)
            first = torch.zeros_like(taken).scatter_(1, order[:, :count], True)
            taken |= first & (key >= 0)
        return taken


class ScoredWindows(nn.Module):
    """Images -> class scores of every window, with what lower resolutions add, where the network has context."""

    def __init__(self, network: nn.Module, stride: Stride) -> None:
        super().__init__()
        self.network, self.stride = network, stride
        self._sliding = Sliding(network)

    def forward(self, x: Tensor, lower: Tensor, nearest: Tensor) -> Tensor:
        """[N, classes, rows, cols]"""
        sliding = self._sliding
        scores = sliding.scores(sliding.pooled(x, self.stride))
        context = getattr(self.network, "context", None)
        if context is None:
            return scores
        hidden = slide(sliding.above[:-1], sliding.pooled(lower, self.stride))
        return in_context(scores, context, hidden, nearest)
