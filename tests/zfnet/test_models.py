"""ZFNet against Fig. 3 of its paper: sizes, order of operations, parameters."""

import dataclasses

import pytest
import torch
from torch import nn

from zfnet import models
from zfnet.models.layers import Network, Pool
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
    with torch.device("meta"):  # shapes alone: the largest has 237 million parameters
        network = models.build(name, classes=7).eval()
        assert network.resize_px >= network.input_px
        assert network(torch.zeros(2, 3, network.input_px, network.input_px)).shape == (2, 7)


SUFFIXES = ("no34", "no7", "no67", "no3467", "fc2048", "fc8192", "wide", "wide_fc8192")
CLAIMS = ("nonorm", "pool2", "half", "tanh", "no1", "no2", "no3", "no4", "no5")


def test_names_are_the_papers_networks_and_every_row_of_the_architecture_table() -> None:
    varied = ("zfnet", "zfnet_small", "alexnet", "alexnet_small")
    overfeat = {f"overfeat_{model}{size}" for model in ("fast", "accurate") for size in ("", "_small")}
    table = {f"{n}_{s}" for n in varied for s in SUFFIXES} | {f"{n}_{s}" for n in varied[2:] for s in CLAIMS}
    assert set(models.names()) == {*varied, "alexnet_ungrouped", *overfeat, *table}


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.build(name).parameters())


# PAPERS 1.11, and 2.2 for the first two.
COUNTED = {
    "alexnet": 60_965_224,
    "alexnet_ungrouped": 62_378_344,
    "zfnet_no34": 59_850_088,
    "zfnet_no7": 45_576_296,
    "zfnet_no67": 12_943_464,
    "zfnet_no3467": 10_435_944,
    "zfnet_fc2048": 28_848_232,
    "zfnet_fc8192": 154_542_184,
    "zfnet_wide": 107_627_624,
    "zfnet_wide_fc8192": 237_560_936,
}


@pytest.mark.parametrize("name", COUNTED)
def test_networks_have_the_parameters_that_were_counted_of_the_papers(name) -> None:
    assert parameters(name) == COUNTED[name]


