"""The three occlusion maps against a loop over positions, captum, and the dense form."""

import itertools
import math

import pytest
import torch
from captum.attr import Occlusion
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Branches, chains, error, torchvision_network, zfnet_like
from torch import nn

from zfnet import occlusion
from zfnet.graph import UnknownLayer
from zfnet.incremental import ELEMENT, Incremental
from zfnet.models import build
from zfnet.occluded import Occluded
from zfnet.occlusion import Grid, blurred, computed_positions, sensitivity, watched_layer
from zfnet.tracing import trace


def image_and_fill(size: int, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(3, size, size, generator=generator, dtype=dtype)
    fill = torch.tensor([0.3, -0.2, 0.1], dtype=dtype)[:, None, None].expand(3, size, size)
    return clean, fill


def slow_twin(model, activation: nn.Module, clean, filled, grid, target):
    """arXiv v3 Sec. 4.2, one position at a time; `activation` is the module that gives the last convolution's."""
    seen = []
    hook = activation.register_forward_hook(lambda _module, _inputs, y: seen.append(y[0].detach().clone()))
    maps = torch.zeros(3, grid.rows, grid.cols, dtype=torch.float64)
    with torch.no_grad():
        clean_scores = model(clean[None])[0]
        strongest = max(range(len(seen[0])), key=lambda m: seen[0][m].max().item())
        target = int(clean_scores.argmax()) if target is None else target
        for i in range(grid.rows):
            for j in range(grid.cols):
                top, left = i * grid.stride_px, j * grid.stride_px
                under = (slice(None), slice(top, top + grid.occluder_px), slice(left, left + grid.width_px))
                occluded = clean.clone()
                occluded[under] = filled[under]
                scores = model(occluded[None])[0]
                maps[:, i, j] = torch.stack(
                    [seen[-1][strongest].sum(), scores.softmax(0)[target], scores.argmax().double()]
                )
    hook.remove()
    return strongest, maps, clean_scores.softmax(0)[target]


def worst(got, reference) -> float:
    assert got.feature_map == reference.feature_map
    assert got.clean_class == reference.clean_class
    assert torch.equal(got.class_map, reference.class_map)
    return max(
        error(got.activation_map, reference.activation_map), error(got.probability_map, reference.probability_map)
    )


# --- the grid --------------------------------------------------------------------------------------------------------


def test_the_papers_grid():
    grid = Grid.of(224)
    assert (grid.occluder_px, grid.stride_px, grid.rows, grid.cols) == (50, 6, 30, 30)
    positions = grid.positions()
    assert positions.shape == (900, 2)
    assert positions[[0, 1, 30, -1]].tolist() == [[0, 0], [0, 6], [6, 0], [174, 174]]


@given(n=st.integers(1, 300), p=st.integers(1, 300), s=st.integers(1, 300))
def test_the_square_always_fits_whole_and_one_more_would_not(n, p, s):
    if p > n:
        with pytest.raises(ValueError, match=f"occluder_px={p} was given; expected 1 to {n}"):
            Grid(n, p, s)
        return
    grid = Grid(n, p, s)
    assert grid.positions().max() + p <= n < grid.positions().max() + s + p


def test_a_clipped_position_covers_the_rest_as_captum_does():
    """captum: ceil((n - p) / s) + 1 positions a side, the last one cut off at the border (PEERS 2.19)."""
    grid = Grid(224, 50, 25, overhang="clip")
    assert (grid.rows, Grid(224, 50, 25).rows) == (8, 7)
    rows, _ = grid.extents()
    assert (rows.first[-1], rows.last[-1], rows.last[-2]) == (175, 223, 199)
    assert Grid(224, 50, 6, overhang="clip").rows == 30  # fits: nothing hangs over


def test_a_rectangle_has_its_own_rows_and_columns():
    grid = Grid(64, 10, 6, occluder_width_px=40)
    assert (grid.rows, grid.cols, grid.width_px) == (10, 5, 40)
    assert grid.positions()[-1].tolist() == [54, 24]
    with pytest.raises(ValueError, match="occluder_width_px=65 was given; expected 1 to 64"):
        Grid(64, 10, 6, occluder_width_px=65)
    with pytest.raises(ValueError, match="stride_px=6; a stride of at most the occluder's sides"):
        Grid(64, 10, 6, occluder_width_px=5, overhang="clip")
    with pytest.raises(ValueError, match="overhang='over'"):
        Grid(64, 10, 6, overhang="over")


def test_small_inputs_still_have_a_grid():
    assert Grid.of(9).stride_px == 1
    with pytest.raises(ValueError, match="stride_px=0"):
        Grid.of(32, stride_px=0)
    with pytest.raises(ValueError, match="occluder_px=0"):
        Grid.of(1)


# --- the maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "incremental"])
@pytest.mark.parametrize(("occluder", "stride", "target"), [(20, 19, None), (45, 17, 3), (96, 1, 0), (1, 40, 1)])
def test_all_three_maps_are_the_loop_over_positions(method, occluder, stride, target):
    torch.manual_seed(1)
    model = zfnet_like(classes=4, input_px=96).double()
    clean, filled = image_and_fill(96)
    grid = Grid.of(96, occluder, stride)
    got = sensitivity(trace(model, (3, 96, 96)), clean, filled, grid, target, memory_mb=8, method=method)
    strongest, maps, probability = slow_twin(model, model.relu5, clean, filled, grid, target)
    assert (got.layer, got.feature_map) == ("conv5", strongest)
    assert error(got.activation_map, maps[0]) <= 1e-12
    assert error(got.probability_map, maps[1]) <= 1e-12
    assert torch.equal(got.class_map.double(), maps[2])
    assert got.clean_probability == pytest.approx(float(probability), rel=1e-12)
    assert got.activation_map.shape == (grid.rows, grid.cols)


@pytest.mark.parametrize("method", ["dense", "incremental"])
@pytest.mark.parametrize("overhang", ["leave", "clip"])
@pytest.mark.parametrize(("height", "width"), [(9, 50), (61, 20)])
def test_rectangles_and_clipped_ones_are_the_loop_over_positions(method, overhang, height, width):
    torch.manual_seed(1)
    model = zfnet_like(classes=4, input_px=96).double()
    clean, _ = image_and_fill(96)
    filled = blurred(clean.permute(1, 2, 0), 4.0).permute(2, 0, 1).double()  # a fill that differs from pixel to pixel
    grid = Grid(96, height, 9, occluder_width_px=width, overhang=overhang)
    got = sensitivity(trace(model, (3, 96, 96)), clean, filled, grid, method=method)
    strongest, maps, _ = slow_twin(model, model.relu5, clean, filled, grid, None)
    assert got.feature_map == strongest
    assert error(got.activation_map, maps[0]) <= 1e-12
    assert error(got.probability_map, maps[1]) <= 1e-12
    assert torch.equal(got.class_map.double(), maps[2])


@pytest.mark.parametrize(("stride", "overhang"), [(16, "leave"), (8, "leave"), (13, "clip")])
@pytest.mark.filterwarnings("ignore")
def test_captum_agrees_on_the_same_grid(stride, overhang):
    """It averages overlapping squares back to pixels (PEERS 2.11), so our map is averaged too; 16 tiles the image."""
    torch.manual_seed(2)
    model = zfnet_like(classes=4, input_px=96).double()
    clean, filled = image_and_fill(96)
    grid = Grid(96, 16, stride, overhang=overhang)
    got = sensitivity(trace(model, (3, 96, 96)), clean, filled, grid, target=2)
    attribution = Occlusion(lambda x: model(x).softmax(1)).attribute(
        clean[None],
        sliding_window_shapes=(3, 16, 16),
        strides=(3, stride, stride),
        baselines=filled[None],
        target=2,
        perturbations_per_eval=16,
    )
    total, count = torch.zeros(96, 96, dtype=torch.float64), torch.zeros(96, 96, dtype=torch.float64)
    for (top, left), p in zip(grid.positions().tolist(), got.probability_map.flatten(), strict=True):
        total[top : top + 16, left : left + 16] += got.clean_probability - p
        count[top : top + 16, left : left + 16] += 1
    assert error(total / count, attribution[0, 0].double()) <= 1e-6  # captum returns float32 whatever it is given


NETWORKS = [
    ("alexnet", 224, 70, 60, "features.10"),
    ("vgg11_bn", 64, 10, 18, None),
    ("resnet18", 96, 12, 28, None),
    ("squeezenet1_1", 96, 12, 28, None),
    ("googlenet", 96, 12, 28, None),
    ("densenet121", 96, 12, 28, None),
    ("mobilenet_v2", 96, 12, 28, None),  # ReLU6: pointwise, though not understood
    ("mobilenet_v3_small", 96, 12, 28, "features.1.block.1.avgpool"),  # squeeze and excitation sees the whole map
    ("shufflenet_v2_x1_0", 96, 12, 28, None),  # channel shuffles: not understood
]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "size", "occluder", "stride", "dense_from"), NETWORKS, ids=[n[0] for n in NETWORKS])
def test_incremental_is_dense_on_torchvision_networks(name, size, occluder, stride, dense_from, dtype, bound):
    model = torchvision_network(name, seed=3).to(dtype)
    clean, filled = image_and_fill(size, dtype=dtype)
    graph, grid = trace(model, (3, size, size)), Grid.of(size, occluder, stride)
    got = sensitivity(graph, clean, filled, grid, memory_mb=64)
    dense = sensitivity(graph, clean, filled, grid, memory_mb=64, method="dense")
    assert worst(got, dense) <= bound
    assert dense.dense_from == graph.input != got.dense_from
    if dense_from:
        assert got.dense_from == dense_from


