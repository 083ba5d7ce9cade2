"""ZFNet against Fig. 3 of its paper: sizes, order of operations, parameters."""

import dataclasses

import pytest
import torch
from torch import nn

from zfnet import models
from zfnet.models.layers import Architecture, Convolution, Network, Pool
from zfnet.normalisation import LocalResponseNorm

ZFNET_CHILDREN = [
    *("pad1", "conv1", "relu1", "pool1", "norm1"),
    *("conv2", "relu2", "pool2", "norm2"),
    *("conv3", "relu3", "conv4", "relu4"),
    *("conv5", "relu5", "pool5"),
    *("flatten", "fc6", "relu6", "dropout6", "fc7", "relu7", "dropout7", "fc8"),
]
# PAPERS 1.1 and form A of 1.2.
ZFNET_SIDES = {
    "pad1": 225,
    "conv1": 110,
    "pool1": 55,
    "conv2": 26,
    "pool2": 13,
    "conv3": 13,
    "conv4": 13,
    "conv5": 13,
    "pool5": 6,
}
ZFNET_PARAMETERS = {
    "conv1": 14_208, "conv2": 614_656, "conv3": 885_120, "conv4": 1_327_488, "conv5": 884_992,
    "fc6": 37_752_832, "fc7": 16_781_312, "fc8": 4_097_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def zfnet() -> Network:
    return models.build("zfnet").eval()


def shapes_of(network: nn.Sequential, side: int) -> dict[str, tuple[int, ...]]:
    shapes, x = {}, torch.zeros(1, 3, side, side)
    with torch.no_grad():
        for name, child in network.named_children():
            x = child(x)
            shapes[name] = tuple(x.shape[1:])
    return shapes


def test_zfnet_runs_relu_then_pool_then_contrast_normalisation(zfnet) -> None:
    assert [name for name, _ in zfnet.named_children()] == ZFNET_CHILDREN


def test_zfnet_has_the_maps_and_sides_of_figure_3(zfnet) -> None:
    shapes = shapes_of(zfnet, 224)
    assert {name: shapes[name][1] for name in ZFNET_SIDES} == ZFNET_SIDES
    assert [shapes[f"conv{i}"][0] for i in range(1, 6)] == [96, 256, 384, 384, 256]
    assert shapes["flatten"] == (9216,)
    assert shapes["fc6"] == shapes["fc7"] == (4096,)
    assert shapes["fc8"] == (1000,)


def test_zfnet_has_62_357_608_parameters(zfnet) -> None:
    assert {
        name: sum(p.numel() for p in zfnet.get_submodule(name).parameters()) for name in ZFNET_PARAMETERS
    } == ZFNET_PARAMETERS
    assert sum(p.numel() for p in zfnet.parameters()) == 62_357_608


def test_zfnet_pads_right_and_bottom_only(zfnet) -> None:
    padded = zfnet.pad1(torch.ones(1, 3, 224, 224))
    assert padded[..., :224, :224].all()
    assert not padded[..., 224, :].any()
    assert not padded[..., 224].any()


def test_zfnet_normalises_in_the_configured_convention_and_drops_half(zfnet) -> None:
    for norm in (zfnet.norm1, zfnet.norm2):
        assert isinstance(norm, LocalResponseNorm)
        assert (norm.size, norm.alpha, norm.beta, norm.k) == (5, 1e-4, 0.75, 2.0)
        assert norm.convention == "configuration"
    assert zfnet.dropout6.p == zfnet.dropout7.p == 0.5


def test_small_network_differs_from_zfnet_in_its_table_alone() -> None:
    small = models.build("zfnet_small", classes=12)
    assert [name for name, _ in small.named_children()] == ZFNET_CHILDREN
    assert type(small) is type(models.build("zfnet_small"))
    sides = {name: shape[1] for name, shape in shapes_of(small.eval(), 64).items() if len(shape) == 3}
    assert {name: sides[name] for name in ZFNET_SIDES} == {
        "pad1": 65,
        "conv1": 30,
        "pool1": 15,
        "conv2": 15,
        "pool2": 7,
        "conv3": 7,
        "conv4": 7,
        "conv5": 7,
        "pool5": 3,
    }


@pytest.mark.parametrize("name", models.names())
def test_every_network_runs_at_its_own_size(name) -> None:
    network = models.build(name, classes=7).eval()
    assert network.resize_px >= network.input_px
    with torch.no_grad():
        assert network(torch.zeros(2, 3, network.input_px, network.input_px)).shape == (2, 7)


def test_state_dict_keys_are_the_names_of_the_layers() -> None:
    keys = models.build("zfnet_small").state_dict().keys()
    layers = [f"conv{i}" for i in range(1, 6)] + [f"fc{i}" for i in range(6, 9)]
    assert list(keys) == [f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")]


def test_a_slice_is_a_plain_sequential_that_shares_the_layers() -> None:
    small = models.build("zfnet_small")
    part = small[:3]
    assert type(part) is nn.Sequential
    assert part.conv1 is small.conv1 is small[1]


def test_builder_takes_alexnets_order_groups_and_floor_pools() -> None:
    alexnet = Architecture(
        name="alexnet",
        input_px=224,
        resize_px=256,
        convolutions=(
            Convolution(name="conv1", maps=96, kernel=11, stride=4, pad_after=3, pool=Pool(), normalise="before pool"),
            Convolution(name="conv2", maps=256, kernel=5, pad=2, groups=2, pool=Pool(ceil=False)),
        ),
        linears=(),
        classifier="fc3",
    )
    network = Network(alexnet, classes=10)
    assert [name for name, _ in network.named_children()][:7] == [
        *("pad1", "conv1", "relu1", "norm1", "pool1"),
        *("conv2", "relu2"),
    ]
    assert network.conv2.weight.shape == (256, 48, 5, 5)  # AlexNet Sec. 3.5: kernels of 5x5x48
    shapes = shapes_of(network.eval(), 224)
    assert [shapes[name][1] for name in ("conv1", "pool1", "conv2", "pool2")] == [55, 27, 27, 13]


@pytest.mark.parametrize("ceil", [True, False])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (3, 3), (2, 3)])
def test_pool_size_is_torchs(kernel, stride, pad, ceil) -> None:
    pool = Pool(kernel=kernel, stride=stride, pad=pad, ceil=ceil)
    for side in range(3, 20):
        assert pool.output_px(side) == pool.module()(torch.zeros(1, 1, side, side)).shape[-1]


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no network is called 'zfnet_smal'.*Did you mean 'zfnet_small'\?"):
        models.build("zfnet_smal")


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="classes is 0"):
        models.build("zfnet_small", classes=0)
    tiny = dataclasses.replace(models.build("zfnet_small").architecture, input_px=6)
    with pytest.raises(ValueError, match="input_px=6 leaves no cell after conv1"):
        Network(tiny, classes=2)
