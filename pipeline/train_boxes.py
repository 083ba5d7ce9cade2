"""Training on boxed images: a regressor of boxes for a model that is there, or a detector out of one (OverFeat 4, 5).

Each makes a run of its own, with the whole network in it: resumed, claimed and accounted for as any training.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal

import tyro

from pipeline import train
from pipeline.box_loop import (
    BACKGROUND,
    BoxPlan,
    BoxTrainer,
    DetectorPlan,
    DetectorTrainer,
    Learns,
    LocalizerPlan,
    LocalizerTrainer,
    Mining,
)
from pipeline.cluster import Workers
from pipeline.objects import objects_of
from pipeline.progress import suggest
from pipeline.runs import Model, Run, RunError
from pipeline.shards import Index, Sample
from pipeline.storage import Location
from zfnet import models
from zfnet.dense import Sliding, Stride, require_scales
from zfnet.recipe import Recipe

_MOST_STRETCH = 4.0
_LOOKED_AT = 64  # samples of the training split, in which at least one usable box must be


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both trainings take."""

    run: str
    """Run directory to write: a local path, s3:// or gs://."""
    source: Annotated[str, tyro.conf.arg(name="from")]
    """Run of the model to begin with; it is left as it is."""
    data: str
    """Folder of the shards; samples have boxes in their json."""
    index: str | None = None
    """Folder of the shards' index, where it is not in the folder of the shards."""
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    """Scales of which a training view is drawn."""
    stride: Stride = "fine"
    """Windows that are trained on: with every offset of the last pool, or the first alone."""
    stretch: float = 1.0
    """How much higher and wider than its scale's an image of a view may be, each drawn on its own; 1: not at all."""
    batch: int = 32
    """Views of a step, over all workers."""
    seed: int = 0
    """Seed of first weights, order and views."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "val"
    """Split whose views are looked at after each epoch."""
    address: str | None = None
    """Ray cluster to join; default the one of `ray job submit`, else an own one."""
    max_skipped: float = 0.01
    """Largest share of samples that may be skipped; above it the job ends with exit status 3."""
    decoders: int | None = None
    """Processes of each worker that decode images; default its number of CPUs, 0: the worker decodes itself."""
    checkpoint_steps: int = 1000
    """Steps between two checkpoints inside an epoch; each epoch's end has one anyway. It never changes a result."""
    failures: int = 3
    """How often a call goes on from the newest checkpoint after workers or their nodes died; spot nodes need more."""
    workers: Workers = field(default_factory=Workers)
    """What the job asks of the cluster."""
    plan: bool = False
    """Forecast steps, hours and storage from a few steps, and do nothing else."""

    def places(self) -> train.Options:
        """What decides no result."""
        names = (
            *("run", "data", "index", "address", "max_skipped", "decoders", "checkpoint_steps", "failures"),
            *("workers", "plan"),
        )
        return train.Options(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Localizer(Options):
    """What training a regressor takes."""

    boxes: Literal["shared", "per-class"] = "shared"
    """One regressor for all classes, which gave the paper's best results, or one for each."""
    learns: Learns = "regressor"
    """What is trained: the regressor alone on frozen features, as in the paper, or all of the network, which goes on
    learning the classes of its windows beside the boxes."""
    in_view: float = 0.5
    """Least share of an object's box that a window must see to be trained on it."""
    filled: float = 0.0
    """Least share of the window that the box must cover to be trained on; the paper has no such bound."""
    epochs: int = 10
    """Passes over the training images."""
    lr: float = 1e-3
    """Highest learning rate; it falls to zero by a cosine."""

    def __post_init__(self) -> None:
        for name in ("in_view", "filled"):
            if not 0 <= getattr(self, name) <= 1:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Detector(Options):
    """What training a detector takes."""

    context: Literal["none", "lower"] = "none"
    """lower: each window is classified with the hidden units of the next lower scale's at the same place."""
    negatives: int = 2
    """Windows of the background that are taken of each view."""
    mining: Mining = "both"
    """Which ones: drawn at random, those that look most like an object, or half of each."""
    epochs: int = 16
    """Passes over the training images."""
    lr: float = 1.5e-3
    """Highest learning rate; it falls to zero by a cosine."""

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise RunError(f"--negatives is {self.negatives}: give at least 1")


def run_localizer(options: Localizer) -> int:
    """Train the regressor, or go on. Returns the exit status.

    Raises: RunError, BadShards, StorageError, CannotSchedule, SweepFailed, each with a message for the user.
    """
    model = Run.at(options.source).load_model()
    if options.learns == "all" and BACKGROUND in model.classes:
        raise RunError(
            f"--learns all trains on windows that show objects, and {options.source} would forget what the class "
            f"{BACKGROUND!r} looks like: give --from a classifier, or leave --learns out"
        )
    base, *heads = model.architecture.split("+")
    kept = [head for head in heads if head == "context"]
    architecture = "+".join([base, *kept, "boxes" if options.boxes == "shared" else "class-boxes"])
    known = _plan(options, model, architecture, _recipe(options))
    own = ("in_view", "filled", "learns")
    plan = LocalizerPlan(**known, **{name: getattr(options, name) for name in own})
    return _carry_out(options, plan, LocalizerTrainer, "train_localizer", "localize.py --run {run} --data {data}")


def run_detector(options: Detector) -> int:
    """Train the detector, or go on. Returns the exit status.

    Raises: RunError, BadShards, StorageError, CannotSchedule, SweepFailed, each with a message for the user.
    """
    model = Run.at(options.source).load_model()
    if BACKGROUND in model.classes or "+" in model.architecture:
        raise RunError(
            f"{options.source} holds {model.architecture} with {len(model.classes)} classes, {BACKGROUND!r} or heads "
            "among them: give --from a classifier that jobs/train.py made, and train its boxes afterwards"
        )
    architecture = model.architecture + ("+context" if options.context == "lower" else "")
    known = _plan(options, model, architecture, _recipe(options))
    plan = DetectorPlan(**known, negatives=options.negatives, mining=options.mining)
    return _carry_out(
        options, plan, DetectorTrainer, "train_detector", "train_localizer.py --from {run} --run BOXES --data {data}"
    )


def _carry_out(options: Options, plan: BoxPlan, trainer: type[BoxTrainer], label: str, then: str) -> int:
    status = train.carry_out(options.places(), plan, trainer, _told, label)
    if not options.plan:
        suggest(then, options.index, run=options.run, data=options.data)
    return status


def _recipe(options: Localizer | Detector) -> Recipe:
    given = {name: getattr(options, name) for name in ("epochs", "batch", "lr")}
    try:
        return Recipe(**given, weight_decay=1e-5, schedule="cosine", warmup=0.05, renormalise=None)
    except ValueError as error:
        raise RunError(str(error)) from None


def _plan(options: Options, model: Model, architecture: str, recipe: Recipe) -> dict[str, Any]:
    """What both plans have in common. Everything that can be refused without training is refused here."""
    index = Index.load(options.data, options.index)
    try:
        models.build(architecture, len(model.classes))
        Sliding(model.network)
    except ValueError as error:
        raise RunError(str(error)) from None
    try:
        require_scales(options.scales)
    except ValueError as error:
        raise RunError(f"--{error}") from None
    if not 1 <= options.stretch <= _MOST_STRETCH:
        raise RunError(f"--stretch is {options.stretch}: give 1, for none, to {_MOST_STRETCH:g}")
    if options.seed < 0:
        raise RunError(f"--seed is {options.seed}: give 0 or more")
    rows = index.split(options.train_split)
    if rows.num_rows < recipe.batch:
        raise RunError(
            f"--batch is {recipe.batch}, and the split {options.train_split!r} holds {rows.num_rows} images: give at "
            "most that"
        )
    _require_boxes(index, rows, model)
    splits = (options.train_split, options.validation_split)
    common = BoxPlan(
        run=str(Run.at(options.run).location),
        data=str(Location.of(options.data)),
        index=options.index and str(Location.of(options.index)),
        architecture=architecture,
        recipe=recipe,
        seed=options.seed,
        train_split=options.train_split,
        validation_split=options.validation_split,
        train_data_id=index.data_id(options.train_split),
        validation_data_id=index.data_id(options.validation_split),
        train_samples=rows.num_rows,
        samples=sum(index.split(split).num_rows for split in splits),
        source=str(Run.at(options.source).location),
        source_model_id=model.model_id,
        scales=options.scales,
        stride=options.stride,
        stretch=options.stretch,
    )
    return {**asdict(common), "recipe": recipe}


def _require_boxes(index: Index, rows: Any, model: Model) -> None:
    """Some of the first samples must have a box of a class of the network's. Raises: RunError saying what they have."""
    reasons: Counter[str] = Counter()
    for sample in islice(index.read(rows.slice(0, _LOOKED_AT)), _LOOKED_AT):
        if not isinstance(sample, Sample):
            reasons[sample.reason] += 1
            continue
        found = objects_of(sample, model.classes)
        if len(found):
            return
        reasons.update([reason for _, reason in found.refused] or ["none"])
    raise RunError(
        f"not one of the first {min(_LOOKED_AT, rows.num_rows)} samples has a box of a class of {model.architecture} "
        f"({dict(reasons)}): give shards whose json has boxes of {', '.join(model.classes[:5])}, ..."
    )


def _told(row: dict[str, Any], epochs: int, label: str) -> str:
    return (
        f"{label}: epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  "
        f"validation {row['validation_loss']:.4f}  "
        f"right {row['validation_right']:.1%} of {row['validation_windows']} windows  "
        f"{row['images_per_second']:.0f} images/s  waiting {row['data_wait_share']:.0%}"
    )
