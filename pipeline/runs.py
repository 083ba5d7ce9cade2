"""The run directory: one network and all that was measured on it. What is finished is what its manifests say.

runs/NAME/run.json                    what the run is; written last, so a run without it has no model
runs/NAME/model/weights.safetensors   weights and the preprocessing's tensors
runs/NAME/results/TABLE/              Parquet, one file for each slice
runs/NAME/results/manifests/TABLE/    a file for each finished slice: what made it; written last
runs/NAME/unfinished/TABLE/WORK/      parts while a job is under way
runs/NAME/unfinished/TABLE/lease.json who writes finished files of the table at this moment
runs/NAME/unfinished/train/           files of training while they are written
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from pipeline.storage import Location
from zfnet import models
from zfnet.images import Preprocessing

_MEAN, _STD = "preprocessing.mean", "preprocessing.std"
_LONGEST_STEM = 80
_CLEARINGS = 10
LEASE = "lease.json"
"""Of a table whose files are being written, or of work on one: see pipeline.lease."""


class RunError(ValueError):
    """The run directory does not allow what was asked; the message says what to do."""


@dataclass(frozen=True)
class Model:
    """A network as a run holds it."""

    network: nn.Module
    architecture: str
    """What `zfnet.models.build` calls it."""
    classes: tuple[str, ...]
    """Names of the network's outputs; none where it ends in feature maps."""
    preprocessing: Preprocessing
    model_id: str

    def require_classes(self, job: str) -> None:
        """Raises: RunError where the network has no classes, which `job` cannot do without."""
        if not self.classes:
            raise RunError(
                f"{job} needs class probabilities, and the network {self.architecture} of this run has no classifier: "
                "give a --run whose network has one (top9, deconv and the atlas work on this one)"
            )


