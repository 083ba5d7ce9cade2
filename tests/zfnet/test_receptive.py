"""Receptive fields against PAPERS 1.1 and against gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from networks import Branches, chains, zfnet_like
from torch import nn

from zfnet.graph import UnknownLayer
from zfnet.receptive import ReceptiveField, fields_beneath, receptive_field
from zfnet.tracing import trace

# PAPERS 1.1, form A: layer -> receptive field, jump, first pixel.
ZFNET = {
    "conv1": (7, 2, 0),
    "pool1": (11, 4, 0),
    "conv2": (27, 8, 0),
    "pool2": (43, 16, 0),
    "conv3": (75, 16, -16),
    "conv4": (107, 16, -32),
    "conv5": (139, 16, -48),
    "pool5": (171, 32, -48),
}


@pytest.fixture(scope="module")
def zfnet():
    return trace(zfnet_like(classes=3))


@pytest.mark.parametrize("layer", ZFNET)
def test_zfnet_has_the_papers_receptive_fields(zfnet, layer):
    size, jump, start = ZFNET[layer]
    assert receptive_field(zfnet, layer) == ReceptiveField((jump, jump), (start, start), (size, size))


def test_the_maps_have_the_papers_sizes(zfnet):
    sizes = {name: zfnet[name].shape[-1] for name in ("conv1", "pool1", "conv2", "pool2", "conv5", "pool5")}
    assert sizes == {"conv1": 110, "pool1": 55, "conv2": 26, "pool2": 13, "conv5": 13, "pool5": 6}


def test_fully_connected_units_see_the_whole_image(zfnet):
    assert receptive_field(zfnet, "fc6").box(0, 0) == (0, 0, 224, 224)
    assert receptive_field(zfnet, "fc8").box(0, 0) == (0, 0, 224, 224)


def test_a_box_may_leave_the_image_and_takes_arrays(zfnet):
    field = receptive_field(zfnet, "conv5")
    assert field.box(0, 12) == (-48, 144, 139, 139)
    top, left, height, width = field.box(np.array([0, 3]), torch.tensor([1, 2]))
    assert (top.tolist(), left.tolist(), height, width) == ([-48, 0], [-32, -16], 139, 139)


def test_an_unknown_layer_is_refused_with_the_nearest_name(zfnet):
    with pytest.raises(UnknownLayer, match="Did you mean 'conv5'"):
        receptive_field(zfnet, "conv55")


def test_branches_take_the_box_that_holds_both():
    graph = trace(Branches(), (3, 33, 33))
    assert receptive_field(graph, "left").size == (15, 15)  # pool: 7, a 3x3 on jump 4
    assert receptive_field(graph, "right").size == (23, 23)
    assert receptive_field(graph, "cat").box(0, 0) == receptive_field(graph, "right").box(0, 0)


def test_inside_a_field_as_large_as_the_map_becomes_the_map(zfnet):
    fields = fields_beneath(zfnet, "conv5", inside=True)
    assert fields["conv4"] == ReceptiveField((1, 1), (-1, -1), (3, 3))
    small = trace(zfnet_like(), (3, 64, 64))
    assert fields_beneath(small, "conv5", inside=True)["x" if "x" in small.operations else small.input].jump == (0, 0)


def pixels_with_influence(model: nn.Module, shape, row: int, col: int) -> np.ndarray:
    """Which input pixels have a gradient to cell (row, col), with all weights positive and pools averaging."""
    x = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, :, row, col].sum(), x)
    return (gradient[0].abs().sum(0) > 0).numpy()


@settings(max_examples=60)
@given(chain=chains(pools=("average",)))
def test_every_cell_of_a_random_chain_sees_its_box_and_nothing_else(chain):
    model, shape = chain
    for parameter in model.parameters():
        parameter.data.fill_(1)
    graph = trace(model, shape)
    field = receptive_field(graph, graph.output)
    rows, cols = graph[graph.output].shape[1:]
    for row, col in {(0, 0), (rows - 1, cols - 1), (rows // 2, cols // 2), (0, cols - 1)}:
        seen = pixels_with_influence(model, shape, row, col)
        top, left, height, width = field.box(row, col)
        box = np.zeros_like(seen)
        box[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = True
        assert not (seen & ~box).any()
        if not seen.any():
            continue
        # Dilation and strides leave holes, so it is the first and last pixel seen that the box must agree with,
        # on the sides where padding does not hide its edge.
        for axis, (start, size) in enumerate(((top, height), (left, width))):
            lines = np.flatnonzero(seen.any(axis=1 - axis))
            if start >= 0 and start + size <= shape[axis + 1] and not _padded(graph):
                assert (lines[0], lines[-1]) == (start, start + size - 1)


def _padded(graph) -> bool:
    return any(op.window and (op.window.pad_before != (0, 0) or op.window.ceil) for op in graph.operations.values())
