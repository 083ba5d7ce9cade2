"""What each part of a network is worth: its variants trained from scratch, side by side (ZFNet Tab. 3 on arXiv).

Two blocks: the rows of ZFNet's architecture table, and what AlexNet's paper says that its own parts bring. Each variant
is an ordinary run in a folder of its own, RUN/VARIANT, trained as jobs/train.py would, with the same seed and options;
those that fit on the cluster are trained at the same time. The table has a slice for each variant, written when its
training is done. One that fails is named at the end, and costs the others nothing.
"""

from __future__ import annotations

import difflib
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from queue import SimpleQueue
from typing import Any

import pandas as pd
import pyarrow as pa
import torch

from pipeline import cluster, metrics, tables, train
from pipeline.cluster import Workers
from pipeline.errors import FORESEEN, SweepFailed
from pipeline.lease import Held
from pipeline.papers.parts import ROWS, Row
from pipeline.progress import say, suggest
from pipeline.runs import Run, RunError, environment
from pipeline.shards import Index
from pipeline.sources.default import shards_or_default
from zfnet import models

TRAIN_ERROR = 0.25
"""AlexNet Sec. 3.1 counts the epochs until the training error is 25 %."""


SETS = {"small": "_small", "full": ""}
"""Words for all rows, and what is added to the papers' names for their networks."""


@dataclass(frozen=True, kw_only=True)
class Options(train.Common):
    """What an ablation takes: a training's options, for every variant, and which variants."""

    run: str = "runs/ablation"
    """Folder of the table, and of the variants' runs, each in a folder of its name: a local path, s3:// or gs://."""
    variants: tuple[str, ...] = ("small",)
    """Networks to train, by name (docs/networks.md), with _nocolour as a further suffix of AlexNet's; small or full:
    all rows of both papers, of their small networks or of their own."""
    workers: Workers = field(default_factory=lambda: Workers(num=1))
    """What each training asks of the cluster; as many are trained at once as fit."""
    plan: bool = False
    """Forecast steps, hours and storage of each training from a few steps, and do nothing else."""


@dataclass(frozen=True)
class Variant:
    """One training."""

    name: str
    base: str
    """The network that is changed, by name."""
    row: Row
    full: bool
    """Whether it is the paper's own network, not a small one of its form."""

    @property
    def architecture(self) -> str:
        """What `zfnet.models.build` calls it."""
        return self.name.removesuffix("_nocolour")

    @property
    def compared_with(self) -> str | None:
        """The variant that its costs are counted from; none for a network as it is."""
        return self.base if self.row.suffix else None

    def training(self, options: Options) -> train.Options:
        """Its training: AlexNet's form always with AlexNet's colour shifts, but for the row that leaves them out."""
        given = {one.name: getattr(options, one.name) for one in fields(train.Common)}
        if self.base.startswith("alexnet"):
            given["colour"] = "none" if self.row.suffix == "nocolour" else options.colour or "paper"
        run = str(self.directory(options.run).location)
        return train.Options(**given, run=run, architecture=self.architecture, plan=options.plan)

    def directory(self, run: str) -> Run:
        """Its run."""
        return Run.at(Run.at(run).location / self.name)


def _known() -> dict[str, Variant]:
    """Every variant there is, the papers' rows first and in their order."""
    found: dict[str, Variant] = {}
    for scale in SETS.values():
        for network, rows in ROWS.items():
            base = network + scale
            for row in rows:
                name = f"{base}_{row.suffix}" if row.suffix else base
                found[name] = Variant(name, base, row, full=not scale)
    bases = {variant.base for variant in found.values()}
    for name in models.names():
        base = max((base for base in bases if name.startswith(base)), key=len, default=name)
        other = Row(suffix=name.removeprefix(base).removeprefix("_"), change="not in the papers' tables", table="other")
        found.setdefault(name, Variant(name, base, other, full=False))
    return found


def chosen(names: tuple[str, ...]) -> list[Variant]:
    """The variants of these names, each once. Raises: RunError for a name that there is not."""
    known = _known()
    found: dict[str, Variant] = {}
    for name in names:
        if name in SETS:
            wanted = {f"{network}{SETS[name]}" for network in ROWS}
            found |= {one: v for one, v in known.items() if v.base in wanted and v.row.table != "other"}
        elif name in known:
            found[name] = known[name]
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise RunError(
                f"--variants: there is none called {name!r}. Did you mean {near!r}? Expected small, full, or some of "
                f"{', '.join(known)}"
            )
    return list(found.values())


