"""Views, averages, ranks and errors against their definitions, torchvision, scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import recall_score, top_k_accuracy_score
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from zfnet import evaluation
from zfnet.activations import NotFinite
from zfnet.evaluation import Errors, Predictions
from zfnet.images import Preprocessing
from zfnet.tracing import trace


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 300), (256, 256), (97, 500)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (256, 227), (72, 64), (72, 72)])
def test_the_views_are_torchvisions(height, width, resize, crop):
    from torchvision.transforms import v2

    image = picture(height, width)
    square = v2.CenterCrop(resize)(v2.Resize(resize)(image))
    pixels, top, left = evaluation.crops(image, resize, crop, "ten")
    assert len(pixels) == evaluation.VIEWS["ten"]
    five = v2.FiveCrop(crop)(square)
    for view, reference in zip(pixels, [*five, *map(v2.functional.hflip, five)], strict=True):
        assert np.array_equal(view, np.asarray(reference))
    if (resize - crop) % 2 == 0:  # else torchvision's last centre, cut from the reflected image, is a column off
        theirs = {np.asarray(view).tobytes() for view in v2.TenCrop(crop)(square)}
        assert {view.tobytes() for view in pixels} == theirs
    for view, t, le in zip(pixels[:5], top, left, strict=False):
        assert np.array_equal(view, np.asarray(square)[t : t + crop, le : le + crop])
    pixels, top, left = evaluation.crops(image, resize, crop, "centre")
    assert np.array_equal(pixels[0], np.asarray(v2.CenterCrop(crop)(v2.Resize(resize)(image))))
    assert (len(pixels), len(top), len(left)) == (evaluation.VIEWS["centre"], 1, 1)


def small_network(classes: int = 4, *end: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, classes), *end).eval()


def test_each_view_is_shown_with_the_mean_of_its_place():
    network = small_network()
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(3, 10, 10, generator=generator) * 255
    preprocessing = Preprocessing(resize_px=10, crop_px=8, channels="BGR", mean=mean)
    views = torch.randint(0, 256, (2, 3, 8, 8, 3), dtype=torch.uint8, generator=generator)
    top, left = [0, 2, 1], [1, 0, 2]
    found = evaluation.log_softmax(trace(network, (3, 8, 8)), preprocessing, views, top, left)
    assert found.dtype == torch.float64
    for image in range(2):
        for view in range(3):
            x = views[image, view].permute(2, 0, 1).flip(0).float()
            x = x - mean[:, top[view] : top[view] + 8, left[view] : left[view] + 8]
            expected = network(x[None])[0].double().log_softmax(0)
            assert (found[image, view] - expected).abs().max() < 1e-4  # the scores are float32, of the size of 100


def test_a_network_that_ends_in_a_softmax_is_not_given_another():
    views = torch.randint(0, 256, (3, 1, 8, 8, 3), dtype=torch.uint8)
    preprocessing = Preprocessing(resize_px=8, crop_px=8, maximum=1.0)
    plain, ended = (
        evaluation.log_softmax(trace(network, (3, 8, 8)), preprocessing, views, [0], [0])
        for network in (small_network(4), small_network(4, nn.Softmax(1)))
    )
    torch.testing.assert_close(plain, ended, rtol=1e-5, atol=1e-6)


def test_scores_that_are_not_finite_name_image_and_class():
    network = small_network()
    with torch.no_grad():
        network[-1].bias[2] = float("nan")
    views = torch.zeros(3, 1, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(NotFinite, match="feature map 2 of image 0"):
        evaluation.log_softmax(trace(network, (3, 8, 8)), Preprocessing(resize_px=8, crop_px=8), views, [0], [0])


def test_the_average_is_that_of_the_probabilities():
    scores = [torch.randn(6, views, 9, dtype=torch.float64) * 5 for views in (1, 10, 3)]
    expected = torch.stack([s.softmax(2).mean(1) for s in scores]).mean(0)
    found = evaluation.average([s.log_softmax(2) for s in scores])
    assert (found.exp() - expected).abs().max() < 1e-15
    assert torch.equal(evaluation.average([scores[0].log_softmax(2)]), scores[0].log_softmax(2)[:, 0])


def test_nothing_underflows():
    """Scores so far apart that their probabilities are 0 in float64 keep their order, and their loss."""
    scores = torch.tensor([[[5000.0, 1000.0, 2000.0, 3000.0, 1.0, 4000.0, 0.0]]], dtype=torch.float64)
    found = Predictions.of(evaluation.average([scores.log_softmax(2)]), torch.tensor([4]))
    assert found.classes.tolist() == [[0, 5, 3, 2, 1]]
    assert found.label_rank.tolist() == [6]
    assert found.loss.tolist() == [4999.0]
    assert found.probabilities.tolist() == [[1, 0, 0, 0, 0]]


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 100])
def test_predictions_are_their_definition(classes):
    rng = np.random.default_rng(classes)
    scores = rng.integers(-3, 4, size=(200, classes)).astype(np.float64)  # many ties
    labels = rng.integers(0, classes, size=200)
    log_p = torch.from_numpy(scores).log_softmax(1)
    found = Predictions.of(log_p, torch.from_numpy(labels))
    for i in range(200):
        order = sorted(range(classes), key=lambda c: (-log_p[i, c].item(), c))
        assert found.classes[i].tolist() == order[:5]
        assert found.label_rank[i] == order.index(labels[i]) + 1
        assert found.probabilities[i].tolist() == log_p[i].exp()[order[:5]].tolist()
    expected = F.cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels), reduction="none")
    assert (found.loss - expected).abs().max() < 1e-14


@pytest.mark.parametrize("classes", [2, 5, 6, 30])
def test_errors_are_those_of_the_libraries(classes):
    rng = np.random.default_rng(classes)
    scores = rng.normal(size=(500, classes))
    labels = rng.integers(0, classes, size=500)
    labels[labels == 1] = 0  # a class without images has no share in the mean
    found = Predictions.of(torch.from_numpy(scores).log_softmax(1), torch.from_numpy(labels))
    errors = Errors.of(labels, found.label_rank.numpy(), classes)
    seen = np.unique(labels)
    assert errors.images.tolist() == [int((labels == c).sum()) for c in range(classes)]
    recall = recall_score(labels, scores.argmax(1), labels=seen, average="macro")
    assert errors.mean_class_accuracy == pytest.approx(recall, abs=1e-15)
    for k, wrong in ((1, errors.top1), (5, errors.top5)):
        right = 500 - wrong.sum()
        k = min(k, classes)
        theirs = multiclass_accuracy(
            torch.from_numpy(scores), torch.from_numpy(labels), classes, average="micro", top_k=k
        )
        assert right / 500 == pytest.approx(float(theirs), abs=1e-6)
        if classes > 2 and k < classes:
            assert right == top_k_accuracy_score(labels, scores, k=k, labels=range(classes), normalize=False)
