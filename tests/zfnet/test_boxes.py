"""Which pixels are hidden: against counts written out pixel by pixel, and rectangles known beforehand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfnet.boxes import Box, elsewhere, in_crop, mask, shrunk, squares_on, support


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("edges", "box"),
    [
        ((2.5, 3.0, 6.1, 8.0), Box(2, 3, 5, 5)),
        ((-4.0, 5.0, 2.0, 40.0), Box(0, 5, 2, 15)),
        ((-9.0, 0.0, 0.0, 5.0), None),
        ((25.0, 0.0, 30.0, 5.0), None),
    ],
)
def test_a_box_is_cut_to_the_crop(edges, box):
    assert in_crop(edges, 20) == box


@given(st.integers(2, 12), st.data())
def test_as_many_pixels_outside_the_box(size, data):
    height, width = (data.draw(st.integers(1, size)) for _ in range(2))
    box = Box(data.draw(st.integers(0, size - height)), data.draw(st.integers(0, size - width)), height, width)
    if box.area == size**2:
        assert elsewhere(box, 1, size, 3, rng()) == []
        return
    part = shrunk(box, size)
    assert box.top <= part.top
    assert part.top + part.height <= box.top + box.height
    assert box.left <= part.left
    assert part.left + part.width <= box.left + box.width
    assert part == box or box.area > size**2 / 2
    assert part.area <= size**2 - box.area
    for hidden in elsewhere(box, part.area, size, 3, rng()):
        assert hidden.sum() == part.area
        for row, col in np.argwhere(hidden):
            assert not (box.top <= row < box.top + height and box.left <= col < box.left + width)


def test_elsewhere_is_a_rectangle_of_the_boxes_shape_where_nothing_is_in_the_way():
    box = Box(0, 0, 3, 5)
    drawn = elsewhere(box, box.area, 60, 40, rng())
    free = [hidden for hidden in drawn if not hidden[:6].any() and not hidden[-3:].any() and not hidden[:, -5:].any()]
    rectangles = 0
    for hidden in free:
        rows, cols = np.flatnonzero(hidden.any(1)), np.flatnonzero(hidden.any(0))
        rectangles += len(rows) == 3 and len(cols) == 5
    assert rectangles > 0.8 * len(free) > 10
    assert len({hidden.tobytes() for hidden in drawn}) > 30


def test_elsewhere_is_the_same_for_the_same_seed():
    one, other = (np.stack(elsewhere(Box(4, 4, 5, 5), 25, 20, 4, rng())) for _ in range(2))
    assert np.array_equal(one, other)


def test_squares_have_their_middle_on_the_places():
    places = np.zeros((20, 20), bool)
    places[3, 4] = places[0, 0] = places[10, 11] = True  # a square of 5 around (0, 0) would leave the image
    found = squares_on(places, 5, 9, rng())
    assert sorted(hidden.tobytes() for hidden in found) == sorted(
        mask(Box(top, left, 5, 5), 20).tobytes() for top, left in ((1, 2), (8, 9))
    )
    assert squares_on(np.zeros((20, 20), bool), 5, 9, rng()) == []


def test_support_is_the_fewest_pixels_that_hold_the_share():
    values = np.random.default_rng(1).normal(size=(6, 7, 3)).astype(np.float32)
    energy = np.square(values.astype(np.float64)).sum(2)
    for share in (0.1, 0.5, 0.9):
        found = support(values, share)
        assert energy[found].sum() >= share * energy.sum()
        assert energy[found].sum() - energy[found].min() < share * energy.sum()
        assert energy[found].min() > energy[~found].max()
    assert not support(np.zeros((4, 4, 3), np.float32), 0.5).any()