@pytest.mark.parametrize("size", [33, 64])
def test_incremental_is_dense_on_branches(size):
    torch.manual_seed(4)
    graph = trace(Branches().double(), (3, size, size))
    clean, filled = image_and_fill(size)
    for occluder, stride in ((1, 3), (5, 4), (13, 7), (30, 1)):
        grid = Grid(size, occluder, stride)
        got = sensitivity(graph, clean, filled, grid)
        assert worst(got, sensitivity(graph, clean, filled, grid, method="dense")) <= 1e-12


class Blocks(nn.Module):
    """A stem, then blocks of two unlike branches that are added or concatenated."""

    def __init__(self, blocks, classes=3):
        super().__init__()
        self.stem, maps = nn.Conv2d(2, 4, 3), 4
        self.branches, self.joins = nn.ModuleList(), []
        for kernels, stride, dilation, groups, join in blocks:
            pair = [
                nn.Conv2d(maps, 4, k, stride, dilation * (k // 2), dilation, groups if maps % groups == 0 else 1)
                for k in kernels
            ]
            self.branches.append(nn.ModuleList(pair))
            self.joins.append(join)
            maps = 4 if join == "add" else 8
        self.fc = nn.Linear(maps, classes)

    def forward(self, x):
        x = self.stem(x)
        for (one, other), join in zip(self.branches, self.joins, strict=True):
            a, b = one(x).relu(), other(x)
            x = a + b if join == "add" else torch.cat([b, a], 1)
        return self.fc(x.mean((2, 3)))


odd = st.sampled_from([1, 3, 5])
blocks = st.tuples(
    st.tuples(odd, odd), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.sampled_from(["add", "cat"])
)


@settings(max_examples=40)
@given(
    blocks=st.lists(blocks, min_size=1, max_size=4),
    sides=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    stride=st.integers(2, 5),
)
def test_incremental_is_the_loop_on_random_branches(blocks, sides, stride):
    torch.manual_seed(9)
    model = Blocks(blocks).double().eval()
    clean, filled = torch.randn(2, 2, 17, 17, dtype=torch.float64)
    overhang = "clip" if stride <= min(sides) else "leave"
    grid = Grid(17, sides[0], stride, occluder_width_px=sides[1], overhang=overhang)
    got = sensitivity(trace(model, (2, 17, 17)), clean, filled, grid, memory_mb=0.2)
    assert error(got.probability_map, probability_twin(model, clean, filled, grid, got.target)) <= 1e-12


def probability_twin(model, clean, filled, grid, target):
    """Fig. 7 (d), one position at a time."""
    found = torch.zeros(grid.rows, grid.cols, dtype=torch.float64)
    for i, j in itertools.product(range(grid.rows), range(grid.cols)):
        top, left, image = i * grid.stride_px, j * grid.stride_px, clean.clone()
        under = (slice(None), slice(top, top + grid.occluder_px), slice(left, left + grid.width_px))
        image[under] = filled[under]
        with torch.no_grad():
            found[i, j] = model(image[None]).softmax(1)[0, target]
    return found


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "resnet18", "squeezenet1_1", "googlenet", "densenet121"])
def test_incremental_is_the_loop_on_torchvision_networks(name):
    size = 96
    model = torchvision_network(name, seed=4).double()
    clean, filled = image_and_fill(size)
    grid = Grid(size, 25, 20, occluder_width_px=33, overhang="clip")
    got = sensitivity(trace(model, (3, size, size)), clean, filled, grid)
    assert error(got.probability_map, probability_twin(model, clean, filled, grid, got.target)) <= 1e-12


