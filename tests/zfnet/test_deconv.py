"""Projections against the paper's definition written out cell by cell, against captum, and against gradients."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution, GuidedBackprop
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Branches, chains, error, torchvision_network, zfnet_like
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from zfnet import deconv
from zfnet.ascent import run_whole, run_windows
from zfnet.deconv import Cells, Semantics, Unprojectable, project, project_images, record
from zfnet.receptive import fields_beneath, receptive_field
from zfnet.tracing import trace
from zfnet.windows import Windows

# --- the slow twin: ECCV 2014 Sec. 2.1, whole maps, one cell at a time -----------------------------------------------


EVERY = slice(None)


def naive_projection(chain, image: Tensor, feature_map: int, row, col, unpool: str = "sum") -> Tensor:
    """The projection [channels, rows, cols] of one cell of the last module's output, for an nn.Sequential.

    `EVERY` row and column: of all cells of the map at once.
    """
    inputs, x = [], image[None]
    for module in chain:
        inputs.append(x)
        x = module(x)
    signal = torch.zeros_like(x)
    signal[0, feature_map, row, col] = x[0, feature_map, row, col]
    for module, seen in zip(reversed(chain), reversed(inputs), strict=True):
        if isinstance(module, nn.ReLU):
            signal = signal.clamp(min=0)
        elif isinstance(module, nn.Conv2d):
            signal = transposed_filtering(signal, module, seen.shape)
        elif isinstance(module, nn.MaxPool2d):
            signal = naive_unpooling(signal, module, seen, unpool)
        elif isinstance(module, nn.ZeroPad2d):
            left, right, top, bottom = module.padding
            signal = signal[:, :, top : signal.shape[2] - bottom, left : signal.shape[3] - right]
        else:  # "we do not use any contrast normalization operations when in this reconstruction path"
            assert isinstance(module, nn.LocalResponseNorm | nn.Identity)
    return signal[0]


def transposed_filtering(signal: Tensor, conv: nn.Conv2d, shape) -> Tensor:
    """Every output cell paints its filter, weighted, onto the cells it was computed from; no bias."""
    below = torch.zeros(shape, dtype=signal.dtype)
    per_group = conv.out_channels // conv.groups
    (sr, sc), (pr, pc), (dr, dc) = conv.stride, conv.padding, conv.dilation
    for _, o, i, j in signal.nonzero().tolist():
        first = o // per_group * conv.weight.shape[1]
        for a in range(conv.kernel_size[0]):
            for b in range(conv.kernel_size[1]):
                r, c = i * sr - pr + a * dr, j * sc - pc + b * dc
                if 0 <= r < shape[2] and 0 <= c < shape[3]:
                    below[0, first : first + conv.weight.shape[1], r, c] += signal[0, o, i, j] * conv.weight[o, :, a, b]
    return below


def naive_unpooling(signal: Tensor, pool: nn.MaxPool2d, seen: Tensor, unpool: str) -> Tensor:
    """Each signal to the place of its window's first maximum; `unpool` says what a place with several signals gets."""
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    (kr, kc), (sr, sc), (pr, pc), (dr, dc) = (
        pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    rows, cols = seen.shape[2:]
    signals: dict[tuple, list] = {}
    for m in range(signal.shape[1]):
        for i in range(signal.shape[2]):
            for j in range(signal.shape[3]):
                window = [
                    (r, c)
                    for r in (i * sr - pr + a * dr for a in range(kr))
                    for c in (j * sc - pc + b * dc for b in range(kc))
                    if 0 <= r < rows and 0 <= c < cols
                ]
                switch = max(window, key=lambda at: seen[0, m, at[0], at[1]].item())  # max: the first of equals
                signals.setdefault((m, *switch), []).append(signal[0, m, i, j].item())
    rule = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "last": lambda v: v[-1]}[unpool]
    below = torch.zeros_like(seen)
    for (m, r, c), values in signals.items():
        below[0, m, r, c] = rule(values)
    return below


