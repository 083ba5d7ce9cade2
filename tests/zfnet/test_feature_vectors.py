"""Which layers "1", "5" and "7" are in other networks, and that features are torch's own activations."""

import pytest
import torch
from torch import nn

from tests.zfnet.networks import torchvision_network, zfnet_like
from zfnet import models
from zfnet.activations import NotFinite
from zfnet.features import features, first_layer, last_hidden_convolution, last_hidden_layer
from zfnet.tracing import trace


@pytest.mark.parametrize(
    ("network", "side", "expected"),
    [
        (lambda: models.build("zfnet_small", classes=3), 64, ("conv1", "conv5", "fc7")),
        (lambda: models.build("zfnet_small_no67", classes=3), 64, ("conv1", "conv5", "pool5")),
        (lambda: torchvision_network("alexnet", 0), 64, ("features.0", "features.10", "classifier.0")),
        (lambda: torchvision_network("squeezenet1_1", 0), 64, ("features.0", "features.12.expand3x3", "cat_7")),
        (lambda: torchvision_network("resnet18", 0), 64, ("conv1", "layer4.1.conv2", "avgpool")),
    ],
)
def test_layers_of_known_networks(network, side, expected):
    graph = trace(network(), (3, side, side))
    found = first_layer(graph), last_hidden_convolution(graph, True), last_hidden_layer(graph, True)
    assert found == expected


def test_a_network_without_classes_ends_in_its_last_hidden_layer():
    graph = trace(zfnet_like(), (3, 96, 96))
    assert (last_hidden_convolution(graph, False), last_hidden_layer(graph, False)) == ("conv5", "pool5")


def test_a_network_without_layers_or_without_convolutions_is_refused():
    graph = trace(nn.Sequential(nn.ReLU()), (3, 8, 8))
    with pytest.raises(ValueError, match="name the layers to compare"):
        first_layer(graph)
    graph = trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 2)), (3, 8, 8))
    assert last_hidden_layer(graph, True) == "1"
    with pytest.raises(ValueError, match="no convolution before its classes"):
        last_hidden_convolution(graph, True)


def test_features_are_the_flat_activations():
    torch.manual_seed(0)
    network, x = zfnet_like(classes=4, input_px=96), torch.randn(3, 3, 96, 96)
    found = features(trace(network, (3, 96, 96)), x, ["conv2", "fc6", "fc8"])
    assert torch.equal(found["conv2"], network[:7](x).flatten(1))  # up to relu2
    assert torch.equal(found["fc6"], network[:-2](x))
    assert torch.equal(found["fc8"], network(x))


def test_an_activation_that_is_not_finite_is_named():
    x = torch.randn(2, 3, 96, 96)
    network = zfnet_like(classes=4, input_px=96)
    with torch.no_grad():
        network.fc6.bias[5] = torch.inf
    with pytest.raises(NotFinite, match="feature map 5 of image 0"):
        features(trace(network, (3, 96, 96)), x, ["conv2", "fc6"])
