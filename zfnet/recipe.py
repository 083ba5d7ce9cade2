"""How a network is trained: first weights, filter renormalisation, learning rate (Zeiler and Fergus 2014, Sec. 3).

All is a plain function of what has happened (step, errors so far), with no state of its own, so that a training that
is resumed takes exactly the steps of one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from zfnet.models.layers import is_convolution

Initialisation = Literal["paper", "he"]
Schedule = Literal["plateau", "epochs", "cosine"]
Colour = Literal["none", "paper", "cuda-convnet"]
Precision = Literal["float32", "bf16", "float64"]

PAPER_STD = 1e-2  # ZFNet Sec. 3: "All weights are initialized to 10^-2 and biases are set to 0"
PAPER_RADIUS = 1e-1  # ZFNet Sec. 3: "whose RMS value exceeds a fixed radius of 10^-1"
ALEXNET_ONES = ("conv2", "conv4", "conv5", "fc6", "fc7")  # AlexNet Sec. 5: biases that begin at 1
COLOUR_STD = 0.1  # AlexNet Sec. 4.1: alpha_i ~ N(0, 0.1)
PIXEL_STD = 64.0  # standard deviation of a pixel, between -128 and 128, about its mean


_WORDS = {"init": Initialisation, "schedule": Schedule, "colour": Colour, "precision": Precision}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a network learns, the paper's numbers where nothing is given."""

    epochs: int = 70
    """Passes over the training images."""
    batch: int = 128
    """Images a step, over all workers together."""
    lr: float = 1e-2
    """Learning rate: the highest under "cosine", else the first."""
    momentum: float = 0.9
    """Share of the last step that a step repeats."""
    weight_decay: float = 5e-4
    """Pull of every weight to zero. ZFNet states none; AlexNet's (Sec. 5)."""
    init: Initialisation = "paper"
    """First weights: "paper" draws all from N(0, 0.01); "he" scales each layer to the width of its input."""
    ones: tuple[str, ...] = ()
    """Layers whose biases begin at 1, where the network has them; all others begin at 0."""
    dropout: float | None = None
    """Probability that a hidden unit is dropped; None: the network's own, 0.5 in the papers' networks."""
    colour: Colour = "none"
    """Shift of an image's colours along their principal components: none (ZFNet), AlexNet's as printed, or what
    cuda-convnet ran."""
    schedule: Schedule = "plateau"
    """Learning rate over time: "plateau" divides it when the validation error stops falling, as AlexNet and ZFNet did
    by hand; "epochs" divides it after given epochs, as OverFeat; "cosine" falls smoothly to zero."""
    patience: int = 5
    """Under "plateau": epochs without a lower validation error before the division. The papers state none."""
    factor: float = 0.1
    """Under "plateau" and "epochs": what the learning rate is multiplied by. AlexNet Sec. 5: 0.1, OverFeat 3.1: 0.5."""
    divisions: int = 3
    """Under "plateau": how often at most. AlexNet Sec. 5: three times."""
    divide_after: tuple[int, ...] = ()
    """Under "epochs": the numbers of epochs, from 1, after which the learning rate is multiplied."""
    warmup: float = 0.0
    """Under "cosine": share of all steps in which the rate climbs from zero."""
    smallest_crop: float | None = None
    """None: random crops of the network's input size, as in the papers. Else of any size from this share of the image
    to the whole, for small data sets; the mean that is subtracted is then one a channel."""
    renormalise: float | None = PAPER_RADIUS
    """Highest root mean square of a convolution filter, enforced after every step; none switches it off."""
    precision: Precision = "float32"
    """Arithmetic: "bf16" is autocast, with weights in float32; "float64" is for comparing runs."""
    channels_last: bool = False
    """Lay images and filters out with the channels innermost."""
    compile: bool = False
    """Let torch.compile fuse the network."""
    accumulate: int = 1
    """Slices that a worker computes its share of a batch in, one after the other, to save memory."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr", "accumulate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more, and less than 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 or more, and less than 1")
        self._check_words()
        if self.smallest_crop is not None and not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop is {self.smallest_crop}; expected a share above 0 and at most 1")
        if self.renormalise is not None and self.renormalise <= 0:
            raise ValueError(f"renormalise is {self.renormalise}; expected a radius above 0, or None for no limit")

    def _check_words(self) -> None:
        for name, words in _WORDS.items():
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(words))}")
        if self.schedule == "epochs" and not self.divide_after:
            raise ValueError(
                "schedule is 'epochs' and divide_after names none; give the epochs, or the preset overfeat"
            )


PRESETS = {
    "zfnet": Recipe(),
    "alexnet": Recipe(epochs=90, ones=ALEXNET_ONES, colour="paper", renormalise=None),
    # OverFeat 3.1, which says neither the biases nor how many epochs there are: some after the last division at 80.
    "overfeat": Recipe(
        epochs=90,
        lr=5e-2,
        momentum=0.6,
        weight_decay=1e-5,
        schedule="epochs",
        factor=0.5,
        divide_after=(30, 50, 60, 70, 80),
        renormalise=None,
    ),
    # Small data needs more steps than epochs of 128 give, and N(0, 0.01) lets narrow layers swallow the signal. Reaches
    # 99 % on the rendered validation images after some 200 s of CPU time.
    "small": Recipe(epochs=28, batch=32, init="he", schedule="cosine", warmup=0.05),
    # N(0, 0.01) does not carry a signal through 18 layers, and the radius of 0.1 is ZFNet's: a 1 x 1 filter of 64 maps
    # begins above it.
    "foreign": Recipe(init="he", renormalise=None),
}
"""Recipes by name: Sec. 3 of ZFNet, Sec. 4 and 5 of AlexNet, 3.1 of OverFeat, one for small networks and data, one for
networks that are not the papers'."""


