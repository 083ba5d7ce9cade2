"""How well fixed features transfer: a new linear classifier on N images a class (ZFNet sections 5.2, 5.3).

The paper keeps layers 1 to 7 and trains a softmax, or a linear SVM, on 15 or 30 images a class of another data set,
tests on up to 50 others of each class, and reports the mean of the classes' accuracies over 5 folds. It does not say
how it scales features or penalises weights. Here each value is brought to mean 0 and variance 1 over the training
images and divided by the root of the number of values: an image then has a length of about 1 whatever the layer, so
that one penalty serves small layers and large ones.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

Classifier = Literal["softmax", "svm"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ITERATIONS = 2000
"""At most, of either solver."""


class TooFewImages(ValueError):
    """A class has too few images to train on so many and test on another."""


@dataclass(frozen=True, eq=False)
class Draw:
    """The images of one fold, as places in the data set."""

    order: Ints
    """[classes, most] images to train on: the first N of each row, for any N."""
    test: Ints
    """Images to test on, none of which is in `order`."""

    def train(self, per_class: int) -> Ints:
        """N images of each class. A larger N adds images and takes none away."""
        return self.order[:, :per_class].ravel()


def draw(labels: Ints, most: int, test_most: int, seed: int, fold: int) -> Draw:
    """Images of each class in an order that (seed, fold) decide: `most` to train on, then up to `test_most` to test on.

    Args:
        labels: [N] classes. Their order counts: give images in one that does not depend on how they are stored.

    Raises: TooFewImages naming the class and how many it has.
    """
    generator = np.random.default_rng([seed, fold])
    order, test = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) <= most:
            raise TooFewImages(f"class {label} has {len(members)} images: train on {len(members) - 1} at most")
        order.append(members[:most])
        test.append(members[most : most + test_most])
    return Draw(np.stack(order), np.concatenate(test))


def scaled(train: npt.NDArray[Any], test: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """Features [N, values] with mean 0 and variance 1/values over the training images; constant values become 0.

    Where there are more values than training images both are turned into the training images' span: a linear classifier
    whose penalty is the length of its weights never leaves it, so it is the same one, found faster.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, spread = train.mean(0), train.std(0)
    varies = train.max(0) > train.min(0)
    divisor = np.where(varies, spread, np.inf) * np.sqrt(train.shape[1])
    train, test = (train - mean) / divisor, (test - mean) / divisor
    if train.shape[1] <= len(train):
        return train, test
    span, coordinates = np.linalg.qr(train.T)
    return np.ascontiguousarray(coordinates.T), test @ span


def fitted(classifier: Classifier, c: float, train: Floats, labels: Ints) -> tuple[Any, bool]:
    """scikit-learn's multinomial logistic regression, or a linear SVM for each class against the rest.

    Args:
        c: weight of the images' losses against half the squared length of the weights.

    Returns: the classifier, and whether its solver converged.
    """
    if classifier == "softmax":
        found = LogisticRegression(C=c, max_iter=ITERATIONS)
    else:
        found = LinearSVC(C=c, max_iter=ITERATIONS, dual=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        found.fit(train, labels)
    return found, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def class_accuracies(predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Floats:
    """[classes], ascending: the share of each class's images that was predicted right."""
    _, place = np.unique(labels, return_inverse=True)
    found: Floats = np.bincount(place, weights=predicted == labels) / np.bincount(place)
    return found


def average_precision(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """PASCAL's since 2010: the area under precision over recall, precision being the best at that recall or above.

    Images with one score count together, so that their order does not matter. NaN where nothing is positive.
    """
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)  # of each score
    found = np.cumsum(positive[order])[last]
    precision = np.maximum.accumulate((found / (last + 1))[::-1])[::-1]
    return float((np.diff(found, prepend=0) * precision).sum() / positive.sum())
