"""A run directory from a network that was trained elsewhere, so that every analysis works on it."""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipeline.progress import say, suggest
from pipeline.runs import Run, RunError, identity
from pipeline.storage import Location
from zfnet import models
from zfnet.graph import Graph
from zfnet.images import Preprocessing
from zfnet.tracing import trace

Three = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What importing takes.

    Preprocessing: by default that of torchvision's own weights for its networks, else RGB from 0 to 255 with nothing
    subtracted. If any of --channels, --maximum, --mean, --mean-image and --std is given, those that are not are RGB,
    255, 0 and 1.
    """

    run: str
    """Run directory to write: a local path, s3:// or gs://."""
    architecture: str
    """A name of zfnet.models.names(), torchvision:NAME, package.module:function, or torchvision:NAME.PART."""
    weights: str | None = None
    """File of a state dict (safetensors, or torch.save without other objects), a name of torchvision's trained weights
    such as IMAGENET1K_V1 or DEFAULT, or nothing: random weights."""
    seed: int = 0
    """Seed of random weights."""
    classes: str | None = None
    """Text file with a class name a line, in the order of the outputs; default torchvision's, else their numbers."""
    resize_px: int | None = None
    """The smallest side of an image is resized to this."""
    crop_px: int | None = None
    """Side of the square crop that the network sees."""
    channels: Literal["RGB", "BGR"] | None = None
    """Channel order of the network's input."""
    maximum: float | None = None
    """White, before the mean is subtracted: 255 (the papers, Caffe) or 1 (torchvision)."""
    mean: Three | None = None
    """Mean of each channel, in the network's channel order and range."""
    mean_image: str | None = None
    """File of a mean for each pixel: .npy of 3 x resize_px x resize_px, in the network's channel order and range."""
    std: Three | None = None
    """Divisor of each channel, in the network's channel order and range."""

    def __post_init__(self) -> None:
        if self.mean is not None and self.mean_image is not None:
            raise RunError("--mean and --mean-image were both given: give one of them")
        if self.seed < 0:
            raise RunError(f"--seed is {self.seed}: give 0 or more")


def run(options: Options) -> int:
    """Build the network, load its weights, check that it runs, and write model/ and run.json. Returns 0.

    Raises: RunError, StorageError, Untraceable, each with a message for the user.
    """
    started = time.monotonic()
    try:
        network, about = _network(options)
        preprocessing = _preprocessing(options)
    except ValueError as error:
        raise RunError(str(error)) from None
    size = preprocessing.crop_px
    graph = trace(network, (3, size, size))
    classes = _class_names(options, _outputs(graph))
    directory = Run.at(options.run)
    _claim(directory, options, identity(options.architecture, preprocessing, network.state_dict()), classes)
    model_id = directory.save_model(
        network, architecture=options.architecture, classes=classes, preprocessing=preprocessing, about=about
    )
    ends = f"{len(classes)} classes" if classes else "no classes: what needs their probabilities is refused"
    say(f"import_model: {options.architecture}, {len(graph.layers)} layers, {ends}")
    say(f"import_model: images: {_describe(preprocessing)}")
    if graph.unknown:
        say(f"import_model: {graph.limits(shown=None)}")
    say(f"import_model: model {model_id}, in {time.monotonic() - started:.1f} s: {directory.location}")
    suggest("top9.py --run {run} --data SHARDS", run=options.run)
    return 0


def _network(options: Options) -> tuple[models.Classifier, dict[str, Any]]:
    """The network with its weights, in evaluation mode, and where they come from, for run.json."""
    about: dict[str, Any] = {"weights": options.weights}
    if options.weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            network = models.build(options.architecture, len(_lines(options.classes)) or models.CLASSES)
        return network.eval(), {"imported": about | {"seed": options.seed}}
    trained = models.torchvision_weights(options.architecture)
    if options.weights in trained:
        tensors = _downloaded(options.weights, trained[options.weights])
    else:
        data = _read(options.weights, f"; torchvision's own weights of this network: {', '.join(trained) or 'none'}")
        about["sha256"] = hashlib.sha256(data).hexdigest()
        tensors = _state_dict(options.weights, data)
    network = models.build(options.architecture)
    outputs = models.classes_of(network, tensors)
    if outputs not in (None, models.CLASSES):
        network = models.build(options.architecture, outputs or models.CLASSES)
    try:
        models.load_tensors(network, tensors)
    except ValueError as error:
        raise RunError(f"{options.weights} cannot be loaded into {options.architecture}: {error}") from None
    return network.eval(), {"imported": about}


def _downloaded(name: str, weights: Any) -> dict[str, Tensor]:
    try:
        return models.torchvision_tensors(weights)
    except (OSError, RuntimeError) as error:  # no network, or a file whose hash is wrong
        raise RunError(
            f"torchvision's weights {name} could not be fetched: {error}. Fetch them where the network allows it, and "
            "give the file as --weights"
        ) from None