SCHEMA = tables.schema(
    "ablation",
    row="a variant of a network, trained: parameters, errors and seconds, and the paper's beside them",
    file="variant",
    key=("variant",),
    columns=[
        tables.column("variant", pa.string(), "Name of the variant, and of its run's folder."),
        tables.MODEL_ID,
        tables.column("train_data_id", pa.string(), "Identity of the training images."),
        tables.column("validation_data_id", pa.string(), "Identity of the validation images."),
        tables.column("table", pa.string(), "architecture (ZFNet Tab. 3), claim (of AlexNet), or other."),
        tables.column("change", pa.string(), "What is changed."),
        tables.or_null("compared_with", pa.string(), "The variant without the change; null for these."),
        tables.column("architecture", pa.string(), "Network, by name."),
        tables.column("parameters", pa.int64(), "Weights and biases, for the classes of these images."),
        tables.column("epochs", pa.int32(), "Passes over the training images."),
        tables.column("train_top1_error", pa.float64(), "Share wrong in the last epoch, while training (dropout on)."),
        tables.column("top1_error", pa.float64(), "Share of the validation images, centre crop, that is wrong."),
        tables.column("top5_error", pa.float64(), "Share of them whose class is not among the five most probable."),
        tables.or_null(
            "epochs_to_25",
            pa.int32(),
            "First epoch with a training error of at most 25 %, as in AlexNet Sec. 3.1; null where there is none.",
        ),
        tables.column("seconds", pa.float64(), "Seconds of all epochs, validation included."),
        tables.or_null("paper_train_top1_error", pa.float64(), "The paper's, where the images are ImageNet's."),
        tables.or_null("paper_top1_error", pa.float64(), "The paper's, where the images are ImageNet's."),
        tables.or_null("paper_top5_error", pa.float64(), "The paper's, where the images are ImageNet's."),
        tables.or_null("paper_top1_cost", pa.float64(), "What the change adds to the top-1 error in the paper."),
        tables.or_null("paper_top5_cost", pa.float64(), "What the change adds to the top-5 error in the paper."),
        tables.or_null("paper_says", pa.string(), "What the paper says, where it gives no number."),
    ],
)


def run(options: Options) -> int:
    """Train every variant, or go on, and write the table. Returns the worst exit status of the trainings.

    Raises: SweepFailed naming the variants that failed, when all others are done; and as a training does, for what
        concerns them all.
    """
    started = time.monotonic()
    variants = chosen(options.variants)
    index = shards_or_default(options.data, options.index)
    if options.plan:
        return max(train.run(variant.training(options), f"ablation: {variant.name}") for variant in variants)
    status, failed = 0, {}
    for variant, outcome in _trained(options, variants):
        wrong = outcome if isinstance(outcome, str) else _recorded(options, variant, index)
        if wrong is not None:
            failed[variant.name] = wrong
            say(f"ablation: {variant.name} failed; the others go on")
        elif isinstance(outcome, int):
            status = max(status, outcome)
    report(options.run)
    say(f"ablation: finished in {time.monotonic() - started:.1f} s: {Run.at(options.run).results('ablation')}")
    suggest("figures.py --run {run}", run=options.run)
    if failed:
        raise SweepFailed(_explained(failed, len(variants)))
    return status


def _trained(options: Options, variants: list[Variant]) -> Iterator[tuple[Variant, int | str]]:
    """Each variant with the exit status of its training, or what went wrong, as they end."""
    done = [one for one in variants if (one.directory(options.run).location / "run.json").exists()]
    todo = [one for one in variants if one not in done]
    for variant in done if options.workers.num else variants:
        yield variant, _outcome(options, variant)
    if not todo or options.workers.num == 0:
        return
    with cluster.connected(options.address):
        together = cluster.groups_at_once(cluster.resolve(train.least(options)))
        say(f"ablation: {len(todo)} variants to train, {min(together, len(todo))} at a time")
        yield from _side_by_side(options, todo, together)


def _side_by_side(options: Options, variants: list[Variant], together: int) -> Iterator[tuple[Variant, int | str]]:
    """So many at a time, each with its outcome as it ends.

    Threads wait for Ray alone. On Ctrl-C none begins another variant, and nobody waits for them: a pool would.
    """
    waiting, ended = deque(variants), SimpleQueue[tuple[Variant, int | str]]()

    def train_some() -> None:
        with suppress(IndexError):
            while True:
                variant = waiting.popleft()
                ended.put((variant, _outcome(options, variant)))

    for _ in range(min(together, len(variants))):
        threading.Thread(target=train_some, daemon=True).start()
    try:
        for _ in variants:
            yield ended.get()
    finally:
        waiting.clear()


def _outcome(options: Options, variant: Variant) -> int | str:
    """The exit status of a training, or what went wrong: it must not end the others."""
    try:
        return train.run(variant.training(options), f"ablation: {variant.name}")
    except (*FORESEEN, Held) as error:
        return str(error)
    except Exception as error:
        return "".join(traceback.format_exception(error))


