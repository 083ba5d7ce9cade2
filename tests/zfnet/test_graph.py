"""The trace: every form of an operation is understood, runs as the model does, and leaves the model alone."""

import operator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import Branches, zfnet_like
from torch import nn

from zfnet.graph import UnknownLayer, Untraceable, average_counts, bins
from zfnet.normalisation import LocalResponseNorm
from zfnet.receptive import receptive_field
from zfnet.tracing import trace

WHOLE = ("alexnet", "vgg", "squeezenet", "resnet", "resnext", "wide_resnet", "googlenet", "densenet",
         "inception", "mnasnet", "regnet_x")  # fmt: skip
# Of the others, the first operations that are not understood, by sort.
PARTLY = {
    "mobilenet_v2": "ReLU6: features.0.2",
    "mobilenet_v3": "Hardswish: features.0.2",
    "efficientnet": "SiLU: features.0.2",
    "shufflenet": "view: view",
    "regnet_y": "Sigmoid: trunk_output.block1.block1-0.f.se.scale_activation",
    "convnext": "permute: permute",
}
QUICK = {
    "alexnet", "vgg11", "vgg11_bn", "squeezenet1_0", "squeezenet1_1", "resnet18", "resnet50", "resnext50_32x4d",
    "googlenet", "densenet121", "inception_v3", "mnasnet0_5", "regnet_x_400mf", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "shufflenet_v2_x0_5", "regnet_y_400mf", "convnext_tiny",
}  # fmt: skip
TRANSFORMERS = ("vit", "swin", "maxvit")
CLASSIFIERS = [n for n in torchvision.models.list_models(module=torchvision.models) if not n.startswith(TRANSFORMERS)]


def torchvision_model(name: str) -> nn.Module:
    """With weights of 0.02 and batch norms that are no identities, drawn in no time."""
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes its widths with tensors
        model = torchvision.models.get_model(name, weights=None, **options)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(0, 0.02)
        else:
            tensor.zero_()
    return model


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLASSIFIERS]
)
def test_torchvisions_classifiers_are_understood_or_named_run_as_they_do_and_are_left_alone(name):
    side = 75 if name == "inception_v3" else 64  # of AlexNet and VGG the adaptive pool has bins of several sizes
    model = torchvision_model(name).train()
    hook = next(model.children()).register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    before = state_of(model)
    graph = trace(model, (3, side, side))
    x = torch.randn(2, 3, side, side)
    activations = {graph.activation_of(layer) for layer in graph.layers}
    got = graph.run(x, [graph.output, *activations])
    assert state_of(model) == before
    hook.remove()
    with torch.no_grad():
        assert torch.equal(got[graph.output], model.eval()(x))
    assert all(got[activation].ndim in (2, 4) for activation in activations), "a sweep needs maps or units"
    if name.startswith(WHOLE):
        assert graph.unknown == ()
    else:
        (start,) = (text for family, text in PARTLY.items() if name.startswith(family))
        assert f"operations are not understood ({start}" in graph.limits()


def state_of(model: nn.Module) -> list:
    """Everything that a trace might leave changed: flags, hooks, attributes, gradients, versions of the tensors."""
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return [
        *modules,
        *((p.grad is None, p.requires_grad, p._version) for p in model.parameters()),
        *(b._version for b in model.buffers()),
    ]


def test_the_limits_say_what_is_not_understood_and_what_still_works():
    graph = trace(torchvision_model("mobilenet_v2"), (3, 64, 64))
    said = graph.limits()
    assert said.startswith("35 of 154 operations are not understood (ReLU6: features.0.2, features.1.conv.0.2")
    assert said.count("features.18.2") == 0, "only the first names of a sort"
    assert "features.18.2)" in graph.limits(shown=None)
    assert said.endswith("work for the layers beneath all of them: features.0.0")


@pytest.mark.parametrize(("rows", "cols"), [(13, 5), (3, 1), (6, 20)])
@pytest.mark.parametrize("out", [(6, 6), (7, 3)])
def test_bins_are_those_of_torchs_adaptive_pool(rows, cols, out):
    pool = nn.AdaptiveAvgPool2d(out)
    graph = trace(nn.Sequential(pool), (2, rows, cols))
    assert graph["0"].kind == "binpool"
    x = torch.randn(3, 2, rows, cols, dtype=torch.float64)
    across, down = bins(graph["0"], (rows, cols))
    torch.testing.assert_close(across @ x @ down.T, pool(x), rtol=1e-12, atol=1e-14)


def test_images_of_a_size_that_the_network_cannot_run_are_refused():
    with pytest.raises(Untraceable, match=r"Sequential cannot run images of 3 x 64 x 64: 'fc6' fails with .*shapes"):
        trace(zfnet_like(classes=3), (3, 64, 64))


def test_names_kinds_and_geometry_of_zfnet():
    graph = trace(zfnet_like(classes=3))
    assert graph.layers == ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc8")
    assert graph.last_convolution == "conv5"
    assert [graph[n].kind for n in ("pad", "conv1", "relu1", "pool1", "norm1", "flat", "drop6")] == [
        "pad", "conv", "relu", "maxpool", "normalisation", "flatten", "identity"
    ]  # fmt: skip
    pool, pad = graph["pool1"].window, graph["pad"].window
    assert (pool.kernel, pool.stride, pool.ceil) == ((3, 3), (2, 2), True)
    assert (pad.pad_before, pad.pad_after) == ((0, 0), (1, 1))
    assert graph.input_shape == (3, 224, 224)


