"""Targets, views and predictions of windows, each against its definition written out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zfnet import images, models
from zfnet.dense import Sliding, slide
from zfnet.images import Preprocessing
from zfnet.localization import (
    FILLED,
    LOOKED_AT,
    Looker,
    Seen,
    best_guesses,
    into_frame,
    lower_view,
    merged,
    nearest_object,
    nearest_window,
    out_of_frame,
    top_classes,
    training_view,
    view,
    window_edges,
    window_labels,
)
from zfnet.models.heads import initialise_heads

BOX = st.tuples(*(st.integers(-20, 90),) * 2, *(st.integers(4, 70),) * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
SMALL = "overfeat_fast_small+boxes"


def edges(boxes):
    return np.array(boxes, float).reshape(-1, 4)


def network(name=SMALL, classes=5, seed=0):
    torch.manual_seed(seed)
    built = models.build(name, classes)
    for module in built.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    initialise_heads(built, seed)
    for head in (built.context, built.regressor and built.regressor.edges):
        if head is not None:
            torch.nn.init.normal_(head.weight, std=0.05)
    return built.eval()


def preprocessing(size=76, crop=69):
    return Preprocessing(
        resize_px=size, crop_px=crop, mean=torch.full((3, 1, 1), 120.0), std=torch.full((3, 1, 1), 64.0)
    )


def picture(height=120, width=170, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


# ------------------------------------------------------------------------------------------------------------- targets


@given(st.lists(BOX, min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.3]))
def test_a_window_is_of_the_box_it_sees_most_of_if_it_sees_enough(boxes, in_view, filled):
    windows = edges([[0, 0, 64, 64], [16, 0, 80, 64], [40, 40, 104, 104]])
    found = nearest_object(windows, edges(boxes), in_view, filled)
    for window, chosen in zip(windows, found, strict=True):
        areas = []
        for top, left, bottom, right in boxes:
            rows = max(0, min(bottom, window[2]) - max(top, window[0]))
            seen = rows * max(0, min(right, window[3]) - max(left, window[1]))
            enough = seen >= in_view * (bottom - top) * (right - left) and seen >= filled * 64**2
            areas.append(seen if enough else 0)
        assert chosen == (int(np.argmax(areas)) if max(areas) > 0 else -1)


@given(st.lists(BOX, max_size=4))
def test_a_window_shows_a_class_the_background_or_neither(boxes):
    windows = edges([[0, 0, 64, 64], [16, 0, 80, 64], [40, 40, 104, 104]])
    labels = np.arange(len(boxes)) % 3
    found = window_labels(windows, edges(boxes), labels, 9)
    for window, label in zip(windows, found, strict=True):
        best, near = (0.0, 9), False
        for number, (top, left, bottom, right) in enumerate(boxes):
            rows = max(0, min(bottom, window[2]) - max(top, window[0]))
            seen = rows * max(0, min(right, window[3]) - max(left, window[1]))
            shown, filled = seen / ((bottom - top) * (right - left)), seen / 64**2
            if shown >= LOOKED_AT and filled >= FILLED and filled > best[0]:
                best = filled, number % 3
            near |= shown >= LOOKED_AT / 2 and filled >= FILLED / 2
        assert label == (best[1] if best[0] else -1 if near else 9)


@given(BOX, BOX)
def test_frames_are_those_of_the_window_and_back(box, window):
    relative = into_frame(np.array(box, float), np.array(window, float))
    height, width = window[2] - window[0], window[3] - window[1]
    moved = [
        (edge - start) / length for edge, start, length in zip(box, window[:2] * 2, (height, width) * 2, strict=True)
    ]
    assert relative.tolist() == pytest.approx(moved)
    assert out_of_frame(relative, np.array(window, float)).tolist() == pytest.approx(box)
    assert into_frame(np.array(window, float), np.array(window, float)).tolist() == [0, 0, 1, 1]


# --------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("stretch", [1.0, 1.7])
@pytest.mark.parametrize("seed", range(12))
def test_a_training_view_moves_the_boxes_with_the_pixels(seed, stretch):
    """A white object on black is found where its box says, mirrored or not, whatever the scale and the stretch."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((90, 140, 3), np.uint8)
    pixels[30:60, 40:80] = 255
    seen = training_view(Image.fromarray(pixels), edges([[30, 40, 60, 80]]), (77, 93, 141), 77, 1.0, stretch, rng)
    rows, cols = np.nonzero(seen.pixels[:, :, 0] > 127)
    top, left, bottom, right = np.clip(seen.boxes[0], 0, 77)
    assert seen.pixels.shape == (77, 77, 3)
    assert abs(rows.min() - top) <= 1
    assert abs(cols.min() - left) <= 1
    assert abs(rows.max() + 1 - bottom) <= 1
    assert abs(cols.max() + 1 - right) <= 1
    middle = (seen.boxes[0, :2] + seen.boxes[0, 2:]) / 2
    assert (middle >= 0).all()
    assert (middle <= 77).all()