def whole(projections, index: int, image_shape) -> Tensor:
    """One projection on the image's own canvas; nothing may be lost outside it."""
    pixels, top, left = projections.pixels[index], int(projections.top[index]), int(projections.left[index])
    margin = 2 * max(*pixels.shape[1:], *image_shape[1:], abs(top), abs(left))
    canvas = torch.zeros(image_shape[0], image_shape[1] + 2 * margin, image_shape[2] + 2 * margin, dtype=pixels.dtype)
    canvas[:, margin + top : margin + top + pixels.shape[1], margin + left : margin + left + pixels.shape[2]] = pixels
    inner = canvas[:, margin:-margin, margin:-margin]
    assert canvas.count_nonzero() == inner.count_nonzero()
    return inner


def some_cells(activation: Tensor, count: int = 4, seed: int = 0) -> Cells:
    """The strongest maps of all four corners, where one fires, and random cells that fire."""
    generator = torch.Generator().manual_seed(seed)
    images, _, rows, cols = activation.shape
    corners = [(0, 0), (0, cols - 1), (rows - 1, 0), (rows - 1, cols - 1)]
    picks = [(k % images, int(activation[k % images, :, r, c].argmax()), r, c) for k, (r, c) in enumerate(corners)]
    picks = [cell for cell in picks if activation[cell] > 0]
    firing = (activation > 0).nonzero()
    picks += firing[torch.randperm(len(firing), generator=generator)[:count]].tolist()
    return Cells(*torch.tensor(picks, dtype=torch.long).reshape(-1, 4).T)


# --- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3", "conv5"])
def test_zfnet_with_contrast_normalisation_projects_as_the_paper_defines_it(layer):
    torch.manual_seed(1)
    model = zfnet_like((3, 3, 3, 3, 3)).double()
    images = torch.randn(2, 3, 71, 95, dtype=torch.float64)
    graph = trace(model, images.shape[1:])
    kept = record(graph, images, [layer])
    cells = some_cells(kept.activation(layer))
    projections = project(kept, layer, cells)
    upto = list(graph.operations).index(graph.activation_of(layer))  # the first operation is the input
    with torch.no_grad():
        for index, (image, *cell) in enumerate(zip(*(c.tolist() for c in cells), strict=True)):
            reference = naive_projection(model[:upto], images[image], *cell)
            assert error(whole(projections, index, images.shape[1:]), reference) <= 1e-12


@settings(max_examples=60)
@given(
    chain=chains(sizes=(6, 13), depth=(2, 4)), unpool=st.sampled_from(["sum", "max", "last"]), seed=st.integers(0, 99)
)
def test_random_integer_chains_project_exactly(chain, unpool, seed):
    model, shape = chain
    images = torch.randint(-2, 3, (2, *shape), generator=torch.Generator().manual_seed(seed)).double()
    graph = trace(model, shape)
    kept = record(graph, images, [graph.output], Semantics(unpool=unpool))
    cells = some_cells(kept.activation(graph.output), 2, seed)
    projections = project(kept, graph.output, cells)
    with torch.no_grad():
        for index, (image, *cell) in enumerate(zip(*(c.tolist() for c in cells), strict=True)):
            reference = naive_projection(model, images[image], *cell, unpool)
            assert torch.equal(whole(projections, index, shape), reference)


@settings(max_examples=20)
@given(chain=chains(sizes=(6, 13), depth=(2, 4)), seed=st.integers(0, 99))
def test_the_mean_of_shared_switches(chain, seed):
    model, shape = chain
    images = torch.randint(-2, 3, (1, *shape), generator=torch.Generator().manual_seed(seed)).double()
    graph = trace(model, shape)
    kept = record(graph, images, [graph.output], Semantics(unpool="mean"))
    cells = some_cells(kept.activation(graph.output), 2, seed)
    projections = project(kept, graph.output, cells)
    with torch.no_grad():
        for index, (_, *cell) in enumerate(zip(*(c.tolist() for c in cells), strict=True)):
            reference = naive_projection(model, images[0], *cell, "mean")
            assert error(whole(projections, index, shape), reference) <= 1e-12


