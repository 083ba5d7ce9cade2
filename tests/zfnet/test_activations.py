"""Top-k and statistics against plain loops, and the laws that make them mergeable."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Branches, zfnet_like
from torch import nn

from zfnet.activations import (
    BINS,
    NONE,
    NotFinite,
    Statistics,
    Strongest,
    TopK,
    bin_of,
    edges,
    strongest,
    strongest_of_layers,
)
from zfnet.tracing import trace


def entries(top: TopK) -> list[list[tuple[float, int, int, int]]]:
    """Each map's entries, without empty places."""
    return [
        [
            (float(a), int(s), int(r), int(c))
            for a, s, r, c in zip(*(x[m] for x in (top.activation, top.sample, top.row, top.col)), strict=True)
            if s != NONE
        ]
        for m in range(len(top.activation))
    ]


def by_definition(activation: torch.Tensor, samples: list[int], k: int) -> list[list[tuple[float, int, int, int]]]:
    """ZFNet section 4, as a loop: one cell an image, sorted by (activation down, sample, row, col)."""
    result = []
    for m in range(activation.shape[1]):
        found = []
        for image, sample in enumerate(samples):
            cells = [
                (-float(activation[image, m, r, c]), sample, r, c)
                for r in range(activation.shape[2])
                for c in range(activation.shape[3])
            ]
            best = min(cells)
            if -best[0] > 0:
                found.append(best)
        result.append([(-a, s, r, c) for a, s, r, c in sorted(found)[:k]])
    return result


def batches(seed: int, images: int, maps: int = 3, side: int = 3, levels: int = 4) -> torch.Tensor:
    """Small integers, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, levels, (images, maps, side, side), generator=generator).float()


@given(seed=st.integers(0, 10**6), images=st.integers(1, 12), k=st.integers(1, 9))
@settings(max_examples=60)
def test_topk_is_the_definition(seed, images, k):
    activation = batches(seed, images)
    samples = np.random.default_rng(seed).permutation(images)
    top = TopK.of(strongest(activation), samples, k)
    assert entries(top) == by_definition(activation, samples.tolist(), k)


@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 12), max_size=4), k=st.integers(1, 9))
@settings(max_examples=60)
def test_a_merge_does_not_care_for_order_grouping_or_repetition(seed, cuts, k):
    activation = batches(seed, 12)
    samples = np.random.default_rng(seed).permutation(12)
    borders = [0, *sorted(cuts), 12]
    states = [TopK.of(strongest(activation[a:b]), samples[a:b], k) for a, b in pairwise(borders) if b > a]
    whole = entries(TopK.of(strongest(activation), samples, k))
    assert entries(TopK.merge(states)) == whole
    assert entries(TopK.merge(states[::-1])) == whole
    assert entries(TopK.merge([TopK.merge(states), *states])) == whole
    nested = states[0]
    for state in states[1:]:
        nested = TopK.merge([nested, state])
    assert entries(nested) == whole


def test_merge_refuses_different_k():
    found = strongest(batches(0, 4))
    with pytest.raises(ValueError, match=r"k = \[2, 3\]"):
        TopK.merge([TopK.of(found, np.arange(4), k) for k in (2, 3)])


def test_fully_connected_layers_are_maps_of_one_cell():
    activation = batches(1, 5, side=1)
    flat = TopK.of(strongest(activation.flatten(1)), np.arange(5), 3)
    assert entries(flat) == entries(TopK.of(strongest(activation), np.arange(5), 3))


def test_the_layout_in_memory_changes_nothing():
    activation = batches(3, 5, maps=7, side=6)
    turned = activation.to(memory_format=torch.channels_last)
    one, other = strongest(activation), strongest(turned)
    for name in ("value", "position", "total", "active"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def same(one: Strongest, other: Strongest) -> bool:
    arrays = ("value", "position", "total", "active")
    return one.shape == other.shape and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in arrays)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_relu_can_be_taken_in_the_same_pass(layout):
    responses = batches(4, 5, maps=7, side=6).contiguous(memory_format=layout)
    rectified = responses.relu()
    assert same(strongest(responses, rectify=True), strongest(rectified))
    assert torch.equal(responses, rectified)


class ReadTwice(nn.Module):
    """What one ReLU reads is read by nobody else, what the other one reads is added to it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.conv2(self.relu1(self.bn1(self.conv1(x))))
        return self.relu2(y) + y


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("network", "side"), [(ReadTwice, 12), (Branches, 33), (lambda: zfnet_like(classes=3), 224)])
def test_layers_reduced_on_their_way_are_those_of_a_whole_run(network, side, layout):
    torch.manual_seed(0)
    graph = trace(network().eval().to(memory_format=layout), (3, side, side))
    x = torch.randn(2, 3, side, side).contiguous(memory_format=layout)
    given = x.clone()
    everything = [name for name, op in graph.operations.items() if op.shape]
    for layers in (graph.layers, everything, everything[::-1]):
        nodes = {layer: graph.activation_of(layer) for layer in layers}
        values = graph.run(x, nodes.values())
        found = strongest_of_layers(graph, x, layers)
        assert list(found) == list(layers)
        assert all(same(found[layer], strongest(values[node])) for layer, node in nodes.items())
    assert torch.equal(x, given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_fails_and_names_the_image(value):
    activation = batches(2, 4)
    activation[2, 1, 0, 0] = value
    with pytest.raises(NotFinite) as error:
        strongest(activation)
    assert (error.value.index, error.value.feature_map) == (2, 1)


@given(seed=st.integers(0, 10**6), images=st.integers(1, 9), cut=st.integers(1, 8))
@settings(max_examples=40)
def test_statistics_are_the_definition_and_merge(seed, images, cut):
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(images, 3, 2, 2, generator=generator).relu() * 10.0 ** (seed % 7 - 3)
    whole = Statistics.of(strongest(activation))
    parts = [activation[:cut], activation[cut:]]
    merged = Statistics.merge([Statistics.of(strongest(part)) for part in parts if len(part)])
    assert np.allclose(whole.total, activation.double().sum((0, 2, 3)), rtol=1e-6)
    assert np.array_equal(whole.maximum, activation.amax((0, 2, 3)))
    assert np.array_equal(whole.active_images, (activation > 0).any(-1).any(-1).sum(0))
    assert np.array_equal(whole.active_cells, (activation > 0).sum((0, 2, 3)))
    assert np.allclose(merged.total, whole.total, rtol=1e-6)
    for name in ("maximum", "active_images", "active_cells", "histogram"):
        assert np.array_equal(getattr(merged, name), getattr(whole, name)), name


def test_quantiles_are_the_upper_edge_of_the_right_bin():
    maxima = np.sort(np.random.default_rng(0).gamma(1.0, 5.0, size=500)).astype(np.float32)
    maxima[:100] = 0
    statistics = Statistics.of(strongest(torch.from_numpy(maxima)[:, None]))
    for share in (0.1, 0.2, 0.5, 0.95, 1.0):
        exact = maxima[int(np.ceil(share * 500)) - 1]
        found = statistics.quantiles((share,))[0, 0]
        assert exact <= found <= max(exact * (1 + 1 / 16), 0)


def test_bins_are_a_sixteenth_of_an_octave():
    assert edges()[0] == 2.0**-20
    assert edges()[-1] == 2.0**20
    assert len(edges()) == BINS + 1
    values = np.float32([2.0**-30, 1.0, 1.0624, 1.0625, 2.0**21])
    found = bin_of(values)
    assert found[0] == 0
    assert found[-1] == BINS - 1
    assert found[1] == found[2] == found[3] - 1
    assert edges()[found[1]] == 1.0