def identity(architecture: str, preprocessing: Preprocessing, weights: dict[str, torch.Tensor]) -> str:
    """model_id: sha256 over names, dtypes, shapes and bytes of all tensors, the architecture and the preprocessing."""
    digest = hashlib.sha256(json.dumps([architecture, preprocessing.describe()], sort_keys=True).encode())
    for name, tensor in sorted(_tensors(weights, preprocessing).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(weights: dict[str, torch.Tensor], preprocessing: Preprocessing) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return tensors | {_MEAN: preprocessing.mean.contiguous(), _STD: preprocessing.std.contiguous()}


@dataclass(frozen=True)
class Run:
    """A run directory, on any storage."""

    location: Location

    @classmethod
    def at(cls, path: str | Location) -> Run:
        """The run of this path; nothing is read or made yet."""
        return cls(Location.of(path))

    def describe(self) -> dict[str, Any]:
        """run.json. Raises: RunError where there is none yet."""
        try:
            found: dict[str, Any] = json.loads((self.location / "run.json").read())
        except FileNotFoundError:
            raise RunError(
                f"there is no trained model in {self.location}: train one with "
                f"`python jobs/train.py --run {self.location}`, import one with jobs/import_model.py, or give --run a "
                "run that has one"
            ) from None
        except ValueError as error:
            raise RunError(
                f"run.json in {self.location} is damaged ({error}): bring it back, or train or import again"
            ) from None
        return found

    def save_model(
        self,
        network: nn.Module,
        *,
        architecture: str,
        classes: tuple[str, ...],
        preprocessing: Preprocessing,
        about: dict[str, Any],
        staging: Location | None = None,
    ) -> str:
        """Write weights, then run.json, built in `staging` if it is given. Returns the model_id."""
        weights = network.state_dict()
        model_id = identity(architecture, preprocessing, weights)
        (self.location / "model" / "weights.safetensors").write(save(_tensors(weights, preprocessing)), staging)
        description = {
            "architecture": architecture,
            "classes": list(classes),
            "preprocessing": preprocessing.describe(),
            "model_id": model_id,
            "versions": versions(),
            **about,
        }
        (self.location / "run.json").write(json.dumps(description, indent=1).encode(), staging)
        return model_id

    def load_model(self) -> Model:
        """The run's network in eval mode, on the CPU.

        Raises: RunError where weights and description do not belong together.
        """
        described = self.describe()
        path = self.location / "model" / "weights.safetensors"
        try:
            tensors = load(path.read())
            mean, std = tensors.pop(_MEAN), tensors.pop(_STD)
            preprocessing = Preprocessing(**described["preprocessing"], mean=mean, std=std)
            classes = tuple(described["classes"])
            network = models.build(described["architecture"], len(classes) or models.CLASSES).eval()
            models.load_tensors(network, tensors)
        except (
            FileNotFoundError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise RunError(
                f"the model of {self.location} cannot be loaded: {str(error).strip()}; {path} and run.json must come "
                "from the same training: bring both back, or train or import again into another --run"
            ) from None
        model_id = identity(described["architecture"], preprocessing, tensors)
        if model_id != described.get("model_id"):
            raise RunError(
                f"the weights in {path} are those of model {model_id}, and run.json describes model "
                f"{described.get('model_id')}: one of the two was replaced; bring back the one that belongs here"
            )
        return Model(network, described["architecture"], classes, preprocessing, model_id)

    def results(self, table: str) -> Location:
        """The folder of a finished table."""
        return self.location / "results" / table

    def slice(self, table: str, name: str) -> Location:
        """The file of a slice of a table."""
        return self.results(table) / f"{file_stem(name)}.parquet"

    def _manifests(self, table: str) -> Location:
        return self.location / "results" / "manifests" / table

    def manifest(self, table: str) -> dict[str, Any]:
        """Finished slices of a table by name, with what made them; empty where none is finished."""
        folder = self._manifests(table)
        return dict(_entry(folder / name) for name in folder.names())

    def finish(self, table: str, slice_: str, entry: dict[str, Any], staging: Location) -> None:
        """Write a slice's manifest: the last step. One file a slice, so that jobs side by side lose nothing.

        Raises: RunError where it is finished with another configuration.
        """
        manifest = self._manifests(table) / f"{file_stem(slice_)}.json"
        if manifest.exists():
            _, known = _entry(manifest)
            _refuse_difference(self.results(table), slice_, known.get("fingerprint", {}), entry.get("fingerprint", {}))
        manifest.write(json.dumps({"table": table, "slice": slice_, **entry}, indent=1).encode(), staging)

    def missing(self, table: str, wanted: dict[str, dict[str, Any]]) -> list[str]:
        """The slices that are not finished.

        Args:
            table: name of the table.
            wanted: slice -> its fingerprint.

        Raises: RunError where one is finished with another configuration: a finished slice is never rewritten.
        """
        finished = self.manifest(table)
        for name, fingerprint in wanted.items():
            if name in finished:
                _refuse_difference(self.results(table), name, finished[name].get("fingerprint", {}), fingerprint)
        return [name for name in wanted if name not in finished]

    @property
    def training(self) -> Location:
        """Where training builds its files under temporary names: gone when it is finished, with what kills left."""
        return self.location / "unfinished" / "train"

    def unfinished(self, table: str) -> Location:
        """The folder of a table's work under way."""
        return self.location / "unfinished" / table

    def turn(self, table: str) -> Location:
        """The lease of whoever writes finished files of a table."""
        return self.unfinished(table) / LEASE


def runs_model(run: Run, config: Any) -> Model:
    """The network of most analyses: the run's, whatever the configuration. Raises: RunError where there is none."""
    return run.load_model()


def _entry(manifest: Location) -> tuple[str, dict[str, Any]]:
    """A slice, and what its manifest says of it. Raises: RunError where that is damaged."""
    try:
        entry = json.loads(manifest.read())
        return str(entry["slice"]), entry
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{manifest} is damaged ({error!r}): delete it and run the job again") from None


def _refuse_difference(table: Location, name: str, known: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [field for field in sorted(known | asked) if known.get(field) != asked.get(field)]
    if differing:
        detail = "; ".join(
            f"{field}: finished with {known.get(field)!r}, asked {asked.get(field)!r}" for field in differing
        )
        raise RunError(
            f"{name} of {table} is finished with another configuration ({detail}). Finished results are never "
            f"rewritten: give --name X to write to {table.name}-X, or delete {table} and its manifests yourself"
        )


def clear(folder: Location) -> None:
    """Delete a folder that another process may be clearing, or still be writing in, at the same moment.

    Raises: OSError where it stays.
    """
    for _ in range(_CLEARINGS):
        with suppress(OSError):
            folder.delete()
            return
        time.sleep(0.05)
    folder.delete()


def require_visible(token: str) -> None:
    """What the driver wrote must be there on every node. Raises: RunError naming the node that does not see it."""
    if not Location.of(token).exists():
        raise RunError(
            f"node {platform.node()} does not see {token}, which this job wrote before its work: give a --run on "
            "storage that all nodes share, or s3:// or gs://"
        )


def require_name(name: str | None) -> None:
    """What --name may be. Raises: RunError."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(f"--name is {name!r}: give letters, digits, '.', '_' and '-', a letter or digit first")


def named(table: str, name: str | None) -> str:
    """What a table is called under --name."""
    return table if name is None else f"{table}-{name}"


def require_at_least_one(config: Any, *names: str) -> None:
    """Each of these options must be 1 or more. Raises: RunError."""
    for name in names:
        if getattr(config, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} is {getattr(config, name)}: give at least 1")


def file_stem(name: str) -> str:
    """A file name (without its end) that stands for any text: the same one always, and none twice.

    A plain lower-case name stands for itself; any other is made plain and told apart by a hash.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-")[:_LONGEST_STEM]
    if plain and plain == name:
        return plain
    return f"{plain or 'slice'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def versions() -> dict[str, str]:
    """Versions of what computes: results are bit for bit the same only where these are."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "pyarrow": pa.__version__,
    }


def environment(device: str) -> dict[str, str]:
    """Versions, device model and CPU capability: parts of one table must agree in all of them."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {**versions(), "device": name, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
