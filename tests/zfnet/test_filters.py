"""Filters' sizes, likeness, frequencies and aliasing, against sums written out and answers known beforehand."""

import cmath
import math

import pytest
import torch
from torch import nn

from tests.zfnet.networks import zfnet_like
from zfnet import filters
from zfnet.tracing import trace


def naive_power(filter_, row, col):
    """The Fourier sum of a filter [channels, rows, cols] at one frequency, in cycles a pixel."""
    power = 0.0
    for channel in filter_.tolist():
        terms = [
            value * cmath.exp(-2j * math.pi * (row * i + col * j))
            for i, line in enumerate(channel)
            for j, value in enumerate(line)
        ]
        power += abs(sum(terms)) ** 2
    return power


def naive_shares(filter_, low, high, stride):
    """Very low, very high and aliased, over all frequencies of the grid."""
    n = filters.GRID
    along = [(k if k < n / 2 else k - n) / n for k in range(n)]
    sums = dict.fromkeys(("all", "low", "high", "aliased"), 0.0)
    for row in along:
        for col in along:
            power = naive_power(filter_, row, col)
            height = math.hypot(row, col) / 0.5
            sums["all"] += power
            sums["low"] += power * (height <= low)
            sums["high"] += power * (height >= high)
            sums["aliased"] += power * (abs(row) > 0.5 / stride[0] or abs(col) > 0.5 / stride[1])
    return [sums[name] / sums["all"] for name in ("low", "high", "aliased")]


def test_shares_against_the_fourier_sum():
    torch.manual_seed(0)
    weights = torch.randn(2, 2, 3, 4)
    low, high = filters.band_shares(weights, 0.3, 0.7)
    aliased = filters.aliased_shares(weights, (3, 2))
    for number in range(2):
        expected = naive_shares(weights[number], 0.3, 0.7, (3, 2))
        assert [float(x[number]) for x in (low, high, aliased)] == pytest.approx(expected, rel=1e-10)


def test_a_spectrum_keeps_the_energy():
    weights = torch.randn(3, 3, 20, 7)
    power, rows, _ = filters.spectrum(weights)
    assert len(rows) == 80  # four times the longer side
    assert torch.allclose(power.mean((1, 2)), weights.double().square().sum((1, 2, 3)), rtol=1e-12)


def wave(cycles_a_pixel, side=33):
    """A filter that answers to one frequency along columns."""
    return torch.cos(2 * math.pi * cycles_a_pixel * torch.arange(side)).expand(1, 1, side, side)


@pytest.mark.parametrize(
    ("cycles", "low", "high", "aliased"),
    [(0.0, 1, 0, 0), (0.25, 0, 0, 1), (0.5, 0, 1, 1), (0.2, 0, 0, 1), (0.05, 1, 0, 0)],
)
def test_waves_lie_where_they_should(cycles, low, high, aliased):
    shares = [*filters.band_shares(wave(cycles), 0.25, 0.75), filters.aliased_shares(wave(cycles), (4, 4))]
    assert [round(float(share)) for share in shares] == [low, high, aliased]


def test_a_single_weight_has_all_frequencies_alike():
    one = torch.ones(1, 3, 1, 1)
    low, high = filters.band_shares(one, 0.25, 0.75)
    assert float(low) == pytest.approx(math.pi / 4 * 0.25**2, rel=0.03)
    assert float(high) == pytest.approx(1 - math.pi / 4 * 0.75**2, rel=0.02)
    assert float(filters.aliased_shares(one, (1, 1))) == 0
    assert float(filters.aliased_shares(one, (4, 4))) == pytest.approx(1 - 1 / 16, abs=0.01)


def test_filters_of_zeros_have_no_shares():
    assert filters.band_shares(torch.zeros(2, 3, 5, 5), 0.25, 0.75)[0].isnan().all()


@pytest.mark.parametrize(("low", "high"), [(0, 0.5), (0.5, 0.5), (0.5, 1.1)])
def test_bands_that_are_none(low, high):
    with pytest.raises(ValueError, match="expected 0 < low < high <= 1"):
        filters.band_shares(wave(0.1), low, high)


def test_cosines_against_each_pair():
    torch.manual_seed(0)
    weights = torch.randn(6, 2, 3, 3)
    weights[2] = 3 * weights[0]
    weights[4] = -weights[3]
    weights[5] = 0
    for groups in (2, 1):
        found = filters.cosines(weights, groups)
        for i in range(6):
            for j in range(6):
                if i == j or 5 in (i, j) or (groups == 2 and (i < 3) != (j < 3)):
                    assert found[i, j].isnan()
                else:
                    one, other = weights[i].flatten().double(), weights[j].flatten().double()
                    assert found[i, j] == pytest.approx(float(one @ other / (one.norm() * other.norm())), abs=1e-12)
    assert found[3, 4] == pytest.approx(-1, abs=1e-12)


def test_rms():
    assert filters.rms(torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])).tolist() == [math.sqrt(12.5), 0]


@pytest.mark.parametrize("groups", [1, 2])
def test_aliasing_of_the_second_layer_against_its_sum(groups):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 5, stride=2), nn.Conv2d(4, 6, 3, groups=groups)
    expected = []
    with torch.no_grad():
        first.weight[1] = 0
        folded = filters.aliased_shares(first.weight, (2, 2))
        for m in range(6):
            fed = aliased = 0.0
            for c in range(4 // groups):
                channel = c + (m // (6 // groups)) * (4 // groups)
                power = float(second.weight[m, c].square().sum() * first.weight[channel].square().sum())
                fed += power
                aliased += power * (float(folded[channel]) if power else 0.0)
            expected.append(aliased / fed)
    assert filters.aliased_shares_above(first, second).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_second_layer_above_a_stride_of_one_is_free_of_aliasing():
    assert filters.aliased_shares_above(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 6, 3)).tolist() == [0] * 6
    with pytest.raises(ValueError, match="reads 5 maps and the first has 4"):
        filters.aliased_shares_above(nn.Conv2d(3, 4, 5), nn.Conv2d(5, 6, 3))


def test_the_first_layer_is_found_beneath_the_second_alone():
    graph = trace(zfnet_like(classes=3), (3, 224, 224))
    assert [layer for layer in graph.layers if filters.is_first(graph, layer)] == ["conv1"]
    beneath = {layer: filters.first_layer_beneath(graph, layer) for layer in graph.layers}
    assert beneath == {layer: "conv1" if layer == "conv2" else None for layer in graph.layers}
