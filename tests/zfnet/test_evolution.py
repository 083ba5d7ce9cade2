"""Cosines of filters and projections: against scipy, and known answers."""

import math

import pytest
import torch
from scipy.spatial.distance import cosine

from zfnet.evolution import cosines, in_field


def test_cosines_against_scipy():
    one, other = torch.randn(2, 7, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for found, a, b in zip(cosines(one, other).tolist(), one, other, strict=True):
        assert found == pytest.approx(1 - cosine(a.flatten().double(), b.flatten().double()), abs=1e-12)


def test_cosines_of_known_pairs():
    x = torch.randn(3, 6)
    assert cosines(x, 0.01 * x).tolist() == pytest.approx([1.0] * 3)  # length does not count
    assert cosines(x, -x).tolist() == pytest.approx([-1.0] * 3)
    assert cosines(torch.tensor([[1.0, 0]]), torch.tensor([[0, 2.0]])).tolist() == [0.0]
    assert math.isnan(cosines(torch.zeros(1, 2), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="expected one and the same"):
        cosines(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (-2, 5), (6, -1), (7, 8), (-2, -1), (1, 1)])
def test_a_projection_finds_its_place_in_its_field(top, left):
    """A field of 4 x 3 in an image of 10 x 10, cut to the image and laid back."""
    whole = torch.randn(20, 20, 3)  # the image with 5 pixels around it
    field = whole[5 + top : 9 + top, 5 + left : 8 + left].clone()
    inside = torch.zeros(20, 20, dtype=torch.bool)
    inside[5:15, 5:15] = True
    mask = inside[5 + top : 9 + top, 5 + left : 8 + left]
    cut = whole[5 + max(0, top) : 5 + min(10, top + 4), 5 + max(0, left) : 5 + min(10, left + 3)]
    assert torch.equal(in_field(cut, top, left, (4, 3)), field * mask[:, :, None])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"3 x 3 pixels at \(2, 0\) do not fit into a field of 4 x 3"):
        in_field(torch.zeros(3, 3, 3), -2, 0, (4, 3))
