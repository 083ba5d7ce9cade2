"""Networks written as tables of layers, and the one builder that turns a table into a module.

The papers print their networks as tables (ZFNet Fig. 3, AlexNet Fig. 2, OverFeat Tab. 1 and 3). An
`Architecture` is such a table in data: a variant is another table, never another class.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from zfnet.normalisation import LocalResponseNorm

Children = Iterator[tuple[str, nn.Module]]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Max pooling. Windows overlap where `stride < kernel`, as in AlexNet and ZFNet; not in OverFeat."""

    kernel: int = 3
    """Side of the window in cells."""
    stride: int = 2
    """Distance of windows in cells."""
    pad: int = 0
    """Cells added on every side; they never win."""
    ceil: bool = True
    """Keep a last window that hangs over the edge. cuda-convnet does; without it 110 cells pool to 54."""

    def output_px(self, side: int) -> int:
        """Side of the pooled map, given the side of the map."""
        steps = (side + 2 * self.pad - self.kernel) / self.stride
        if not self.ceil:
            return math.floor(steps) + 1
        # torch drops a last window that would lie in the padding alone.
        overhangs_into_padding = math.ceil(steps) * self.stride >= side + self.pad
        return math.ceil(steps) + (0 if overhangs_into_padding else 1)

    def then(self, other: Pool) -> Pool:
        """This pool and another one upon it, as one: a maximum of maxima."""
        kernel = self.kernel + (other.kernel - 1) * self.stride
        return Pool(kernel=kernel, stride=self.stride * other.stride, ceil=self.ceil)

    def module(self) -> nn.Module:
        """The torch module."""
        return nn.MaxPool2d(self.kernel, self.stride, self.pad, ceil_mode=self.ceil)


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """One convolution layer: filters, ReLU, and what the paper's figure draws behind them."""

    name: str
    """"conv" and the number of the layer; its other operations get the same number: relu1, pool1, norm1."""
    maps: int
    """Feature maps."""
    kernel: int
    """Side of the square filters in cells."""
    stride: int = 1
    """Distance of windows in cells."""
    pad: int = 0
    """Zeros on every side."""
    pad_after: int = 0
    """Further zeros on the right and at the bottom alone, a module of their own: pad1."""
    groups: int = 1
    """Separate halves of AlexNet's two GPUs; 1 where every filter sees every map."""
    pool: Pool | None = None
    """Max pooling, or none."""
    normalise: Literal["after pool", "before pool"] | None = None
    """Contrast normalisation: after the pool as in ZFNet, before it as in AlexNet, or none."""

    def output_px(self, side: int) -> int:
        """Side of the map that leaves the layer, given the side of the map that enters it."""
        convolved = (side + 2 * self.pad + self.pad_after - self.kernel) // self.stride + 1
        return self.pool.output_px(convolved) if self.pool else convolved

    def children(self, maps_in: int) -> Children:
        """Names and modules of the layer, in the order in which they run."""
        number = self.name.removeprefix("conv")
        if self.pad_after:
            yield f"pad{number}", nn.ZeroPad2d((0, self.pad_after, 0, self.pad_after))
        yield self.name, nn.Conv2d(maps_in, self.maps, self.kernel, self.stride, self.pad, groups=self.groups)
        yield f"relu{number}", nn.ReLU()
        if self.normalise == "before pool":
            yield f"norm{number}", LocalResponseNorm()
        if self.pool:
            yield f"pool{number}", self.pool.module()
        if self.normalise == "after pool":
            yield f"norm{number}", LocalResponseNorm()


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One hidden, fully connected layer: weights, ReLU, dropout."""

    name: str
    """"fc" and the number of the layer; its other operations get the same number: relu6, dropout6."""
    units: int
    """Outputs."""
    dropout: float = 0.5
    """Probability of setting an output to zero in training."""

    def children(self, weights: nn.Module) -> Children:
        """Names and modules of the layer, in the order in which they run, given the module of its weights."""
        number = self.name.removeprefix("fc")
        yield self.name, weights
        yield f"relu{number}", nn.ReLU()
        yield f"dropout{number}", nn.Dropout(self.dropout)


class FullyConnected(nn.Conv2d):
    """A fully connected layer as a convolution over all it reads, so that it slides over larger images (OverFeat 3.5).

    It computes what a linear layer with these weights, flattened in the order maps, rows, columns, does to each
    window. The papers count it among the fully connected layers, and so do all analyses.
    """


def is_convolution(module: nn.Module | None) -> bool:
    """Whether it is a convolution layer; a fully connected one in the form of a convolution is none."""
    return isinstance(module, nn.Conv2d) and not isinstance(module, FullyConnected)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network as its paper prints it."""

    name: str
    """What `zfnet.models.build` calls it."""
    input_px: int
    """Side of the square crop that the network sees, in pixels."""
    resize_px: int
    """What an image's smallest side is resized to before it is cropped, in pixels."""
    convolutions: tuple[Convolution, ...]
    """Layers with maps, from the image up."""
    linears: tuple[Linear, ...]
    """Hidden layers without maps."""
    classifier: str
    """Name of the last layer, which has one output a class and no ReLU."""
    sliding: bool = False
    """Layers without maps are `FullyConnected`, so that images may be larger than input_px, and have a score for each
    window; then the largest of each class is given (OverFeat 3.4)."""
    activation: Literal["relu", "tanh"] = "relu"
    """What stands wherever the papers have a ReLU: relu1 or tanh1, ..."""