@pytest.mark.parametrize("method", ["dense", "incremental"])
def test_the_map_that_is_watched_is_hidden_where_a_convolution_gives_the_classes(method):
    """SqueezeNet's last convolution is its classifier: its strongest map would be a class's own scores."""
    model = torchvision_network("squeezenet1_1", seed=4).double()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # the twin's hook keeps what it is shown
    clean, filled = image_and_fill(96)
    grid = Grid(96, 25, 30)
    got = sensitivity(trace(model, (3, 96, 96)), clean, filled, grid, method=method)
    strongest, maps, _ = slow_twin(model, model.features[12].expand3x3_activation, clean, filled, grid, None)
    assert (got.layer, got.feature_map) == ("features.12.expand3x3", strongest)
    assert error(got.activation_map, maps[0]) <= 1e-12
    assert error(got.probability_map, maps[1]) <= 1e-12


def test_the_only_convolution_is_watched_though_it_gives_the_classes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert watched_layer(trace(model, (3, 9, 9))) == "0"
    with pytest.raises(UnknownLayer, match="no convolution"):
        watched_layer(trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2)))


@settings(max_examples=60)
@given(chain=chains(pools=("max", "average"), sizes=(14, 14)), occluder=st.integers(1, 9), stride=st.integers(1, 5))
def test_incremental_is_dense_on_random_chains(chain, occluder, stride):
    model, shape = chain
    shape = (shape[0], 14, 14)
    model = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    generator = torch.Generator().manual_seed(5)
    clean, filled = torch.randn(2, *shape, generator=generator, dtype=torch.float64) / 50
    graph, grid = trace(model, shape), Grid(14, occluder, stride)
    got = sensitivity(graph, clean, filled, grid, memory_mb=0.1)
    dense = sensitivity(graph, clean, filled, grid, memory_mb=0.1, method="dense")
    assert error(got.activation_map, dense.activation_map) <= 1e-12
    assert error(got.probability_map, dense.probability_map) <= 1e-12


