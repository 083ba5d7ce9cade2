"""Dense evaluation against Tab. 5 of the OverFeat paper, and against every window run through the network by itself."""

import dataclasses

import numpy as np
import pytest
import torch
from networks import overfeat
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zfnet import models
from zfnet.activations import NotFinite
from zfnet.dense import SCALES, Sliding, interleave, slide, strongest
from zfnet.images import Preprocessing
from zfnet.models.layers import Network
from zfnet.models.overfeat import OVERFEAT_ACCURATE_SMALL, OVERFEAT_FAST_SMALL

SMALL = ("overfeat_fast_small", "overfeat_accurate_small")

# PAPERS 3.4, the run of the accurate model: image, maps before and after the last pool, of each offset's classifier,
# and interleaved. Scale 5 as corrected: the table prints 32x35 and 10x11.
TABLE_5 = {
    1: ((245, 245), (17, 17), (5, 5), (1, 1), (3, 3)),
    2: ((281, 317), (20, 23), (6, 7), (2, 3), (6, 9)),
    3: ((317, 389), (23, 29), (7, 9), (3, 5), (9, 15)),
    4: ((389, 461), (29, 35), (9, 11), (5, 7), (15, 21)),
    5: ((425, 497), (32, 38), (10, 12), (6, 8), (18, 24)),
    6: ((461, 569), (35, 44), (11, 14), (7, 10), (21, 30)),
}


@pytest.mark.parametrize("scale", TABLE_5)
def test_the_accurate_models_maps_are_the_tables(scale) -> None:
    size, before, after, each, together = TABLE_5[scale]
    with torch.device("meta"):
        sliding = Sliding(models.build("overfeat_accurate").eval())
        x = torch.zeros(1, 3, *size)
        assert sliding.sides_px(scale) == size
        assert sliding.beneath(x).shape == (1, 1024, *before)
        pooled = sliding.pooled(x, "fine")
        assert pooled.shape == (9, 1, 1024, *after)
        assert sliding.above(pooled[0]).shape == (1, 1000, *each)
        assert sliding.scores(pooled).shape == (1, 1000, *together)
        assert sliding.scores(sliding.pooled(x, "coarse")).shape == (1, 1000, *each)
    assert (sliding.step_px, sliding.window_px, sliding.window_cells) == ({"coarse": 36, "fine": 12}, 221, 5)
    assert sliding.field("fine").box(*(side - 1 for side in together))[:2] == tuple(side - 221 for side in size)


def test_the_fast_models_scales_follow_the_same_rule() -> None:
    with torch.device("meta"):
        sliding = Sliding(models.build("overfeat_fast").eval())
        assert (sliding.step_px, sliding.window_px, sliding.window_cells) == ({"coarse": 32, "fine": 16}, 231, 6)
        for scale, steps in enumerate(SCALES, 1):
            sides = sliding.sides_px(scale)
            assert sides == tuple(231 + 16 + 32 * k for k in steps)
            maps = sliding.scores(sliding.pooled(torch.zeros(1, 3, *sides), "fine"))
            assert maps.shape[2:] == tuple(2 * (k + 1) for k in steps)


@pytest.mark.parametrize("name", ["overfeat_accurate", "overfeat_fast", *SMALL])
def test_all_windows_of_scale_6_cost_less_than_a_tenth_of_the_windows_one_by_one(name) -> None:
    """In multiply-adds; `benchmarks/dense.py` measures the time."""
    with torch.device("meta"), torch.no_grad():
        network = models.build(name).eval()
        sliding = Sliding(network)
        with FlopCounterMode(display=False) as dense:
            maps = sliding.scores(sliding.pooled(torch.zeros(1, 3, *sliding.sides_px(6)), "fine"))
        with FlopCounterMode(display=False) as window:
            network(torch.zeros(1, 3, network.input_px, network.input_px))
    assert 10 * dense.get_total_flops() < maps[0, 0].numel() * window.get_total_flops()


def unpadded(table, classes=4, seed=0) -> Network:
    """A small network of a table's form whose convolutions do not pad, with small whole numbers as weights."""
    convolutions = tuple(dataclasses.replace(c, pad=0, maps=min(c.maps, 6)) for c in table.convolutions)
    linears = tuple(dataclasses.replace(layer, units=7) for layer in table.linears)
    side = {OVERFEAT_FAST_SMALL.name: 69 + 8 * 6, OVERFEAT_ACCURATE_SMALL.name: 70 + 6 * 8}[table.name]
    network = Network(dataclasses.replace(table, input_px=side, convolutions=convolutions, linears=linears), classes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).double()
    return network.eval()