def test_a_convolutions_activation_is_after_the_batch_norm_and_relu_that_solely_follow_it():
    zfnet = trace(zfnet_like(classes=3))
    assert [zfnet.activation_of(n) for n in ("conv1", "fc6", "fc8", "pool1")] == ["relu1", "relu6", "fc8", "pool1"]
    resnet = trace(torchvision_model("resnet18"), (3, 64, 64))
    assert resnet.activation_of("conv1") == "relu"
    assert resnet.activation_of("layer1.0.conv1") == "layer1_0_relu"  # the module is used twice: fx's name
    assert resnet.activation_of("layer1.0.conv2") == "layer1.0.bn2"  # a sum follows, not a ReLU
    branches = trace(Branches(), (3, 33, 33))
    assert branches.activation_of("down") == "down"


class Forms(nn.Module):
    """One operation in a form given by the test, after a convolution."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 4, 3), form

    def forward(self, x):
        return self.form(self.conv(x))


FORMS = [
    ("relu", nn.ReLU(inplace=True)),
    ("relu", F.relu),
    ("relu", lambda x: F.relu(x, inplace=True)),
    ("relu", torch.relu),
    ("relu", lambda x: x.relu()),
    ("relu", lambda x: x.relu_()),
    ("maxpool", lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)),
    ("maxpool", nn.AdaptiveMaxPool2d(5)),
    ("maxpool", lambda x: F.adaptive_max_pool2d(x, (5, 2))),
    ("avgpool", lambda x: F.avg_pool2d(x, kernel_size=x.size()[2:])),
    ("avgpool", nn.AdaptiveAvgPool2d((1, 1))),
    ("avgpool", lambda x: x.mean([2, 3], keepdim=True)),
    ("add", lambda x: x + x),
    ("add", lambda x: torch.add(x, x)),
    ("add", lambda x: x.add(x)),
    ("add", lambda x: operator.iadd(x, x)),
    ("cat", lambda x: torch.cat([x, x], 1)),
    ("cat", lambda x: torch.cat((x, x), dim=-3)),
    ("flatten", nn.Flatten()),
    ("flatten", lambda x: torch.flatten(x, 1)),
    ("flatten", lambda x: x.flatten(1)),
    ("flatten", lambda x: x.view(x.shape[0], -1)),
    ("flatten", lambda x: x.reshape(-1, 4 * 100)),
    ("pad", lambda x: F.pad(x, (0, 1, 2, 3))),
    ("pad", nn.ZeroPad2d(2)),
    ("identity", nn.Dropout2d()),
    ("identity", lambda x: F.dropout(x, training=False)),
    ("identity", nn.Identity()),
    ("identity", lambda x: x.contiguous()),
    ("normalisation", nn.LocalResponseNorm(3)),
    ("normalisation", LocalResponseNorm(3, convention="printed")),
    ("normalisation", lambda x: F.local_response_norm(x, 3, alpha=1e-3)),
    ("batchnorm", nn.BatchNorm2d(4)),
    ("softmax", nn.Softmax(dim=1)),
    ("softmax", lambda x: F.softmax(x, dim=1)),
    ("unknown", nn.ReLU6(inplace=True)),
    ("unknown", nn.Hardswish()),
    ("binpool", nn.AdaptiveAvgPool2d(3)),  # 10 cells in 3 windows: not of one size
    ("binpool", lambda x: F.adaptive_avg_pool2d(x, (3, 12))),
    ("binpool", lambda x: x.mean((2, 3))),
    ("unknown", nn.AdaptiveMaxPool2d(3)),
    ("unknown", lambda x: x.mean(1)),
    ("unknown", lambda x: x + 1),
    ("unknown", lambda x: torch.add(x, x, alpha=2)),
    ("unknown", lambda x: torch.cat([x, x], 2)),
    ("unknown", lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    ("unknown", nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    ("unknown", nn.BatchNorm2d(4, track_running_stats=False)),
    ("unknown", lambda x: x.transpose(2, 3)),
]


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(FORMS)])
def test_every_form_is_understood_and_computes_what_the_model_computes(kind, form):
    model = Forms(form).eval()
    x = torch.randn(3, 3, 12, 12)
    before = x.clone()
    graph = trace(model, (3, 12, 12))
    assert graph[graph.output].kind == kind
    got = graph.run(x, ["conv", graph.output])
    with torch.no_grad():
        conv = model.conv(x)
        assert torch.equal(got["conv"], conv), "the convolution's own output was written over"
        torch.testing.assert_close(got[graph.output], model(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)


class InPlaceThenOldName(nn.Module):
    """A pre-activation block as people write it: the in-place ReLU also changes what the sum reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.first(x)
        z = self.second(self.relu(y))
        return y + z