# --- where windows end -----------------------------------------------------------------------------------------------


def cost_of_cut(plan: Incremental, sizes, windowed: set[str]) -> float:
    """By the definition: multiply-adds of windows and whole maps, and elements that are moved, counted one by one."""
    total = 0.0
    for op in plan.needed[1:]:
        per_cell = (op.module.weight.numel() if isinstance(op.module, nn.Conv2d) else 0) + ELEMENT * op.shape[0]
        if len(op.shape) < 3:
            continue
        total += per_cell * math.prod(sizes[op.name] if op.name in windowed else op.shape[1:])
        if op.name in windowed and op.window is not None:
            reach = [(n - 1) * s + m for n, s, m in zip(sizes[op.name], op.window.stride, op.window.span, strict=True)]
            total += ELEMENT * plan.graph[op.inputs[0]].shape[0] * math.prod(reach)
    for name in windowed:
        if any(user not in windowed for user in plan.graph.users[name]):
            total += ELEMENT * math.prod(plan.graph[name].shape)
    return total


@pytest.mark.parametrize("occluder", [1, 8, 20, 40, 64])
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "branches"])
def test_the_network_is_cut_where_the_count_is_least(name, occluder):
    model = Branches() if name == "branches" else torchvision_network(name, seed=0)
    graph = trace(model, (3, 64, 64))
    plan = Incremental(graph, Grid(64, occluder, 9).extents(), graph.activation_of(graph.last_convolution))
    names = list(plan.changes)
    for row, col in itertools.product((0, -1), repeat=2):
        sizes = {n: (int(rows.sizes[row]), int(cols.sizes[col])) for n, (rows, cols) in plan.changes.items()}
        costs = [cost_of_cut(plan, sizes, set(names[:end])) for end in range(1, len(names) + 1)]
        chosen = cost_of_cut(plan, sizes, set(plan._cut(sizes)))
        assert chosen == pytest.approx(min(costs))


