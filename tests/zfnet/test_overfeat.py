"""OverFeat's networks against Tab. 1 and 3 of their paper: sizes, parameters, layers that slide."""

import pytest
import torch
from networks import overfeat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zfnet import models
from zfnet.features import last_hidden_convolution, last_hidden_layer
from zfnet.models.layers import FullyConnected
from zfnet.tracing import trace

# PAPERS 3.1 and 3.2, "Run": what leaves each convolution and pool.
FAST = {
    "conv1": (96, 56), "pool1": (96, 28), "conv2": (256, 24), "pool2": (256, 12), "conv3": (512, 12),
    "conv4": (1024, 12), "conv5": (1024, 12), "pool5": (1024, 6), "fc6": (3072, 1), "fc7": (4096, 1), "fc8": (1000, 1),
}  # fmt: skip
ACCURATE = {
    "conv1": (96, 108), "pool1": (96, 36), "conv2": (256, 30), "pool2": (256, 15), "conv3": (512, 15),
    "conv4": (512, 15), "conv5": (1024, 15), "conv6": (1024, 15), "pool6": (1024, 5), "fc7": (4096, 1),
    "fc8": (4096, 1), "fc9": (1000, 1),
}  # fmt: skip
PRINTED = {"overfeat_fast": (FAST, 145_920_872), "overfeat_accurate": (ACCURATE, 144_656_488)}
SMALL = tuple(f"{name}_small" for name in PRINTED)


def shapes_of(network: nn.Sequential, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
    shapes, x = {}, torch.zeros(1, 3, rows, cols)
    for name, child in network.named_children():
        x = child(x)
        shapes[name] = tuple(x.shape[1:])
    return shapes


@pytest.mark.parametrize("name", PRINTED)
def test_networks_have_the_maps_the_sides_and_the_parameters_of_their_table(name) -> None:
    sides, parameters = PRINTED[name]
    with torch.device("meta"):
        network = models.build(name).eval()
        found = shapes_of(network, network.input_px, network.input_px)
    assert {layer: found[layer] for layer in sides} == {layer: (m, side, side) for layer, (m, side) in sides.items()}
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.resize_px == 256


# Tab. 4 prints 2810 and 5369 million; PAPERS has these from a count of the layers as printed.
CONNECTIONS = {"overfeat_fast": 2801, "overfeat_accurate": 5355}


@pytest.mark.parametrize("name", CONNECTIONS)
def test_networks_have_the_connections_that_were_counted(name) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = models.build(name).eval()
        network(torch.zeros(1, 3, network.input_px, network.input_px))
    assert counter.get_total_flops() // 2 // 10**6 == CONNECTIONS[name]


KERNELS = {  # filter and stride of the convolutions, and of the pools, in Tab. 1 and 3
    "overfeat_fast": ([(11, 4), (5, 1), (3, 1), (3, 1), (3, 1), (6, 1), (1, 1), (1, 1)], [2, 2, 2]),
    "overfeat_accurate": ([(7, 2), (7, 1), (3, 1), (3, 1), (3, 1), (3, 1), (5, 1), (1, 1), (1, 1)], [3, 2, 3]),
}


@pytest.mark.parametrize("name", KERNELS)
def test_filters_strides_and_pools_are_the_tables_and_nothing_normalises(name) -> None:
    with torch.device("meta"):
        network = models.build(name)
    modules = list(network.children())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size[0], m.stride[0]) for m in convolutions] == KERNELS[name][0]
    assert [m.padding[0] for m in convolutions] == [0, 0, *[1] * (len(convolutions) - 5), 0, 0, 0]
    pools = [m for m in modules if isinstance(m, nn.MaxPool2d)]
    assert [(m.kernel_size, m.stride, m.ceil_mode) for m in pools] == [(p, p, False) for p in KERNELS[name][1]]
    assert [m.p for m in modules if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    others = {nn.Conv2d, FullyConnected, nn.ReLU, nn.MaxPool2d, nn.Dropout, nn.AdaptiveMaxPool2d, nn.Flatten}
    assert {type(m) for m in modules} == others


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_have_their_form_and_no_pool_drops_a_cell(name) -> None:
    with torch.device("meta"):
        small, large = models.build(name), models.build(name.removesuffix("_small"))
        assert [n for n, _ in small.named_children()] == [n for n, _ in large.named_children()]
        assert {n: type(m) for n, m in small.named_children()} == {n: type(m) for n, m in large.named_children()}
        sides = shapes_of(small.eval(), small.input_px, small.input_px)
    pools = {n: m for n, m in small.named_children() if isinstance(m, nn.MaxPool2d)}
    assert [p.kernel_size for p in pools.values()] == KERNELS[name.removesuffix("_small")][1]
    for number in (n.removeprefix("pool") for n in pools):
        assert sides[f"pool{number}"][1] * pools[f"pool{number}"].kernel_size == sides[f"conv{number}"][1]


@pytest.mark.parametrize("name", SMALL)
def test_at_its_own_size_the_layers_that_slide_are_linear_layers_of_the_same_weights(name) -> None:
    network = overfeat(name)
    x = torch.randn(3, 3, network.input_px, network.input_px, dtype=torch.float64)
    number = next(i for i, layer in enumerate(network.children()) if isinstance(layer, FullyConnected))
    units = network[:number](x).flatten(1)
    for layer in list(network.children())[number:]:
        if isinstance(layer, FullyConnected):
            units = units @ layer.weight.flatten(1).T + layer.bias
        elif isinstance(layer, nn.ReLU):
            units = units.clamp_min(0)
    torch.testing.assert_close(network(x), units, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_weights_say_the_number_of_classes(name) -> None:
    assert models.classes_of(models.build(name, 3), models.build(name, 8).state_dict()) == 8


@pytest.mark.parametrize("name", SMALL)
def test_a_larger_image_has_the_largest_score_of_its_windows(name) -> None:
    network = overfeat(name)
    side = network.input_px + 41
    x = torch.randn(1, 3, side, side + 30, dtype=torch.float64)
    maps = network[: list(dict(network.named_children())).index("maximum")](x)
    assert maps.shape[2] > 1
    assert maps.shape[3] > maps.shape[2]
    assert torch.equal(network(x), maps.amax((2, 3)))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("more", [0, 40])
def test_the_layers_that_slide_count_as_fully_connected_at_every_size(name, more) -> None:
    network = models.build(name, classes=7)
    side = network.input_px + more
    graph = trace(network, (3, side, side))
    last = {"fast": ("conv5", "fc7"), "accurate": ("conv6", "fc8")}[name.split("_")[1]]
    assert graph.last_convolution == last[0]
    assert (last_hidden_convolution(graph, True), last_hidden_layer(graph, True)) == last
    assert graph.unknown == ()
    assert graph[graph.output].shape == (7,)