def _recorded(options: Options, variant: Variant, index: Index) -> str | None:
    """Write the variant's slice, where it is not there. Returns what went wrong."""
    directory = Run.at(options.run)
    described = variant.directory(options.run).describe()
    made = {name: described[name] for name in ("model_id", "training")}
    try:
        if directory.missing("ablation", {variant.name: made}):
            rows = tables.conform({name: [value] for name, value in _row(options, variant, index).items()}, SCHEMA)
            tables.write(rows, directory.slice("ablation", variant.name))
            entry = {"rows": 1, "fingerprint": made, "environment": environment("cpu")}
            directory.finish("ablation", variant.name, entry, directory.unfinished("ablation"))
    except FORESEEN as error:
        return str(error)
    finally:
        directory.unfinished("ablation").delete()
    return None


def _row(options: Options, variant: Variant, index: Index) -> dict[str, Any]:
    """The table's row, from the variant's own run."""
    directory = variant.directory(options.run)
    described = directory.describe()
    epochs = metrics.read(directory).to_pylist()
    last, training = epochs[-1], described["training"]
    reached = [row["epoch"] for row in epochs if 1 - row["train_top1"] <= TRAIN_ERROR]
    return {
        "variant": variant.name,
        **{name: described[name] for name in ("model_id", "architecture")},
        **{name: training[name] for name in ("train_data_id", "validation_data_id")},
        **{name: getattr(variant.row, name) for name in ("table", "change")},
        "compared_with": variant.compared_with,
        "parameters": _parameters(variant.architecture, len(described["classes"])),
        "epochs": last["epoch"],
        "train_top1_error": 1 - last["train_top1"],
        "top1_error": 1 - last["validation_top1"],
        "top5_error": 1 - last["validation_top5"],
        "epochs_to_25": min(reached, default=None),
        "seconds": sum(row["seconds"] for row in epochs),
        **paper(variant, index.classes),
    }


def _parameters(architecture: str, classes: int) -> int:
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in models.build(architecture, classes).parameters())


def paper(variant: Variant, classes: tuple[str, ...]) -> dict[str, float | str | None]:
    """The paper's columns: its errors for its own networks on ImageNet alone, what a change costs always."""
    row = variant.row
    errors = row.errors if row.errors and variant.full and is_imagenet(classes) else (None, None, None)
    costs = row.costs
    if row.errors and row.suffix:
        (base,) = (one.errors for one in ROWS[variant.base.removesuffix("_small")] if not one.suffix)
        assert base is not None
        costs = (row.errors[1] - base[1], row.errors[2] - base[2])
    percents = dict(zip(("train_top1_error", "top1_error", "top5_error"), errors, strict=True))
    percents |= dict(zip(("top1_cost", "top5_cost"), costs, strict=True))
    shares = {f"paper_{name}": None if value is None else round(value / 100, 6) for name, value in percents.items()}
    return {**shares, "paper_says": row.says}


def is_imagenet(classes: tuple[str, ...]) -> bool:
    """Whether these are the 1,000 classes of ILSVRC, in their order: by number of the synset, or by name.

    Lists of names differ in some words from one source to the next, so nine of ten must agree.
    """
    known = models.torchvision_classes("torchvision:alexnet")
    if len(classes) != len(known):
        return False
    if all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes == tuple(sorted(classes)) and (classes[0], classes[-1]) == ("n01440764", "n15075141")
    alike = sum(_plain(name) == _plain(other) for name, other in zip(classes, known, strict=True))
    return alike >= 0.9 * len(known)


def _plain(name: str) -> str:
    return name.split(",")[0].replace("_", " ").strip().lower()


def _explained(failed: dict[str, str], count: int) -> str:
    """Which variants failed, those that failed alike together."""
    alike: dict[str, list[str]] = {}
    for name, why in failed.items():
        alike.setdefault(why, []).append(name)
    said = [f"{', '.join(names)}: {why}" for why, names in alike.items()]
    return "\n".join(
        [f"{len(failed)} of {count} variants failed; mend the cause and give the same command again", *said]
    )


def report(run: str) -> None:
    """Say what the table shows: errors in percent, and what each change costs, here and in the papers."""
    directory = Run.at(run)
    found = directory.manifest("ablation")
    if not found:
        return
    order = list(_known())
    rows = pd.concat(tables.read(directory.slice("ablation", name)).to_pandas() for name in found)
    rows = rows.set_index("variant").loc[sorted(found, key=order.index)]
    base = rows.reindex(rows.compared_with)
    shown = pd.DataFrame({"change": rows.change, "parameters": rows.parameters.map("{:,}".format)})
    for name in ("train_top1_error", "top1_error", "top5_error"):
        shown[f"{name}, %"] = 100 * rows[name]
    for name in ("top1", "top5"):
        shown[f"{name} cost"] = 100 * (rows[f"{name}_error"].to_numpy() - base[f"{name}_error"].to_numpy())
        shown[f"paper's {name} cost"] = 100 * rows[f"paper_{name}_cost"].astype(float)
    shown["epochs to 25 %"] = rows.epochs_to_25.map(lambda epoch: "" if pd.isna(epoch) else f"{epoch:.0f}")
    shown["seconds"] = rows.seconds.map("{:.0f}".format)
    say("ablation:\n" + shown.to_string(float_format="{:.1f}".format, na_rep=""))