def _read(path: str, hint: str = "") -> bytes:
    try:
        return Location.of(path).read()
    except FileNotFoundError:
        raise RunError(f"there is no file {Location.of(path)}{hint}") from None


def _state_dict(path: str, data: bytes) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or torch.save; never unpickled.

    A checkpoint's "state_dict" or "model" is taken out of it, and DistributedDataParallel's "module." off every name.
    """
    try:
        if path.endswith(".safetensors"):
            found: Any = load(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise RunError(
            f"{path} cannot be read as weights: {str(error).splitlines()[0]} Give safetensors, or a file of "
            "torch.save(model.state_dict(), path), which holds tensors alone: other objects are never loaded"
        ) from None
    for key in ("state_dict", "model"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise RunError(f"{path} holds no state dict: give a file of tensors by name, as model.state_dict() gives them")
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def _preprocessing(options: Options) -> Preprocessing:
    """What was given, over the defaults of the architecture."""
    trained = models.torchvision_weights(options.architecture)
    weights = options.weights if options.weights in trained else "DEFAULT"
    default = models.preprocessing_of(options.architecture, weights or "DEFAULT")
    crop_px = options.crop_px or default.crop_px
    sizes = {"resize_px": options.resize_px or max(default.resize_px, crop_px), "crop_px": crop_px}
    values = (options.channels, options.maximum, options.mean, options.mean_image, options.std)
    if all(value is None for value in values):
        default_values = {"channels": default.channels, "maximum": default.maximum}
        return Preprocessing(**sizes, **default_values, mean=default.mean, std=default.std)  # type: ignore[arg-type]
    return Preprocessing(
        **sizes,
        channels=options.channels or "RGB",
        maximum=255.0 if options.maximum is None else options.maximum,
        mean=_mean(options),
        std=torch.tensor(options.std or (1.0, 1.0, 1.0)).view(3, 1, 1),
    )


def _mean(options: Options) -> Tensor:
    if options.mean_image is None:
        return torch.tensor(options.mean or (0.0, 0.0, 0.0)).view(3, 1, 1)
    try:
        image = np.load(io.BytesIO(_read(options.mean_image)), allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    except (ValueError, EOFError) as error:
        raise RunError(f"--mean-image {options.mean_image} is no array of numbers: {error}") from None


def _outputs(graph: Graph) -> int:
    """How many classes the network tells apart: its units at the end, or none where it ends in feature maps."""
    shape = graph[graph.output].shape
    return shape[0] if len(shape) == 1 else 0


def _class_names(options: Options, outputs: int) -> tuple[str, ...]:
    """A name for each output. Raises: RunError where the file has another number of them."""
    names = _lines(options.classes)
    if options.classes is not None and len(names) != outputs:
        raise RunError(
            f"--classes {options.classes} has {len(names)} names, and {options.architecture} with these weights has "
            f"{outputs} outputs: give a name for each, one a line"
        )
    if not names and options.weights is not None and outputs:
        names = models.torchvision_classes(options.architecture)
    return names if len(names) == outputs else tuple(map(str, range(outputs)))


def _lines(path: str | None) -> tuple[str, ...]:
    """The lines of a text file, without empty ones at its end; none for no file."""
    if path is None:
        return ()
    try:
        return tuple(line.strip() for line in _read(path).decode().rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise RunError(f"--classes {path} is no UTF-8 text: {error}") from None


def _claim(directory: Run, options: Options, model_id: str, classes: tuple[str, ...]) -> None:
    """A run holds one model for ever. Raises: RunError where it holds another, or a training."""
    if (directory.location / "run.json").exists():
        known = directory.describe()
        if (known.get("model_id"), known.get("classes")) != (model_id, list(classes)):
            raise RunError(
                f"{directory.location} holds another model, {known.get('model_id')} ({known.get('architecture')}), and "
                f"this one is {model_id} ({options.architecture}): give another --run"
            )
    elif (directory.location / "checkpoints").names():
        raise RunError(f"{directory.location} holds an unfinished training: give another --run")


def _describe(preprocessing: Preprocessing) -> str:
    """In one line, so that what was taken by default is seen."""
    mean, std = (t.flatten().tolist() for t in (preprocessing.mean, preprocessing.std))
    minus = "/".join(f"{m:g}" for m in mean) if len(mean) == 3 else "an image"
    return (
        f"resized to {preprocessing.resize_px} px, centre {preprocessing.crop_px} px, {preprocessing.channels} "
        f"0..{preprocessing.maximum:g}, minus {minus}, divided by {'/'.join(f'{s:g}' for s in std)}"
    )