def test_a_cell_of_a_pool_goes_to_the_place_of_its_maximum_alone():
    images = torch.rand(1, 2, 9, 9, dtype=torch.float64)
    graph = trace(nn.Sequential(nn.MaxPool2d(3, 2)), (2, 9, 9))
    kept = record(graph, images, ["0"])
    pixels, top, left = project(kept, "0", Cells(*torch.tensor([[0], [1], [2], [3]])))
    assert (int(top), int(left)) == (4, 6)
    window = images[0, 1, 4:7, 6:9]
    assert torch.equal(pixels[0, 1], torch.where(window == window.max(), window, 0))
    assert not pixels[0, 0].any()


@settings(max_examples=40)
@given(chain=chains(sizes=(6, 13), depth=(2, 4)), seed=st.integers(0, 99))
def test_all_cells_of_a_map_project_as_the_whole_deconvnet_does(chain, seed):
    model, shape = chain
    images = torch.randint(-2, 3, (2, *shape), generator=torch.Generator().manual_seed(seed)).double()
    graph = trace(model, shape)
    kept = record(graph, images, [graph.output], Semantics(cells="all"))
    image, feature_map = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0])
    pixels, top, left = project(kept, graph.output, Cells(image, feature_map, image * 0, image * 0))
    assert (top.tolist(), left.tolist()) == ([0] * 4, [0] * 4)
    with torch.no_grad():
        for index, (i, m) in enumerate(zip(image.tolist(), feature_map.tolist(), strict=True)):
            assert torch.equal(pixels[index], naive_projection(model, images[i], m, EVERY, EVERY))


def test_all_cells_of_a_map_are_not_the_sum_of_its_cells():
    images = torch.tensor([[[[1.0, 0.0, 2.0]]]])
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 2), bias=False), nn.ReLU(), nn.Conv2d(1, 1, (1, 2), bias=False))
    model[0].weight.data[:] = torch.tensor([[[[1.0, 1.0]]]])
    model[2].weight.data[:] = torch.tensor([[[[2.0, -1.0]]]])
    graph, whole_map = trace(model, (1, 1, 3)), Semantics(cells="all", seed="one")
    nowhere = Cells(*torch.zeros(4, 1, dtype=torch.long))
    together = project(record(graph, images, ["2"], whole_map), "2", nowhere).pixels
    assert together.tolist() == [[[[2.0, 2.0, 0.0]]]]  # the signals 2 and -1 of conv2's only cell; -1 is rectified


# --- windows alone against the image run whole ------------------------------------------------------------------------


def in_windows(graph, images: Tensor, layer: str, cells: Cells, **semantics):
    """Activations and projections, in the cells' order, with no image run whole."""
    route = deconv._Route.of(graph, layer, Semantics(**semantics))
    with torch.no_grad():
        activation, pixels = route.up_and_down(images, cells)
    return activation, pixels


def whole_and_in_windows(graph, images, layer, cells, **semantics):
    """(activations, pixels) from images run whole, and from the cells' windows alone."""
    kept = record(graph, images, [layer], Semantics(**semantics))
    whole = kept.activation(layer)[tuple(cells)], project(kept, layer, cells).pixels
    return whole, in_windows(graph, images, layer, cells, **semantics)