def test_views_are_of_every_scale_mirrored_half_the_time_and_repeatable():
    def draw(seed, about=1.0):
        rng = np.random.default_rng(seed)
        return training_view(picture(), edges([[0, 0, 30, 40]]), (77, 173), 77, about, 1.0, rng)

    seen = [draw(seed) for seed in range(60)]
    assert {one.smallest_px for one in seen} == {77, 173}
    assert 18 < sum(one.mirrored for one in seen) < 42
    assert np.array_equal(draw(3).pixels, seen[3].pixels)
    assert all((one.place >= 0).all() and (one.place <= 1).all() for one in seen)
    assert all((one.boxes[:, :2] < 77).all() and (one.boxes[:, 2:] > 0).all() for one in seen)
    assert any((one.boxes[:, 2:] < 0).any() for one in (draw(seed, 0.0) for seed in range(20)))  # anywhere


def test_stretched_views_show_objects_of_other_sizes_and_proportions():
    """Height and width are each drawn between the scale's and so many times it, evenly on a logarithmic scale."""

    def size(seed, stretch):
        rng = np.random.default_rng(seed)
        box = training_view(picture(100, 100), edges([[40, 40, 60, 60]]), (77,), 77, 1.0, stretch, rng).boxes[0]
        return (box[2:] - box[:2]) / (0.2 * 77)

    drawn = np.log([size(seed, 2.0) for seed in range(200)]) / np.log(2)
    assert -0.02 < drawn.min() < 0.05
    assert 0.95 < drawn.max() < 1.02
    assert np.abs(drawn.mean(0) - 0.5).max() < 0.07
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2
    assert size(0, 1.0).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("stretch", [1.0, 1.3])
@pytest.mark.parametrize("seed", range(6))
def test_the_lower_view_shows_the_same_place_smaller(seed, stretch):
    """The view, shrunk, is what the lower view shows where it says that the view lies, at a border too."""
    rng = np.random.default_rng(seed)
    image = picture(160, 200)
    seen = training_view(image, edges([[0, 0, 60, 80]]), (154,), 77, 1.0, stretch, rng)
    lower, there = lower_view(image, seen, 77)
    assert lower.shape == (77, 77, 3)
    top, left, bottom, right = (round(edge) for edge in there)
    assert min(top, left) >= 0
    assert max(bottom, right) <= 77
    shrunk = Image.fromarray(seen.pixels).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(shrunk, float) - lower[top:bottom, left:right]).mean() < 8


def test_a_view_holds_the_whole_image_but_for_less_than_a_step():
    resized = images.resize(picture(120, 170), 93)
    pixels, crop = view(resized, (170, 120), 16)
    assert pixels.shape == (93, 93 + 32, 3)
    assert crop.to_original(0, 0, 93, 125)[0] == 0
    across = crop.to_original(0, 0, 93, 125)
    assert across[1] == pytest.approx((170 - across[3]) / 2, abs=1)
    upright, _ = view(images.resize(picture(170, 120), 93), (120, 170), 16)
    assert upright.shape == (125, 93, 3)


# --------------------------------------------------------------------------------------------------------- predictions


def test_scores_and_boxes_lie_where_the_windows_do():
    built = network()
    looker = Looker(built, preprocessing(), (1, 3), "fine")
    image = picture()
    views = looker.views({side: images.resize(image, side) for side in looker.sides_px}, image.size)
    seen = looker.look(views)
    sliding = Sliding(built)
    assert [one.scale for one in seen] == [1, 3]
    for one, (pixels, crop) in zip(seen, views, strict=True):
        x = preprocessing().normalise(torch.from_numpy(pixels.copy())[None])
        pooled = sliding.pooled(x, "fine")
        scores, boxes = sliding.scores(pooled)[0], slide(built.regressor, pooled)[0]
        rows, cols = scores.shape[1:]
        assert one.windows.shape == (rows * cols, 4)
        for row, col in ((0, 0), (1, 2), (rows - 1, cols - 1)):
            number = row * cols + col
            top, left, height, width = sliding.field("fine").box(row, col)
            place = crop.to_original(top, left, height, width)
            np.testing.assert_allclose(
                one.windows[number], [place[0], place[1], place[0] + place[2], place[1] + place[3]]
            )
            np.testing.assert_allclose(
                one.confidences[number],
                scores[:, row, col].double().softmax(0).detach().numpy(),
                rtol=1e-5,
            )
            relative = boxes[:, row, col].double().detach().numpy()
            in_view = [top + relative[0] * height, left + relative[1] * width]
            size = [(relative[2] - relative[0]) * height, (relative[3] - relative[1]) * width]
            found = crop.to_original(*in_view, *size)
            expected = np.clip([found[0], found[1], found[0] + found[2], found[1] + found[3]], 0, [120, 170, 120, 170])
            np.testing.assert_allclose(one.boxes[number], expected, atol=1e-6)