def preset_of(architecture: str) -> str:
    """Name of the preset that a network is trained with if none is given."""
    if architecture.startswith(("zfnet_small", "alexnet_small", "overfeat_fast_small", "overfeat_accurate_small")):
        return "small"
    if ":" in architecture:
        return "foreign"
    return next((paper for paper in ("alexnet", "overfeat") if architecture.startswith(paper)), "zfnet")


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@torch.no_grad()
def initialise(model: nn.Module, how: Initialisation = "paper", seed: int = 0, ones: tuple[str, ...] = ()) -> None:
    """Draw the first weights of every convolution and linear layer, in place; biases become 0, or 1 in `ones`.

    "paper" is N(0, 0.01) throughout. The paper says "initialized to 10^-2"; the constant would train one feature.

    "he" keeps the variance of the signal from layer to layer (He et al. 2015), and divides the pixels' deviation of
    about 64 out, an equal share in each of the layers. All of it in the first would make that one's weights so small
    that a step of the common learning rate throws them about.

    Args:
        model: changed in place, on whatever device it is.
        how: "paper" or "he".
        seed: the weights depend on it and on the model's shape alone; torch's global generator is left alone.
        ones: names of layers whose biases become 1 (AlexNet Sec. 5: ALEXNET_ONES); those that the model does not have
            are left out, so that the papers' networks with layers removed are drawn the same way.

    Raises:
        ValueError: `how` is neither.
    """
    if how not in get_args(Initialisation):
        raise ValueError(f"how is {how!r}; expected one of {', '.join(get_args(Initialisation))}")
    generator = torch.Generator().manual_seed(seed)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    for name, layer in layers.items():
        std = PAPER_STD
        if how == "he":
            fan_in = layer.weight[0].numel()
            std = math.sqrt(2 / fan_in) * PIXEL_STD ** (-1 / len(layers))
        # Drawn on the CPU, where every machine draws the same.
        layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, std, generator=generator))
        if layer.bias is not None:
            layer.bias.fill_(1.0 if name in ones else 0.0)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Give every dropout of the model this probability, in place; 0 switches dropout off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


