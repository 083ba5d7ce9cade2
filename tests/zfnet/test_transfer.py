"""Draws, scaling and classifiers: against scikit-learn's own pipeline, and where the answer is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import LinearSVC

from zfnet import transfer
from zfnet.transfer import TooFewImages, class_accuracies, draw, fitted, scaled

CLASSIFIERS = ("softmax", "svm")


def blobs(classes, each, values, apart, seed=0):
    """Features of classes whose centres lie `apart`, and their labels, shuffled."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, apart, (classes, values))
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    return (centres[labels] + rng.normal(size=(len(labels), values))).astype(np.float32), labels


def accuracy(features, labels, classifier, per_class=10, c=10.0):
    found = draw(labels, per_class, 50, seed=0, fold=0)
    train, test = scaled(features[found.train(per_class)], features[found.test])
    predict, converged = fitted(classifier, c, train, labels[found.train(per_class)])
    assert converged
    return class_accuracies(predict.predict(test), labels[found.test]).mean()


@pytest.mark.parametrize("values", [8, 200])
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_separable_features_are_all_right_and_shuffled_labels_are_chance(classifier, values):
    features, labels = blobs(5, 60, values, apart=20)
    assert accuracy(features, labels, classifier) == 1.0
    shuffled = np.random.default_rng(1).permutation(labels)
    assert 0.1 < accuracy(features, shuffled, classifier) < 0.3  # 250 images: 0.2 +- 0.025


@pytest.mark.parametrize("values", [12, 90])  # fewer and more than the training images
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_classifiers_are_scikit_learns_on_scaled_features(classifier, values):
    features, labels = blobs(4, 30, values, apart=0.5)
    features[:, 3] = 7  # a value that never changes
    found = draw(labels, 10, 50, seed=0, fold=0)
    train, test = features[found.train(10)], features[found.test]
    direct = LogisticRegression(C=3.0, tol=1e-8, max_iter=5000)
    if classifier == "svm":
        direct = LinearSVC(C=3.0, tol=1e-8, max_iter=100_000, random_state=0)
    root = FunctionTransformer(lambda x: x / np.sqrt(values))
    expected = make_pipeline(StandardScaler(), root, direct).fit(train.astype(float), labels[found.train(10)])
    ours, converged = fitted(classifier, 3.0, scaled(train, test)[0], labels[found.train(10)])
    assert converged
    wanted = expected.decision_function(test.astype(float))
    scores = ours.decision_function(scaled(train, test)[1])
    assert np.abs(scores - wanted).max() / np.abs(wanted).max() < 0.01
    assert (ours.predict(scaled(train, test)[1]) == expected.predict(test.astype(float))).mean() > 0.98


def test_draws_are_disjoint_nested_and_decided_by_seed_and_fold():
    labels = np.repeat([2, 5, 9], [8, 30, 70])
    one = draw(labels, 6, 50, seed=3, fold=1)
    assert np.bincount(labels[one.train(6)]).tolist() == [0, 0, 6, 0, 0, 6, 0, 0, 0, 6]
    assert np.bincount(labels[one.test])[[2, 5, 9]].tolist() == [2, 24, 50]
    assert not set(one.train(6)) & set(one.test)
    assert len(set(one.test)) == len(one.test)
    assert set(one.train(2)) < set(one.train(6))
    again, other = draw(labels, 6, 50, seed=3, fold=1), draw(labels, 6, 50, seed=3, fold=2)
    assert (again.order == one.order).all()
    assert (again.test == one.test).all()
    assert (other.order != one.order).any()
    with pytest.raises(TooFewImages, match="class 2 has 8 images: train on 7 at most"):
        draw(labels, 8, 50, seed=0, fold=0)


def test_the_accuracy_of_a_class_counts_once():
    labels = np.array([0, 0, 0, 0, 4, 4, 7])
    predicted = np.array([0, 0, 0, 4, 4, 7, 0])
    found = class_accuracies(predicted, labels)
    assert found.tolist() == [0.75, 0.5, 0.0]
    assert found.mean() == balanced_accuracy_score(labels, predicted)


def test_a_solver_that_stops_early_says_so(monkeypatch):
    monkeypatch.setattr(transfer, "ITERATIONS", 1)
    features, labels = blobs(3, 20, 30, apart=1)
    assert not fitted("softmax", 10.0, features.astype(float), labels)[1]