@settings(max_examples=100)
@given(chain=chains(sizes=(6, 20), depth=(2, 5)), seed=st.integers(0, 99), blank=st.booleans())
def test_switches_of_windows_are_those_of_the_whole_image_bit_for_bit(chain, seed, blank):
    """Small integers: full of equal maxima; a blank image has nothing else."""
    model, shape = chain
    images = torch.randint(-2, 3, (2, *shape), generator=torch.Generator().manual_seed(seed)).double()
    images = images * 0 if blank else images
    graph = trace(model, shape)
    outputs, whole = run_whole(graph, images, [graph.output], Semantics())
    plan = fields_beneath(graph, graph.output, inside=True)
    _, rows, cols = graph[graph.output].shape
    corners = torch.tensor([[i, r, c] for i in (0, 1) for r in (0, rows // 2, rows - 1) for c in (0, cols - 1)])
    windows = Windows(*corners.T)
    with torch.no_grad():
        output, kept = run_windows(graph, images, graph.output, plan, windows, Semantics())
    assert torch.equal(output[:, :, 0, 0], outputs[graph.output][corners[:, 0], :, corners[:, 1], corners[:, 2]])
    for name, switches in kept.items():
        _, *size = graph[name].shape
        expected, beside = windows.cut(whole[name], plan[name]), windows.beside(plan[name], size)
        assert torch.equal(switches if beside is None else switches.masked_fill(beside, 0), expected), name


@settings(max_examples=60)
@given(chain=chains(pools=("max", "average"), sizes=(6, 20), depth=(2, 4)), seed=st.integers(0, 99))
def test_random_chains_project_the_same_from_their_windows(chain, seed):
    model, shape = chain
    images = torch.randint(-2, 3, (2, *shape), generator=torch.Generator().manual_seed(seed)).double()
    graph = trace(model, shape)
    cells = some_cells(record(graph, images, [graph.output]).activation(graph.output), 3, seed)
    whole, windows = whole_and_in_windows(graph, images, graph.output, cells)
    exact = not any(isinstance(module, nn.AvgPool2d) for module in model)
    for got, expected in zip(windows, whole, strict=True):
        assert torch.equal(got, expected) or (not exact and error(got, expected) <= 1e-12)


OTHER_RULES = {"relu": "guided", "normalisation": "gradient", "seed": "one"}


@pytest.mark.parametrize("semantics", [{}, OTHER_RULES], ids=["paper", "others"])
@pytest.mark.parametrize("layer", ["conv1", "conv3", "conv5", "fc6"])
def test_zfnet_projects_the_same_from_its_windows(layer, semantics):
    torch.manual_seed(10)
    model = zfnet_like(classes=3).double()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    graph = trace(model)
    cells = some_cells(record(graph, images, [layer]).activation(layer))
    whole, windows = whole_and_in_windows(graph, images, layer, cells, **semantics)
    for got, expected in zip(windows, whole, strict=True):
        assert error(got, expected) <= 1e-12


@pytest.mark.parametrize("layer", ["stem", "right", "cat", "shrink", "last", "fc"])
def test_branches_project_the_same_from_their_windows(layer):
    torch.manual_seed(11)
    images = torch.randn(2, 3, 37, 61, dtype=torch.float64)
    graph = trace(Branches().eval().double(), images.shape[1:])
    cells = some_cells(record(graph, images, [layer]).activation(layer))
    whole, windows = whole_and_in_windows(graph, images, layer, cells)
    for got, expected in zip(windows, whole, strict=True):
        assert error(got, expected) <= 1e-12


@pytest.fixture(scope="module")
def scattered():
    """A graph, images, and cells of three layers: from none to many in an image."""
    torch.manual_seed(12)
    graph = trace(zfnet_like(classes=3).double())
    images = torch.randn(5, 3, 224, 224, dtype=torch.float64)
    cells = {
        "conv1": Cells(*torch.tensor([[4, 0, 5, 6], [0, 3, 100, 109]]).T),
        "conv3": Cells(*torch.tensor([[0, 1, 6, 6], [3, 2, 0, 12]]).T),
        "conv5": Cells(*torch.tensor([[0, m, 2 * m, 12 - m] for m in range(6)] + [[1, 2, 3, 4]]).T),
    }
    return graph, images, cells


@pytest.mark.parametrize("semantics", [{}, {"unpool": "last"}, {"cells": "all"}], ids=str)
def test_images_run_whole_or_in_windows_give_the_same(scattered, semantics):
    graph, images, cells = scattered
    kept = record(graph, images, list(cells), Semantics(**semantics))
    seen = {layer: [] for layer in cells}
    for layer, which, activation, projections in project_images(graph, images, cells, Semantics(**semantics)):
        seen[layer] += which.tolist()
        some = Cells(*(column[which] for column in cells[layer]))
        expected = project(kept, layer, some)
        assert error(activation, kept.activation(layer)[tuple(some)]) <= 1e-12
        assert error(projections.pixels, expected.pixels) <= 1e-12
        assert torch.equal(projections.top, expected.top)
        assert torch.equal(projections.left, expected.left)
    assert {layer: sorted(which) for layer, which in seen.items()} == {
        layer: list(range(len(some.image))) for layer, some in cells.items()
    }


def test_the_cheaper_way_is_chosen_for_every_image(scattered, monkeypatch):
    graph, images, cells = scattered
    ran = []
    monkeypatch.setattr(deconv, "run_whole", lambda g, x, *rest: ran.append(len(x)) or run_whole(g, x, *rest))
    list(project_images(graph, images, cells))
    assert ran == [1]  # the image with six cells of conv5; two others have one or two, and two have none


def counted_multiply_adds(graph, images, cells) -> int:
    """What torch is asked to do by the forward passes: twice the multiply-adds of convolutions and products."""
    route = deconv._Route.of(graph, "conv5", Semantics())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run_windows(graph, images, route.target, route.plan, Windows(*(cells[i] for i in (0, 2, 3))), Semantics())
    return counter.get_total_flops() // 2


def test_multiply_adds_are_counted_as_they_are_done(scattered):
    graph, images, cells = scattered
    one = Cells(*(column[:1] for column in cells["conv5"]))
    assert counted_multiply_adds(graph, images, one) == deconv._Route.of(graph, "conv5", Semantics()).multiply_adds


# --- against captum --------------------------------------------------------------------------------------------------


class Whole(fx.Tracer):
    """Does not look into convolutions, those of our own class either."""

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def up_to(model: nn.Module, graph, layer: str) -> nn.Module:
    """The model cut off at a layer's activation, without in-place ReLUs (captum's hooks do not bear them)."""
    model = copy.deepcopy(model)
    cut = fx.GraphModule(model, Whole().trace(model))
    wanted = graph.activation_of(layer)
    node = next(n for n in cut.graph.nodes if wanted in (n.name, n.target))
    cut.graph.output_node().args = (node,)
    cut.graph.eliminate_dead_code()
    cut.recompile()
    for module in cut.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return cut.eval()


def captum_error(model: nn.Module, images: Tensor, layer: str, method=Deconvolution, **semantics) -> float:
    """The largest error over some cells that fire; captum starts from 1, so it is scaled by the activation."""
    graph = trace(model, images.shape[1:])
    kept = record(graph, images, [layer], Semantics(**semantics))
    cells = some_cells(kept.activation(layer))
    projections = project(kept, layer, cells)
    attribution, worst = method(up_to(model, graph, layer)), 0.0
    flat = len(graph[graph.activation_of(layer)].shape) == 1
    for index, (image, *cell) in enumerate(zip(*(c.tolist() for c in cells), strict=True)):
        x = images[image : image + 1].clone().requires_grad_()
        unit = attribution.attribute(x, target=cell[0] if flat else tuple(cell)).detach()[0]
        reference = unit * kept.activation(layer)[image, cell[0], cell[1], cell[2]]
        worst = max(worst, error(whole(projections, index, images.shape[1:]), reference))
    return worst


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv4", "conv5", "fc6", "fc8"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.filterwarnings("ignore")
def test_captum_agrees_on_zfnet_without_normalisation(layer, dtype, bound):
    torch.manual_seed(2)
    model = zfnet_like(normalisation=False, classes=4).to(dtype)
    assert captum_error(model, torch.randn(2, 3, 224, 224, dtype=dtype), layer) <= bound


TORCHVISION = [
    ("alexnet", 127, ["features.3", "features.10"]),
    ("vgg11", 64, ["features.3", "features.18"]),
    ("vgg11_bn", 64, ["features.4", "features.25"]),
    ("resnet18", 97, ["layer1.1.conv2", "layer2.0.conv1", "layer4.1.conv2"]),
    ("squeezenet1_1", 95, ["features.3.squeeze", "features.12.expand3x3", "classifier.1"]),
    ("densenet121", 64, ["features.denseblock1.denselayer6.conv2", "features.denseblock3.denselayer2.conv1"]),
]


@pytest.mark.parametrize(("name", "size", "layers"), TORCHVISION, ids=[name for name, _, _ in TORCHVISION])
@pytest.mark.filterwarnings("ignore")
def test_captum_agrees_on_torchvision_networks(name, size, layers):
    model = torchvision_network(name, seed=3).double()
    images = torch.randn(1, 3, size, size + 10, dtype=torch.float64)
    for layer in layers:
        assert captum_error(model, images, layer) <= 1e-12, layer


@settings(max_examples=25)
@given(chain=chains(pools=("max", "average")), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore")
def test_captum_agrees_on_random_chains(chain, seed):
    model, shape = chain
    images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert captum_error(model, images, trace(model, shape).output) <= 1e-12


@pytest.mark.filterwarnings("ignore")
def test_guided_agrees_with_captums_guided_backpropagation():
    torch.manual_seed(4)
    model = zfnet_like(normalisation=False).double()
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    assert captum_error(model, images, "conv4", GuidedBackprop, relu="guided") <= 1e-12


# --- against gradients -----------------------------------------------------------------------------------------------


class Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, signal):
        return signal.clamp(min=0)


class RectifyOnTheWayDown(TorchFunctionMode):
    """Every ReLU, in whatever form, rectifies the gradient (captum sees only the modules)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            return Rectified.apply(args[0])
        return func(*args, **(kwargs or {}))


def gradient_error(model, images, layer, rectify: bool, **semantics) -> float:
    graph = trace(model, images.shape[1:])
    kept = record(graph, images, [layer], Semantics(seed="one", **semantics))
    cells = some_cells(kept.activation(layer))
    projections = project(kept, layer, cells)
    cut, worst = up_to(model, graph, layer), 0.0
    for index, (image, *cell) in enumerate(zip(*(c.tolist() for c in cells), strict=True)):
        x = images[image : image + 1].clone().requires_grad_()
        if rectify:
            with RectifyOnTheWayDown():
                y = cut(x)
        else:
            y = cut(x)
        (reference,) = torch.autograd.grad(y.reshape(kept.activation(layer)[:1].shape)[(0, *cell)], x)
        worst = max(worst, error(whole(projections, index, images.shape[1:]), reference[0]))
    return worst


@pytest.mark.parametrize("layer", ["stem", "left", "right", "cat", "shrink", "down", "last", "fc", "avg_pool2d"])
@pytest.mark.parametrize("relu", ["deconvnet", "gradient"])
def test_branches_sum_their_windows(layer, relu):
    torch.manual_seed(5)
    model = Branches().eval().double()
    images = torch.randn(2, 3, 37, 61, dtype=torch.float64)
    assert gradient_error(model, images, layer, rectify=relu == "deconvnet", relu=relu) <= 1e-12


class Forks(nn.Module):
    """A stem, then forks: two filterings side by side that are added up or concatenated, with or without a skip.

    Small integers, so that what is equal is equal in any order of summation.
    """

    def __init__(self, maps: int, forks: list[dict], generator: torch.Generator):
        super().__init__()
        self.stem = nn.Conv2d(2, maps, 3, stride=2, padding=1)
        self.forks, self.layers = forks, nn.ModuleList()
        for fork in forks:
            branches = [nn.Conv2d(maps, maps, k, padding="same", dilation=d, groups=g) for k, d, g in fork["branches"]]
            pool = nn.MaxPool2d(3, fork["stride"], 1, ceil_mode=fork["ceil"])
            joined = nn.Conv2d(maps * (len(branches) if fork["cat"] else 1), maps, 1)
            self.layers.append(nn.ModuleList([nn.ModuleList(branches), pool, joined]))
        self.last = nn.Conv2d(maps, 2, 1)
        for parameter in self.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for fork, (branches, pool, joined) in zip(self.forks, self.layers, strict=True):
            sides = [branch(x).relu() for branch in branches]
            y = torch.cat(sides, 1) if fork["cat"] else sides[0] + sides[1]
            y = joined(y)
            x = pool(F.relu(x + y if fork["skip"] else y))
        return F.relu(self.last(x))


@st.composite
def forked(draw) -> tuple[nn.Module, tuple[int, int, int]]:
    branch = st.tuples(st.integers(1, 4), st.integers(1, 2), st.sampled_from([1, 2]))
    flags = {name: st.booleans() for name in ("ceil", "cat", "skip")}
    fork = st.fixed_dictionaries({"branches": st.tuples(branch, branch), "stride": st.integers(1, 2), **flags})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (2, draw(st.integers(7, 30)), draw(st.integers(7, 30)))
    return Forks(4, draw(st.lists(fork, min_size=1, max_size=3)), generator).double().eval(), shape


@settings(max_examples=30)
@given(forks=forked(), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore")
def test_random_branches_sum_their_windows(forks, seed):
    model, shape = forks
    images = torch.randint(-2, 3, (2, *shape), generator=torch.Generator().manual_seed(seed)).double()
    graph = trace(model, shape)
    assert gradient_error(model, images, graph.output, rectify=True) == 0
    cells = some_cells(record(graph, images, [graph.output]).activation(graph.output), 2, seed)
    whole, windows = whole_and_in_windows(graph, images, graph.output, cells)
    for got, expected in zip(windows, whole, strict=True):
        assert torch.equal(got, expected)


class Bins(nn.Module):
    """Averages over bins of several sizes, more of them than cells too, and over the whole map."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 5, 3), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 2)
        self.shrink, self.repeat, self.fc = nn.AdaptiveAvgPool2d((5, 3)), nn.AdaptiveAvgPool2d((7, 7)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(self.shrink(F.relu(self.conv1(x)))))
        return self.fc(F.relu(self.conv3(self.repeat(x))).mean((2, 3)))


@pytest.mark.parametrize("layer", ["shrink", "conv2", "repeat", "conv3", "mean", "fc"])
@pytest.mark.parametrize("relu", ["deconvnet", "gradient"])
def test_averages_over_bins_of_several_sizes_share_their_signal(layer, relu):
    torch.manual_seed(6)
    model = Bins().eval().double()
    images = torch.randn(2, 3, 37, 61, dtype=torch.float64)
    assert gradient_error(model, images, layer, rectify=relu == "deconvnet", relu=relu) <= 1e-12
    graph = trace(model, (3, 37, 61))
    cells = some_cells(record(graph, images, [layer]).activation(layer), 4, seed=2)
    whole, windows = whole_and_in_windows(graph, images, layer, cells, relu=relu)
    for got, expected in zip(windows, whole, strict=True):
        assert error(got, expected) <= 1e-12


def test_functional_relus_of_googlenet_rectify_too():
    model = torchvision_network("googlenet", seed=6).double()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert gradient_error(model, images, "inception4a.branch3.1.conv", rectify=True) <= 1e-12


@pytest.mark.parametrize("layer", ["conv2", "conv5", "fc8"])
def test_all_options_gradient_is_the_gradient(layer):
    torch.manual_seed(7)
    model = zfnet_like(classes=3).double()
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    assert gradient_error(model, images, layer, rectify=False, relu="gradient", normalisation="gradient") <= 1e-12


@settings(max_examples=40)
@given(chain=chains(pools=("max", "average")), seed=st.integers(0, 99))
def test_the_way_down_is_the_adjoint_of_the_way_up(chain, seed):
    model, shape = chain
    images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert gradient_error(model, images, trace(model, shape).output, rectify=False, relu="gradient") <= 1e-12


# --- what must not matter, and refusals ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zfnet():
    torch.manual_seed(8)
    graph = trace(zfnet_like(classes=3), (3, 224, 224))
    images = torch.randn(3, 3, 224, 224)
    return graph, images, record(graph, images, ["conv1", "conv3", "fc6"])


def test_windows_are_the_receptive_fields_and_zero_outside_the_image(zfnet):
    graph, _, kept = zfnet
    cells = some_cells(kept.activation("conv3"))
    pixels, top, left = project(kept, "conv3", cells)
    expected = receptive_field(graph, "conv3").box(cells.row, cells.col)
    assert torch.equal(top, expected[0])
    assert torch.equal(left, expected[1])
    assert pixels.shape == (8, 3, 75, 75)
    assert not pixels[0, :, :16].any()  # the cell (0, 0) begins 16 pixels above the image
    assert pixels[0].any()
    assert pixels.min() < 0 < pixels.max()  # the pixels themselves are not rectified


def test_nothing_depends_on_the_company_a_cell_is_in(zfnet):
    _, _, kept = zfnet
    cells = some_cells(kept.activation("conv3"), 12)
    together = project(kept, "conv3", cells).pixels
    assert torch.equal(project(kept, "conv3", cells).pixels, together)
    alone = torch.cat([project(kept, "conv3", Cells(*(c[i : i + 1] for c in cells))).pixels for i in range(16)])
    assert error(alone, together) <= 1e-5
    assert error(project(kept, "conv3", cells, memory_mb=40).pixels, together) <= 1e-5


class Memory(TorchDispatchMode):
    """The largest number of bytes that tensors made under it hold at one time."""

    def __init__(self):
        super().__init__()
        self.holders, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                self.hold(tensor, tensor.untyped_storage())
        return made

    def hold(self, tensor, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        self.bytes += 0 if self.holders.get(place) else size
        self.peak = max(self.peak, self.bytes)
        self.holders[place] = self.holders.get(place, 0) + 1
        weakref.finalize(tensor, self.release, place, size)

    def release(self, place, size):
        self.holders[place] -= 1
        self.bytes -= 0 if self.holders[place] else size


@pytest.mark.parametrize(("layer", "budgets"), [("conv1", (2**14, 2**17)), ("conv5", (4 * 2**20, 40 * 2**20))])
def test_memory_is_set_by_its_option_and_not_by_the_cells(layer, budgets):
    torch.manual_seed(13)
    graph = trace(zfnet_like((24, 32, 32, 32, 32)))
    images = torch.randn(2, 3, 224, 224)
    cells = some_cells(record(graph, images, [layer]).activation(layer), 1)
    peaks = {}
    for times in (20, 80):
        for budget in budgets:
            some = {layer: Cells(*(column.repeat(times) for column in cells))}
            with Memory() as memory:
                for _ in project_images(graph, images, some, memory_mb=budget / 2**20):
                    pass
            peaks[times, budget] = memory.peak
    cells_themselves = 200 * 60 * len(cells.row)
    for budget in budgets:
        assert peaks[80, budget] <= peaks[20, budget] + cells_themselves
    small, large = (peaks[80, budget] for budget in budgets)
    assert small + cells_themselves < large or layer == "conv1"
    assert large - small <= budgets[1]


def test_no_cells_give_no_projections(zfnet):
    pixels, top, left = project(zfnet[2], "conv1", Cells(*torch.zeros(4, 0, dtype=torch.long)))
    assert (pixels.shape, len(top), len(left)) == ((0, 3, 7, 7), 0, 0)
    graph, images, _ = zfnet
    assert list(project_images(graph, images, {})) == []
    assert list(project_images(graph, images, {"conv1": Cells(*torch.zeros(4, 0, dtype=torch.long))})) == []


def test_a_cell_that_does_not_fire_projects_to_nothing(zfnet):
    _, _, kept = zfnet
    silent = (kept.activation("conv3") == 0).nonzero()[:3]
    assert not project(kept, "conv3", Cells(*silent.T)).pixels.any()


def test_the_model_and_the_images_are_left_alone(zfnet):
    graph, images, _ = zfnet
    before = images.clone()
    kept = record(graph, images, ["conv5"], Semantics(normalisation="gradient", relu="guided"))
    projections = project(kept, "conv5", some_cells(kept.activation("conv5")))
    assert torch.equal(images, before)
    assert not projections.pixels.requires_grad
    assert all(p.grad is None for p in graph["conv1"].module.parameters())


def test_refusals(zfnet):
    _, images, kept = zfnet
    one = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="'conv2' was not recorded, only conv1, conv3, fc6"):
        project(kept, "conv2", Cells(one, one, one, one))
    with pytest.raises(ValueError, match="row 55 was given; layer 'conv3' has 0 to 12"):
        project(kept, "conv3", Cells(one, one, one + 55, one))
    with pytest.raises(ValueError, match="four integer tensors"):
        project(kept, "conv3", Cells(one, one, one, one.float()))
    with pytest.raises(ValueError, match=r"unpool='average' was given; expected one of sum, mean, max, last"):
        Semantics(unpool="average")
    mobilenet = trace(torchvision_network("mobilenet_v2", seed=9), (3, 64, 64))
    record(mobilenet, images[:, :, :64, :64], ["features.0.0"])  # nothing unknown beneath it
    with pytest.raises(Unprojectable, match=r"'features.18.0'.*features.0.2 \(ReLU6\)"):
        record(mobilenet, images[:, :, :64, :64], ["features.18.0"])
