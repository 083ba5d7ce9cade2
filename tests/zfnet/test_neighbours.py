"""Nearest neighbours against their definition and scikit-learn's."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from zfnet import neighbours
from zfnet.neighbours import NONE, nearest


def by_definition(queries, numbers, gallery, names, k):
    """Every distance, sorted in Python."""
    found = []
    for query, own in zip(queries.astype(np.float64), numbers, strict=True):
        pairs = [
            (np.sqrt(((query - vector) ** 2).sum()), name)
            for vector, name in zip(gallery.astype(np.float64), names, strict=True)
            if name != own
        ]
        found.append(sorted(pairs)[:k])
    return found


def pairs(distance, number):
    return [[(d, n) for d, n in zip(*row, strict=True) if n != NONE] for row in zip(distance, number, strict=True)]


@pytest.mark.parametrize("together", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_neighbours_are_their_definition_bit_for_bit(k, together, monkeypatch):
    monkeypatch.setattr(neighbours, "_TOGETHER", 50)
    rng = np.random.default_rng(0)
    gallery = rng.normal(1000, 1, (40, 6)).astype(np.float32)  # far from 0: a product alone loses digits
    gallery[30:] = gallery[:10]  # copies: ties
    gallery[5] = gallery[6]
    names = rng.permutation(40)
    blocks = [(gallery[i : i + together], names[i : i + together]) for i in range(0, 40, together)]
    found = nearest(gallery, names, blocks, k)
    assert pairs(*found) == by_definition(gallery, names, gallery, names, k)
    assert found[0].shape == (40, k)


def test_neighbours_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    gallery, queries = rng.normal(size=(500, 33)), rng.normal(size=(20, 33))
    distance, number = nearest(queries, np.full(20, -1), [(gallery, np.arange(500))], 6)
    outside, places = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(gallery).kneighbors(queries)
    assert (number == places).all()
    assert np.abs(distance - outside).max() / outside.max() < 1e-12