def test_multiply_adds_are_those_of_the_papers_network():
    """1.17 thousand million an image; a pixel that is occluded changes at most what its windows reach."""
    graph = trace(build("zfnet"), (3, 224, 224))
    activation = graph.activation_of("conv5")
    whole, windows = Incremental(graph, Grid(224, 224, 1).extents(), activation).multiply_adds()
    assert (
        whole
        == windows
        == 110**2 * 147 * 96
        + 26**2 * 2400 * 256
        + 169 * (2304 * 384 + 3456 * 640)
        + (9216 * 4096 + 4096 * 4096 + 4096 * 1000)
    )
    limits = []
    for square, stride in ((16, 4), (32, 8), (50, 6), (64, 16)):
        whole, windows = Incremental(graph, Grid(224, square, stride).extents(), activation).multiply_adds()
        limits.append(round(whole / windows, 2))
    assert limits == [5.81, 4.63, 3.48, 3.17]


@pytest.mark.parametrize("occluder", [(1, 1), (5, 2), (12, 30)])
def test_every_position_is_in_one_group_whose_windows_hold_what_changes(occluder):
    grid = Grid(64, occluder[0], 3, occluder_width_px=occluder[1])
    graph = trace(torchvision_network("squeezenet1_1", seed=0), (3, 64, 64))
    plan = Incremental(graph, grid.extents(), graph.activation_of(graph.last_convolution))
    places = torch.cartesian_prod(torch.arange(grid.rows), torch.arange(grid.cols))
    groups = plan.groups(places)
    assert torch.cat([group.index for group in groups]).sort().values.tolist() == list(range(len(places)))
    for group in groups:
        assert torch.equal(places[group.index], torch.stack(group.places, 1))
        for name, sizes in group.sizes.items():
            for axis, at, size in zip(plan.changes[name], group.places, sizes, strict=True):
                origin = axis.origins(at, size)
                assert (origin >= 0).all()
                assert (origin + size <= axis.length).all()
                assert (origin <= axis.first[at]).all()
                assert (origin + size > axis.last[at]).all()


# --- probabilities, refinement, memory -------------------------------------------------------------------------------


def test_all_probabilities_hold_the_map_and_add_up():
    torch.manual_seed(7)
    graph = trace(zfnet_like(classes=4, input_px=96).double(), (3, 96, 96))
    clean, filled = image_and_fill(96)
    got = sensitivity(graph, clean, filled, Grid.of(96, 30, 11), all_probabilities=True)
    assert got.probabilities.shape == (7, 7, 4)
    assert torch.equal(got.probabilities[..., got.target], got.probability_map)
    assert torch.equal(got.probabilities.argmax(2), got.class_map)
    assert error(got.probabilities.sum(2), torch.ones(7, 7)) <= 1e-12
    assert sensitivity(graph, clean, filled, Grid.of(96, 30, 11)).probabilities is None