def alexnet_by_hand(conv=True, wide=False, fc6=4096, fc7=4096) -> int:
    """Weights and biases of A's Fig. 2, layer by layer: kernel^2 x maps in of a group x maps out + biases."""
    conv3, conv4, conv5 = (512, 1024, 512) if wide else (384, 384, 256)
    count = 11 * 11 * 3 * 96 + 96 + 5 * 5 * 48 * 256 + 256
    if conv:
        count += 3 * 3 * 256 * conv3 + conv3 + 3 * 3 * (conv3 // 2) * conv4 + conv4
        count += 3 * 3 * (conv4 // 2) * conv5 + conv5
    else:
        count += 3 * 3 * (256 // 2) * conv5 + conv5  # layer 5 on the maps of layer 2
    units = 6 * 6 * conv5
    for hidden in (fc6, fc7):
        if hidden:
            count, units = count + units * hidden + hidden, hidden
    return count + units * 1000 + 1000


@pytest.mark.parametrize(
    ("suffix", "changed"),
    [
        ("", {}),
        ("_no34", {"conv": False}),
        ("_no7", {"fc7": 0}),
        ("_no67", {"fc6": 0, "fc7": 0}),
        ("_no3467", {"conv": False, "fc6": 0, "fc7": 0}),
        ("_fc2048", {"fc6": 2048, "fc7": 2048}),
        ("_fc8192", {"fc6": 8192, "fc7": 8192}),
        ("_wide", {"wide": True}),
        ("_wide_fc8192", {"wide": True, "fc6": 8192, "fc7": 8192}),
    ],
)
def test_variants_of_alexnet_have_the_parameters_of_their_row(suffix, changed) -> None:
    assert parameters(f"alexnet{suffix}") == alexnet_by_hand(**changed)


ALEXNET_BY_HAND = {
    # weights (kernel^2 x maps in of a group x maps out) and biases of conv1 to conv5; layers above as in Fig. 2
    "nonorm": (
        121 * 3 * 96 + 96,
        25 * 48 * 256 + 256,
        9 * 256 * 384 + 384,
        9 * 192 * 384 + 384,
        9 * 192 * 256 + 256,
    ),
    "half": (121 * 3 * 48 + 48, 25 * 48 * 128 + 128, 9 * 128 * 192 + 192, 9 * 192 * 192 + 192, 9 * 192 * 256 + 256),
    "no1": (25 * 3 * 256 + 256, 9 * 256 * 384 + 384, 9 * 192 * 384 + 384, 9 * 192 * 256 + 256),
    "no2": (121 * 3 * 96 + 96, 9 * 96 * 384 + 384, 9 * 192 * 384 + 384, 9 * 192 * 256 + 256),
    "no3": (121 * 3 * 96 + 96, 25 * 48 * 256 + 256, 9 * 128 * 384 + 384, 9 * 192 * 256 + 256),
    "no4": (121 * 3 * 96 + 96, 25 * 48 * 256 + 256, 9 * 256 * 384 + 384, 9 * 192 * 256 + 256),
    "no5": (121 * 3 * 96 + 96, 25 * 48 * 256 + 256, 9 * 256 * 384 + 384, 9 * 192 * 384 + 384),
}


@pytest.mark.parametrize("suffix", ALEXNET_BY_HAND)
def test_alexnets_own_ablations_have_the_parameters_counted_by_hand(suffix) -> None:
    maps = 384 if suffix == "no5" else 256
    above = 36 * maps * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert parameters(f"alexnet_{suffix}") == sum(ALEXNET_BY_HAND[suffix]) + above
    if suffix == "nonorm":  # what has no weights changes no count
        assert {parameters(f"alexnet_{name}") for name in ("pool2", "tanh", "nonorm")} == {parameters("alexnet")}


@pytest.mark.parametrize("base", ["alexnet", "alexnet_small"])
def test_alexnets_own_ablations_leave_all_other_maps_as_they_are(base) -> None:
    def sides(name: str) -> dict[str, int]:
        with torch.device("meta"):
            network = models.build(name, classes=3).eval()
            found, x = {}, torch.zeros(1, 3, network.input_px, network.input_px)
            for child, module in network.named_children():
                x = module(x)
                found[child] = x.shape[-1]
        return {child: side for child, side in found.items() if child.startswith(("conv", "pool", "fc"))}

    whole = sides(base)
    assert sides(f"{base}_pool2") == sides(f"{base}_nonorm") == sides(f"{base}_tanh") == sides(f"{base}_half") == whole
    for number in range(1, 6):
        kept = sides(f"{base}_no{number}")
        assert f"conv{number}" not in kept
        for child in (f"conv{above}" for above in range(number + 1, 6) if (number, above) != (1, 2)):
            assert kept[child] == whole[child]
        last = f"pool{5 if number < 5 else 4}"
        assert kept[last] == whole["pool5"]


def test_alexnets_own_ablations_change_what_they_say() -> None:
    with torch.device("meta"):
        names = {
            suffix: [name for name, _ in models.build(f"alexnet_small_{suffix}").named_children()] for suffix in CLAIMS
        }
        pools = [m for m in models.build("alexnet_small_pool2") if isinstance(m, nn.MaxPool2d)]
        groups = [m.groups for m in models.build("alexnet_small_half") if isinstance(m, nn.Conv2d)]
    assert names["nonorm"] == [name for name in ALEXNET_CHILDREN if not name.startswith("norm")]
    assert names["tanh"] == [name.replace("relu", "tanh") for name in ALEXNET_CHILDREN]
    assert [(pool.kernel_size, pool.stride) for pool in pools] == [(2, 2)] * 3
    assert groups == [1] * 5


def test_a_pool_upon_a_pool_is_one() -> None:
    x = torch.randn(2, 3, 55, 30)
    first, second = Pool(), Pool(kernel=2, stride=2)
    for one, other in ((first, first), (first, second), (second, first)):
        assert torch.equal(other.module()(one.module()(x)), one.then(other).module()(x))


def test_variants_of_the_small_networks_differ_as_those_of_the_large_ones() -> None:
    # zfnet_small: 32, 64, 96, 96, 64 maps, 3 x 3 cells at the end, 512 units; kernels 7, 5, 3, 3, 3.
    below = 7 * 7 * 3 * 32 + 32 + 5 * 5 * 32 * 64 + 64
    above = 9 * 64 * 512 + 512 + 512 * 512 + 512 + 512 * 1000 + 1000
    middle = 9 * 64 * 96 + 96 + 9 * 96 * 96 + 96 + 9 * 96 * 64 + 64
    assert parameters("zfnet_small") == below + middle + above
    assert parameters("zfnet_small_no34") == below + 9 * 64 * 64 + 64 + above
    assert parameters("zfnet_small_no67") == below + middle + 9 * 64 * 1000 + 1000
    assert parameters("zfnet_small_no7") == parameters("zfnet_small") - (512 * 512 + 512)
    wide = 9 * 64 * 128 + 128 + 9 * 128 * 256 + 256 + 9 * 256 * 128 + 128
    above_wide = 9 * 128 * 512 + 512 + 512 * 512 + 512 + 512 * 1000 + 1000
    assert parameters("zfnet_small_wide") == below + wide + above_wide
    grouped = 5 * 5 * 16 * 64 + 9 * 48 * 96 + 9 * 48 * 64
    dense = 5 * 5 * 32 * 64 + 9 * 96 * 96 + 9 * 96 * 64
    assert parameters("alexnet_small") == parameters("zfnet_small") - dense + grouped
    for name in ("zfnet_small", "alexnet_small"):
        with torch.device("meta"):
            assert models.build(f"{name}_fc2048").fc7.weight.shape == (2048, 2048)


ALEXNET_CHILDREN = [
    *("pad1", "conv1", "relu1", "norm1", "pool1"),
    *("conv2", "relu2", "norm2", "pool2"),
    *("conv3", "relu3", "conv4", "relu4"),
    *("conv5", "relu5", "pool5"),
    *("flatten", "fc6", "relu6", "dropout6", "fc7", "relu7", "dropout7", "fc8"),
]


def test_alexnet_is_as_printed() -> None:
    with torch.device("meta"):
        alexnet = models.build("alexnet").eval()
        shapes, x = {}, torch.zeros(1, 3, 224, 224)
        for name, child in alexnet.named_children():
            x = child(x)
            shapes[name] = tuple(x.shape[1:])
    assert [name for name, _ in alexnet.named_children()] == ALEXNET_CHILDREN
    assert shapes["conv1"] == (96, 55, 55)  # A, Fig. 2
    assert shapes["conv2"] == (256, 27, 27)
    assert shapes["conv3"] == shapes["conv4"] == (384, 13, 13)
    assert (shapes["conv5"], shapes["pool5"]) == ((256, 13, 13), (256, 6, 6))
    # A, Sec. 3.5: the sizes of the kernels.
    kernels = [tuple(alexnet.get_submodule(f"conv{i}").weight.shape) for i in range(1, 6)]
    assert kernels == [(96, 3, 11, 11), (256, 48, 5, 5), (384, 256, 3, 3), (384, 192, 3, 3), (256, 192, 3, 3)]
    assert [alexnet.get_submodule(f"conv{i}").groups for i in range(1, 6)] == [1, 2, 1, 2, 2]
    assert alexnet.dropout6.p == alexnet.dropout7.p == 0.5


def test_alexnets_last_window_hangs_over_the_right_and_bottom_edge() -> None:
    padded = models.build("alexnet_no67", classes=1).pad1(torch.ones(1, 3, 224, 224))
    assert padded.shape[-2:] == (227, 227)
    assert padded[..., :224, :224].all()
    assert padded.sum() == 3 * 224 * 224


@pytest.mark.parametrize("suffix", ["", *(f"_{s}" for s in SUFFIXES)])
def test_variants_keep_names_and_order_of_the_layers_that_stay(suffix) -> None:
    with torch.device("meta"):
        children = [name for name, _ in models.build(f"alexnet_small{suffix}").named_children()]
    gone = {number for number in "3467" if suffix.startswith("_no") and number in suffix}
    assert children == [name for name in ALEXNET_CHILDREN if name[-1] not in gone]


def test_state_dict_keys_are_the_names_of_the_layers() -> None:
    keys = models.build("zfnet_small").state_dict().keys()
    layers = [f"conv{i}" for i in range(1, 6)] + [f"fc{i}" for i in range(6, 9)]
    assert list(keys) == [f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")]


def test_a_slice_is_a_plain_sequential_that_shares_the_layers() -> None:
    small = models.build("zfnet_small")
    part = small[:3]
    assert type(part) is nn.Sequential
    assert part.conv1 is small.conv1 is small[1]


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
