"""First weights, filter renormalisation and learning rates against Sec. 3 of the ZFNet paper."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from zfnet import models
from zfnet.recipe import (
    ALEXNET_ONES,
    PIXEL_STD,
    PRESETS,
    Recipe,
    colour_axes,
    colour_scale,
    cosine,
    initialise,
    learning_rate,
    plateaus,
    preset_of,
    renormalise_filters,
    set_dropout,
)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_paper_initialisation_is_normal_with_deviation_0_01_and_no_bias() -> None:
    model = models.build("zfnet_small")
    initialise(model, "paper")
    for name, tensor in weights(model).items():
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert tensor.std().item() == pytest.approx(0.01, rel=0.05)
            assert abs(tensor.mean().item()) < 0.001


def test_he_initialisation_turns_pixels_into_logits_of_ordinary_size() -> None:
    model = models.build("zfnet_small", classes=50).eval()
    pixels = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 64
    initialise(model, "he")
    with torch.no_grad():
        assert 0.05 < model(pixels).std().item() < 5
        initialise(model, "paper")
        assert model(pixels).std().item() < 0.01  # why a small network needs the other


def test_weights_depend_on_the_seed_alone() -> None:
    first, second = models.build("zfnet_small"), models.build("zfnet_small")
    state = torch.get_rng_state()
    initialise(first, "he", seed=3)
    initialise(second, "he", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    initialise(second, "he", seed=4)
    assert not torch.equal(first.conv1.weight, second.conv1.weight)


def test_renormalisation_rescales_only_filters_beyond_the_radius() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 7), nn.Linear(4, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, rms in enumerate((0.05, 0.1, 0.7)):
            filter_ = torch.randn(3, 7, 7, generator=generator)
            model[0].weight[number] = filter_ * rms / filter_.square().mean().sqrt()
        model[0].bias.fill_(9)
        model[1].weight.fill_(9)
    before = weights(model)
    renormalise_filters(model, radius=0.1)
    after = weights(model)
    assert torch.equal(after["0.weight"][0], before["0.weight"][0])
    torch.testing.assert_close(after["0.weight"][1], before["0.weight"][1])
    torch.testing.assert_close(after["0.weight"][2], before["0.weight"][2] / 7)
    for untouched in ("0.bias", "1.weight", "1.bias"):
        assert torch.equal(after[untouched], before[untouched])


def test_radius_is_a_root_mean_square_not_a_norm() -> None:
    model = models.build("zfnet_small")
    with torch.no_grad():
        model.conv1.weight.fill_(1)
    renormalise_filters(model)
    # PAPERS 1.4: the L2 radius of layer 1 is 0.1 * sqrt(7 * 7 * 3) = 1.212.
    assert model.conv1.weight[0].norm().item() == pytest.approx(1.212, abs=1e-3)


def test_renormalisation_leaves_a_silent_filter_and_autograd_alone() -> None:
    model = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(model.weight)
    renormalise_filters(model)
    assert not model.weight.any()
    assert model.weight.requires_grad
    assert model.weight.grad_fn is None


def test_plateaus_counts_waits_without_a_new_lowest_error() -> None:
    assert plateaus([], patience=2, at_most=3) == 0
    assert plateaus([0.9, 0.8, 0.7], patience=2, at_most=3) == 0
    assert plateaus([0.9, 0.8, 0.85], patience=2, at_most=3) == 0
    assert plateaus([0.9, 0.8, 0.85, 0.8], patience=2, at_most=3) == 1
    assert plateaus([0.9, 0.9, 0.9, 0.5, 0.6, 0.6], patience=2, at_most=3) == 2
    assert plateaus([1.0] * 50, patience=2, at_most=3) == 3


def test_plateau_divides_the_rate_by_ten_three_times_at_most() -> None:
    paper = PRESETS["zfnet"]
    rates = [learning_rate(paper, 0, 10, [0.5] * epochs) for epochs in range(1, 40)]
    assert sorted({round(rate, 9) for rate in rates}, reverse=True) == [1e-2, 1e-3, 1e-4, 1e-5]


def test_cosine_climbs_then_falls_to_zero() -> None:
    shares = [cosine(step, total=100, warmup=0.1) for step in range(101)]
    assert shares[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares[10:]))
    assert shares[100] == 0.0
    assert cosine(0, total=1, warmup=0.0) == 1.0


@pytest.mark.parametrize("schedule", ["plateau", "epochs", "cosine"])
def test_rate_depends_on_the_past_alone_so_that_resume_is_exact(schedule) -> None:
    recipe = dataclasses.replace(PRESETS["small"], schedule=schedule, patience=1, divide_after=(2, 5))
    errors = [0.9, 0.5, 0.6, 0.4, 0.4]
    straight = [learning_rate(recipe, step, 10, errors[: step // 10]) for step in range(60)]
    resumed = [learning_rate(recipe, step, 10, list(errors[: step // 10])) for step in reversed(range(60))]
    assert straight == resumed[::-1]
    assert len(set(straight)) > 1


def test_paper_recipe_has_the_papers_numbers() -> None:
    paper = PRESETS["zfnet"]
    assert (paper.epochs, paper.batch, paper.lr, paper.momentum) == (70, 128, 0.01, 0.9)
    assert (paper.init, paper.renormalise, paper.schedule) == ("paper", 0.1, "plateau")
    assert paper.weight_decay == 5e-4
    assert preset_of("another network") == "zfnet"


@pytest.mark.parametrize("name", models.names())
def test_every_recipe_gives_finite_rates(name) -> None:
    recipe = PRESETS[preset_of(name)]
    assert all(math.isfinite(learning_rate(recipe, step, 5, [])) for step in range(5 * recipe.epochs + 1))


def test_alexnets_recipe_has_its_numbers() -> None:
    alexnet = PRESETS["alexnet"]
    assert (alexnet.epochs, alexnet.batch, alexnet.lr, alexnet.momentum, alexnet.weight_decay) == (
        90,
        128,
        0.01,
        0.9,
        5e-4,
    )
    assert (alexnet.colour, alexnet.renormalise, alexnet.divisions) == ("paper", None, 3)
    names = ("alexnet", "alexnet_no34", "zfnet", "zfnet_wide", "zfnet_small", "alexnet_small_no7", "torchvision:vgg11")
    assert [preset_of(name) for name in names] == ["alexnet", "alexnet", "zfnet", "zfnet", "small", "small", "foreign"]
    assert [preset_of(name) for name in ("overfeat_accurate", "overfeat_fast_small")] == ["overfeat", "small"]


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v2"])
def test_foreign_networks_begin_with_a_signal_that_reaches_the_classes(name) -> None:
    """Logits of the order of 1 that differ from image to image; under N(0, 0.01) those of SqueezeNet are 1e-18."""
    model = models.build(f"torchvision:{name}", classes=10)
    initialise(model, PRESETS["foreign"].init)
    set_dropout(model, 0.0)
    pixels = PIXEL_STD * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        spread = float(model.train()(pixels).std(0).mean())
    assert 0.05 < spread < 5


def test_overfeats_recipe_has_its_numbers_and_halves_the_rate_after_five_epochs() -> None:
    overfeat = PRESETS["overfeat"]
    assert (overfeat.batch, overfeat.momentum, overfeat.weight_decay, overfeat.init) == (128, 0.6, 1e-5, "paper")
    assert (overfeat.ones, overfeat.colour, overfeat.renormalise) == ((), "none", None)
    rates = [learning_rate(overfeat, step, 3, []) for step in range(3 * overfeat.epochs)]
    last = {
        1: 0.05,
        30: 0.05,
        31: 0.025,
        50: 0.025,
        51: 0.0125,
        61: 0.05 / 8,
        71: 0.05 / 16,
        80: 0.05 / 16,
        81: 0.05 / 32,
    }
    for epoch, rate in last.items():
        assert rates[3 * epoch - 3 : 3 * epoch] == [rate] * 3
    names = ("overfeat_fast", "overfeat_accurate", "overfeat_fast_small", "overfeat_accurate_small")
    assert [preset_of(name) for name in names] == ["overfeat", "overfeat", "small", "small"]


def test_a_fully_connected_layer_that_slides_is_renormalised_no_more_than_a_linear_one() -> None:
    model = models.build("overfeat_fast_small", classes=3)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    renormalise_filters(model, 0.1)
    for name, tensor in weights(model).items():
        scaled = name.startswith("conv") and name.endswith("weight")
        assert tensor.flatten()[0].item() == pytest.approx(0.1 if scaled else 1.0)


def test_alexnets_ones_are_biases_of_the_layers_that_there_are() -> None:
    model = models.build("zfnet_small")
    plain = models.build("zfnet_small")
    del model.conv4
    initialise(model, "paper", ones=ALEXNET_ONES)
    initialise(plain, "paper")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert (module.bias == (1.0 if name in ("conv2", "conv5", "fc6", "fc7") else 0.0)).all()
    assert torch.equal(model.conv3.weight, plain.conv3.weight)  # the draw does not depend on it


def test_dropout_is_set_in_every_hidden_layer() -> None:
    model = models.build("zfnet_small").train()
    set_dropout(model, 0.0)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), model(x))


def test_colour_axes_are_the_papers_formula() -> None:
    """Against the covariance written out, and numpy's own eigenvectors."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(500, 3)) @ np.array([[0.5, 0.3, 0.2], [0.2, 0.4, 0.2], [0.1, 0.1, 0.5]])
    covariance = np.cov(pixels.T, bias=True)
    vectors = np.linalg.eig(covariance)[1]
    alphas = rng.standard_normal((4000, 3))
    shifts = alphas @ colour_axes(torch.from_numpy(covariance), "paper").numpy()
    # AlexNet's sum over components with pixels from 0 to 1, brought back to 0 to 255: covariance of the shifts.
    unit = np.linalg.eig(covariance / 255**2)[0]
    expected = vectors @ np.diag((0.1 * unit * 255) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(shifts.T, bias=True), expected, rtol=0.1, atol=0.05 * expected.max())
    axes = colour_axes(torch.from_numpy(covariance), "cuda-convnet").numpy()
    np.testing.assert_allclose(axes.T @ axes, 0.01 * covariance, rtol=1e-10)  # standard deviations: the colours' own
    assert not colour_axes(torch.from_numpy(covariance), "none").any()
    assert (colour_scale("paper"), colour_scale("cuda-convnet")) == (1.0, pytest.approx(1 / 1.1))
    for row in axes:
        assert row[np.abs(row).argmax()] > 0


def test_refuses_what_it_cannot_mean() -> None:
    for field, value, message in [
        ("lr", 0, "expected more than 0"),
        ("momentum", 1.0, "less than 1"),
        ("init", "xavier", "expected one of paper, he"),
        ("schedule", "step", "expected one of plateau, epochs, cosine"),
        ("renormalise", 0.0, "None for no limit"),
        ("dropout", 1.0, "less than 1"),
        ("colour", "pca", "expected one of none, paper, cuda-convnet"),
        ("precision", "fp8", "expected one of float32, bf16, float64"),
        ("accumulate", 0, "expected more than 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe(**{field: value})
    with pytest.raises(ValueError, match="give the epochs, or the preset overfeat"):
        Recipe(schedule="epochs")
    with pytest.raises(ValueError, match="expected one of paper, he"):
        initialise(nn.Linear(2, 2), "xavier")
    with pytest.raises(ValueError, match="fewer images than a batch"):
        learning_rate(Recipe(), 0, 0, [])