def test_refinement_is_exact_where_it_computes_and_linear_between():
    torch.manual_seed(8)
    graph = trace(zfnet_like(classes=4, input_px=96).double(), (3, 96, 96))
    clean, filled = image_and_fill(96)
    grid = Grid(96, 20, 7, occluder_width_px=34)  # 11 x 9 positions: nodes at rows 0, 4, 8, 10 and columns 0, 4, 8
    exact = sensitivity(graph, clean, filled, grid, all_probabilities=True)
    coarse = sensitivity(graph, clean, filled, grid, refine=0, all_probabilities=True)
    assert exact.exact
    assert not coarse.exact
    for name in ("activation_map", "probability_map", "class_map", "probabilities"):
        assert error(getattr(coarse, name)[[0, 4, 8, 10]][:, ::4], getattr(exact, name)[[0, 4, 8, 10]][:, ::4]) <= 1e-12
    middle = exact.probability_map[[0, 0, 4, 4], [0, 4, 0, 4]].mean()
    assert float(coarse.probability_map[2, 2]) == pytest.approx(float(middle), rel=1e-12)
    assert float(coarse.activation_map[9, 0]) == pytest.approx(
        float(exact.activation_map[[8, 10], 0].mean()), rel=1e-12
    )
    half = sensitivity(graph, clean, filled, grid, refine=0.5)
    same = (half.probability_map - exact.probability_map).abs() <= 1e-12
    assert 12 + round(0.5 * 99) <= int(same.sum()) < 99
    most = (coarse.probability_map - coarse.clean_probability).abs() / (
        coarse.probability_map - coarse.clean_probability
    ).abs().max()
    clean_sum = graph.run(clean[None], ["relu5"])["relu5"][0, coarse.feature_map].sum()
    most += (coarse.activation_map - clean_sum).abs() / (coarse.activation_map - clean_sum).abs().max()
    assert same.flatten()[most.flatten().argsort(descending=True)[:49]].all()


@pytest.mark.parametrize("refine", [0, 0.2, 0.99, 1])
def test_computed_positions_are_as_many_as_are_run(monkeypatch, refine):
    graph = trace(zfnet_like(classes=4, input_px=96), (3, 96, 96))
    clean, filled = (image.float() for image in image_and_fill(96))
    grid, run, counts = Grid(96, 20, 7, occluder_width_px=34), occlusion._measure, []
    monkeypatch.setattr(occlusion, "_measure", lambda *args: (counts.append(len(args[1])), run(*args))[1])
    sensitivity(graph, clean, filled, grid, refine=refine)
    *computed, lowest = counts
    assert lowest == 1
    assert computed_positions(grid, refine) == sum(computed)


def test_refinement_of_one_position_and_of_all():
    graph = trace(Branches().double(), (3, 33, 33))
    clean, filled = image_and_fill(33)
    one = Grid(33, 33, 1)
    assert worst(sensitivity(graph, clean, filled, one, refine=0.3), sensitivity(graph, clean, filled, one)) <= 1e-12
    grid = Grid(33, 9, 5)
    assert worst(sensitivity(graph, clean, filled, grid, refine=0.99), sensitivity(graph, clean, filled, grid)) <= 1e-12


