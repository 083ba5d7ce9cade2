"""Training on Ray Train: any number of workers, CPU or GPU, resumed after a crash at the exact sample.

The data order, the augmentation and the learning rate are functions of (seed, epoch, step): see pipeline/stream.py
and zfnet/recipe.py. Checkpoints are our own (pipeline/checkpoints.py), so the same command goes on where it stopped,
on any number of workers.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from tqdm import tqdm

from pipeline import cluster, lease, metrics, tables
from pipeline.checkpoints import EVOLUTION, claim_of
from pipeline.cluster import Workers
from pipeline.errors import FORESEEN, SweepFailed
from pipeline.loop import Plan, Trainer, describe
from pipeline.plan_training import forecast
from pipeline.progress import EXIT_SKIPPED, bar, clock, say, suggest
from pipeline.runs import LEASE, Run, RunError, clear, require_visible
from pipeline.sources.default import DEFAULT, shards_or_default
from pipeline.storage import Location
from pipeline.stream import labelled
from zfnet import models
from zfnet.recipe import PRESETS, Colour, Initialisation, Precision, Recipe, Schedule, preset_of

Tell = Callable[[dict[str, Any], int, str], str]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What training takes, of whatever network; recipe fields that are not given are those of the network's preset."""

    data: str = DEFAULT
    """Folder of the shards; the default is drawn if it is missing."""
    index: str | None = None
    """Folder of the shards' index, where it is not in the folder of the shards."""
    preset: Literal["zfnet", "alexnet", "overfeat", "small", "foreign"] | None = None
    """Recipe that the following options change: a paper's, or one for small networks; default the network's own."""
    epochs: int | None = None
    """Passes over the training images."""
    batch: int | None = None
    """Images of a step, over all workers."""
    lr: float | None = None
    """Learning rate: under the cosine schedule the highest, else the first."""
    weight_decay: float | None = None
    """Pull of every weight to zero."""
    init: Initialisation | None = None
    """First weights: the paper's N(0, 0.01), or He's."""
    schedule: Schedule | None = None
    """Learning rate over time: divided at plateaus (AlexNet, ZFNet) or after given epochs (OverFeat), or a cosine."""
    dropout: float | None = None
    """Probability that a hidden unit is dropped; default the network's own."""
    colour: Colour | None = None
    """Random shift of an image's colours: none, AlexNet's as printed, or what cuda-convnet ran."""
    precision: Precision | None = None
    """Arithmetic: float32, bf16 autocast, or float64 for comparing runs."""
    channels_last: bool = False
    """Lay images and filters out with the channels innermost."""
    compile: bool = False
    """Let torch.compile fuse the network; needs a C++ compiler on CPU."""
    accumulate: int | None = None
    """Slices that a worker computes its share of a batch in, to save memory; default 1."""
    smallest_crop: float | None = None
    """Crops of any size from this share of the image to the whole; default crops of the network's input size."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "val"
    """Split to validate on after each epoch, with the centre crop."""
    address: str | None = None
    """Ray cluster to join; default the one of `ray job submit`, else an own one."""
    max_skipped: float = 0.01
    """Largest share of samples that may be skipped; above it the job ends with exit status 3."""
    decoders: int | None = None
    """Processes of each worker that decode images; default its number of CPUs, 0: the worker decodes itself."""
    checkpoint_steps: int = 1000
    """Steps between two checkpoints inside an epoch; each epoch's end has one anyway. It never changes a result."""
    keep_epochs: tuple[int, ...] = EVOLUTION
    """Epochs whose weights are kept for jobs/evolution.py, beside the last two; default the paper's of figure 4."""
    min_workers: int | None = None
    """Elastic training: start and go on with as few workers as this, and use up to --workers.num as nodes come."""
    failures: int = 3
    """How often a call goes on from the newest checkpoint after workers or their nodes died; spot nodes need more."""
    tensorboard: bool = False
    """Write each epoch's metrics for TensorBoard too, to RUN/tensorboard; needs a local --run."""
    workers: Workers = field(default_factory=Workers)
    """What the job asks of the cluster."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """What one training takes."""

    run: str = "runs/demo"
    """Run directory to write: a local path, s3:// or gs://."""
    architecture: str = "zfnet_small"
    """Network, by name."""
    plan: bool = False
    """Forecast steps, hours and storage from a few steps, and do nothing else."""


def run(options: Options, label: str = "train") -> int:
    """Train, or go on. Returns the exit status: 0, or 3 above --max-skipped.

    Args:
        options: what is trained, on what and where.
        label: what every line begins with that is said.

    Raises: RunError, BadShards, StorageError, CannotSchedule, SweepFailed, each with a message for the user.
    """
    status = carry_out(options, _plan(options), label=label)
    if not options.plan:
        suggest("evaluate.py --run {run} --data {data}", options.index, run=options.run, data=options.data)
    return status


