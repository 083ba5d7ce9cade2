"""Do projections depend on what the network learned? Weights randomised from the top down.

Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, Sec. 3: re-initialise the layers of a network one after
another from the top (cascading), and compare the pictures with those of the trained network by Spearman's rank
correlation, of absolute values and of signed ones. What does not change does not show what was learned. Nie et al., "A
Theoretical Explanation for Perplexing Behaviors of Backpropagation-based Visualizations", ICML 2018, show that
deconvnet's pictures of images can be nearly independent of the class.
"""

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zfnet.graph import Graph


def cascade(graph: Graph, layer: str) -> tuple[str, ...]:
    """The layers that a cell of `layer` depends on, itself first: the order in which they are randomised."""
    beneath = set(graph.ancestors([layer]))
    return tuple(name for name in reversed(graph.layers) if name in beneath)


def randomised(network: nn.Module, layers: Sequence[str], seed: int) -> nn.Module:
    """A copy of the network in which these convolution and linear layers have random weights and biases.

    Each tensor is drawn from a normal distribution of its own mean and standard deviation, so that the layer keeps its
    scale. A layer's draw depends on the seed and its name alone, not on which others are drawn. All other tensors are
    shared with `network`, which is left as it was.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    found = copy.deepcopy(network, shared)
    for layer in layers:
        digest = hashlib.sha256(f"{seed} {layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        module = found.get_submodule(layer)
        for name, tensor in list(module.named_parameters(recurse=False)):
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            drawn = tensor.detach().mean() + tensor.detach().std(correction=0) * drawn
            setattr(module, name, nn.Parameter(drawn, requires_grad=tensor.requires_grad))
    return found


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of two tensors of as many values: Pearson's of their ranks, equals sharing their mean.

    NaN where all values of one of them are equal.
    """
    x, y = (ranks(values.flatten()) for values in (one, other))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.square().sum() * y.square().sum()).sqrt())


def ranks(values: Tensor) -> Tensor:
    """[n] -> their places in ascending order, from 1, as float64; equal values share the mean of their places."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    places: Tensor = (last - (counts - 1) / 2.0).double()
    return places[which]
