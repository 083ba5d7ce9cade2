"""The analyses on OverFeat through the graph, at its own size and larger, where fully connected layers have maps."""

import dataclasses

import pytest
import torch
from networks import error, overfeat
from test_deconv import captum_error
from test_occlusion import image_and_fill, slow_twin
from torch import nn

from zfnet.activations import strongest
from zfnet.models.layers import Network
from zfnet.models.overfeat import OVERFEAT_ACCURATE, OVERFEAT_FAST
from zfnet.occlusion import Grid, sensitivity
from zfnet.receptive import ReceptiveField, receptive_field
from zfnet.tracing import trace

SMALL = {"overfeat_fast_small": ("conv5", "relu5", "fc7"), "overfeat_accurate_small": ("conv6", "relu6", "fc8")}


def thin(table) -> nn.Module:
    """The geometry of a table with two maps a layer."""
    convolutions = tuple(dataclasses.replace(layer, maps=2) for layer in table.convolutions)
    linears = tuple(dataclasses.replace(layer, units=2) for layer in table.linears)
    return Network(dataclasses.replace(table, convolutions=convolutions, linears=linears), 2).eval()


@pytest.mark.parametrize(
    ("table", "layer", "side", "field"),
    [  # (jump, start, size)
        (OVERFEAT_ACCURATE, "conv1", 221, (2, 0, 7)),
        (OVERFEAT_ACCURATE, "conv2", 221, (6, 0, 47)),
        (OVERFEAT_ACCURATE, "conv6", 221, (12, -48, 149)),  # PAPERS 4.4: the conv part reaches 149
        (OVERFEAT_ACCURATE, "fc7", 257, (36, -48, 317)),  # and the whole stack 317, more than its window of 221
        (OVERFEAT_ACCURATE, "fc9", 257, (36, -48, 317)),
        (OVERFEAT_FAST, "conv1", 231, (4, 0, 11)),
        (OVERFEAT_FAST, "conv5", 231, (16, -48, 151)),
        (OVERFEAT_FAST, "fc8", 263, (32, -48, 327)),
    ],
)
def test_receptive_fields_are_the_windows_and_what_padding_adds(table, layer, side, field) -> None:
    jump, start, size = field
    found = receptive_field(trace(thin(table), (3, side, side)), layer)
    assert found == ReceptiveField((jump, jump), (start, start), (size, size))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("more", [(0, 0), (37, 21)])
def test_the_graph_runs_as_the_network_does_at_any_size(name, more) -> None:
    network = overfeat(name)
    x = torch.randn(2, 3, *(network.input_px + m for m in more), dtype=torch.float64)
    graph = trace(network, x.shape[1:])
    seen = {}
    for child, module in network.named_children():
        module.register_forward_hook(lambda _module, _inputs, y, child=child: seen.update({child: y.clone()}))
    with torch.no_grad():
        assert torch.equal(graph.run(x, [graph.output])[graph.output], network(x))
    layers = [layer for layer in graph.layers if layer.startswith("fc")]
    found = graph.run(x, [graph.activation_of(layer) for layer in layers])
    for node, maps in found.items():
        assert torch.equal(maps, seen[node])
        cells = strongest(maps)
        assert torch.equal(torch.as_tensor(cells.value), maps.amax((2, 3)).float())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("more", [(0, 0), (37, 21)])
@pytest.mark.filterwarnings("ignore")
def test_captum_agrees_on_projections_of_all_layers_at_any_size(name, more) -> None:
    network = overfeat(name)
    last, _, hidden = SMALL[name]
    x = torch.randn(1, 3, *(network.input_px + m for m in more), dtype=torch.float64)
    for layer in ("conv2", last, hidden, network.architecture.classifier):
        assert captum_error(network, x, layer) <= 1e-12, layer
    assert captum_error(network, x, last, relu="gradient") > 1e-3  # the options are not lost on the way


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("side", [0, 32])
@pytest.mark.parametrize("method", ["dense", "incremental"])
def test_occlusion_is_the_loop_over_positions_at_any_size(name, side, method) -> None:
    network = overfeat(name)
    side += network.input_px
    last, rectified, _ = SMALL[name]
    clean, filled = image_and_fill(side)
    grid = Grid(side, 15, 17)
    got = sensitivity(trace(network, (3, side, side)), clean, filled, grid, memory_mb=16, method=method)
    feature_map, maps, probability = slow_twin(network, network.get_submodule(rectified), clean, filled, grid, None)
    assert (got.layer, got.feature_map) == (last, feature_map)
    assert error(got.activation_map, maps[0]) <= 1e-12
    assert error(got.probability_map, maps[1]) <= 1e-12
    assert torch.equal(got.class_map.double(), maps[2])
    assert got.clean_probability == pytest.approx(float(probability), rel=1e-12)
