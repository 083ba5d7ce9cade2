"""Feature vectors: what the papers call "layer 1", "layer 5" and "layer 7", in any network.

The papers compare images by the activations of whole layers, flattened: the first convolution, the last one, and the
last hidden layer, whose features the classifier reads. In ZFNet these are conv1, conv5 and fc7.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zfnet.activations import NotFinite
from zfnet.graph import Graph
from zfnet.models.layers import is_convolution


def first_layer(graph: Graph) -> str:
    """The first layer that the output depends on. Raises: ValueError where there is none."""
    return _layers(graph, graph.output)[0]


def last_hidden_layer(graph: Graph, classes: bool) -> str:
    """What the layer of the classes reads: the last hidden layer, or in a network without any the pooled features.

    Args:
        graph: of the network.
        classes: whether the network's last layer gives classes; without, its output is what is asked for.

    Raises: ValueError where there is no layer.
    """
    name = graph[_layers(graph, graph.output)[-1]].inputs[0] if classes else graph.output
    while graph[name].kind in ("identity", "flatten"):
        name = graph[name].inputs[0]
    return next((layer for layer in graph.layers if graph.activation_of(layer) == name), name)


def last_hidden_convolution(graph: Graph, classes: bool) -> str:
    """The last convolution that the last hidden layer depends on, or is. Raises: ValueError where there is none."""
    layers = _layers(graph, graph.activation_of(last_hidden_layer(graph, classes)))
    convolutions = [layer for layer in layers if is_convolution(graph[layer].module)]
    if not convolutions:
        raise ValueError("this network has no convolution before its classes: name the layers to compare")
    return convolutions[-1]


def _layers(graph: Graph, name: str) -> list[str]:
    """The layers that an operation depends on, in order."""
    layers = [operation for operation in graph.ancestors([name]) if operation in graph.layers]
    if not layers:
        raise ValueError(f"{name!r} depends on no convolution and no linear layer: name the layers to compare")
    return layers


def features(graph: Graph, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """The activations of whole layers, flattened.

    Args:
        graph: of the network.
        x: [N, channels, rows, columns].
        layers: layers, or any other operations.

    Returns: layer -> [N, units].

    Raises: UnknownLayer; NotFinite where an activation is NaN or infinite.
    """
    nodes = {layer: graph.activation_of(layer) for layer in layers}
    activations = graph.run(x, list(nodes.values()))
    for activation in activations.values():
        broken = (~torch.isfinite(activation)).reshape(*activation.shape[:2], -1).any(-1).nonzero()
        if len(broken):
            raise NotFinite(*(int(v) for v in broken[0]))
    return {layer: activations[node].flatten(1) for layer, node in nodes.items()}