def window_by_window(network: Network, x: torch.Tensor, step: int) -> torch.Tensor:
    """The definition: every window, cut out of the image and run through the network by itself."""
    side = network.input_px
    rows, cols = ((size - side) // step + 1 for size in x.shape[2:])
    scores = [
        [network(x[:, :, i : i + side, j : j + side]) for j in step * np.arange(cols)] for i in step * np.arange(rows)
    ]
    return torch.stack([torch.stack(row, -1) for row in scores], -2)


@pytest.mark.parametrize("table", [OVERFEAT_FAST_SMALL, OVERFEAT_ACCURATE_SMALL], ids=lambda table: table.name)
@pytest.mark.parametrize("stride", ["fine", "coarse"])
@pytest.mark.parametrize("more", [(0, 0), (36, 54), (25, 71)])
@torch.no_grad()
def test_without_padding_every_cell_is_the_score_of_its_window_exactly(table, stride, more) -> None:
    network = unpadded(table)
    sliding = Sliding(network)
    least = sliding.sides_px(1)[0]
    x = torch.randint(-3, 4, (2, 3, *(least + m for m in more)), generator=torch.Generator().manual_seed(1)).double()
    maps = sliding.scores(sliding.pooled(x, stride))
    expected = window_by_window(network, x, sliding.step_px[stride])
    rows, cols = maps.shape[2:]
    assert torch.equal(maps, expected[:, :, :rows, :cols])
    # Windows at the far end are left out only where not every offset has one.
    assert all(
        e - m < (sliding.cells if stride == "fine" else 1) for m, e in zip(maps.shape, expected.shape, strict=True)
    )
    if more == (0, 0) and stride == "fine":
        assert maps.shape == expected.shape
    assert sliding.field(stride).box(rows - 1, cols - 1)[0] == (rows - 1) * sliding.step_px[stride]


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_with_padding_the_head_sees_the_window_of_the_maps_that_enter_the_last_pool(name) -> None:
    """What is left to compare where convolutions pad: pool and linear layers, by their definition, on each window."""
    network = overfeat(name)
    sliding = Sliding(network)
    x = torch.randn(1, 3, *(sliding.window_px + n for n in (29, 45)), dtype=torch.float64)
    maps, scores = sliding.beneath(x), sliding.scores(sliding.pooled(x, "fine"))
    side = sliding.cells * sliding.window_cells
    hidden = [layer for layer in sliding.above if isinstance(layer, nn.Conv2d)]
    for row in range(scores.shape[2]):
        for col in range(scores.shape[3]):
            window = maps[0, :, row : row + side, col : col + side]
            units = window.unfold(1, sliding.cells, sliding.cells).unfold(2, sliding.cells, sliding.cells).amax((3, 4))
            units = units.flatten()
            for layer in hidden:
                units = layer.weight.flatten(1) @ units + layer.bias
                units = units if layer is hidden[-1] else units.clamp_min(0)
            torch.testing.assert_close(scores[0, :, row, col], units, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_an_image_of_one_window_has_the_networks_own_scores(name) -> None:
    network = overfeat(name)
    x = torch.randn(2, 3, network.input_px, network.input_px, dtype=torch.float64)
    sliding = Sliding(network)
    torch.testing.assert_close(
        sliding.scores(sliding.pooled(x, "coarse"))[:, :, 0, 0], network(x), rtol=1e-12, atol=1e-12
    )


def test_interleaving_puts_the_offsets_of_figure_3_side_by_side() -> None:
    k, rows, cols = 3, 2, 4
    offsets = torch.arange(k * k).view(k * k, 1, 1, 1, 1)
    cells = torch.arange(rows * cols).view(1, 1, 1, rows, cols)
    together = interleave(100 * offsets + cells)
    assert together.shape == (1, 1, rows * k, cols * k)
    for row in range(rows * k):
        for col in range(cols * k):
            offset, cell = divmod(int(together[0, 0, row, col]), 100)
            assert (*divmod(offset, k), *divmod(cell, cols)) == (row % k, col % k, row // k, col // k)


@torch.no_grad()
def test_another_head_and_every_activation_come_out_as_the_scores_do() -> None:
    network = overfeat("overfeat_accurate_small")
    sliding = Sliding(network)
    x = torch.randn(2, 3, 100, 118, dtype=torch.float64)
    pooled = sliding.pooled(x, "fine")
    assert torch.equal(slide(sliding.above, pooled), sliding.scores(pooled))
    names = ["relu1", "conv6", "pool6", "relu7", "fc9"]
    found = sliding.activations(x, names, "fine")
    assert list(found) == names
    assert torch.equal(found["fc9"], sliding.scores(pooled))
    assert torch.equal(found["relu7"], slide(sliding.above[:2], pooled))
    assert torch.equal(found["pool6"], interleave(pooled))
    assert torch.equal(found["relu1"], network[:2](x))
    assert torch.equal(found["conv6"].clamp_min(0), sliding.beneath(x))
    # Every value of the interleaved pool is the maximum of 3 x 3 neighbours, one cell further on for each column.
    assert torch.equal(
        found["pool6"], nn.functional.max_pool2d(sliding.beneath(x), 3, 1)[:, :, : found["pool6"].shape[2]]
    )
    with pytest.raises(ValueError, match="maximum, conv7 cannot be had of larger images; expected one of conv1, relu1"):
        sliding.activations(x, ["maximum", "conv7", "fc7"], "fine")


@pytest.mark.parametrize("of", ["probabilities", "scores"])
def test_the_strongest_window_of_each_class_before_or_after_the_softmax(of) -> None:
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3
    found = strongest(scores, of)
    for image in range(2):
        windows = [scores[image, :, row, col].double() for row in range(4) for col in range(5)]
        if of == "probabilities":
            expected = torch.stack([window.softmax(0) for window in windows]).amax(0)
        else:
            expected = torch.stack(windows).amax(0).softmax(0)
        torch.testing.assert_close(found[image].exp(), expected, rtol=1e-12, atol=0)
    scores[1, 2, 3, 0] = torch.nan
    with pytest.raises(NotFinite) as raised:
        strongest(scores, of)
    assert (raised.value.index, raised.value.feature_map) == (1, 2)


@pytest.mark.parametrize(
    ("width", "height", "scale", "shown"),
    [
        (500, 375, 6, (461, 569)),  # most photos are as long as the table's images, or longer
        (375, 500, 2, (317, 281)),  # upright ones have them on their side
        (400, 400, 6, (461, 461)),
        (550, 500, 4, (389, 425)),  # 427: as many whole coarse strides as there are
        (2000, 300, 3, (317, 389)),
        (500, 375, 1, (245, 245)),
    ],
)
def test_an_image_is_seen_at_the_tables_size_or_as_far_as_it_reaches(width, height, scale, shown) -> None:
    from torchvision.transforms import v2

    with torch.device("meta"):
        sliding = Sliding(models.build("overfeat_accurate"))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))
    resized = v2.Resize(sliding.sides_px(scale)[0])(image)
    pixels, crop = sliding.view(resized, image.size, scale)
    assert pixels.shape == (*shown, 3)
    assert np.array_equal(pixels, np.asarray(v2.CenterCrop(shown)(resized)))
    top, left, high, wide = crop.to_original(0, 0, *shown)
    assert (top + high / 2, left + wide / 2) == pytest.approx((height / 2, width / 2), abs=1.1)
    assert crop.from_original(top, left, high, wide) == pytest.approx((0, 0, *shown))


def test_pixels_of_any_size_are_normalised_with_a_mean_for_each_channel() -> None:
    mean = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)) * 100
    preprocessing = Preprocessing(resize_px=12, crop_px=10, channels="BGR", mean=mean, std=torch.full((3, 1, 1), 2.0))
    pixels = torch.arange(2 * 20 * 31 * 3).reshape(2, 20, 31, 3).remainder(251).byte()
    expected = (pixels.permute(0, 3, 1, 2).flip(1).float() - mean.mean((1, 2)).view(3, 1, 1)) / 2
    torch.testing.assert_close(preprocessing.of_any_size().normalise(pixels), expected)


def test_what_cannot_slide_is_refused() -> None:
    with pytest.raises(ValueError, match="zfnet_small takes images of one size.*give an OverFeat network"):
        Sliding(models.build("zfnet_small", 2))
    with pytest.raises(ValueError, match="Linear takes images of one size"):
        Sliding(nn.Linear(2, 2))
    network = models.build("overfeat_fast_small", 2)
    convolutions = network.architecture.convolutions
    overlapping = dataclasses.replace(convolutions[-1], pool=dataclasses.replace(convolutions[-1].pool, stride=1))
    changed = dataclasses.replace(network.architecture, convolutions=(*convolutions[:-1], overlapping))
    with pytest.raises(ValueError, match="offsets need a last pool without overlap"):
        Sliding(Network(changed, 2))
    sliding = Sliding(network)
    with pytest.raises(ValueError, match="too small for a fine window: expected at least 77 px"):
        sliding.pooled(torch.zeros(1, 3, 90, 69), "fine")
    with pytest.raises(ValueError, match="too small for a coarse window: expected at least 69 px"):
        sliding.pooled(torch.zeros(1, 3, 68, 90), "coarse")
    with pytest.raises(ValueError, match="scale is 7; expected 1 to 6"):
        sliding.sides_px(7)
