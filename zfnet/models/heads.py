"""OverFeat with heads of other purposes beside its classifier: a regressor of boxes, and context for detection.

OverFeat section 4.2: "the regression network takes as input the pooled feature maps from layer 5. It has 2
fully-connected hidden layers of size 4096 and 1024 channels, respectively. The final output layer has 4 units which
specify the coordinates for the bounding box edges". The classifier stays what it was, and so does what the network
gives for an image: all analyses work on it.

A network's heads stand behind its name: "overfeat_fast+boxes", "overfeat_fast+context+class-boxes".
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

from zfnet.models.layers import Architecture, FullyConnected, Network

HEADS = ("context", "boxes", "class-boxes")
"""What may stand behind a name: context, then a regressor for all classes together, or one for each."""
EDGES = 4
"""Top, left, bottom, right, in units of the window: its own are 0, 0, 1, 1."""


class HeadedNetwork(Network):
    """A sliding network with heads, which `forward` leaves alone: it gives images x classes.

    Args:
        architecture: of a sliding network.
        classes: outputs of the classifier.
        heads: some of HEADS, in that order, one regressor at most.

    Raises:
        ValueError: the network does not slide, or there is no such head.
    """

    regressor: nn.Sequential | None
    """Pooled maps [N, maps, rows, cols] -> edges in units of the window [N, 4, ...], or [N, classes x 4, ...]."""
    context: FullyConnected | None
    """Units of the last hidden layer at a lower resolution -> what they add to the class scores."""

    def __init__(self, architecture: Architecture, classes: int, heads: tuple[str, ...]) -> None:
        super().__init__(architecture, classes)
        ranks = [HEADS.index(head) if head in HEADS else -1 for head in heads]
        if not heads or -1 in ranks or min((b - a for a, b in pairwise(ranks)), default=1) < 1 or {1, 2} <= {*ranks}:
            raise ValueError(
                f"the heads are {'+'.join(heads)!r}; expected some of {', '.join(HEADS)} in this order, one of the "
                "last two at most"
            )
        if not architecture.sliding or not architecture.linears:
            raise ValueError(
                f"{architecture.name} looks at one window of an image: only OverFeat's networks take heads"
            )
        self._classifying = [name for name, _ in self.named_children()]
        first, units = self.get_submodule(architecture.linears[0].name), architecture.linears[-1].units
        assert isinstance(first, FullyConnected)
        self.context = FullyConnected(units, classes, 1, bias=False) if "context" in heads else None
        self.regressor = None
        if heads[-1] != "context":
            outputs = EDGES * (classes if heads[-1] == "class-boxes" else 1)
            # 4096 and 1024 beside hidden layers of 4096 units, and in small networks as much less.
            self.regressor = regressor(first.in_channels, first.kernel_size[0], units, outputs)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Images -> class scores, as without heads."""
        for name in self._classifying:
            x = self.get_submodule(name)(x)
        return x


def regressor(maps: int, cells: int, units: int, outputs: int) -> nn.Sequential:
    """Windows of `cells` x `cells` pooled cells -> units -> units / 4 -> outputs, all as convolutions."""
    modules = {
        "hidden1": FullyConnected(maps, units, cells),
        "relu1": nn.ReLU(),
        "hidden2": FullyConnected(units, units // 4, 1),
        "relu2": nn.ReLU(),
        "edges": FullyConnected(units // 4, outputs, 1),
    }
    return nn.Sequential(OrderedDict(modules))


@torch.no_grad()
def initialise_heads(network: HeadedNetwork, seed: int) -> None:
    """First weights: the regressor gives the window itself, and context adds nothing. The rest is left alone.

    Hidden layers keep the signal's variance (He et al. 2015); the paper does not say how it began.
    """
    generator = torch.Generator().manual_seed(seed)
    if network.context is not None:
        nn.init.zeros_(network.context.weight)
    if network.regressor is None:
        return
    for name, layer in network.regressor.named_children():
        if isinstance(layer, FullyConnected):
            std = 1e-3 if name == "edges" else (2 / layer.weight[0].numel()) ** 0.5
            layer.weight.copy_(torch.empty(layer.weight.shape).normal_(0, std, generator=generator))
            assert layer.bias is not None
            layer.bias.zero_()
            if name == "edges":
                layer.bias.view(-1, EDGES)[:, 2:] = 1.0