def carry_out(
    options: Options, plan: Plan, trainer: type[Trainer] = Trainer, tell: Tell | None = None, label: str = "train"
) -> int:
    """Train as planned, or go on, with the `options` that decide no result. Returns the exit status.

    Args:
        options: where and how to train.
        plan: what is trained.
        trainer: what each worker runs.
        tell: a row of its metrics, the number of epochs and the label -> what is said of it; default of a classifier.
        label: what every line begins with that is said.
    """
    directory = Run.at(options.run)
    _refuse_places(options, directory)
    if options.plan and not _is_finished(directory, plan):
        _refuse_claimed(directory, plan)
        return forecast(plan, trainer, least(options), options.decoders, options.keep_epochs, label)
    if _is_finished(directory, plan):
        say(f"{label}: finished already: {directory.location}")
    else:
        _claim(directory, plan)
        with lease.held(directory.training / LEASE, directory.training, label):
            if not _is_finished(directory, plan):
                _train(options, plan, trainer, tell or _told, label)
    clear(directory.training)
    return _status(directory, plan, options.max_skipped, label)


def _is_finished(directory: Run, plan: Plan) -> bool:
    """Whether the run has its model. Raises: RunError where it is that of another training."""
    if not (directory.location / "run.json").exists():
        return False
    _refuse_other(directory, directory.describe().get("training", {}), plan)
    return True


def _train(options: Options, plan: Plan, trainer: type[Trainer], tell: Tell, label: str) -> None:
    directory = Run.at(plan.run)
    say(f"{label}: {json.dumps(asdict(plan))}")
    started = time.time()
    try:
        _run_workers(options, plan, trainer, tell, label)
    except FORESEEN:
        if not _is_finished(directory, plan):
            raise
        say(f"{label}: another run of this job finished it meanwhile")
    if not _is_finished(directory, plan):
        raise SweepFailed(f"{label}: ended without a model in {directory.location}; give the same command again")
    model_id = directory.describe()["model_id"]
    say(f"{label}: model {model_id} after {time.time() - started:.1f} s: {directory.location}")


def _run_workers(options: Options, plan: Plan, trainer: type[Trainer], tell: Tell, label: str) -> None:
    with _reporting(Run.at(plan.run), plan.recipe.epochs, options.tensorboard, tell, label):
        if options.workers.num == 0:
            alone = trainer(
                plan,
                rank=0,
                world=1,
                device="cpu",
                decoders=options.decoders or 0,
                checkpoint_steps=options.checkpoint_steps,
                keep_epochs=options.keep_epochs,
            )
            alone.run()
        else:
            _on_ray(options, plan, trainer)


def _refuse_places(options: Options, directory: Run) -> None:
    """Options that decide no result. Raises: RunError."""
    if options.checkpoint_steps < 1:
        raise RunError(f"--checkpoint-steps is {options.checkpoint_steps}: give at least 1")
    if options.failures < 0:  # Ray Train's -1 is without end: a fault that comes back would never be said
        raise RunError(f"--failures is {options.failures}: give 0, for none, or more")
    if options.min_workers is not None and not 1 <= options.min_workers <= (options.workers.num or 0):
        raise RunError(
            f"--min-workers is {options.min_workers} and --workers.num {options.workers.num}: give 1 or more, and "
            "--workers.num as the largest number of workers"
        )
    if options.tensorboard and directory.location.local is None:
        raise RunError(f"--tensorboard writes to a local disk, and --run is {directory.location}: leave it out")


def _plan(options: Options) -> Plan:
    """Everything that can be refused without training is refused here."""
    index = shards_or_default(options.data, options.index)
    try:
        models.build(options.architecture, classes=2)
    except ValueError as error:
        raise RunError(str(error)) from None
    recipe = _recipe(options)
    if options.seed < 0:
        raise RunError(f"--seed is {options.seed}: give 0 or more")
    if len(index.classes) < 2:
        raise RunError(f"{options.data} has {len(index.classes)} classes: training needs at least 2")
    counts = {}
    for split in (options.train_split, options.validation_split):
        usable, skipped = labelled(index, split, len(index.classes))
        counts[split] = usable.num_rows
        if not usable.num_rows:
            reasons = Counter(found.reason for found in skipped)
            raise RunError(
                f"the split {split!r} holds no image with a usable label ({dict(reasons)}): training needs labels"
            )
    if counts[options.train_split] < recipe.batch:
        raise RunError(
            f"--batch is {recipe.batch}, and the split {options.train_split!r} holds {counts[options.train_split]} "
            "images: give at most that"
        )
    return Plan(
        run=str(Run.at(options.run).location),
        data=str(Location.of(options.data)),
        index=options.index and str(Location.of(options.index)),
        architecture=options.architecture,
        recipe=recipe,
        seed=options.seed,
        train_split=options.train_split,
        validation_split=options.validation_split,
        train_data_id=index.data_id(options.train_split),
        validation_data_id=index.data_id(options.validation_split),
        train_samples=counts[options.train_split],
        samples=sum(index.splits[split] for split in (options.train_split, options.validation_split)),
    )