@torch.no_grad()
def renormalise_filters(model: nn.Module, radius: float = PAPER_RADIUS) -> None:
    """Scale every filter of a convolution layer whose root mean square exceeds `radius` to it, in place (ZFNet Sec. 3).

    The mean is over a filter's kernel x kernel x maps_in weights; its bias does not count and is not changed. The
    gradients and the optimiser's momentum stay as they are.
    """
    for filters in _filters(model):
        rms = filters.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        filters.mul_(torch.where(rms > radius, radius / rms, 1.0))


def _filters(model: nn.Module) -> Iterator[Tensor]:
    """Weights of the convolutions, maps x maps_in x kernel x kernel."""
    return (module.weight for module in model.modules() if isinstance(module, nn.Conv2d) and is_convolution(module))


# ---------------------------------------------------------------------------------------------------------------------
# Colour


def colour_axes(covariance: Tensor, variant: Colour) -> Tensor:
    """Principal components of the colours, each as long as one standard deviation of the shift along it.

    AlexNet Sec. 4.1 adds [p1, p2, p3] [a1 l1, a2 l2, a3 l3]^T with a ~ N(0, 0.1), p the eigenvectors and l the
    eigenvalues of the covariance of RGB. An eigenvalue has the square of the pixels' unit: with pixels up to 255 it
    is some 10^4, and shifts of 1,000 would follow. So "paper" takes pixels from 0 to 1. "cuda-convnet" takes the
    square roots of the eigenvalues, which scale as pixels do; it also divides the shifted image by 1.1
    (`colour_scale`).

    Args:
        covariance: [3, 3] of RGB from 0 to 255, over the pixels of the training images.
        variant: "none" gives zeros.

    Returns: float64 [3, 3]; row i is added a_i times, a_i ~ N(0, 1), to the pixels (0 to 255).
    """
    if variant == "none":
        return torch.zeros(3, 3, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance.to(torch.float64))
    # An eigenvector has no sign of its own, and libraries differ: its largest component is made positive.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    lengths = values.clamp_min(0) / 255 if variant == "paper" else values.clamp_min(0).sqrt()
    axes: Tensor = COLOUR_STD * lengths[:, None] * vectors.T
    return axes


def colour_scale(variant: Colour) -> float:
    """What a shifted training image is multiplied by: cuda-convnet keeps its variance near that of a test image's."""
    return 1 / (1 + COLOUR_STD) if variant == "cuda-convnet" else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, errors: Sequence[float]) -> float:
    """Learning rate of the step numbered `step` from 0.

    Args:
        recipe: lr, and the schedule with its numbers.
        step: steps taken so far, over all epochs.
        steps_per_epoch: steps of one epoch.
        errors: validation error after each epoch finished so far, oldest first: all that "plateau" remembers, and
            what a checkpoint must hold.

    Raises:
        ValueError: `step` is negative or `steps_per_epoch` below 1.
    """
    if step < 0 or steps_per_epoch < 1:
        raise ValueError(
            f"step is {step} and steps_per_epoch is {steps_per_epoch}; expected 0 or more and 1 or more: "
            "are there fewer images than a batch holds?"
        )
    if recipe.schedule == "plateau":
        return recipe.lr * recipe.factor ** plateaus(errors, recipe.patience, recipe.divisions)
    if recipe.schedule == "epochs":
        return recipe.lr * recipe.factor ** sum(step >= epochs * steps_per_epoch for epochs in recipe.divide_after)
    return recipe.lr * cosine(step, recipe.epochs * steps_per_epoch, recipe.warmup)


def plateaus(errors: Sequence[float], patience: int, at_most: int) -> int:
    """How often `errors` went `patience` epochs without a new lowest value; waiting starts afresh after each time."""
    lowest, waited, found = math.inf, 0, 0
    for error in errors:
        if error < lowest:
            lowest, waited = error, 0
        else:
            waited += 1
        if waited == patience:
            waited, found = 0, found + 1
    return min(found, at_most)


def cosine(step: int, total: int, warmup: float) -> float:
    """Share of the highest rate: a straight climb over the first `warmup * total` steps, then half a cosine to 0."""
    climb = round(warmup * total)
    if step < climb:
        return (step + 1) / climb
    if step >= total:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - climb) / (total - climb)))