class Network(nn.Sequential):
    """An `Architecture` as a module, its children named conv1, relu1, pool1, norm1, ... in running order.

    Takes images x 3 x input_px x input_px, RGB with the mean subtracted, about -128 to 128 (ZFNet Sec. 3);
    gives images x classes, before the softmax. A `sliding` architecture takes larger images too; `zfnet.dense` gives
    the scores of every window. Weights are torch's own until `zfnet.recipe.initialise`.

    Args:
        architecture: the table.
        classes: outputs of the classifier.

    Raises:
        ValueError: fewer than one class, or an input too small to leave the linear layers a cell.
    """

    def __init__(self, architecture: Architecture, classes: int) -> None:
        if classes < 1:
            raise ValueError(f"classes is {classes}: a classifier has at least 1; give the number of your labels")
        super().__init__(OrderedDict(_activated(architecture, _children(architecture, classes))))
        self.architecture = architecture
        self.classes = classes

    @property
    def input_px(self) -> int:
        """Side of the square crop that the network sees, in pixels."""
        return self.architecture.input_px

    @property
    def resize_px(self) -> int:
        """What an image's smallest side is resized to before it is cropped, in pixels."""
        return self.architecture.resize_px

    def __getitem__(self, index: int | slice) -> Any:
        """A child; or, for a slice, a plain `nn.Sequential` of them, since a part is not the architecture."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


def _activated(architecture: Architecture, children: Children) -> Children:
    """The children with the architecture's own activation function for every ReLU."""
    for name, module in children:
        if isinstance(module, nn.ReLU) and architecture.activation == "tanh":
            yield name.replace("relu", "tanh"), nn.Tanh()
        else:
            yield name, module


def _children(architecture: Architecture, classes: int) -> Children:
    maps, side = 3, architecture.input_px
    for convolution in architecture.convolutions:
        yield from convolution.children(maps)
        maps, side = convolution.maps, convolution.output_px(side)
        if side < 1:
            raise ValueError(
                f"{architecture.name}: input_px={architecture.input_px} leaves no cell after "
                f"{convolution.name}; expected at least one: enlarge input_px, or shorten strides"
            )
    if not architecture.sliding:
        yield "flatten", nn.Flatten()
        maps, side = maps * side**2, 1
    for linear in architecture.linears:
        yield from linear.children(_weights(architecture, maps, linear.units, side))
        maps, side = linear.units, 1
    yield architecture.classifier, _weights(architecture, maps, classes, side)
    if architecture.sliding:
        yield "maximum", nn.AdaptiveMaxPool2d(1)
        yield "flatten", nn.Flatten()


def _weights(architecture: Architecture, maps: int, units: int, side: int) -> nn.Module:
    """The weights of a layer without maps, on all cells of maps of this side."""
    return FullyConnected(maps, units, side) if architecture.sliding else nn.Linear(maps, units)