def _recipe(options: Options) -> Recipe:
    """The network's preset with what was given on the command line."""
    given = {field.name: getattr(options, field.name, None) for field in fields(Recipe)}
    try:
        preset = PRESETS[options.preset or preset_of(options.architecture)]
        return replace(preset, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise RunError(str(error)) from None


def _claim(directory: Run, plan: Plan) -> None:
    """Write what this run trains before anything else, or check that it is the same. Raises: RunError, StorageError."""
    _refuse_claimed(directory, plan)
    claim_of(directory).write(json.dumps(describe(plan), indent=1).encode(), directory.training)


def _refuse_claimed(directory: Run, plan: Plan) -> None:
    """Raises: RunError where another training was begun there."""
    if claim_of(directory).exists():
        _refuse_other(directory, claim_of(directory).read_json(), plan)


def _refuse_other(directory: Run, known: dict[str, Any], plan: Plan) -> None:
    asked = json.loads(json.dumps(describe(plan)))
    differing = [name for name in sorted(known | asked) if known.get(name) != asked.get(name)]
    if differing:
        detail = "; ".join(f"{name}: {known.get(name)!r} there, asked {asked.get(name)!r}" for name in differing)
        raise RunError(
            f"{directory.location} holds another training ({detail}): give the options it was begun with to go on, "
            "or another --run"
        )


@contextmanager
def _reporting(directory: Run, epochs: int, tensorboard: bool, tell: Tell, label: str) -> Iterator[None]:
    """Say each epoch as its metrics appear, and the pace inside one, wherever the workers run."""
    stop = threading.Event()
    said = metrics.read(directory).num_rows
    pace = metrics.pace(directory)
    steps: tqdm[Any] | None = None

    def report() -> None:
        nonlocal said, pace, steps
        while True:
            ended = stop.wait(1.0)
            rows = metrics.read(directory, said).to_pylist()
            for row in rows:
                say(tell(row, epochs, label))
            if rows and tensorboard:
                metrics.write_tensorboard(directory, rows)
            said += len(rows)
            now = metrics.pace(directory)
            if now and now != pace and not ended:
                steps = bar(label, now["steps"] * epochs, "steps") if steps is None else steps
                _say_pace(now, epochs, label, steps)
            pace = now
            if ended:
                return

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if steps is not None:
            steps.close()


def _say_pace(pace: dict[str, Any], epochs: int, label: str, steps: tqdm[Any] | None) -> None:
    if steps is not None:
        steps.set_postfix_str(f"{pace['images_per_second']:.0f} images/s, waiting {pace['data_wait_share']:.0%}", False)
        steps.update(pace["step"] - steps.n)
        return
    epoch, step = divmod(pace["step"] - 1, pace["steps"])
    say(
        f"{label}: epoch {epoch + 1}/{epochs}, step {step + 1}/{pace['steps']}  "
        f"{pace['images_per_second']:.0f} images/s  waiting {pace['data_wait_share']:.0%}  "
        f"{clock(pace['seconds_left'])} left, validation apart"
    )


def _told(row: dict[str, Any], epochs: int, label: str) -> str:
    left = clock(row["seconds"] * (epochs - row["epoch"]))
    return (
        f"{label}: epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  top-1 {row['validation_top1']:.1%}  "
        f"top-5 {row['validation_top5']:.1%}  {row['images_per_second']:.0f} images/s  "
        f"waiting {row['data_wait_share']:.0%}  {left} left"
    )


def least(options: Common) -> Workers:
    """What a training needs to begin. Elastic: the smallest group; Ray Train adds workers as there is room for them."""
    return options.workers if options.min_workers is None else replace(options.workers, num=options.min_workers)


def _on_ray(options: Options, plan: Plan, trainer: type[Trainer]) -> None:
    """Train on the cluster with Ray Train."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    with cluster.connected(options.address):
        resources = cluster.resolve(least(options))
        decoders = options.decoders if options.decoders is not None else resources.cpus
        # Decoding takes about as much of a CPU as a small network does; torch's threads would only wait for it.
        config = {
            "plan": plan,
            "trainer": trainer,
            "decoders": decoders,
            "threads": max(1, resources.cpus // 2),
            "checkpoint_steps": options.checkpoint_steps,
            "keep_epochs": options.keep_epochs,
        }
        most = None if options.min_workers is None else options.workers.num
        cluster.fit(_worker, config, resources, options.failures, most)


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    rank, world, device = cluster.train_context()
    torch.set_num_threads(config["threads"])
    plan: Plan = config["plan"]
    require_visible(str(claim_of(Run.at(plan.run))))
    trainer: Trainer = config["trainer"](
        plan,
        rank=rank,
        world=world,
        device=device,
        decoders=config["decoders"],
        checkpoint_steps=config["checkpoint_steps"],
        keep_epochs=config["keep_epochs"],
    )
    trainer.run()


def _status(directory: Run, plan: Plan, max_skipped: float, label: str) -> int:
    """0, or 3 where a larger share of the samples of both splits was skipped than allowed."""
    location = directory.location / "results" / "skipped" / "train.parquet"
    skipped = tables.read(location).num_rows if location.exists() else 0
    about = "; see results/skipped/train.parquet" if skipped else ""
    say(f"{label}: {skipped} of {plan.samples} samples skipped{about}")
    return EXIT_SKIPPED if skipped > max_skipped * plan.samples else 0