@pytest.mark.parametrize("method", ["incremental", "dense"])
def test_no_batch_is_larger_than_memory_allows(method, monkeypatch):
    """However many positions there are, so many go together that what is held for each of them fits."""
    graph = trace(Branches().double(), (3, 64, 64))
    clean, filled = image_and_fill(64)
    seen = []
    run = Occluded._batch
    monkeypatch.setattr(Occluded, "_batch", lambda self, rows, *rest: seen.append(len(rows)) or run(self, rows, *rest))
    for stride in (9, 2):
        seen.clear()
        grid = Grid(64, 10, stride)
        sensitivity(graph, clean, filled, grid, memory_mb=1, method=method)
        plan = Incremental(graph, grid.extents(), graph.activation_of(graph.last_convolution), method == "incremental")
        places = torch.cartesian_prod(torch.arange(grid.rows), torch.arange(grid.cols))
        most = max(2**20 // (8 * group.elements) for group in plan.groups(places))
        assert sum(seen) == len(places) + 1  # the lowest once more, for all its classes
        assert max(seen) <= most


def test_blur_is_a_gaussian():
    pixels = torch.zeros(61, 61, 3)
    pixels[30, 30] = 1
    got = blurred(pixels, 4.0)[..., 0]
    at = torch.arange(61) - 30.0
    expected = torch.exp(-(at[:, None] ** 2 + at**2) / 32) * ((at.abs() <= 12)[:, None] & (at.abs() <= 12))
    assert error(got, expected / expected.sum()) <= 1e-5
    assert error(blurred(torch.full((20, 9, 3), 7, dtype=torch.uint8), 10.0), torch.full((20, 9, 3), 7.0)) <= 1e-5


# --- details ---------------------------------------------------------------------------------------------------------


KEPT = []


@torch.fx.wrap
def keep(x):
    """Keeps what the network was shown."""
    KEPT.append(x.clone())
    return x * 1


def test_every_position_is_covered_by_the_fill_once_and_nothing_else_changes():
    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 1, 1), nn.Linear(1, 2)

        def forward(self, x):
            return self.fc(self.conv(keep(x)).amax((2, 3)))

    graph = trace(Watching(), (3, 8, 8))
    clean, filled = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    KEPT.clear()
    grid = Grid(8, 3, 2)
    sensitivity(graph, clean, filled, grid, memory_mb=1, method="dense")
    *shown, lowest = torch.cat(KEPT[1:])[-len(grid.positions()) - 1 :]
    assert any(torch.equal(lowest, image) for image in shown)
    for image, (top, left) in zip(shown, grid.positions().tolist(), strict=True):
        expected = torch.zeros(3, 8, 8)
        expected[:, top : top + 3, left : left + 3] = 1
        assert torch.equal(image, expected)


def test_equal_activations_and_classes_take_the_first():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    got = sensitivity(trace(model, (3, 9, 9)), torch.ones(3, 9, 9), torch.zeros(3, 9, 9), Grid(9, 3, 3))
    assert (got.feature_map, got.clean_class) == (0, 0)
    assert not got.class_map.any()


def test_a_network_that_ends_in_a_softmax_is_not_given_a_second_one():
    torch.manual_seed(6)
    scores = zfnet_like(classes=4, input_px=96).double()
    clean, filled = image_and_fill(96)
    grid = Grid.of(96, 30, 33)
    one = sensitivity(trace(scores, (3, 96, 96)), clean, filled, grid)
    two = sensitivity(trace(nn.Sequential(scores, nn.Softmax(1)), (3, 96, 96)), clean, filled, grid)
    assert error(two.probability_map, one.probability_map) <= 1e-12


def test_memory_does_not_matter_and_the_images_are_left_alone():
    graph = trace(Branches().double(), (3, 40, 40))
    clean, filled = image_and_fill(40)
    before = clean.clone()
    one, many = (sensitivity(graph, clean, filled, Grid.of(40, stride_px=3), memory_mb=mb) for mb in (0.5, 1000))
    assert worst(one, many) <= 1e-12
    assert torch.equal(clean, before)


def test_refusals():
    graph = trace(zfnet_like(classes=4, input_px=96), (3, 96, 96))
    clean, filled = image_and_fill(96, dtype=torch.float32)
    grid = Grid.of(96)
    with pytest.raises(ValueError, match="grid is for 64 px a side; the network was traced for 96 x 96"):
        sensitivity(graph, clean, filled, Grid.of(64))
    with pytest.raises(ValueError, match=r"filled has shape \(3, 9, 9\)"):
        sensitivity(graph, clean, filled[:, :9, :9], grid)
    with pytest.raises(ValueError, match="target=4 was given; the network has the classes 0 to 3"):
        sensitivity(graph, clean, filled, grid, target=4)
    with pytest.raises(ValueError, match="method='fast'"):
        sensitivity(graph, clean, filled, grid, method="fast")
    with pytest.raises(ValueError, match=r"refine=1\.5, memory_mb=0"):
        sensitivity(graph, clean, filled, grid, refine=1.5, memory_mb=0)
    with pytest.raises(ValueError, match="not finite"):
        sensitivity(graph, clean * torch.nan, filled, grid)
    with pytest.raises(ValueError, match="one row of class scores is expected"):
        sensitivity(trace(zfnet_like(), (3, 96, 96)), clean, filled, grid)