def test_a_regressor_for_each_class_gives_each_its_boxes():
    built = network("overfeat_accurate_small+class-boxes", classes=3)
    looker = Looker(built, preprocessing(78, 70), (2,), "coarse")
    image = picture()
    (seen,) = looker.look(looker.views({looker.sides_px[0]: images.resize(image, looker.sides_px[0])}, image.size))
    assert seen.boxes.shape == (len(seen.windows), 3, 4)
    assert np.array_equal(seen.of(1), seen.boxes[:, 1])
    assert not np.allclose(seen.of(1), seen.of(2))


def test_context_adds_what_the_nearest_window_of_the_lower_scale_says():
    built = network("overfeat_fast_small+context+boxes")
    image = picture()
    looker = Looker(built, preprocessing(), (1, 4), "fine")
    resized = {side: images.resize(image, side) for side in looker.sides_px}
    views = looker.views(resized, image.size)
    low, high = looker.look(views)
    alone = Looker(built, preprocessing(), (4,), "fine")
    (without,) = alone.look(alone.views({s: resized[s] for s in alone.sides_px}, image.size))
    sliding = Sliding(built)
    x = preprocessing().normalise(torch.from_numpy(views[0][0].copy())[None])
    hidden = slide(sliding.above[:-1], sliding.pooled(x, "fine"))[0].flatten(1).T
    for number in (0, 7, len(high.windows) - 1):
        middle = (high.windows[number, :2] + high.windows[number, 2:]) / 2
        away = [np.hypot(*((other[:2] + other[2:]) / 2 - middle)) for other in low.windows]
        added = built.context(hidden[int(np.argmin(away))][None, :, None, None]).flatten().double().detach().numpy()
        expected = without.confidences[number] * np.exp(added)
        np.testing.assert_allclose(high.confidences[number], expected / expected.sum(), rtol=1e-4)
    assert np.array_equal(high.boxes, without.boxes)


@pytest.mark.parametrize("heads", ["boxes", "context+class-boxes"])
def test_the_mirror_image_is_looked_at_as_an_image_of_its_own_and_its_edges_are_put_back(heads):
    built = network(f"overfeat_fast_small+{heads}")
    image = picture(120, 120)  # a square is not cut, which may be uneven
    both, alone = (Looker(built, preprocessing(), (1, 3), "fine", mirror) for mirror in (True, False))

    def look(looker, image):
        resized = {side: images.resize(image, side) for side in looker.sides_px}
        return looker.look(looker.views(resized, image.size))

    seen, straight = look(both, image), look(alone, image)
    # The views of the mirror image, cut and resized from it.
    mirrored = look(alone, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert [(one.scale, one.mirrored) for one in seen] == [(1, False), (3, False), (1, True), (3, True)]
    for one, other in zip(seen, straight, strict=False):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("windows", "boxes"))
        assert np.array_equal(one.confidences, other.confidences)
    for one, other in zip(seen[2:], mirrored, strict=True):
        np.testing.assert_allclose(one.windows, reflected(other.windows, 120), atol=1e-9)
        np.testing.assert_allclose(one.boxes, reflected(other.boxes, 120), atol=0.5)
        np.testing.assert_allclose(one.confidences, other.confidences, atol=1e-3)
        assert not np.allclose(one.boxes, other.boxes, atol=5)


def reflected(boxes, width):
    return np.stack([boxes[..., 0], width - boxes[..., 3], boxes[..., 2], width - boxes[..., 1]], -1)


def test_training_and_looking_agree_on_which_lower_window_is_nearest():
    windows = window_edges(Sliding(network()), "fine", 6, 6)
    found = nearest_window(out_of_frame(windows / 109, np.array([10.0, 20, 60, 70])), windows)
    middles = (windows[:, :2] + windows[:, 2:]) / 2 * 50 / 109 + [10, 20]
    away = [np.hypot(*(((other[:2] + other[2:]) / 2)[None] - middles).T) for other in windows]
    assert np.array_equal(found, np.argmin(away, 0))


# --------------------------------------------------------------------------------------------------------- final boxes


