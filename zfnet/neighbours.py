"""Nearest neighbours by Euclidean distance, exact and in bounded memory (AlexNet section 6, figure 4 right).

AlexNet shows, for test images, the training images whose feature vectors in the last hidden layer lie nearest. One
matrix product gives all distances but loses digits where vectors are close: an image and its copy would not be at
distance 0. So the product only says which pairs can be among the nearest, by a bound on its rounding, and these are
subtracted number by number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

NONE = np.iinfo(np.int64).max
"""Number of a neighbour that there is not."""

_TOGETHER = 2**22
"""Float64 numbers of the pairs that are subtracted at once."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def nearest(
    queries: npt.NDArray[Any], numbers: Ints, gallery: Iterable[tuple[npt.NDArray[Any], Ints]], k: int
) -> tuple[Floats, Ints]:
    """The k nearest of the gallery for each query, nearest first; of equal distances the smaller number first.

    Args:
        queries: [Q, D].
        numbers: [Q] of the queries; nothing is its own neighbour.
        gallery: vectors [G, D] with their numbers [G], so many at a time that memory holds [Q, G]; each number once.
        k: neighbours wanted.

    Returns: Euclidean distances [Q, k] and numbers [Q, k]; infinity and NONE where the gallery holds fewer.
    """
    asked = np.asarray(queries, dtype=np.float64)
    distance, number = np.full((len(asked), k), np.inf), np.full((len(asked), k), NONE)
    for vectors, names in gallery:
        block = np.asarray(vectors, dtype=np.float64)
        query, place = _possible(asked, block, numbers[:, None] == names, distance)
        found = query, _squared(asked, block, query, place), names[place]
        distance, number = _best(distance, number, found)
    return np.sqrt(distance), number


def _possible(queries: Floats, block: Floats, own: npt.NDArray[np.bool_], worst: Floats) -> tuple[Ints, Ints]:
    """Query and place of all pairs that may be among the k nearest.

    Args:
        queries: [Q, D].
        block: [G, D].
        own: [Q, G] the pairs of a vector with itself.
        worst: [Q, k] squared distances so far.
    """
    one, other = (np.einsum("ij,ij->i", x, x) for x in (queries, block))
    size = one[:, None] + other
    squared = size - 2 * queries @ block.T
    rounding = 4 * (queries.shape[1] + 4) * np.finfo(np.float64).eps * size
    at_most = np.where(own, np.inf, squared + rounding)
    k = worst.shape[1]
    bound = np.partition(np.concatenate([worst, at_most], axis=1), k - 1, axis=1)[:, k - 1 : k]
    query, place = np.nonzero((squared - rounding <= bound) & ~own)
    return query, place


def _squared(queries: Floats, block: Floats, query: Ints, place: Ints) -> Floats:
    """Squared distances of pairs, number by number."""
    together = max(1, _TOGETHER // max(1, queries.shape[1]))
    pieces = [
        ((queries[query[i : i + together]] - block[place[i : i + together]]) ** 2).sum(1)
        for i in range(0, len(query), together)
    ]
    return np.concatenate(pieces) if pieces else np.zeros(0)


def _best(distance: Floats, number: Ints, found: tuple[Ints, Floats, Ints]) -> tuple[Floats, Ints]:
    """The k nearest of those so far, [Q, k] squared distances and numbers, and of new pairs."""
    queries, k = distance.shape
    query = np.concatenate([np.repeat(np.arange(queries), k), found[0]])
    squared = np.concatenate([distance.ravel(), found[1]])
    names = np.concatenate([number.ravel(), found[2]])
    order = np.lexsort((names, squared, query))
    count = np.bincount(query, minlength=queries)
    first = order[(np.cumsum(count) - count)[:, None] + np.arange(k)]
    return squared[first], names[first]