def test_an_in_place_operation_changes_what_later_readers_of_its_input_read():
    model = InPlaceThenOldName().eval()
    graph = trace(model, (3, 8, 8))
    assert graph[graph.output].inputs == ("relu", "second")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(graph.run(x, [graph.output])[graph.output], model(x))


def test_memory_written_in_part_is_refused():
    class Partly(nn.Module):
        def forward(self, x):
            left, right = x.chunk(2, dim=3)
            left.relu_()
            return right * 1

    with pytest.raises(Untraceable, match="written in part"):
        trace(Partly(), (3, 8, 8))


def test_only_what_is_needed_is_run():
    graph = trace(zfnet_like(classes=3))
    ran = []
    spies = {n: lambda *v, n=n, op=op: ran.append(n) or op.compute(*v) for n, op in graph.operations.items()}
    graph.run(torch.zeros(1, 3, 224, 224), ["relu2"], instead=spies)
    assert ran == ["pad", "conv1", "relu1", "pool1", "norm1", "conv2", "relu2"]


def test_a_run_can_start_from_any_cut():
    graph = trace(Branches().eval(), (3, 33, 33))
    x = torch.randn(2, 3, 33, 33)
    values = graph.run(x, ["cat", graph.output])
    again = graph.run_from({"cat": values["cat"]}, [graph.output])
    assert torch.equal(again[graph.output], values[graph.output])
    with pytest.raises(ValueError, match="input image as well"):
        graph.run_from({"left": torch.zeros(1)}, [graph.output])


def test_the_model_is_left_as_it_was_found_and_its_hooks_are_not_called():
    model = Branches().train()
    called = []
    model.stem.register_forward_hook(lambda *_: called.append(1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    graph = trace(model, (3, 33, 33))
    graph.run(torch.randn(1, 3, 33, 33), [graph.output])
    assert not called
    assert len(model.stem._forward_hooks) == 1
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_flags_are_put_back_when_the_run_fails():
    class Fails(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    model = Fails().train()
    graph = trace(nn.Sequential(nn.Identity()), (3, 4, 4))
    assert graph.output == "0"
    with pytest.raises(Exception, match="singular"):
        trace(model, (3, 4, 4))
    assert model.training


def test_weights_that_are_loaded_after_the_trace_count():
    model = Branches().eval()
    graph = trace(model, (3, 33, 33))
    model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(graph.run(x, [graph.output])[graph.output], model(x))


def test_tensors_made_in_forward_do_not_stay_on_the_model():
    class MadeInForward(nn.Module):
        def forward(self, x):
            return x * torch.tensor([2.0])

    model = MadeInForward()
    attributes = set(vars(model))
    graph = trace(model, (3, 4, 4))
    assert set(vars(model)) == attributes
    assert torch.equal(graph.run(torch.ones(1, 3, 4, 4), [graph.output])[graph.output], torch.full((1, 3, 4, 4), 2.0))


def test_functional_convolutions_and_linear_layers_count_as_layers():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
            self.fc = nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            x = F.relu(F.conv2d(x, self.weight, self.bias, padding="same"))
            return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.fc)

    model = Functional()
    graph = trace(model, (3, 8, 8))
    assert graph.layers == ("conv2d", "linear")
    assert graph["conv2d"].window.pad_before == (1, 1)
    assert graph["conv2d"].inputs == ("x",)
    assert graph.unknown == ()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(graph.run(x, ["linear"])["linear"], model(x))


def test_a_pointwise_function_that_is_not_understood_keeps_the_receptive_field():
    graph = trace(torchvision_model("mobilenet_v2"), (3, 64, 64))
    assert receptive_field(graph, "features.1.conv.1").size == (7, 7)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("divisor", [None, 5])
def test_average_counts_are_what_torch_divides_by(ceil_mode, count_include_pad, divisor):
    pool = nn.AvgPool2d((3, 2), (2, 3), (1, 1), ceil_mode, count_include_pad, divisor)
    x = torch.randint(0, 9, (1, 1, 10, 9)).double()
    graph = trace(nn.Sequential(pool), (1, 10, 9))
    rows, cols = average_counts(graph["0"], (10, 9))
    sums = F.avg_pool2d(x, (3, 2), (2, 3), (1, 1), ceil_mode, divisor_override=1)
    torch.testing.assert_close(sums / (rows[:, None] * cols), pool(x), rtol=1e-14, atol=0)


def test_refusals_say_what_was_given_and_what_to_do():
    graph = trace(zfnet_like(classes=3))
    with pytest.raises(UnknownLayer, match=r"no layer 'convolution5'.*Its layers are conv1, conv2"):
        graph.activation_of("convolution5")
    with pytest.raises(ValueError, match=r"shape \(1, 3, 64, 64\).*trace with input_shape"):
        graph.run(torch.zeros(1, 3, 64, 64), ["conv1"])
    with pytest.raises(ValueError, match="no convolution"):
        _ = trace(nn.Sequential(nn.ReLU())).last_convolution

    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    for model, message in ((Two(), "needs 'y'"), (Pair(), "one tensor is expected"), (Branch(), "branch on their")):
        with pytest.raises(Untraceable, match=message):
            trace(model)