def seen(scale, confidences, boxes):
    return Seen(scale, edges(boxes), np.array(confidences, float), edges(boxes))


def test_boxes_are_merged_over_scales_within_a_class():
    one = seen(1, [[0.9, 0.1], [0.2, 0.8]], [[0, 0, 10, 10], [0, 0, 10, 10]])
    other = seen(2, [[0.6, 0.4]], [[0, 0, 10, 10]])
    found = merged([one, other], [[0, 1], [0, 1]], 0.15, 0.5, "confidence")
    assert found.classes.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.9 + 0.2 + 0.6, 0.8 + 0.4])
    assert found.windows.tolist() == [3, 2]
    # A class that is not among a scale's best brings no boxes of that scale.
    assert merged([one, other], [[0], [0, 1]], 0.15, 0.5, "confidence").scores.tolist() == pytest.approx([1.7, 0.4])


def test_no_window_is_confident_or_has_a_box():
    none = seen(1, [[0.4, 0.6]], [[5, 5, 5, 9]])
    assert merged([none], [[0, 1]], 0.1, 0.5, "paper").classes.tolist() == []
    assert merged([none], [[]], 0.1, 0.5, "paper").boxes.shape == (0, 4)


def test_the_classes_of_a_scale_are_those_of_its_strongest_windows():
    one = seen(1, [[0.1, 0.5, 0.4, 0.0], [0.6, 0.1, 0.3, 0.0]], [[0, 0, 1, 1]] * 2)
    assert top_classes(one, 2, None) == [0, 1]
    assert top_classes(one, 3, 1) == [0, 2, 3]


def test_guesses_are_the_best_boxes_some_of_each_class():
    confidences = [[0.9, 0.1], [0.3, 0.7], [0.8, 0.2]]
    boxes = [[0, 0, 10, 10], [50, 50, 60, 60], [80, 0, 95, 10]]
    found = merged([seen(1, confidences, boxes)], [[0, 1]], 0.15, 0.5, "confidence")
    assert found.classes.tolist() == [0, 0, 1, 0, 1]
    guesses = best_guesses(found, 5, 1)
    assert guesses.classes.tolist() == [0, 1]
    assert guesses.boxes.tolist() == [[0, 0, 10, 10], [50, 50, 60, 60]]
    assert best_guesses(found, 5, 2).classes.tolist() == [0, 0, 1, 1]
    assert best_guesses(found, 5, 3).classes.tolist() == found.classes.tolist()
    assert best_guesses(found, 3, 5).scores.tolist() == found.scores[:3].tolist()
    assert len(best_guesses(found, 1, 1).classes) == 1


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="no regressor of boxes"):
        Looker(models.build("overfeat_fast_small", 3), preprocessing(), (1,), "fine")
    with pytest.raises(ValueError, match=r"scales is \(2, 1\): give some of 1 to 6, ascending"):
        Looker(network(), preprocessing(), (2, 1), "fine")
    with pytest.raises(ValueError, match="zfnet_small looks at one window"):
        models.build("zfnet_small+boxes", 3)
    with pytest.raises(ValueError, match=r"the heads are 'box'; expected some of context, boxes, class-boxes"):
        models.build("overfeat_fast+box", 3)


# --------------------------------------------------------------------------------------------------------------- heads


def test_heads_are_the_papers_and_begin_at_the_window_itself():
    with torch.device("meta"):
        fast, accurate = (models.build(f"overfeat_{which}+boxes", 1000) for which in ("fast", "accurate"))
        each = models.build("overfeat_fast+class-boxes", 1000)
    shapes = [
        [tuple(layer.weight.shape) for layer in (n.regressor.hidden1, n.regressor.hidden2)] for n in (fast, accurate)
    ]
    assert shapes == [[(4096, 1024, 6, 6), (1024, 4096, 1, 1)], [(4096, 1024, 5, 5), (1024, 4096, 1, 1)]]
    assert fast.regressor.edges.out_channels == 4
    assert each.regressor.edges.out_channels == 4000
    built = models.build(SMALL, 3)
    initialise_heads(built, 0)
    edges_ = built.regressor(torch.randn(1, 128, 3, 3))[0, :, 0, 0]
    np.testing.assert_allclose(edges_.detach(), [0, 0, 1, 1], atol=0.1)


def test_heads_change_nothing_that_the_classifier_says():
    built = network("overfeat_fast_small+context+class-boxes")
    plain = models.build("overfeat_fast_small", 5).eval()
    plain.load_state_dict({name: t for name, t in built.state_dict().items() if name in plain.state_dict()})
    x = torch.randn(2, 3, 69, 69)
    assert torch.equal(built(x), plain(x))
